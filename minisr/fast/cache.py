"""The KV cache: keys and values of the tokens seen so far, kept once where rows share them.

Legend as in model.py. What all prompts begin with is one row for all; a prompt is one row for its n
responses; only what a row says itself is its own. So a step reads each shared key once for all rows
that look at it, not once a row, and nothing is copied when a prompt fans out.
"""

from copy import copy

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
        shape = (self.config.n_layers, len(self.seen), self.config.n_kv_heads, capacity, self.config.head_dim)
        self.k, self.v = like.new_empty(shape), like.new_empty(shape)
        self.length = 0  # columns in use
        self.pad = self.seen.new_zeros(len(self.seen))  # (B,) how many of them are padding, on the left
        self.padded = 0  # the most of these
        self.bias = like.new_zeros(*shape[1:3], 1, capacity)  # (B, G, 1, S) added to scores: -inf on padding

    def set_padding(self, pad: Tensor) -> None:
        """The first pad (B,) of the own columns, which are still to come, hold no token."""
        self.pad, self.padded = pad, int(pad.max())
        columns = torch.arange(self.padded, device=pad.device)
        self.bias[..., :self.padded].masked_fill_((columns < pad[:, None])[:, None, None], -torch.inf)
        for x in (self.k, self.v):  # may stay unwritten, and no weight of 0 makes 0 of a NaN
            x[:, :, :, :self.padded] = 0

    def begin(self, new: int) -> Tensor:
        """Rotary positions (B, T) of the next `new` columns (padding: any), which attend() then takes."""
        columns = torch.arange(self.length + new, device=self.seen.device)
        before = (self.pad - self.length).clamp(min=0)[:, None]  # padding to come
        hidden = (columns > columns[self.length:, None]) | (columns < self.pad[:, None])[:, None]  # (B, T, S)
        # Padding sees itself, or its softmax would have no term.
        self.mask = ~(hidden & (columns != columns[self.length:, None]))[:, None]  # (B, 1, T, S)
        return (self.seen[:, None] - before + torch.arange(new, device=self.seen.device)).clamp(min=0)

    def end(self, new: int) -> None:
        """All layers have taken the next `new` columns."""
        self.seen = self.seen + new
        if self.length < self.padded:
            self.seen = self.seen - (self.pad - self.length).clamp(0, new)
        self.length += new

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k, v (B, G, T, D) of one layer, and let q (B, H, T, D) look at all: (B, H, T, D)."""
        end = self.length + k.shape[2]
        self.k[layer, :, :, self.length:end] = k
        self.v[layer, :, :, self.length:end] = v
        k, v, mask = self.k[layer, :, :, :end], self.v[layer, :, :, :end], self.mask  # (B, G, S, D)
        for part in reversed(self.shared):  # a prefill computes so much that copying costs nothing
            keys, values, there = part.expanded(layer)
            k, v = torch.cat([keys, k], 2), torch.cat([values, v], 2)
            mask = torch.cat([there.expand(-1, -1, q.shape[2], -1), mask], 3)
        return grouped_attention(q, k, v, mask)

    def look(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The same for one token a row, q (B, H, D), k, v (B, G, D): (B, H D). Each part is read once, and
        one softmax is over the scores of all."""
        B, H, D = q.shape
        G, end = k.shape[1], self.length + 1
        keys, values = self.k[layer], self.v[layer]
        keys.select(2, self.length).copy_(k)
        values.select(2, self.length).copy_(v)
        keys, values = (x.flatten(0, 1).narrow(1, 0, end) for x in (keys, values))  # (B G, S, D)
        q = q.reshape(B * G, H // G, D)  # (B G, R, D)
        own = scores(q, keys, self.bias.flatten(0, 1).narrow(2, 0, end))  # (B G, R, S)
        if not self.shared:
            return torch.bmm(softmax(own), values).view(B, H * D)
        q, own = (x.view(B, G, H // G, -1) for x in (q, own))
        parts = [*(part.scores(layer, q) for part in self.shared), own]  # each (B, G, R, S)
        *shares, own = softmax(torch.cat(parts, -1)).split([s.shape[-1] for s in parts], -1)
        y = torch.bmm(own.flatten(0, 1), values).view(B, G, H // G, D)
        for part, share in zip(self.shared, shares):
            y = y + part.mix(layer, share)
        return y.view(B, H * D)

    def part(self, rows: slice, skip: int) -> "KVCache":
        """The same memory, of these rows and without the first `skip` own columns, in which they have
        nothing but padding: to prefill it in parts. The whole is then told by end()."""
        part = copy(self)
        part.k, part.v = self.k[:, rows, :, skip:], self.v[:, rows, :, skip:]
        part.seen, part.pad, part.padded = self.seen[rows], self.pad[rows] - skip, self.padded - skip
        part.shared = [copy(shared) for shared in self.shared]
        for shared in part.shared:
            shared.slot = shared.slot[rows]
        return part

    def share(self, width: int, capacity: int) -> None:
        """Each row becomes `width` rows that share what it has seen; capacity is for their own tokens."""
        rows = torch.arange(len(self.seen) * width, device=self.seen.device)
        for part in self.shared:
            part.slot, part.width = (part.slot[rows // width]) * width + rows % width, part.width * width
        k, v, bias = (x.narrow(3, 0, self.length) for x in (self.k, self.v, self.bias))
        self.shared.append(Shared(k, v, bias, rows, width))
        self.seen = self.seen[rows // width]
        self._own(capacity, self.k)

    def keep(self, rows: Tensor) -> None:
        """Only these rows go on."""
        self.seen, self.pad, self.bias = self.seen[rows], self.pad[rows], self.bias[rows]
        for old in (self.k, self.v):  # in place
            old[:, :len(rows), :, :self.length] = old[:, rows, :, :self.length]
        self.k, self.v = self.k[:, :len(rows)], self.v[:, :len(rows)]
        for part in self.shared:
            part.keep(rows)


class Shared:
    """Keys and values of A ancestors, (L, A, G, S, D); at each up to `width` rows look."""

    def __init__(self, k: Tensor, v: Tensor, bias: Tensor, slot: Tensor, width: int):
        self.k, self.v = k, v
        self.bias = bias  # (A, G, 1, S), -inf where no token is
        self.slot, self.width = slot, width  # (B,) which of the A * width places is the row's

    def scores(self, layer: int, q: Tensor) -> Tensor:
        """q (B, G, R, D) times each key: (B, G, R, S)."""
        return self._gather(scores(self._spread(q), self.k[layer].flatten(0, 1), self.bias.flatten(0, 1)))

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

    def expanded(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values (B, G, S, D) once a row, and where a token is (B, 1, 1, S)."""
        rows = self.slot // self.width
        return self.k[layer, rows], self.v[layer, rows], self.bias[rows, :1] == 0

    def keep(self, rows: Tensor) -> None:
        """Only these rows look; ancestors at which none looks any more leave when they are a fifth."""
        self.slot = self.slot[rows]
        ancestor, place = self.slot // self.width, self.slot % self.width
        living, ancestor = ancestor.unique(return_inverse=True)
        if len(living) < 0.8 * self.k.shape[1]:
            self.k, self.v = self.k[:, living], self.v[:, living]
            self.bias = self.bias[living]
            self.slot = ancestor * self.width + place


def scores(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
    """q (B G, R, D) times keys (B G, S, D), over sqrt(D), plus bias (B G, 1 or R, S): (B G, R, S)."""
    return torch.baddbmm(bias, q, k.transpose(1, 2), alpha=q.shape[-1]**-0.5)


def softmax(x: Tensor) -> Tensor:
    """In float32, whatever comes and goes."""
    return x.softmax(-1, dtype=torch.float32).to(x.dtype)


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention of q (B, H, T, D) on k, v (B, G, S, D) under mask (B, 1, T, S) -> (B, H, T, D).

    The R queries of a key/value head are laid side by side in time, so that no key is copied."""
    B, H, T, D = q.shape
    G = k.shape[1]
    mask = mask.repeat(1, 1, H // G, 1)
    q = q.reshape(B, G, (H // G) * T, D)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).view(B, H, T, D)
