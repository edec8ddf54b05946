"""Training losses that compute only what is scored.

target_loss replaces LM.target_loss: the last feed-forward network and the head run only where a token is a target (on
the tiny model, SFT is 1.2 times as fast for it).
pair_logps replaces LM.pair_logps: pairs are packed as [prompt | chosen | rejected], so each prompt is computed once
for both responses and nothing is computed on padding except in attention. This is prefix sharing (Wang and Hegde, 2024,
arXiv 2410.20305); on the tiny model it makes DPO 1.8 times as fast. Legend as in model.py; M is the number of tokens of
a packed batch, N of the scored ones.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from minisr.dpo import EncodedPair
from minisr.fast.forward import MaskedAttention, choose_causal_attention, final_hidden
from minisr.model import Decoder, upcast
from minisr.sft import Example, right_pad

MAX_LOGITS = 2**25  # numbers held at once: 128 MB in float32


def target_loss(model: Decoder, examples: list[Example], gradient_checkpointing: bool = False) -> Tensor:
    """Cross-entropy summed over the target tokens of the examples: a scalar."""
    ids, mask = right_pad(examples, model.device)  # (B, T)
    is_target = mask[:, 1:]
    sources = F.pad(is_target, (0, 1)).flatten().nonzero()[:, 0]  # (N,) the tokens before the targets
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    attention = choose_causal_attention(ids, model.embed.weight.dtype)
    x = final_hidden(model, ids, positions, attention, sources, gradient_checkpointing)  # (N, C)
    return -token_logps(model.head, x, ids[:, 1:][is_target]).sum()


def pair_logps(model: Decoder, pairs: list[EncodedPair], gradient_checkpointing: bool = False) -> tuple[Tensor, Tensor]:
    """log p(y_w | x) and log p(y_l | x) of each pair: (B,) and (B,)."""
    packed = PackedPairs(pairs, model.device)
    x = final_hidden(model, packed.ids, packed.positions, packed.attend, packed.sources, gradient_checkpointing)
    logps = token_logps(model.head, x, packed.ids[0, packed.targets])  # (N,)
    sums = torch.segment_reduce(logps, "sum", lengths=packed.response_lengths)  # (2 B,)
    return sums[0::2], sums[1::2]


def token_logps(head, x: Tensor, targets: Tensor) -> Tensor:
    """log p of each target (N,) after the final hidden state x (N, C): (N,).

    Logits of many tokens over a large vocabulary would fill the memory, so they are computed in chunks, and once
    more in the backward pass."""
    chunk = max(1, MAX_LOGITS // head.weight.shape[0])
    if len(x) <= chunk:
        return chunk_logps(head, x, targets)
    parts = [checkpoint(chunk_logps, head, *part, use_reentrant=False)
             for part in zip(x.split(chunk), targets.split(chunk))]
    return torch.cat(parts)


def chunk_logps(head, x: Tensor, targets: Tensor) -> Tensor:
    return -F.cross_entropy(upcast(head(x)), targets, reduction="none")


class PackedPairs:
    """B pairs as one row of M tokens: [prompt | chosen | rejected] of each pair in turn.

    Attention runs on a padded grid (B, T). The positions of both responses continue the prompt's, and the rejected
    response does not see the chosen one."""

    def __init__(self, pairs: list[EncodedPair], device):
        lengths = torch.tensor([[len(part) for part in pair] for pair in pairs], device=device)  # (B, 3)
        prompt_ends, chosen_ends, ends = lengths.cumsum(1).split(1, dim=1)  # (B, 1) each
        column = torch.arange(int(ends.max()), device=device)  # (T,)
        is_token = column < ends  # (B, T)
        is_rejected = column >= chosen_ends
        is_chosen = (column >= prompt_ends) & ~is_rejected
        hidden = is_rejected[:, :, None] & is_chosen[:, None, :]  # rejected queries do not see chosen keys
        self.attention = MaskedAttention(((column <= column[:, None]) & ~hidden)[:, None])  # (B, 1, T, T)
        self.grid_index = is_token.flatten().nonzero()[:, 0]  # (M,) where the tokens lie on the grid
        tokens = [token for pair in pairs for part in pair for token in part]
        self.ids = torch.tensor([tokens], device=device)  # (1, M)
        chosen_lengths = lengths[:, 1:2]
        self.positions = (column - is_rejected * chosen_lengths)[is_token][None]  # (1, M)
        # Each response token is predicted by the token before it; the first rejected one by the prompt's last token.
        index = torch.arange(len(self.grid_index), device=device)
        is_first_rejected = column == chosen_ends
        before = index - 1 - (is_first_rejected * chosen_lengths)[is_token]
        self.targets = (is_chosen | is_rejected)[is_token].nonzero()[:, 0]  # (N,)
        self.sources = before[self.targets]  # (N,)
        self.response_lengths = lengths[:, 1:].flatten()  # (2 B,) chosen, rejected, chosen, ...

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (1, H, M, D), k and v (1, G, M, D) -> (1, H, M, D)."""
        q, k, v = (self._to_grid(x[0].transpose(0, 1)) for x in (q, k, v))  # (B, H or G, T, D)
        y = self.attention(q, k, v)
        return y.transpose(1, 2).flatten(0, 1).index_select(0, self.grid_index).transpose(0, 1)[None]

    def _to_grid(self, x: Tensor) -> Tensor:
        """(M, H, D) -> (B, H, T, D), zeros where there is no token."""
        B, _, T, _ = self.attention.mask.shape
        grid = x.new_zeros(B * T, *x.shape[1:]).index_put((self.grid_index,), x)  # index_copy would keep x for backward
        return grid.unflatten(0, (B, T)).transpose(1, 2)
