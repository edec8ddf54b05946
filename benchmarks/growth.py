"""Does time grow as the work does? Each arrow over its own number: N, J, prompts, tokens, pairs.

    pip install ".[report]" && python benchmarks/growth.py     --model smollm2 for the real model

Prints a table and draws growth.png. "grows" is the exponent of time over the last doubling: 1 is in
proportion, less is better (what is shared is not computed again), more would be faster than its work.
"""

import argparse
import json
import statistics
from math import log2
from pathlib import Path

import torch
from sides import in_one_line

from minisr.bench import MODELS, Trainer, machine, take_turns
from minisr.dpo import dpo_loss, encode_pairs, pair_logps
from minisr.interop.source import load_source
from minisr.judge import judge_prompt, load_template
from minisr.pairs import select_pairs
from minisr.runner.config import SeedConfig
from minisr.runner.files import need
from minisr.runner.run import ENGLISH_TEMPLATE, WORLD_TEMPLATE
from minisr.runner.seed_data import build_seed_data
from minisr.sampler import SampleConfig, sample
from minisr.train import OptimConfig

DOUBLINGS = {"tiny": 5, "smollm2": 3}


def works(name: str) -> dict[str, dict[int, object]]:
    """By title: what to run for each size."""
    model, tokenizer = load_source(MODELS[name])
    tiny = name == "tiny"
    data = build_seed_data(SeedConfig("world" if tiny else "english", judge_evaluation=12), 0)
    asked = [tokenizer.encode_prompt(record["prompt"]) for record in data["evaluation"] + data["ift"]]
    template = load_template(WORLD_TEMPLATE if tiny else ENGLISH_TEMPLATE)
    judged = [tokenizer.encode_prompt(judge_prompt(template, r["prompt"], y))
              for r in data["ranked"] for y in r["responses"]]
    columns = ([r[field] for r in data["ranked"]] for field in ("prompt", "responses", "scores"))
    pairs, _ = select_pairs(*columns)
    encoded = encode_pairs(tokenizer, pairs, model.config.max_seq_len)
    trainer = Trainer(model, OptimConfig())

    def step(batch):
        def losses():
            chosen, rejected, _ = pair_logps(model, batch)
            yield dpo_loss(chosen, rejected, chosen.detach(), rejected.detach(), 0.1)[0].mean()
        return lambda: trainer.step(losses())

    def run(prompts, n, new_tokens):
        config = SampleConfig(1.0, 1.0, new_tokens)  # each row so long
        return lambda: sample(model, prompts, n, config, key=1, stop=(-1,))

    few, tokens = (32, 32) if tiny else (4, 8)
    sizes = [2**i for i in range(DOUBLINGS[name] + 1)]
    room = model.config.max_seq_len - max(map(len, asked[:few]))
    return {
        "responses over N": {n: run(asked[:few], n, tokens) for n in sizes},
        "responses over prompts, N = 4": {8 * p: run(asked[:8 * p], 4, tokens) for p in sizes},
        "responses over new tokens": {4 * t: run(asked[:few], 4, 4 * t) for t in sizes if 4 * t < room},
        "judging over J": {j: run(judged[:few], j, tokens) for j in sizes},
        "judging over responses, J = 3": {4 * r: run(judged[:4 * r], 3, tokens) for r in sizes},
        "DPO step over pairs": {2 * b: step(encoded[:2 * b]) for b in sizes if 2 * b <= len(encoded)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--repeats", type=int, default=5, metavar="K", help="timed turns, default 5")
    parser.add_argument("--threads", type=int, default=2, metavar="K")
    parser.add_argument("--out", default="growth.png", metavar="FILE.png")
    options = parser.parse_args()
    if options.repeats < 1 or options.threads < 1:
        parser.error("--repeats and --threads are at least 1")
    if not options.out.endswith(".png") or not Path(options.out).absolute().parent.is_dir():
        parser.error(f"--out {options.out}: a .png in a folder that is there")
    figure = need("matplotlib.figure", "report").Figure((11, 6.5), layout="constrained")
    torch.set_num_threads(options.threads)
    able, results = machine("cpu", options.threads), []
    curves = works(options.model)
    axes = figure.subplots(2, 3)
    print(f"{options.model:32} seconds, median, at each size; how it grows over the last doubling")
    for axis, (title, runs) in zip(axes.flat, curves.items()):
        for run in runs.values():
            run()  # warm up
        seconds = take_turns(runs, options.repeats)
        sizes, medians = list(runs), [statistics.median(taken) for taken in seconds.values()]
        grows = log2(medians[-1] / medians[-2])
        print(f"{title:32} " + "  ".join(f"{n}: {t:.3f}" for n, t in zip(sizes, medians)) + f"   {grows:.2f}")
        spread = [[t - min(taken) for t, taken in zip(medians, seconds.values())],
                  [max(taken) - t for t, taken in zip(medians, seconds.values())]]
        axis.errorbar(sizes, medians, spread, marker="o", capsize=3, label="measured")
        line = [medians[-1] * n / sizes[-1] for n in sizes]
        axis.plot(sizes, line, "--", color="gray", label="in proportion")
        axis.set(xscale="log", yscale="log", title=title, ylabel="seconds", xticks=sizes, xticklabels=sizes)
        axis.minorticks_off()
        axis.legend()
        results.append({"work": title, "model": options.model, "unit": "seconds", "sizes": sizes,
                        "seconds_median": medians, "runs": list(seconds.values()), "grows": grows})
    figure.savefig(options.out, dpi=110)
    print(f"picture: {options.out}")
    print(json.dumps({"machine": able, "results": results}))


if __name__ == "__main__":
    in_one_line(main)
