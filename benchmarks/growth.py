"""How does time grow with the amount of work? Each step of the loop over N, J, prompts, tokens or pairs.

    pip install ".[report]" && python benchmarks/growth.py     with --model smollm2 for the real model
    python benchmarks/growth.py --processes 2 4                over the number of processes instead, one thread each

Prints a table and draws growth.png. "grows" is the exponent of time over the last doubling: 1 means in proportion, less
means that shared work is not computed again, more means that time grows faster than the work. Over processes, -1 means
that twice as many need half the time.
"""

import json
import os
import statistics
import subprocess
import sys
from math import log2
from pathlib import Path

import torch
from sides import NEVER, OneLineParser, in_one_line

from minisr import InputError
from minisr.bench import MODELS, Trainer, machine, take_turns
from minisr.dpo import dpo_loss, encode_pairs
from minisr.fast import FastLM
from minisr.interop.source import load_source
from minisr.judge import judge_prompt
from minisr.pairs import select_pairs
from minisr.runner.config import SeedConfig
from minisr.runner.files import import_extra
from minisr.runner.run import ENGLISH_TEMPLATE, WORLD_TEMPLATE, load_template
from minisr.runner.seed_data import build_seed_data
from minisr.sampler import SamplingConfig
from minisr.train import TrainConfig

DOUBLINGS = {"tiny": 5, "smollm2": 3}


def works(name: str) -> dict[str, dict[int, object]]:
    """Title of each curve -> size -> a function that does the work of that size."""
    lm, tiny = FastLM(*load_source(MODELS[name])), name == "tiny"
    data = build_seed_data(SeedConfig("world" if tiny else "english", judge_evaluation=12), 0)
    template = load_template(WORLD_TEMPLATE if tiny else ENGLISH_TEMPLATE)
    prompts = [lm.tokenizer.encode_prompt(record["prompt"]) for record in data["evaluation"] + data["ift"]]
    judged = [lm.tokenizer.encode_prompt(judge_prompt(template, r["prompt"], y))
              for r in data["ranked"] for y in r["responses"]]

    def run(prompts, n, new_tokens):
        config = SamplingConfig(1.0, 1.0, new_tokens)
        return lambda: lm.sample(prompts, n, config, 1, NEVER)

    few, tokens = (32, 32) if tiny else (4, 8)
    sizes = [2**i for i in range(DOUBLINGS[name] + 1)]
    room = lm.max_seq_len - max(map(len, prompts[:few]))
    return {
        "responses over N": {n: run(prompts[:few], n, tokens) for n in sizes},
        "responses over prompts, N = 4": {8 * p: run(prompts[:8 * p], 4, tokens) for p in sizes},
        "responses over new tokens": {4 * t: run(prompts[:few], 4, 4 * t) for t in sizes if 4 * t < room},
        "judging over J": {j: run(judged[:few], j, tokens) for j in sizes},
        "judging over responses, J = 3": {4 * r: run(judged[:4 * r], 3, tokens) for r in sizes},
        "DPO step over pairs": dpo_steps(lm, data["ranked"], [2 * b for b in sizes]),
    }


def dpo_steps(lm: FastLM, ranked: list[dict], sizes: list[int]) -> dict[int, object]:
    """Optimizer steps on batches of these numbers of pairs, as far as there are pairs."""
    pairs, _ = select_pairs(*([r[field] for r in ranked] for field in ("prompt", "responses", "scores")))
    encoded = encode_pairs(lm, pairs)
    trainer = Trainer(lm, TrainConfig())

    def step(batch):
        def loss():
            chosen, rejected = lm.pair_logps(batch)
            return dpo_loss(chosen, rejected, chosen.detach(), rejected.detach(), 0.1)[0].mean(), {}
        return lambda: trainer.step([loss])

    return {size: step(encoded[:size]) for size in sizes if size <= len(encoded)}


def measure(title: str, model: str, runs: dict, repeats: int) -> dict:
    """One of the "results", also printed: the seconds of every size."""
    for run in runs.values():
        run()  # warm up
    return summarize(title, model, take_turns(runs, repeats))


def summarize(title: str, model: str, taken: dict[int, list[float]]) -> dict:
    """The result from the seconds of every size, also printed."""
    sizes, medians = list(taken), [statistics.median(seconds) for seconds in taken.values()]
    grows = log2(medians[-1] / medians[-2]) / log2(sizes[-1] / sizes[-2])
    print(f"{title:32} " + "  ".join(f"{n}: {t:.3f}" for n, t in zip(sizes, medians)) + f"   {grows:.2f}")
    return {"work": title, "model": model, "unit": "seconds", "sizes": sizes, "seconds_median": medians,
            "runs": list(taken.values()), "grows": grows}


def measure_processes(model: str, counts: list[int], repeats: int) -> list[dict]:
    """One result a step: its seconds in one process of one thread, and shared by these numbers of processes."""
    taken: dict[str, dict[int, list[float]]] = {}
    for n in counts:
        command = [sys.executable, "-m", "minisr", "bench", "--model", model, "--processes", str(n), "--threads", "1",
                   "--repeats", str(repeats)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
        if done.returncode:
            raise InputError(done.stderr.strip())
        for entry in json.loads(done.stdout.splitlines()[-1])["results"]:
            tokens = max(entry["runs"]) * entry["seconds_min"]  # every turn computes the same number
            times = taken.setdefault(entry["work"], {1: []})
            times[1] += [tokens / rate for rate in entry["their_runs"]]
            times[n] = [tokens / rate for rate in entry["runs"]]
    return [summarize(f"{work} over processes", model, times) for work, times in taken.items()]


def draw(axis, result: dict) -> None:
    """Median, minimum and maximum of the seconds at each size, and a line in proportion to the size."""
    sizes, medians, runs = result["sizes"], result["seconds_median"], result["runs"]
    spread = [[t - min(seconds) for t, seconds in zip(medians, runs)],
              [max(seconds) - t for t, seconds in zip(medians, runs)]]
    axis.errorbar(sizes, medians, spread, marker="o", capsize=3, label="measured")
    in_proportion = ([medians[0] * sizes[0] / n for n in sizes] if "processes" in result["work"] else
                     [medians[-1] * n / sizes[-1] for n in sizes])
    axis.plot(sizes, in_proportion, "--", color="gray", label="in proportion")
    axis.set(xscale="log", yscale="log", title=result["work"], ylabel="seconds", xticks=sizes, xticklabels=sizes)
    axis.minorticks_off()
    axis.legend()


def main() -> None:
    parser = OneLineParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--repeats", type=int, default=5, metavar="K", help="timed turns, default 5")
    parser.add_argument("--threads", type=int, default=2, metavar="K", help="of the CPU, default 2")
    parser.add_argument("--processes", type=int, nargs="+", metavar="N",
                        help="measure these numbers of processes, each more than 1, instead of more work")
    parser.add_argument("--out", default="growth.png", metavar="FILE.png")
    options = parser.parse_args()
    if options.repeats < 1 or options.threads < 1:
        parser.error("--repeats and --threads must be at least 1")
    if options.processes and (min(options.processes) < 2 or sorted(set(options.processes)) != options.processes):
        parser.error("--processes must be at least 2, in ascending order")
    if not options.out.endswith(".png") or not Path(options.out).absolute().parent.is_dir():
        parser.error(f"--out {options.out}: it must be a .png file in an existing folder")
    figure = import_extra("matplotlib.figure", "report").Figure((11, 6.5), layout="constrained")
    torch.set_num_threads(options.threads)
    able = machine("cpu", options.threads)
    print(f"{options.model:32} seconds (median) at each size; the exponent of growth over the last doubling")
    if options.processes:
        results = measure_processes(options.model, options.processes, options.repeats)
    else:
        results = [measure(title, options.model, runs, options.repeats) for title, runs in works(options.model).items()]
    for axis, result in zip(figure.subplots(2, 3).flat, results):
        draw(axis, result)
    figure.savefig(options.out, dpi=110)
    print(f"picture: {options.out}")
    print(json.dumps({"machine": able, "results": results}))


if __name__ == "__main__":
    in_one_line(main)
