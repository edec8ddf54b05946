"""minisr against transformers.generate and TRL's DPOTrainer: the same work and weights, on one machine, in turns.

    python benchmarks/peers.py                     both models; --quick: one minute, SmolLM2 three more

benchmarks/README.md describes what is compared and how to interpret it. The last line printed is one JSON document,
with the fields of `minisr bench`.
"""

import json
import os
import statistics
import sys
import tempfile
from collections import namedtuple
from dataclasses import replace
from math import ceil, log
from pathlib import Path

from sides import TRL, Minisr, MinisrDPO, OneLineParser, Process, Transformers, in_one_line
from tqdm import tqdm

from minisr.bench import MODELS, common_prefix_length, machine, summary
from minisr.interop import hf
from minisr.interop.source import load_source
from minisr.judge import judge_prompt
from minisr.pairs import select_pairs
from minisr.runner.config import SeedConfig
from minisr.runner.files import import_extra
from minisr.runner.run import ENGLISH_TEMPLATE, WORLD_TEMPLATE, load_template
from minisr.runner.seed_data import build_seed_data

# Prompts with N = 4 responses each; responses judged J = 3 times; batches of distinct prompts; pairs of a DPO step.
Size = namedtuple("Size", "prompts judged batches pairs")
SIZES = {"tiny": Size(64, 64, (1, 16, 64), 32), "smollm2": Size(16, 64, (1, 16, 64), 6)}
QUICK = {"tiny": Size(16, 16, (1, 16), 8), "smollm2": Size(2, 2, (1, 4), 2)}
WORKS = ("responses", "judging", "batch", "dpo")


def main() -> None:
    parser = OneLineParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--only", nargs="+", choices=WORKS, default=WORKS)
    parser.add_argument("--repeats", type=int, default=5, metavar="K", help="timed turns, default 5")
    parser.add_argument("--threads", type=int, default=2, metavar="K", help="of the CPU, default 2")
    parser.add_argument("--quick", action="store_true", help="little work, to check that all sides run")
    options = parser.parse_args()
    if options.repeats < 1 or options.threads < 1:
        parser.error("--repeats and --threads must be at least 1")
    # For the sides' processes: everything runs on the CPU in float32, without progress bars.
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
    for package in ("transformers", "trl"):
        import_extra(package, "test")
    for model in options.model:
        load_source(MODELS[model])  # a missing model is reported now, not in an hour
    able, results = machine("cpu", options.threads), []
    for model in options.model:
        size = (QUICK if options.quick else SIZES)[model]
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            jobs, pairs = prepare(model, size, folder)
            jobs = {name: job for name, job in jobs.items() if name[0] in options.only}
            results += sampling(model, folder, jobs, options)
            if "dpo" in options.only:
                results += training(model, folder, pairs, options)
    print_table(results)
    print(json.dumps({"machine": able, "results": results}))


def prepare(name: str, size: Size, folder: Path) -> tuple[dict, list[dict]]:
    """Export the model to folder. Returns the sampling jobs by (work, detail), and the pairs of the DPO step."""
    model, tokenizer = load_source(MODELS[name])
    # Room for a judge prompt of 250 tokens in the tiny world, too. Its judgements mean nothing then.
    model.config = replace(model.config, max_seq_len=max(1024, model.config.max_seq_len))
    hf.export(model, tokenizer, folder)
    data = build_seed_data(SeedConfig("world" if name == "tiny" else "english", judge_evaluation=12), 0)
    distinct = dict.fromkeys(record["prompt"] for record in data["evaluation"] + data["ift"])
    prompts = [tokenizer.encode_prompt(text) for text in distinct]
    template = load_template(WORLD_TEMPLATE if name == "tiny" else ENGLISH_TEMPLATE)
    if name == "tiny":  # its rubric has 55 tokens; repeated four times, it is as long as one in English
        rubric, _, rest = template.partition("\n")
        template = "\n".join([rubric] * 4 + [rest])
    responses = [(r["prompt"], y) for r in data["ranked"] for y in r["responses"]][:size.judged]
    judged = [tokenizer.encode_prompt(judge_prompt(template, x, y)) for x, y in responses]
    paper, whole = {"temperature": 0.7, "top_p": 0.9}, {"temperature": 1.0, "top_p": 1.0}
    jobs = {("responses", f"{size.prompts} x 4, own stops, up to 64"):
            {"prompts": prompts[:size.prompts], "n": 4, "new_tokens": 64, "forced": False,
             **(whole if name == "tiny" else paper)}}
    for new in (4, 32):
        jobs["judging", f"{len(judged)} x 3, {common_prefix_length(judged)} tokens shared, {new} new"] = {
            "prompts": judged, "n": 3, "new_tokens": new, "forced": True, **paper}
    for batch in size.batches:
        jobs["batch", f"{batch} x 1, 64 new"] = {
            "prompts": prompts[:batch], "n": 1, "new_tokens": 64, "forced": True, **whole}
    pairs, _ = select_pairs(*([r[field] for r in data["ranked"]] for field in ("prompt", "responses", "scores")))
    return jobs, [{k: pair[k] for k in ("prompt", "chosen", "rejected")} for pair in pairs[:size.pairs]]


def sampling(model: str, folder: Path, jobs: dict, options) -> list[dict]:
    """The results of every sampling job."""
    if not jobs:
        return []
    ours = Process(Minisr, options.threads, folder)
    plain, sharing = (Process(Transformers, options.threads, folder, share) for share in (False, True))
    results = []
    for (work, detail), job in jobs.items():
        peers = [plain, sharing] if work == "judging" else [plain]
        for peer in peers:
            check_greedy(ours, peer, job)
        turns = take_turns(f"{model} {work}", [ours, *peers], options.repeats,
                           lambda side, times, turn, job=job: side("timed", times, "lengths", job, turn))
        for turn in turns:
            turn["tokens"] = [sum(lengths) for lengths in turn["result"]]
        if job["forced"] and len({count for turn in turns for count in turn["tokens"]}) > 1:
            sys.exit(f"not the same work: {work} has different lengths on the two sides")
        results += [compare(work, detail, model, peer.peer, turns[0], turn)
                    for peer, turn in zip(peers, turns[1:])]
    for process in (ours, plain, sharing):
        process.end()
    return results


def check_greedy(ours: Process, peer: Process, job: dict) -> None:
    """At temperature 0 both sides must write the same tokens. A tie within rounding may change a row."""
    job = job | {"prompts": job["prompts"][:8], "n": 1, "temperature": 0, "new_tokens": 8, "forced": True}
    a, b = (side("sample", job, 0) for side in (ours, peer))
    equal = sum(x == y for x, y in zip(a, b)) / len(a)
    if equal < 0.75 or [*map(len, a)] != [*map(len, b)]:
        sys.exit(f"not the same work: only {equal:.0%} of the greedy rows of {peer.peer} equal minisr's")


def training(model: str, folder: Path, pairs: list[dict], options) -> list[dict]:
    """Time and memory of an optimizer step on a batch of pairs."""
    results = []
    for reference in ("in memory", "precomputed"):  # one after the other, to hold fewer models in memory
        ours, peer = (Process(make, options.threads, folder, pairs, reference) for make in (MinisrDPO, TRL))
        encoded, theirs = ([tuple(map(list, row)) for row in side("pair_ids")] for side in (ours, peer))
        losses = [side("step") for side in (ours, peer)]
        if encoded != theirs or abs(losses[0] - losses[1]) > 1e-5 or abs(losses[0] - log(2)) < 1e-4:
            sys.exit(f"not the same work: losses {losses}, tokens equal: {encoded == theirs}")
        turns = take_turns(f"{model} DPO", [ours, peer], options.repeats,
                           lambda side, times, _: side("timed", times, "step"))
        tokens = sum(len(part) for pair in encoded for part in pair)
        for turn in turns:
            turn["tokens"] = [tokens] * options.repeats
        entry = compare("dpo", f"step on {len(pairs)} pairs", model, peer.peer, *turns, loss=losses[0],
                        their_loss=losses[1])
        results += [entry, entry | {
            "work": "dpo memory", "unit": "MB", "ours": entry["peak_mb"], "theirs": entry["their_peak_mb"],
            "ratio": entry["their_peak_mb"] / entry["peak_mb"], "runs": [], "their_runs": []}]
        for process in (ours, peer):
            process.end()
    return results


def take_turns(title: str, sides: list[Process], repeats: int, call) -> list[dict]:
    """The measurements of each side, field -> a value for each of `repeats` rounds A B A B. A first round is not
    counted. Short work is repeated within a turn, equally often on every side, until it takes a quarter of a second."""
    turns: list[list[dict]] = [[] for _ in sides]
    times = 1
    for turn in tqdm(range(repeats + 1), title, leave=False):
        for side, taken in zip(sides, turns):
            taken.append(call(side, times, turn))
        if turn == 0:
            times = ceil(0.25 / turns[0][0]["seconds"])
    return [{field: [measured[field] for measured in taken[1:]] for field in taken[0]} for taken in turns]


def compare(work: str, detail: str, model: str, peer: str, ours: dict, theirs: dict, **more) -> dict:
    """One of the "results". The ratio is how many times better minisr is."""
    a, b = (summary(work, model, side["tokens"], side["seconds"], peak_mb=max(side["peak_mb"]))
            for side in (ours, theirs))
    other = {f"their_{k}": b[k] for k in ("runs", "seconds_median", "seconds_min", "seconds_max", "peak_mb")}
    return a | other | {
        "detail": detail, "peer": peer, "theirs": b["ours"], "ratio": a["ours"] / b["ours"],
        "tokens": statistics.mean(ours["tokens"]), "their_tokens": statistics.mean(theirs["tokens"]),
        "libraries_mb": ours["libraries_mb"][0], "their_libraries_mb": theirs["libraries_mb"][0]} | more


def print_table(results: list[dict]) -> None:
    """Seconds are printed as median [min, max]."""
    print(f"{'model':8} {'work':44} {'peer':42} {'ratio':>6}  {'minisr':>9} {'peer':>9}  "
          f"{'minisr, seconds':24} {'peer, seconds':24} peak MB")
    for r in results:
        ours, theirs = (f"{r[f'{whose}seconds_median']:.3f} [{r[f'{whose}seconds_min']:.3f}, "
                        f"{r[f'{whose}seconds_max']:.3f}]" for whose in ("", "their_"))
        print(f"{r['model']:8} {r['work'] + ', ' + r['detail']:44} {r['peer']:42} {r['ratio']:6.2f}  "
              f"{r['ours']:9,.0f} {r['theirs']:9,.0f}  {ours:24} {theirs:24} "
              f"{r['peak_mb']:,.0f} / {r['their_peak_mb']:,.0f}")
    libraries = {f"{r['libraries_mb']:.0f} / {r['their_libraries_mb']:.0f} MB ({r['peer']})" for r in results}
    print("\nratio: how many times better minisr is. minisr, peer: tokens/s, or MB of memory. Part of each peak that "
          "the libraries alone take:", ", ".join(sorted(libraries)))


if __name__ == "__main__":
    in_one_line(main)
