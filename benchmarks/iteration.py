"""A whole iteration, M1 -> M2, by minisr, and by transformers.generate and TRL's DPOTrainer.

    minisr run tiny_configs/tiny.toml
    python benchmarks/iteration.py runs/tiny --seeds 0 1 2
    python benchmarks/iteration.py runs/smollm2 --seeds 0 --dtype bfloat16

Both start from the run's M1 and use its config, few-shot prompts, filters, judge prompt, score parser and selection of
pairs. Only generation and training differ. TRL has neither replay nor minisr's NLL term, so both are off on both sides.
In the tiny world the oracle scores both M2, to check that they are equally good.
"""

import json
import os
import shutil
import statistics
import sys
import tempfile
import warnings
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from sides import OneLineParser, Transformers, in_one_line

from minisr import InputError
from minisr.bench import machine
from minisr.interop import hf
from minisr.interop.names import weights_from
from minisr.lm import LM
from minisr.loop import self_reward
from minisr.runner.config import load_config
from minisr.runner.engine import RunLM
from minisr.runner.evaluation import answer_metrics
from minisr.runner.files import import_extra, read_json
from minisr.runner.run import Run
from minisr.runner.steps import StoredModel, keep
from minisr.sampler import Completion

STEPS = ("prompts", "responses", "rewards", "pairs", "training")
METRICS = ("flawless", "flawless_greedy", "mean_score")
# float32; bf16=True, which keeps float32 weights and converts them for each product; weights and optimizer in bfloat16,
# which is the least work, but loses small steps: minisr keeps float32 master weights
TRL_DTYPES = ("float32", "mixed", "bfloat16")


class PeerLM(RunLM, LM):
    """M1 with transformers.generate as its sampler. Batches are minisr's: as many rows, similar lengths together."""

    def __init__(self, generator: Transformers, model, tokenizer):
        super().__init__(model, tokenizer)
        self.generator = generator

    def sample_batch(self, prompts, seeds, config, stop_ids) -> list[list[Completion]]:
        n = seeds.shape[1]
        room = self.max_seq_len - max(map(len, prompts))
        job = {"prompts": prompts, "n": n, "temperature": config.temperature, "top_p": config.top_p,
               "new_tokens": min(config.max_new_tokens, room)}
        rows = self.generator.generate(job, int(seeds[0, 0]), list(stop_ids))
        completions = [Completion(ids, finished=ids[-1] in stop_ids) for ids in rows]
        return [completions[i:i + n] for i in range(0, len(completions), n)]


class PeerModel(StoredModel):
    """M1 with transformers.generate as its sampler and TRL's DPOTrainer for its training."""

    def __init__(self, run: Run, name: str, generator: Transformers, exported: Path, trl_dtype: str):
        super().__init__(run, name)
        self.exported, self.trl_dtype = exported, trl_dtype  # M1 as a Hugging Face folder; see TRL_DTYPES
        run.lm_class = partial(PeerLM, generator)

    def train_dpo(self, pairs: list[dict]) -> StoredModel:
        trained = self.lm.copy()
        weights = train_with_trl(self.exported, pairs, self.config.dpo, self.seed("DPO"), self.trl_dtype)
        trained.model.load_state_dict(weights_from(trained.model.config, weights, "TRL"),
                                      strict=not trained.model.config.tie_embeddings)
        return self.successor(self.next_name, trained)


def train_with_trl(exported: Path, pairs: list[dict], config, seed: int, trl_dtype: str) -> dict:
    """The weights, by Hugging Face's names, after TRL's DPOTrainer with the settings of a DPOConfig."""
    import datasets
    import transformers
    import trl
    role = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    chats = [{k: [{"role": role[k], "content": pair[k]}] for k in role} for pair in pairs]
    micro_batch = config.micro_batch or config.batch_size
    steps = -(-len(pairs) // config.batch_size) * config.epochs
    settings = trl.DPOConfig(
        str(exported.parent / "trl"), beta=config.beta, use_cpu=True, bf16=trl_dtype == "mixed", report_to=[],
        max_length=None, gradient_checkpointing=False, save_strategy="no", seed=seed % 2**31,
        per_device_train_batch_size=micro_batch, gradient_accumulation_steps=config.batch_size // micro_batch,
        num_train_epochs=config.epochs, learning_rate=config.learning_rate, lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": config.min_learning_rate}, warmup_steps=round(config.warmup_fraction * steps),
        adam_beta2=0.95, max_grad_norm=config.max_grad_norm, weight_decay=0.0,
        precompute_ref_log_probs=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        exported, attn_implementation="sdpa", dtype=torch.bfloat16 if trl_dtype == "bfloat16" else torch.float32)
    with redirect_stdout(sys.stderr):
        trl.DPOTrainer(model, None, settings, train_dataset=datasets.Dataset.from_list(chats),
                       processing_class=transformers.AutoTokenizer.from_pretrained(exported)).train()
    return dict(model.state_dict())


def iterate(source: Path, folder: Path, config, make_M1) -> dict:
    """One iteration from the M1 of the run `source`, made in `folder`: seconds of each step, and M2's metrics."""
    for name in ("seed", "M1"):
        made = shutil.ignore_patterns("timing.json", "*.counts.json", *(["*.jsonl"] if name == "M1" else []))
        shutil.copytree(source / name, folder / name, ignore=made)
    shutil.copy(source / "judge.txt", folder)
    M1 = make_M1(Run(folder, config), "M1")
    M2 = self_reward(M1, keep)
    timings = [read_json(model.folder / "timing.json", "timing") for model in (M1, M2)]
    result = {"seed": config.seed, "seconds": {step: (timings[0] | timings[1])[step] for step in STEPS}}
    run = Run(folder, config)
    if run.has_oracle:
        metrics = answer_metrics(StoredModel(run, "M2").answer(run.evaluation_prompts))
        result |= {name: metrics[name] for name in METRICS}
    return result


def compare(step: str, sides: dict[str, list[dict]], **names) -> dict:
    """One of the "results", also printed: the seconds of a step, or of all."""
    ours, theirs = ([sum(made["seconds"].values()) if step == "all" else made["seconds"][step] for made in side]
                    for side in sides.values())
    a, b = statistics.median(ours), statistics.median(theirs)
    print(f"{step:10} minisr {a:8.2f} s [{min(ours):.2f}, {max(ours):.2f}]   "
          f"peers {b:8.2f} s [{min(theirs):.2f}, {max(theirs):.2f}]")
    return {"work": step, **names, "unit": "seconds", "ours": a, "theirs": b, "ratio": b / a if a else None,
            "runs": ours, "their_runs": theirs}


def parse_options():
    parser = OneLineParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run that has its M1")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE",
                        help="change one key of the config, e.g. --set prompts.count=100")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of both sides' weights")
    parser.add_argument("--trl-dtype", choices=TRL_DTYPES, help="of TRL's training; default: float32, and with "
                        "--dtype bfloat16 mixed, which is TRL's bf16=True")
    options = parser.parse_args()
    options.trl_dtype = options.trl_dtype or {"float32": "float32", "bfloat16": "mixed"}[options.dtype]
    return options


def check_config(config) -> None:
    """Raise InputError if minisr would train M2 in a way that the peers' side does not."""
    dpo = config.dpo
    if config.lora.rank or dpo.positives_only or dpo.consistency or dpo.reference != "previous":
        raise InputError("TRL's side trains all weights with plain DPO; set lora.rank=0, dpo.positives_only=false, "
                         "dpo.consistency=false and dpo.reference=previous with --set")
    if dpo.optimizer != "adamw" or dpo.dropout or dpo.weight_decay:
        raise InputError("TRL's side trains with AdamW, without dropout and weight decay; set dpo.optimizer=adamw, "
                         "dpo.dropout=0 and dpo.weight_decay=0 with --set")
    if dpo.micro_batch and dpo.batch_size % dpo.micro_batch:
        raise InputError(f"dpo.micro_batch = {dpo.micro_batch} does not divide dpo.batch_size = {dpo.batch_size}, as "
                         "TRL requires; change one with --set")


def main() -> None:
    options = parse_options()
    for package in ("transformers", "trl"):
        import_extra(package, "test")
    warnings.simplefilter("ignore", FutureWarning)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    both = ["dpo.replay_weight=0.0", "dpo.nll_weight=0.0", "device=cpu", f"dtype={options.dtype}", *options.set]
    config = load_config(options.run / "config.toml", overrides=tuple(both))
    check_config(config)
    sides: dict[str, list[dict]] = {"minisr": [], "peers": []}
    with tempfile.TemporaryDirectory() as scratch:
        exported = Path(scratch) / "hf"
        M1 = StoredModel(Run(options.run, config), "M1").lm
        hf.export(M1.model, M1.tokenizer, exported)
        dtype = getattr(torch, options.dtype)
        generator = Transformers(config.threads, exported, dtype=dtype)
        peers = partial(PeerModel, generator=generator, exported=exported, trl_dtype=options.trl_dtype)
        makers = {"minisr": StoredModel, "peers": peers}
        able = machine("cpu", config.threads, dtype)
        for seed in options.seeds:
            for name, make_M1 in makers.items():
                made = iterate(options.run, Path(scratch) / f"{name}{seed}", replace(config, seed=seed), make_M1)
                sides[name].append(made)
                print(name, json.dumps(made), flush=True)
    names = {"model": str(options.run), "peer": f"{generator.name}, TRL in {options.trl_dtype}"}
    results = [compare(step, sides, **names) for step in (*STEPS, "all")]
    for metric in METRICS:
        if all(metric in made for side in sides.values() for made in side):
            means = (f"{name} {statistics.mean(made[metric] for made in side):.3f}" for name, side in sides.items())
            print(f"M2's {metric}:", ", ".join(means))
    print(json.dumps({"machine": able, "results": results, "models": sides}))


if __name__ == "__main__":
    in_one_line(main)
