"""The command line: minisr run | pretrain | experiment | report | eval | show | chat | import | export
| bench."""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from minisr import __version__
from minisr.runner.files import InputError
from minisr.runner.stop import Stop

SOURCES = "a Hugging Face folder, a .gguf file, or package:NAME for the .gguf in an installed package"
EPILOG = """\
start here:
  minisr run tiny_configs/tiny.toml            M0 -> M1 -> M2 -> M3 on this CPU, ends in a table
  minisr show runs/tiny                        one prompt's whole way through an iteration
  minisr chat runs/tiny/M3                     ask it something, see how it judges its own answers

A run that was stopped goes on where it was: give the same command again.
exit codes: 0 done, 2 wrong input (one line on stderr), 130 interrupted (resumable)
"""


def main(arguments: list[str] | None = None) -> int:
    """Parse the arguments, run the command, turn expected failures into one line and a code."""
    options = _parser().parse_args(arguments)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # for a terminal that is not UTF-8
    try:
        options.command(options)
        return 0
    except InputError as error:
        print(f"minisr: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nminisr: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `minisr show ... | head`
        sys.stderr.close()
        return 0
    except OSError as error:  # a disk that is full or read-only, where no one looked
        print(f"minisr: {' '.join(str(error).split())[:300]}; mend it, and the same command goes on",
              file=sys.stderr)
        return 2


def run(options) -> None:
    """Close the loop: everything from seed data to the table."""
    Stop.on_signals()
    from minisr.loop import run_loop
    from minisr.report.show import show_answers
    from minisr.report.table import LEGEND, line, table
    from minisr.runner.resume import locked
    run = _open_run(options)
    with locked(run.folder):
        metrics = run_loop(run, after=lambda so_far: print(line(so_far), flush=True))
    print()
    print(table(metrics))
    print(f"\n{LEGEND}\nFiles: {run.folder}/ (metrics.json; M1/prompts.jsonl, responses.jsonl, "
          f"rewards.jsonl, pairs.jsonl)\nSee one prompt's way: minisr show {run.folder}\n"
          f"Ask it: minisr chat {run.folder}/{list(metrics['models'])[-1]}")
    _write_page(run.folder)
    if not run.has_oracle:
        print(f"\nNobody here can tell which answers are better: read them (more: minisr show {run.folder} "
              f"--answers 9) or ask an outside judge (minisr eval {run.folder} --export FOLDER).\n")
        show_answers(run.folder, 2)


def pretrain(options) -> None:
    """Make a seed model M0 from the world's text."""
    Stop.on_signals()
    from minisr.runner.config import PretrainConfig, load_config
    from minisr.runner.pretrain import pretrain
    config = load_config(options.config, PretrainConfig, options.set)
    pretrain(config, options.out)
    print(f"M0 is in {options.out}/")


def experiment(options) -> None:
    """Variants and seeds of one config, and the table with intervals."""
    Stop.on_signals()
    from minisr.report.experiment_table import differences_table, results_table
    from minisr.runner.experiment import experiment
    out = options.out or Path("runs") / options.config.stem
    results = experiment(options.config, out, options.jobs, options.only)
    print(f"{results_table(results)}\n\nDifferences on the same seed:\n\n{differences_table(results)}")
    print(f"\nMeans over seeds, ± the 95 % interval (bold: without 0). Files: {out}/")
    _write_page(out)


def report(options) -> None:
    """A run or an experiment as one HTML page."""
    from minisr.report.page import write_page
    print(f"{write_page(options.folder, options.out)}: open it in a browser")


def evaluate(options) -> None:
    """Evaluate the models a run has so far, making what is missing, and print the table."""
    from minisr.loop import evaluate, finished_models
    from minisr.report.table import LEGEND, table
    from minisr.runner.config import load_config
    from minisr.runner.resume import locked
    from minisr.runner.run import Run
    from minisr.runner.seed_data import read_prompts
    if options.prompts and not options.export:
        raise InputError("--prompts are answered for an outside judge: say where with --export FOLDER")
    run = Run(options.run, load_config(options.run / "config.toml"))
    models = finished_models(run)
    if not models:
        raise InputError(f"{options.run} has no trained model yet; minisr run makes them")
    if options.export:
        prompts = read_prompts(options.prompts) if options.prompts else run.evaluation()
        for model in models:
            model.export_answers(prompts, options.export / f"{model.name}.json")
        print(f"Answers of {', '.join(model.name for model in models)} to {len(prompts)} prompts are in "
              f"{options.export}/, one file a model, in AlpacaEval's format")
        return
    with locked(run.folder):
        print(table(evaluate(run, models)))
    print(f"\n{LEGEND}")


def show(options) -> None:
    """One prompt's whole way through an iteration, or all models' answers."""
    from minisr.report.show import show_answers, show_prompt
    if options.answers is not None:
        show_answers(options.run, options.answers)
    else:
        show_prompt(options.run, options.model, options.prompt)


def chat(options) -> None:
    """Ask a model; it answers several times and judges each answer."""
    from minisr.report.chat import chat
    from minisr.sampler import SampleConfig
    config = SampleConfig(temperature=options.temperature, max_new_tokens=options.max_new_tokens)
    chat(options.model, options.ask, options.n, options.template, config, options.seed)


def import_(options) -> None:
    """Make a minisr model folder from a Hugging Face folder or a GGUF file."""
    from minisr.interop.source import load_source, source_digest
    from minisr.runner.checkpoint import save_model
    if (options.out / "meta.json").exists():
        raise InputError(f"{options.out} holds a model already; choose another folder with --out")
    model, tokenizer = load_source(options.source, chat=options.chat)
    save_model(options.out, model, tokenizer, {"made_by": "import", "from": source_digest(options.source)})
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{options.out}/ holds a model of {size:.1f} M parameters, {len(tokenizer)} pieces, chat template\n"
          f"{tokenizer.template}\nAs M0 of a run: --set seed_model={options.out}")


def export(options) -> None:
    """Write a Hugging Face folder of any model."""
    from minisr.interop import hf
    from minisr.interop.source import load_source
    if (options.out / "config.json").exists():
        raise InputError(f"{options.out} holds a model already; choose another folder with --out")
    hf.export(*load_source(options.model), options.out)
    print(f"{options.out}/ is a Hugging Face folder: transformers loads it, and so can what builds on it")


def bench(options) -> None:
    """Speed, memory and share of the machine's limit of each arrow of the figure."""
    from minisr.bench import bench
    bench(options.model, options.only, options.without, options.repeats, options.threads)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """A wrong option is wrong input like any other: one line, code 2."""
        self.exit(2, f"minisr: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="minisr", description="Self-Rewarding Language Models in pure PyTorch: a model writes "
        "prompts, answers them, judges its answers and is trained on its own preferences.",
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"minisr {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(function, name, help):
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(command=function)
        return sub

    _run_commands(command)
    _model_commands(command)
    return parser


def _run_commands(command) -> None:
    """What makes and looks at runs."""
    sub = command(run, "run", "the main job: the whole loop, M0 to M3, resumable")
    sub.add_argument("config", type=Path, help="a TOML file, e.g. tiny_configs/tiny.toml")
    sub.add_argument("--out", type=Path, help="folder of the run; default runs/NAME_OF_CONFIG")
    _set(sub)
    sub = command(pretrain, "pretrain", "make a seed model M0 from the tiny world's text")
    sub.add_argument("config", type=Path, help="a TOML file, e.g. tiny_configs/pretrain.toml")
    sub.add_argument("--out", type=Path, default=Path("runs/M0"), help="folder of the model; default runs/M0")
    _set(sub)
    sub = command(experiment, "experiment", "variants and seeds of one config, a table with intervals")
    sub.add_argument("config", type=Path, help="a TOML file, e.g. tiny_configs/experiments/main.toml")
    sub.add_argument("--out", type=Path, help="folder of the runs; default runs/NAME_OF_CONFIG")
    sub.add_argument("--jobs", type=int, default=1, choices=range(1, 65), metavar="K",
                     help="runs side by side; default 1")
    sub.add_argument("--only", nargs="+", metavar="VARIANT", help="these variants, e.g. one row again")
    sub = command(report, "report", "a run or an experiment as one HTML page with pictures")
    sub.add_argument("folder", type=Path, help="of a run or an experiment, e.g. runs/tiny; finished or not")
    sub.add_argument("--out", type=Path, metavar="FILE", help="the page; default FOLDER/report.html")
    sub = command(evaluate, "eval", "evaluate the models that a run has so far, print the table")
    sub.add_argument("run", type=Path, help="folder of a run, e.g. runs/tiny")
    sub.add_argument("--export", type=Path, metavar="FOLDER", help="instead write every model's answers to "
                     "FOLDER/MODEL.json in AlpacaEval's format, for an outside judge")
    sub.add_argument("--prompts", type=Path, metavar="FILE", help="with --export: answer these (JSON or "
                     "JSONL records with instruction or prompt), not the run's held-out prompts")
    sub = command(show, "show", "one prompt's answers, judgements in words, pair and log-probabilities")
    sub.add_argument("run", type=Path, help="folder of a run, e.g. runs/tiny")
    sub.add_argument("--model", default="M1", help="whose iteration: M1 (default), M2, ...")
    sub.add_argument("--prompt", type=int, default=0, metavar="I", help="which x_i; default 0")
    sub.add_argument("--answers", type=int, metavar="K",
                     help="instead K held-out prompts with the answers of SFT, M1, M2, ...")


def _model_commands(command) -> None:
    """What takes one model."""
    sub = command(chat, "chat", "ask a model, see several answers and how it judges them")
    sub.add_argument("model", help=f"a model, e.g. runs/tiny/M3, or {SOURCES}")
    sub.add_argument("--ask", metavar="PROMPT", help="one question; without it, read them from the terminal")
    sub.add_argument("-n", type=int, default=4, metavar="N",
                     help="answers to each; default 4")
    sub.add_argument("--temperature", type=float, default=0.7, help="default 0.7; 0 is greedy")
    sub.add_argument("--max-new-tokens", type=int, default=256, metavar="K",
                     help="longest answer and judgement; default 256")
    sub.add_argument("--template", type=Path, help="your own judge prompt, a text file with {prompt} and "
                     "{response}; default: the tiny world's for its models, else the one in English")
    sub.add_argument("--seed", type=int, default=0, help="another seed, other answers")
    sub = command(import_, "import", "make a minisr model folder from a Hugging Face folder or a GGUF file")
    sub.add_argument("source", help=SOURCES)
    sub.add_argument("--out", type=Path, required=True, help="folder of the model")
    sub.add_argument("--chat", default="", help="chat template: chatml, llama2, llama3, zephyr, plain, tiny "
                     "or a text file with {prompt} and {response}; default: the one most like the model's")
    sub = command(export, "export", "write a model as a Hugging Face folder, for transformers and its kin")
    sub.add_argument("model", help="folder of a model, e.g. runs/tiny/M3")
    sub.add_argument("--out", type=Path, required=True, help="the Hugging Face folder")
    sub = command(bench, "bench", "how fast each arrow of the figure is on this machine, and its limit")
    sub.add_argument("--model", help="tiny, smollm2 or a model's folder; default tiny, and smollm2 if its "
                     "package is there")
    sub.add_argument("--only", nargs="+", default=[], metavar="WORK",
                     help="of prompts, responses, judging, reference, dpo, sft")
    sub.add_argument("--without", action="append", default=[], metavar="TRICK",
                     help="do it the plain way: prefix-sharing or dropping (prompts, responses, judging), "
                     "prompt-sharing (reference, dpo); repeatable")
    sub.add_argument("--repeats", type=int, default=5, metavar="K", help="timed turns; default 5")
    sub.add_argument("--threads", type=int, default=2, metavar="K", help="of the CPU; default 2")


def _set(sub) -> None:
    sub.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE",
                     help="change one key of the config, e.g. --set judge.by=random (repeatable)")


def _write_page(folder: Path) -> None:
    """The page at the end of a run or an experiment, if what it needs is installed."""
    from minisr.report.page import write_page
    if find_spec("matplotlib"):
        print(f"Page: {write_page(folder)}")
    else:
        print(f'No page: pip install "minisr[report]", then minisr report {folder}')


def _open_run(options):
    from minisr.runner.config import load_config
    from minisr.runner.run import Run
    config = load_config(options.config, overrides=tuple(options.set))
    return Run.open(options.out or Path("runs") / options.config.stem, config)
