"""The sampler: N responses to each of many prompts, batched, with the KV cache.

Legend as in model.py. What makes it fast is the structure of the loop, not tricks:

- what all prompts begin with (few-shot header, judge prompt) is computed once;
- each prompt is computed once, its keys and values serve its N rows;
- finished rows leave the batch.

Random numbers come from a sample's coordinates (seed, stage, prompt, n, token), never from a
shared stream, so that batch size, order and resuming do not change what is drawn.
"""

from dataclasses import astuple, dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from minisr import InputError
from minisr.fast.cache import KVCache
from minisr.fast.step import Step
from minisr.model import Decoder, out_of_memory
from minisr.rng import first_numbers, row_key, uniform
from minisr.runner.resume import UNKEPT
from minisr.runner.stop import Stop


@dataclass(frozen=True)
class SampleConfig:
    """How tokens are drawn. The defaults of T and p are the paper's, for responses and evaluation."""

    temperature: float = 0.7  # 0 is greedy
    top_p: float = 0.9
    max_new_tokens: int = 64
    rows: int = 512  # sequences decoded side by side


@dataclass
class Sample:
    """One response: its ids with the end token if it came, and whether it came."""

    ids: list[int]
    finished: bool  # False: cut at max_new_tokens or at the model's context
    logp: float = 0.0  # if asked for and finished: log p of ids under the model, whatever the temperature


@torch.inference_mode()
def sample(model: Decoder, prompts: list[list[int]], n: int, config: SampleConfig, *,
           key: int, stop: tuple[int, ...], title: str = "sample", with_logps: bool = False,
           journal=UNKEPT) -> list[list[Sample]]:
    """Draw n responses to each prompt (token ids): result[i][j] is sample j of prompt i.

    A response ends with the first token that is in stop, and keeps it. with_logps asks for its log p.
    Finished waves are kept in the journal, and taken from it.

    Raises InputError if a prompt leaves no room for a single new token in the model's context."""
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) < model.config.max_seq_len:
            raise InputError(f"{title}: prompt {i} has {len(prompt)} tokens; the model's context is "
                             f"{model.config.max_seq_len}, so 1 to {model.config.max_seq_len - 1} fit")
    results: list[list[Sample]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # like lengths, less padding
    per_wave = max(1, config.rows // n)
    with tqdm(total=len(prompts) * n, desc=title, leave=False) as bar:
        for start in range(0, len(order), per_wave):
            wave = order[start:start + per_wave]
            drawn = journal.get(key, start)
            if drawn is None:
                drawn = [[astuple(s) for s in row] for row in _wave_or_halves(
                    model, [prompts[i] for i in wave], wave, n, config, key, stop, with_logps)]
                journal.add(drawn, key, start)
                Stop.check()
            for i, row in zip(wave, drawn):
                results[i] = [Sample(*values) for values in row]
            bar.update(len(wave) * n)
    return results


def _wave_or_halves(model, prompts, numbers, *how) -> list[list[Sample]]:
    """A wave; where memory does not suffice, the one half of its prompts and then the other."""
    try:
        return _wave(model, prompts, numbers, *how)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        if len(prompts) == 1:
            raise InputError("not enough memory for the responses to one prompt; a new run with fewer of "
                             "them, or with fewer new tokens, may do") from error
    half = len(prompts) // 2  # outside of `except`, which would hold on to the failed wave
    return [samples for part in (slice(half), slice(half, None))
            for samples in _wave_or_halves(model, prompts[part], numbers[part], *how)]


def _wave(model, prompts, numbers, n, config, key, stop, with_logps) -> list[list[Sample]]:
    """Prefill these prompts, fan out to n rows each, decode until all rows are done."""
    limit = min(config.max_new_tokens, model.config.max_seq_len - min(map(len, prompts)))
    logits, cache = prefill(model, prompts, n, limit)
    logits = logits.repeat_interleave(n, 0)  # (B, V)
    keys = torch.tensor([row_key(key, i, j) for i in numbers for j in range(n)])
    tokens, logps = decode(model, logits, cache, keys.to(model.device), limit, config, stop, with_logps)
    samples = []
    for number, (row, logp) in enumerate(zip(tokens.tolist(), logps.tolist())):
        row = row[:model.config.max_seq_len - len(prompts[number // n])]  # each has its own room
        end = next((i for i, token in enumerate(row) if token in stop), None)
        samples.append(Sample(row, False) if end is None else Sample(row[:end + 1], True, logp))
    return [samples[i:i + n] for i in range(0, len(samples), n)]


def prefill(model: Decoder, prompts: list[list[int]], n: int, limit: int) -> tuple[Tensor, KVCache]:
    """Logits (P, V) after each prompt, and the cache of n rows a prompt with room for limit tokens.

    What all prompts begin with is computed once and shared; the rest, padded on the left, once a prompt."""
    shared = shared_prefix(prompts)
    pad = torch.tensor([len(prompt) for prompt in prompts])
    rest = max(map(len, prompts)) - shared
    pad = rest + shared - pad  # (P,)
    ids = torch.zeros(len(prompts), rest, dtype=torch.long)  # (P, T)
    for row, prompt in enumerate(prompts):
        ids[row, pad[row]:] = torch.tensor(prompt[shared:])
    room = rest + (limit if n == 1 else 0)
    cache = KVCache(model.config, 1 if shared else len(prompts), shared or room, model.embed.weight)
    if shared:
        nothing = torch.zeros(0, dtype=torch.long, device=model.device)  # but keys and values is wanted
        model.hidden(torch.tensor([prompts[0][:shared]], device=model.device), cache, nothing)
        cache.share(len(prompts), room)
    cache.set_padding(pad.to(model.device))
    last = []
    for rows in alike((rest - pad).tolist(), 2**15 if model.embed.weight.is_cuda else 512):
        skip = int(pad[rows].min())  # columns in which none of them has a token
        group = ids[rows, skip:].to(model.device)
        ends = torch.arange(1, len(group) + 1, device=model.device) * group.shape[1] - 1
        last.append(model.hidden(group, cache.part(rows, skip), ends))
    cache.end(rest)
    if n > 1:
        cache.share(n, limit)
    return model.head(torch.cat(last)), cache


def alike(tokens: list[int], least: int) -> list[slice]:
    """Rows in groups of `least` tokens or more: with prompts sorted by length little padding is computed,
    and only a group's activations are in memory at once."""
    groups, start = [], 0
    for end in range(1, len(tokens) + 1):
        if sum(tokens[start:end]) >= least or end == len(tokens):
            groups.append(slice(start, end))
            start = end
    return groups


def shared_prefix(prompts: list[list[int]]) -> int:
    """How many tokens are computed once for all; a few are not worth a part of their own in each step."""
    shared = common_prefix(prompts) if len(prompts) > 1 else 0
    return shared if shared >= 16 else 0


def common_prefix(prompts: list[list[int]]) -> int:
    """How many tokens all prompts begin with, leaving at least one token of each for itself."""
    low, high = min(prompts), max(prompts)  # if these two share a beginning, all between do
    limit = min(map(len, prompts)) - 1
    return next((i for i in range(limit) if low[i] != high[i]), limit)


def decode(model, logits, cache, keys, limit, config, stop, with_logps) -> tuple[Tensor, Tensor]:
    """Draw up to limit tokens for each row: (B, limit), and their log p, up to the stop token: (B,).

    What follows a row's stop token means nothing."""
    forward = Step(model, int(cache.seen.max()) + limit)
    logps = torch.zeros(len(keys), device=keys.device)
    tokens = torch.full((limit, len(keys)), stop[0], device=keys.device)
    rows = torch.arange(len(keys), device=keys.device)  # rows still in the batch
    alive = torch.ones(len(keys), dtype=torch.bool, device=keys.device)
    numbers = first_numbers(keys, limit)
    ends = torch.zeros(max(logits.shape[1], *stop) + 2, dtype=torch.bool, device=keys.device)
    ends[list(stop)] = True  # looked up by token; -1, which never comes, has a place of its own
    for step in range(limit):
        drawn = draw(logits, config.temperature, config.top_p, keys, step, numbers[step])  # (B,)
        tokens[step].index_copy_(0, rows, drawn)
        if with_logps:
            said = logits.gather(1, drawn[:, None])[:, 0] - logits.logsumexp(1)
            logps.index_add_(0, rows, torch.where(alive, said, 0.0).float())
        alive = alive & ~ends[drawn]
        living = int(alive.sum())
        if living == 0 or step == limit - 1:
            break
        if living < 0.8 * len(rows):  # dropping rows copies the cache, so not at every step
            kept = alive.nonzero()[:, 0]
            cache.keep(kept)
            rows, keys, drawn, alive = rows[kept], keys[kept], drawn[kept], alive[kept]
            numbers = numbers[:, kept]
        logits = forward(drawn, cache)  # (B, V)
    return tokens.t(), logps


def draw(logits: Tensor, temperature: float, top_p: float, keys: Tensor, step: int,
         first: Tensor | None = None) -> Tensor:
    """One token for each row of logits (B, V): temperature first, then top-p; greedy at 0.

    Top-p without sorting: draw from the full distribution and accept what lies in the nucleus,
    that is where the tokens strictly more probable than it have mass below top_p. What is
    accepted is distributed as the renormalised nucleus; with p = 0.9 a second draw is rare.
    first are the numbers (B,) of the first try, if they are known."""
    if temperature == 0:
        return logits.argmax(-1)
    # No float32 temperature below 1e-30 is meant; 0 / 0 would be drawn from.
    probs = (logits.float() / max(temperature, 1e-30)).softmax(-1)  # (B, V)
    cdf = probs.cumsum(-1)
    u = uniform(keys, step * 64) if first is None else first
    drawn = _invert(cdf, u)
    if top_p >= 1:
        return drawn
    todo = _outside(probs, drawn, top_p).nonzero()[:, 0]
    for attempt in range(1, 64):
        if len(todo) == 0:
            return drawn
        again = _invert(cdf[todo], uniform(keys[todo], step * 64 + attempt))
        drawn[todo] = again
        todo = todo[_outside(probs[todo], again, top_p)]
    drawn[todo] = probs[todo].argmax(-1)  # a nucleus of next to no mass: its most probable token
    return drawn


def _invert(cdf: Tensor, u: Tensor) -> Tensor:
    """The token (B,) at which the cumulative probability (B, V) passes the share u (B,) of the whole."""
    token = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)
    return token.clamp(max=cdf.shape[1] - 1)[:, 0]


def _outside(probs: Tensor, token: Tensor, top_p: float) -> Tensor:
    """Whether a token (B,) lies outside the nucleus."""
    above = probs > probs.gather(1, token[:, None])
    return (probs * above).sum(-1) >= top_p
