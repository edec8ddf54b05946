"""The sampler: prefill a batch of prompts, then decode one token per row in each step, with a KV cache.

Legend as in model.py; P is the number of prompts, n the samples per prompt. Random numbers come from a sample's own
seed (rng.py), so up to rounding the tokens of a sample do not depend on what else is in its batch.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minisr.model import Decoder, KVCache, upcast
from minisr.rng import uniform

MAX_ATTEMPTS = 64  # draws until a token lies in the nucleus; at top_p = 0.9 at most one in ten misses it


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn. Temperature and top-p are the paper's for responses and evaluation (section 3.1.3)."""

    temperature: float = 0.7  # 0: greedy
    top_p: float = 0.9
    max_new_tokens: int = 64
    rows: int = 512  # batch size, in sequences


@dataclass
class Completion:
    """One sampled sequence: its ids, up to and including the stop token if one was drawn."""

    ids: list[int]
    finished: bool  # False: cut off at max_new_tokens or at the model's max_seq_len
    logp: float | None = None  # log p(ids | prompt); the fast engine records it for the frozen reference


@torch.inference_mode()
def generate(model: Decoder, prompts: list[list[int]], seeds: np.ndarray, config: SamplingConfig,
             stop_ids: tuple[int, ...]) -> list[list[Completion]]:
    """Complete a batch of P prompts (token ids) n times each: result[i][j] is completion j of prompts[i].

    seeds (P, n) holds one random seed per completion. A completion ends with the first token in stop_ids."""
    P, n = seeds.shape
    rows = [prompt for prompt in prompts for _ in range(n)]  # B = P n rows
    seeds = seeds.flatten()  # (B,)
    max_new = [min(config.max_new_tokens, model.config.max_seq_len - len(row)) for row in rows]

    # 1) Prefill. Padding on the left puts the last token of every prompt into the last column.
    ids, attention_mask = left_pad(rows, model.device)  # (B, T)
    cache = KVCache(model, len(rows), max_len=ids.shape[1] + max(max_new))
    # Only the last column goes through the head: logits (B, T, V) of whole prompts would be large.
    logits = model.head(model.hidden_states(ids, cache, attention_mask)[:, -1])  # (B, V)

    # 2) Decode, until all rows have drawn a stop token or the largest max_new is reached.
    tokens = torch.empty(len(rows), 0, dtype=torch.long, device=model.device)  # (B, steps)
    finished = torch.zeros(len(rows), dtype=torch.bool, device=model.device)  # (B,)
    for step in range(max(max_new)):
        drawn = sample_top_p(logits, config.temperature, config.top_p, seeds, step)  # (B,)
        tokens = torch.cat([tokens, drawn[:, None]], dim=1)
        finished |= torch.isin(drawn, torch.tensor(stop_ids, device=model.device))
        if finished.all():
            break
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(rows), 1)], dim=1)  # (B, S)
        logits = model(drawn[:, None], cache, attention_mask)[:, -1]  # (B, V)

    # 3) Cut every row at its own max_new and at its first stop token.
    completions = [cut_at_stop(row[:limit], stop_ids) for row, limit in zip(tokens.tolist(), max_new)]
    return [completions[i * n:(i + 1) * n] for i in range(P)]


def left_pad(rows: list[list[int]], device) -> tuple[Tensor, Tensor]:
    """ids (B, T), padded on the left with zeros, and attention_mask (B, T), False on padding."""
    T = max(map(len, rows))
    ids = torch.tensor([[0] * (T - len(row)) + row for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    attention_mask = torch.arange(T, device=device) >= (T - lengths)[:, None]
    return ids, attention_mask


def cut_at_stop(ids: list[int], stop_ids: tuple[int, ...]) -> Completion:
    """The ids up to and including the first stop token; unfinished if there is none."""
    for position, token in enumerate(ids):
        if token in stop_ids:
            return Completion(ids[:position + 1], finished=True)
    return Completion(ids, finished=False)


def sample_top_p(logits: Tensor, temperature: float, top_p: float, seeds: np.ndarray, step: int) -> Tensor:
    """Draw one token for each row of logits (B, V): (B,). Temperature first, then top-p; temperature 0 is greedy.

    The nucleus (Holtzman et al., 2020) is the smallest set of most probable tokens whose mass reaches top_p, plus any
    tokens tied with its least probable one. This is rejection sampling: tokens are drawn from the full distribution, by
    inverse transform sampling, until one lies in the nucleus. The result is distributed as a draw from the renormalized
    nucleus, and a faster sampler can use the same random numbers without sorting. Attempt k of a row uses
    uniform(seed, MAX_ATTEMPTS * step + k)."""
    if temperature == 0:
        return logits.argmax(-1)
    probs = (upcast(logits) / max(temperature, 1e-30)).softmax(-1)  # (B, V)
    descending = probs.sort(descending=True).values
    mass_before = descending.cumsum(-1) - descending  # of the tokens before each one in descending order
    min_prob = descending.masked_fill(mass_before >= top_p, torch.inf).amin(-1, keepdim=True)  # (B, 1)
    in_nucleus = (probs >= min_prob) | (top_p >= 1)  # (B, V)

    cdf = probs.cumsum(-1)  # (B, V)
    token = probs.argmax(-1)  # the fallback if all attempts miss, possible only for a tiny top_p
    pending = torch.ones_like(token, dtype=torch.bool)
    for attempt in range(MAX_ATTEMPTS):
        u = torch.from_numpy(uniform(seeds, MAX_ATTEMPTS * step + attempt)).to(cdf.device)  # (B,)
        drawn = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True).clamp(max=cdf.shape[1] - 1)  # (B, 1)
        accepted = pending & in_nucleus.gather(1, drawn)[:, 0]
        token = torch.where(accepted, drawn[:, 0], token)
        pending &= ~accepted
        if not pending.any():
            break
    return token
