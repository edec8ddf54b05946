"""The command line of minisr. `minisr --help` lists its commands.

Each command has two functions here: one that runs it, and one that describes its options.
"""

import argparse
import os
import sys
from importlib.util import find_spec
from pathlib import Path

from minisr import InputError, __version__
from minisr.runner import launcher, processes
from minisr.runner.files import printable
from minisr.runner.stop import Stop

MODEL_SOURCES = ("a Hugging Face folder, a .gguf file, or package:NAME for the .gguf file in an installed "
                 "package")
MODEL_OPTIONS = ("model", "source", "chat")  # texts that may be a path
RESUME = "To resume an interrupted run, run the same command again."

DESCRIPTION = """\
Self-Rewarding Language Models in pure PyTorch. A language model writes new
prompts, samples several responses to each, scores them itself, and is trained
with DPO on the resulting pairs."""

EPILOG = f"""\
start here:
  minisr run tiny_configs/tiny.toml   train M0 -> M1 -> M2 -> M3, print results
  minisr show runs/tiny               follow one prompt through an iteration
  minisr chat runs/tiny/M3            ask the last model; it judges its answers
  minisr COMMAND --help               what a command does, with an example

{RESUME}
exit codes: 0 success; 2 error (one line on stderr); 130 interrupted
"""

RESUMABLE = ("run", "experiment", "eval", "pretrain")  # commands


def main(arguments: list[str] | None = None) -> int:
    """Run a command; report an expected failure as one line on stderr and return the exit code."""
    options, unknown = _parser().parse_known_args(arguments)
    if unknown:
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # for a terminal that is not UTF-8
    options.arguments = sys.argv[1:] if arguments is None else arguments
    try:
        for name, value in vars(options).items():
            if isinstance(value, Path) or name in MODEL_OPTIONS and value:
                setattr(options, name, type(value)(os.path.expanduser(value)))
        return options.command(options) or 0
    except processes.ProcessLost as error:
        if not (launcher.is_worker() and processes.is_main()):  # its launcher says which process ended
            print(f"minisr: process {processes.rank()} of {processes.size()} lost the connection to another ({error}); "
                  "run the same command again to resume", file=sys.stderr)
        return processes.EXIT_CODE_LOST
    except InputError as error:
        print(f"minisr: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        how = "; to resume, run the same command again" if options.arguments[0] in RESUMABLE else ""
        print(f"\nminisr: interrupted{how}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has gone, e.g. `minisr show ... | head`
        sys.stderr.close()
        return 0
    except OSError as error:  # e.g. a disk that is full or read-only
        reason = " ".join(str(error).split())[:300]
        again = "again to resume" if options.arguments[0] in RESUMABLE else "again"
        print(f"minisr: {reason}; fix this, then run the same command {again}", file=sys.stderr)
        return 2


def one_line(error: InputError) -> str:
    """The message in one line: it may name a file whose name has line breaks or moves the cursor."""
    return printable(" ".join(str(error).splitlines()))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """Report a wrong option as one line with exit code 2, like all wrong input."""
        self.exit(2, f"minisr: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="minisr", description=DESCRIPTION, epilog=EPILOG,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"minisr {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_run, _add_pretrain, _add_experiment, _add_report, _add_eval, _add_show, _add_chat,
                _add_import, _add_export, _add_bench):
        add(commands)
    return parser


def _add_command(commands, function, name: str, summary: str, details: str) -> argparse.ArgumentParser:
    """A command's parser. Its help shows the summary and the details: an example and what to do next."""
    parser = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.",
                                 epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(command=function, parser=parser)
    return parser


def _add_set_option(parser) -> None:
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE",
                        help="change one key of the config, e.g. --set judge.by=random; repeatable")


# minisr run

def run(options) -> None:
    """Train and evaluate SFT, M1, M2, ... and print the table."""
    if options.processes and not launcher.is_worker():
        return _launch(options)
    Stop.on_signals()
    launcher.end_with_launcher()
    from minisr.report.show import show_answers
    from minisr.report.table import LEGEND, line, table
    from minisr.runner.evaluation import evaluated_models
    from minisr.runner.run import warn_of_slow_bfloat16
    from minisr.runner.steps import run_loop
    from minisr.runner.storage import folder_lock
    run = _open_run(options)
    was_finished = f"M{run.config.iterations + 1}" in evaluated_models(run.folder / "metrics.json")
    if was_finished:
        print(f"{run.folder} is finished already; checking its files", flush=True)
    warn_of_slow_bfloat16(run.dtype, run.device)
    with folder_lock(run.folder):
        metrics = run_loop(run, None if was_finished else lambda so_far: print(line(so_far), flush=True))
    is_main = processes.is_main()
    processes.finish()
    if not is_main:
        return
    print(f"\n{table(metrics)}\n\n{LEGEND}")
    print(f"Files: {run.folder}/ (metrics.json; M1/prompts.jsonl, responses.jsonl, rewards.jsonl, "
          "pairs.jsonl)")
    print(f"Follow one prompt through an iteration: minisr show {run.folder}")
    print(f"Ask the last model: minisr chat {run.folder}/{list(metrics['models'])[-1]}")
    _write_page(run.folder)
    if not run.has_oracle:
        print("\nThis data has no oracle, so answers are not scored. Read them (more with minisr show "
              f"{run.folder} --answers 9) or have them judged (minisr eval {run.folder} --export FOLDER).\n")
        show_answers(run.folder, 2)


def _launch(options) -> int:
    """Run the same command in several processes. They check the config: this one need not import PyTorch."""
    if processes.planned_size() > 1:
        raise InputError("torchrun has started several processes already; leave out --processes")
    if options.processes != "auto":
        return launcher.launch(options.arguments, launcher.number_of_processes(options.processes))
    from minisr.runner.config import load_config
    config = load_config(options.config, overrides=tuple(options.set))
    return launcher.launch(options.arguments, launcher.automatic_number(config.device, config.threads))


def _warn_of_too_many_threads(n: int, threads: int) -> None:
    if launcher.is_worker() and processes.is_main() and n * threads > launcher.available_cores() and threads > 1:
        print(f"minisr: {n} processes of {threads} threads each share {launcher.available_cores()} cores; "
              "--set threads=1 is faster", file=sys.stderr)


def _open_run(options):
    from minisr.runner.config import load_config
    from minisr.runner.run import Run
    config = load_config(options.config, overrides=tuple(options.set))
    processes.start(config.device)
    _warn_of_too_many_threads(processes.size(), config.threads)
    run = Run.open(options.out or Path("runs") / options.config.stem, config)
    if run.data_table:
        print(f"{run.data_table}\n", flush=True)
    return run


def _add_run(commands) -> None:
    parser = _add_command(
        commands, run, "run", "run the whole loop: SFT baseline, M1, M2, ...", f"""\
SFT(M0) on IFT data is the SFT baseline; SFT(M0) on IFT and EFT data is M1.
Each iteration then trains M(t+1) with DPO on preferences that M(t) produced
itself. {RESUME}

example:
  minisr run tiny_configs/tiny.toml --set iterations=3 --out runs/four

next:
  minisr show runs/four       follow one prompt through an iteration
  minisr chat runs/four/M4    ask the last model
  minisr report runs/four     charts on one HTML page, runs/four/report.html
""")
    parser.add_argument("config", type=Path, help="a TOML file, e.g. tiny_configs/tiny.toml")
    parser.add_argument("--out", type=Path, help="the run's folder; default runs/NAME_OF_CONFIG")
    parser.add_argument("--processes", metavar="N", help="share the work among N processes of this machine; "
                        '"auto": one per GPU, or without GPUs the number of cores divided by threads. The results are '
                        "the same, bit for bit, for any number. For several machines see minisr/README.md")
    _add_set_option(parser)


# minisr pretrain

def pretrain(options) -> None:
    """Train a seed model M0 on the tiny world's text."""
    Stop.on_signals()
    from minisr.runner.config import PretrainConfig, load_config
    from minisr.runner.pretrain import pretrain
    config = load_config(options.config, PretrainConfig, options.set)
    _check_no_model(options.out, "meta.json")
    pretrain(config, options.out)
    print(f"M0 is in {options.out}/\nUse it in a run: --set seed_model={options.out}")


def _add_pretrain(commands) -> None:
    parser = _add_command(
        commands, pretrain, "pretrain", "train a seed model M0 on the tiny world's text", f"""\
minisr ships such a model, so this step is optional.
{RESUME}

example:
  minisr pretrain tiny_configs/pretrain.toml --out runs/M0

next:
  minisr run tiny_configs/tiny.toml --set seed_model=runs/M0 --out runs/own_M0
""")
    parser.add_argument("config", type=Path, help="a TOML file, e.g. tiny_configs/pretrain.toml")
    parser.add_argument("--out", type=Path, default=Path("runs/M0"),
                        help="the model's folder; default runs/M0")
    _add_set_option(parser)


# minisr experiment

def experiment(options) -> None:
    """Run variants and seeds of one config, and print the tables with intervals."""
    Stop.on_signals()
    from minisr.report.experiment_table import differences_table, results_table
    from minisr.runner.experiment import experiment
    out = options.out or Path("runs") / options.config.stem
    if out.is_file():
        raise InputError(f"{out} is a file; choose a folder with --out")
    results = experiment(options.config, out, options.jobs, options.only)
    print(f"{results_table(results)}\n\nDifferences on the same seed:\n\n{differences_table(results)}\n")
    print(f"Means over seeds ± the 95 % interval; bold: the interval excludes 0. Files: {out}/")
    _write_page(out)


def _add_experiment(commands) -> None:
    parser = _add_command(
        commands, experiment, "experiment", "run variants and seeds of one config and compare them", f"""\
The experiment file names a base config, seeds, and variants, each with the
config keys it changes. Each run is an ordinary run in OUT/VARIANT-SEED; what a
variant shares with the base is copied. Prints means over seeds with confidence
intervals. {RESUME}

example:
  minisr experiment tiny_configs/experiments/main.toml --jobs 2 --only random

next:
  minisr report runs/main           charts of all variants on one HTML page
  minisr show runs/main/random-0    one prompt in one of the runs
""")
    parser.add_argument("config", type=Path,
                        help="an experiment file, e.g. tiny_configs/experiments/main.toml")
    parser.add_argument("--out", type=Path, help="the folder of the runs; default runs/NAME_OF_CONFIG")
    parser.add_argument("--jobs", type=int, default=1, choices=range(1, 65), metavar="K",
                        help="number of runs at the same time; default 1")
    parser.add_argument("--only", nargs="+", metavar="VARIANT",
                        help="run only these variants, and the base runs they are compared with")


# minisr report

def report(options) -> None:
    """Write the page of a run or an experiment."""
    from minisr.report.page import write_page
    print(f"{write_page(options.folder, options.out)}: open it in a browser")


def _write_page(folder: Path) -> None:
    """Write the page at the end of a run or an experiment, if matplotlib is installed."""
    from minisr.report.page import write_page
    if find_spec("matplotlib"):
        print(f"Page: {write_page(folder)}")
    else:
        print('No page: pip install "minisr[report]" (from a checkout: pip install ".[report]"), then '
              f"minisr report {folder}")


def _add_report(commands) -> None:
    parser = _add_command(
        commands, report, "report", "write one HTML page about a run or an experiment, with charts", """\
An unfinished run gets a page about what it has so far. Needs matplotlib:
pip install "minisr[report]"

example:
  minisr report runs/tiny

next: open runs/tiny/report.html in a browser
""")
    parser.add_argument("folder", type=Path, help="folder of a run or an experiment, e.g. runs/tiny")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page; default FOLDER/report.html")


# minisr eval

def evaluate(options) -> None:
    """Evaluate the models that a run has so far, or export their answers."""
    from minisr.report.table import LEGEND, table
    from minisr.runner.config import load_stored_config
    from minisr.runner.evaluation import check_judged, evaluate
    from minisr.runner.run import Run
    from minisr.runner.steps import finished_models, keep
    from minisr.runner.storage import check_run, folder_lock
    if options.prompts and not options.export:
        raise InputError("--prompts needs --export FOLDER, the folder for the answers")
    if options.judge is not None and options.export:
        raise InputError("--judge and --export do not go together: use one at a time")
    check_run(options.run)
    run = Run(options.run, load_stored_config(options.run / "config.toml"))
    models = finished_models(run)
    if not models:
        raise InputError(f"{options.run} has no trained model yet; train one with minisr run")
    if options.export:
        _export_answers(run, models, options)
        return
    if options.judge is not None:
        _compare_models(run, models, options.judge)
        return
    check_judged(run.config, models)
    with folder_lock(run.folder, has_out=False):
        print(table(evaluate(run, models, keep)))
    print(f"\n{LEGEND}")


def _compare_models(run, models: list, command: str) -> None:
    """Print the wins of each model over the one before it and over the SFT baseline, by an outside judge."""
    from minisr.report.head_to_head_table import head_to_head_table
    from minisr.runner.head_to_head import head_to_head
    from minisr.runner.steps import keep
    from minisr.runner.storage import folder_lock
    Stop.on_signals()
    with folder_lock(run.folder, has_out=False):
        print(head_to_head_table(head_to_head(run, models, keep, command)))
    print("Each prompt is judged in both orders; disagreement is a tie. In brackets: 95 % intervals. Files: "
          f"{run.folder}/head_to_head.json, head_to_head.jsonl")


def _export_answers(run, models: list, options) -> None:
    """Write each model's answers in AlpacaEval's format."""
    from minisr.runner.evaluation import export_answers
    if options.export.is_file():
        raise InputError(f"{options.export} is a file; choose a folder with --export")
    prompts = _read_prompts(options.prompts, models[0].lm) if options.prompts else run.evaluation_prompts
    for model in models:
        export_answers(model, prompts, options.export / f"{model.name}.json")
    names = ", ".join(model.name for model in models)
    print(f"The answers of {names} to {len(prompts)} prompts are in {options.export}/, one file per model, "
          "in AlpacaEval's format")


def _read_prompts(path: Path, lm) -> list[str]:
    """The prompts of a file. Raises InputError that names those that the model's context cannot hold."""
    from minisr.runner.seed_data import read_prompts
    prompts = read_prompts(path)
    lengths = {place: len(lm.tokenizer.encode_prompt(prompt)) for place, prompt in prompts}
    too_long = [f"{place} ({length} tokens)" for place, length in lengths.items() if length >= lm.max_seq_len]
    if too_long:
        raise InputError(f"{path}: the model's context of {lm.max_seq_len} tokens has no room for an answer to "
                         f"{', '.join(too_long)}; shorten or remove these prompts")
    return [prompt for _, prompt in prompts]


def _add_eval(commands) -> None:
    parser = _add_command(
        commands, evaluate, "eval", "evaluate the models of a run and print the table of results", """\
Every trained model answers the held-out prompts and judges the held-out
responses, unless it has done so already. With --export, writes the models'
answers for an external judge instead. With --judge, a program of yours compares
the answers of each model with those of the one before and of the SFT baseline.

examples:
  minisr eval runs/tiny
  minisr eval runs/tiny --export answers --prompts my_prompts.jsonl
  minisr eval runs/tiny --judge "python my_judge.py"

next:
  minisr show runs/tiny --answers 5    read the models' answers side by side
""")
    parser.add_argument("run", type=Path, help="a run's folder, e.g. runs/tiny")
    parser.add_argument("--export", type=Path, metavar="FOLDER",
                        help="write every model's answers to FOLDER/MODEL.json in AlpacaEval's format, for "
                        "an external judge")
    parser.add_argument("--judge", metavar="COMMAND",
                        help="a program that reads JSON lines with prompt, response_a and response_b, and writes "
                        'one line for each, e.g. {"better": "a"}: a, b, tie or null')
    parser.add_argument("--prompts", type=Path, metavar="FILE",
                        help="with --export: answer these prompts, JSON or JSONL records with instruction or "
                        "prompt; default: the run's held-out prompts")


# minisr show

def show(options) -> None:
    """Print one prompt's path through an iteration, or all models' answers."""
    from minisr.report.show import show_answers, show_prompt
    if options.answers is not None:
        show_answers(options.run, options.answers)
    else:
        show_prompt(options.run, options.model, options.prompt)


def _add_show(commands) -> None:
    parser = _add_command(
        commands, show, "show", "follow one prompt through an iteration", """\
Prints a prompt x_i, its responses y_i^n with their scores and a judgement of
each, the preference pair, and the pair's log-probabilities before and after
DPO. A judgement that holds no valid score is "unparsed".

examples:
  minisr show runs/tiny --model M2 --prompt 3
  minisr show runs/tiny --answers 5

next:
  minisr chat runs/tiny/M3    ask a model yourself
""")
    parser.add_argument("run", type=Path, help="a run's folder, e.g. runs/tiny")
    parser.add_argument("--model", default="M1",
                        help="the model that wrote and judged the responses: M1 (default), M2, ...")
    parser.add_argument("--prompt", type=int, default=0, metavar="I", help="index of the prompt; default 0")
    parser.add_argument("--answers", type=int, metavar="K",
                        help="print K held-out prompts with the answers of SFT, M1, M2, ... instead")


# minisr chat

def chat(options) -> None:
    """Ask a model, which answers several times and judges each answer."""
    from minisr.report.chat import chat
    from minisr.sampler import SamplingConfig
    config = SamplingConfig(temperature=options.temperature, max_new_tokens=options.max_new_tokens)
    chat(options.model, options.ask, options.n, options.template, config, options.seed)


def _add_chat(commands) -> None:
    parser = _add_command(
        commands, chat, "chat", "ask a model, which also judges its own answers", """\
Prints the answers with their rewards, best first. An answer is "unparsed" if
none of its judgements holds a valid score. Models of the tiny world understand
only requests of that world.

example:
  minisr chat runs/tiny/M3 --ask "Write a story about a sad pig at the river."

next:
  minisr chat runs/tiny/SFT    compare: this model was not trained to judge
  minisr show runs/tiny        how such judgements become training data
""")
    parser.add_argument("model", help=f"a model's folder, e.g. runs/tiny/M3, or {MODEL_SOURCES}")
    parser.add_argument("--ask", metavar="PROMPT",
                        help="one question; default: read questions from the terminal")
    parser.add_argument("-n", type=int, default=4, metavar="N", help="answers to each question; default 4")
    parser.add_argument("--temperature", type=float, default=0.7, help="default 0.7; 0 is greedy")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="K",
                        help="maximum length of an answer and of a judgement; default 256")
    parser.add_argument("--template", type=Path,
                        help="a judge prompt, a text file with {prompt} and {response}; default: that of "
                        "the model's run; else the tiny world's for its models, an English one for all others")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the answers; default 0")


# minisr import

def import_(options) -> None:
    """Make a minisr model folder from a Hugging Face folder or a GGUF file."""
    from minisr.interop.source import load_source, source_digest
    from minisr.runner.checkpoint import save_model
    _check_no_model(options.out, "meta.json")
    model, tokenizer = load_source(options.source, chat=options.chat)
    save_model(options.out, model, tokenizer, {"made_by": "import", "from": source_digest(options.source)})
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{options.out}/ holds a model of {size:.1f} M parameters with a vocabulary of {len(tokenizer)} "
          f"tokens and the chat template\n{tokenizer.template}\n"
          f"Use it as M0 of a run: --set seed_model={options.out}")


def _check_no_model(folder: Path, file: str) -> None:
    if folder.is_file():
        raise InputError(f"{folder} is a file; choose a folder with --out")
    if (folder / file).exists():
        raise InputError(f"{folder} already holds a model; choose another folder with --out")
    if (folder / "config.toml").exists():
        raise InputError(f"{folder} holds a run; choose another folder with --out")


def _add_import(commands) -> None:
    parser = _add_command(
        commands, import_, "import", "convert a Hugging Face or GGUF model to a minisr model folder", """\
example:
  minisr import path/to/model.gguf --out runs/imported --chat chatml

next:
  minisr chat runs/imported --ask "Why is the sky blue?"
  minisr run CONFIG --set seed_model=runs/imported
""")
    parser.add_argument("source", help=MODEL_SOURCES)
    parser.add_argument("--out", type=Path, required=True, help="the model's folder")
    parser.add_argument("--chat", default="",
                        help="chat template: chatml, llama2, llama3, zephyr, plain, tiny or a text file with "
                        "{prompt} and {response}; default: the one closest to the model's own")


# minisr export

def export(options) -> None:
    """Write any model as a Hugging Face folder."""
    from minisr.interop import hf
    from minisr.interop.source import load_source
    _check_no_model(options.out, "config.json")
    hf.export(*load_source(options.model), options.out)
    print(f"{options.out}/ is a Hugging Face folder, which transformers and tools built on it can load")


def _add_export(commands) -> None:
    parser = _add_command(
        commands, export, "export", "write a model as a Hugging Face folder", """\
example:
  minisr export runs/tiny/M3 --out runs/tiny/M3-hf

next, in Python:
  transformers.AutoModelForCausalLM.from_pretrained("runs/tiny/M3-hf")
""")
    parser.add_argument("model", help="a model's folder, e.g. runs/tiny/M3")
    parser.add_argument("--out", type=Path, required=True, help="the Hugging Face folder")


# minisr bench

def bench(options) -> int | None:
    """Measure the speed of each step of the loop."""
    from minisr import bench
    from minisr.runner import bench_processes
    threads = options.threads
    if threads is None:
        threads = launcher.available_cores() if options.processes else 2
    if not launcher.is_worker():
        if options.processes and options.without:
            raise InputError("--processes and --without do not go together: use one at a time")
        bench.check_options(options.model, options.only, options.without, options.repeats, threads)
    if not options.processes:
        bench.bench(options.model, options.only, options.without, options.repeats, threads, options.dtype)
    elif launcher.is_worker():
        launcher.end_with_launcher()
        bench_processes.bench(options.model, options.only, options.repeats, threads, options.dtype)
    else:
        n = options.processes
        return launcher.launch(options.arguments, launcher.automatic_number("auto", 1) if n == "auto"
                               else launcher.number_of_processes(n))
    return None


def _add_bench(commands) -> None:
    parser = _add_command(
        commands, bench, "bench", "measure the speed of each step of the loop on this machine", """\
Times the plain engine and the fast engine in turns. Prints tokens per second
of both, their ratio, seconds, the share of this machine's theoretical limit
that the fast engine reaches, and its peak memory. The last line repeats this
as one JSON document.

With --processes N: times N processes that share each step, one thread each, in
turns with one process that has one thread per core. Both do the same work in the
same batches, with the code of a run.

examples:
  minisr bench --model tiny --only responses judging
  minisr bench --model tiny --processes 2

next: compare with the measured results in benchmarks/README.md
""")
    parser.add_argument("--model", help="tiny, smollm2 or a model's folder; default: tiny, and smollm2 if "
                        "its package is installed")
    parser.add_argument("--only", nargs="+", default=[], metavar="STEP",
                        help="measure only these of prompts, responses, judging, reference, dpo, sft")
    parser.add_argument("--without", action="append", default=[], metavar="OPTIMIZATION",
                        help="time the fast engine with and without it, in turns: prefix-sharing, row-dropping, "
                        "decode-step, prefill-groups, unsorted-top-p (on a CPU), target-selection, packed-pairs, "
                        "cuda-graphs (on a GPU); repeatable")
    parser.add_argument("--repeats", type=int, default=5, metavar="K", help="timed repetitions; default 5")
    parser.add_argument("--threads", type=int, metavar="K",
                        help="CPU threads; default 2. With --processes: of the single process; default: one per core")
    parser.add_argument("--processes", metavar="N", help='compare N processes with one; "auto": one per GPU, or '
                        "one per core")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
                        help="of the weights; default: bfloat16 on a GPU, else float32")
