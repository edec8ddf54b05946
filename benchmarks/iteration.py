"""A whole iteration, M1 -> M2, by minisr and the usual way, by transformers.generate and TRL's DPOTrainer.

    minisr run tiny_configs/tiny.toml
    python benchmarks/iteration.py runs/tiny --seeds 0 1 2

Both start from the run's M1, with its config, few-shot prompts, filters, judge prompt, parser and selection
of pairs; only who generates and who trains differs. TRL knows neither replay nor minisr's NLL term: both are
off on both sides. Of the tiny world both M2 are put before the oracle, to see that the same comes out.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import warnings
from contextlib import ExitStack, redirect_stdout
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from sides import Transformers, in_one_line
from tqdm import tqdm

from minisr import dpo, judge, prompts
from minisr.bench import machine
from minisr.evaluate import answer_metrics
from minisr.interop import hf
from minisr.interop.names import weights_from
from minisr.runner import stages
from minisr.runner.config import load_config
from minisr.runner.files import need, read_json
from minisr.runner.run import Run
from minisr.sampler import Sample

ARROWS = ("prompts", "responses", "rewards", "pairs", "training")


class Peers:
    """Stand where minisr samples and trains."""

    def __init__(self, threads: int, folder: Path):
        self.generator, self.folder = Transformers(threads, folder), folder

    def sample(self, model, asked, n, config, *, key, stop, title="", **_) -> list[list[Sample]]:
        """minisr.sampler.sample by transformers.generate, as many rows at once, like lengths together."""
        order, results = sorted(range(len(asked)), key=lambda i: len(asked[i])), [None] * len(asked)
        wave = max(1, config.rows // n)
        self.generator.eos = list(stop)
        for start in tqdm(range(0, len(order), wave), f"generate {title}", leave=False):
            chosen = order[start:start + wave]
            room = model.config.max_seq_len - max(len(asked[i]) for i in chosen)
            job = {"prompts": [asked[i] for i in chosen], "n": n, "temperature": config.temperature,
                   "top_p": config.top_p, "new_tokens": min(config.max_new_tokens, room), "forced": False}
            rows = self.generator.sample(job, (key + start) % 2**63)
            for number, i in enumerate(chosen):
                results[i] = [Sample(ids, ids[-1] in stop) for ids in rows[number * n:(number + 1) * n]]
        return results

    def train(self, model, tokenizer, pairs, replay, config, key, title, *_, **__):
        """minisr.dpo.train_dpo by TRL's DPOTrainer."""
        import datasets
        import transformers
        import trl
        role = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        chats = [{k: [{"role": role[k], "content": pair[k]}] for k in role} for pair in pairs]
        steps = -(-len(pairs) // config.batch_size) * config.epochs
        settings = trl.DPOConfig(
            str(self.folder.parent / "trl"), beta=config.beta, use_cpu=True, bf16=False, report_to=[],
            max_length=None, gradient_checkpointing=False, save_strategy="no", seed=key % 2**31,
            per_device_train_batch_size=config.micro_batch or config.batch_size,
            gradient_accumulation_steps=config.batch_size // (config.micro_batch or config.batch_size),
            num_train_epochs=config.epochs, learning_rate=config.learning_rate,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr": config.final_learning_rate},
            warmup_steps=round(config.warmup * steps), adam_beta2=0.95, max_grad_norm=config.clip,
            weight_decay=config.weight_decay, precompute_ref_log_probs=True)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            self.folder, attn_implementation="sdpa", dtype=torch.float32)
        with redirect_stdout(sys.stderr):
            trl.DPOTrainer(theirs, None, settings, train_dataset=datasets.Dataset.from_list(chats),
                           processing_class=transformers.AutoTokenizer.from_pretrained(self.folder)).train()
        model.load_state_dict(weights_from(model.config, dict(theirs.state_dict()), "TRL"),
                              strict=not model.config.tie_embeddings)
        return model


def iterate(source: Path, folder: Path, config, seed: int, peers: Peers | None) -> dict:
    """One iteration of the run in source, made in folder: seconds of each arrow, and M2's metrics."""
    for name in ("seed", "M1"):
        made = shutil.ignore_patterns("timing.json", "*.counts.json", *(["*.jsonl"] if name == "M1" else []))
        shutil.copytree(source / name, folder / name, ignore=made)
    run = Run(folder, replace(config, seed=seed))
    M1 = stages.Model(run, "M1")
    with ExitStack() as stack:
        if peers:
            for module in (prompts, judge, stages):
                stack.enter_context(patch.object(module, "sample", peers.sample))
            stack.enter_context(patch.object(dpo, "train_dpo", peers.train))
        x = M1.new_prompts()
        y = M1.respond(x)
        M2 = M1.train_dpo(M1.select_pairs(x, y, M1.judge(x, y)))
    timing = dict(pair for model in (M1, M2)
                  for pair in read_json(model.folder / "timing.json", "timing").items())
    figures = answer_metrics(M2.answer(run.evaluation())) if run.has_oracle else {}
    return {"seed": seed, "seconds": {arrow: timing[arrow] for arrow in ARROWS},
            **{name: figures[name] for name in ("flawless", "flawless_greedy", "mean_score") if figures}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run that has its M1")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE",
                        help="change one key of the config, e.g. --set prompts.count=100")
    options = parser.parse_args()
    for package in ("transformers", "trl"):
        need(package, "test")
    warnings.simplefilter("ignore", FutureWarning)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    plain = ["dpo.replay=0.0", "dpo.nll=0.0", "device=cpu", *options.set]
    config = load_config(options.run / "config.toml", overrides=tuple(plain))
    sides: dict[str, list[dict]] = {"minisr": [], "peers": []}
    with tempfile.TemporaryDirectory() as scratch:
        exported = Path(scratch) / "hf"
        hf.export(*stages.Model(Run(options.run, config), "M1").load(), exported)
        peers = Peers(config.threads, exported)
        able = machine("cpu", config.threads)
        for seed in options.seeds:
            for name in sides:
                made = iterate(options.run, Path(scratch) / f"{name}{seed}", config, seed,
                               peers if name == "peers" else None)
                sides[name].append(made)
                print(name, json.dumps(made), flush=True)
    results = []
    for arrow in (*ARROWS, "all"):
        ours, theirs = ([sum(made["seconds"].values()) if arrow == "all" else made["seconds"][arrow]
                         for made in side] for side in sides.values())
        a, b = statistics.median(ours), statistics.median(theirs)
        results.append({"work": arrow, "model": str(options.run), "peer": f"{peers.generator.name}, TRL",
                        "unit": "seconds", "ours": a, "theirs": b, "ratio": b / a if a else None,
                        "runs": ours, "their_runs": theirs})
        print(f"{arrow:10} minisr {a:8.2f} s [{min(ours):.2f}, {max(ours):.2f}]   "
              f"peers {b:8.2f} s [{min(theirs):.2f}, {max(theirs):.2f}]")
    for figure in ("flawless", "flawless_greedy", "mean_score"):
        if all(figure in made for side in sides.values() for made in side):
            means = (f"{name} {statistics.mean(made[figure] for made in side):.3f}"
                     for name, side in sides.items())
            print(f"M2's {figure}:", ", ".join(means))
    print(json.dumps({"machine": able, "results": results, "models": sides}))


if __name__ == "__main__":
    in_one_line(main)
