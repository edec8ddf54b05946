"""The KV cache: keys and values of the tokens seen so far, kept once where rows share them.

Legend as in model.py. What all prompts begin with is one row for all; a prompt is one row for its n
responses; only what a row says itself is its own. So a step reads each shared key once for all rows
that look at it, not once a row, and nothing is copied when a prompt fans out.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class KVCache:
    """What B rows have seen: shared parts first, then their own columns (L, B, G, capacity, D).

    The model asks for positions and attention; the sampler says what is shared and which rows go on."""

    def __init__(self, config, rows: int, capacity: int, like: Tensor):
        self.config = config
        self.shared: list[Shared] = []
        self.seen = torch.zeros(rows, dtype=torch.long, device=like.device)  # (B,) tokens of each row
        self._own(capacity, like)

    def _own(self, capacity: int, like: Tensor) -> None:
        shape = (self.config.layers, len(self.seen), self.config.kv_heads, capacity, self.config.head_width)
        self.k, self.v = like.new_empty(shape), like.new_empty(shape)
        self.length = 0  # columns in use
        self.pad: Tensor | None = None  # (B,) how many of them are padding, on the left

    def begin(self, new: int) -> Tensor:
        """Rotary positions (B, T) of the next `new` columns (padding: any), which attend() then takes."""
        columns = torch.arange(self.length + new, device=self.seen.device)
        before = 0 if self.pad is None else (self.pad - self.length).clamp(min=0)[:, None]  # padding to come
        self.padding = None if self.pad is None else columns < self.pad[:, None]  # (B, S)
        future = columns > columns[self.length:, None]  # (T, S)
        self.mask = None
        if new > 1 or self.pad is not None:
            hidden = future[None] if self.pad is None else future | self.padding[:, None]
            # Padding sees itself, or its softmax would have no term.
            self.mask = ~(hidden & (columns != columns[self.length:, None]))[:, None]  # (B, 1, T, S)
        return (self.seen[:, None] - before + torch.arange(new, device=self.seen.device)).clamp(min=0)

    def end(self, new: int) -> None:
        """All layers have taken the next `new` columns."""
        self.seen = self.seen + new
        if self.pad is not None:
            self.seen = self.seen - (self.pad - self.length).clamp(0, new)
        self.length += new

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k, v (B, G, T, D) of one layer, and let q (B, H, T, D) look at all: (B, H, T, D)."""
        end = self.length + k.shape[2]
        self.k[layer, :, :, self.length:end] = k
        self.v[layer, :, :, self.length:end] = v
        k, v = self.k[layer, :, :, :end], self.v[layer, :, :, :end]  # (B, G, S, D)
        if not self.shared:
            return grouped_attention(q, k, v, self.mask)
        if q.shape[2] == 1:
            return self._attend_in_parts(layer, q, k, v)
        # A prefill computes so much that copying what is shared costs nothing.
        parts = [part.expanded(layer) for part in self.shared]
        mask = F.pad(self.mask, (sum(keys.shape[2] for keys, _ in parts), 0), value=True)
        return grouped_attention(q, *(torch.cat(x, 2) for x in zip(*parts, (k, v))), mask)

    def _attend_in_parts(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One token a row: one softmax over the scores of all parts, each of which is read once."""
        B, H, _, D = q.shape
        G = k.shape[1]
        q = q.view(B, G, H // G, D) * D**-0.5  # (B, G, R, D)
        own = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).view(B, G, H // G, -1)
        if self.padding is not None:
            own = own.masked_fill(self.padding[:, None, None], -torch.inf)
        scores = [*(part.scores(layer, q) for part in self.shared), own]  # each (B, G, R, S)
        weights = torch.cat(scores, -1).softmax(-1, dtype=torch.float32).to(q.dtype)
        *shares, own = weights.split([s.shape[-1] for s in scores], -1)
        y = torch.bmm(own.flatten(0, 1), v.flatten(0, 1)).view(B, G, H // G, D)
        for part, share in zip(self.shared, shares):
            y = y + part.mix(layer, share)
        return y.view(B, H, 1, D)

    def share(self, width: int, capacity: int) -> None:
        """Each row becomes `width` rows that share what it has seen; capacity is for their own tokens."""
        rows = torch.arange(len(self.seen) * width, device=self.seen.device)
        for part in self.shared:
            part.slot, part.width = (part.slot[rows // width]) * width + rows % width, part.width * width
        k, v = self.k[:, :, :, :self.length], self.v[:, :, :, :self.length]
        self.shared.append(Shared(k, v, self.padding, rows, width))
        self.seen = self.seen[rows // width]
        self._own(capacity, self.k)

    def keep(self, rows: Tensor) -> None:
        """Only these rows go on."""
        self.seen = self.seen[rows]
        old_k, old_v, length, pad = self.k, self.v, self.length, self.pad
        self._own(old_k.shape[3], old_k)
        self.k[:, :, :, :length] = old_k[:, rows, :, :length]
        self.v[:, :, :, :length] = old_v[:, rows, :, :length]
        self.length, self.pad = length, None if pad is None else pad[rows]
        for part in self.shared:
            part.keep(rows)


class Shared:
    """Keys and values of A ancestors, (L, A, G, S, D); at each up to `width` rows look."""

    def __init__(self, k: Tensor, v: Tensor, padding: Tensor | None, slot: Tensor, width: int):
        self.k, self.v = k, v
        self.padding = padding  # (A, S), True where no token is; None: everywhere is
        self.slot, self.width = slot, width  # (B,) which of the A * width places is the row's

    def scores(self, layer: int, q: Tensor) -> Tensor:
        """q (B, G, R, D) times each key: (B, G, R, S)."""
        scores = torch.bmm(self._spread(q), self.k[layer].flatten(0, 1).transpose(1, 2))
        if self.padding is not None:
            hidden = self.padding[:, None, None].expand(-1, self.k.shape[2], -1, -1).flatten(0, 1)
            scores = scores.masked_fill_(hidden, -torch.inf)
        return self._gather(scores)

    def mix(self, layer: int, weights: Tensor) -> Tensor:
        """The values, by weights (B, G, R, S): (B, G, R, D)."""
        return self._gather(torch.bmm(self._spread(weights), self.v[layer].flatten(0, 1)))

    def _spread(self, x: Tensor) -> Tensor:
        """Rows (B, G, R, X) -> by ancestor (A G, width R, X); a place that no row has holds zeros."""
        A, (_, G, R, X) = self.k.shape[1], x.shape
        if len(x) < A * self.width:
            x = x.new_zeros(A * self.width, G, R, X).index_copy_(0, self.slot, x)
        return x.view(A, self.width, G, R, X).transpose(1, 2).reshape(A * G, self.width * R, X)

    def _gather(self, x: Tensor) -> Tensor:
        """The reverse: (A G, width R, X) -> (B, G, R, X)."""
        A, G = self.k.shape[1:3]
        x = x.view(A, G, self.width, -1, x.shape[-1]).transpose(1, 2).flatten(0, 1)
        return x if len(self.slot) == len(x) else x.index_select(0, self.slot)

    def expanded(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values once a row: (B, G, S, D) each."""
        rows = self.slot // self.width
        return self.k[layer, rows], self.v[layer, rows]

    def keep(self, rows: Tensor) -> None:
        """Only these rows look; ancestors at which none looks any more leave when they are a fifth."""
        self.slot = self.slot[rows]
        ancestor, place = self.slot // self.width, self.slot % self.width
        living, ancestor = ancestor.unique(return_inverse=True)
        if len(living) < 0.8 * self.k.shape[1]:
            self.k, self.v = self.k[:, living], self.v[:, living]
            self.padding = None if self.padding is None else self.padding[living]
            self.slot = ancestor * self.width + place


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of q (B, H, T, D) on k, v (B, G, S, D) under mask (B, 1, T, S) -> (B, H, T, D).

    The R queries of a key/value head are laid side by side in time, so that no key is copied."""
    B, H, T, D = q.shape
    G = k.shape[1]
    if mask is not None:
        mask = mask.repeat(1, 1, H // G, 1)
    q = q.reshape(B, G, (H // G) * T, D)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).view(B, H, T, D)
