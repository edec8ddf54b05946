"""A KV cache in which rows share the keys and values of a common prefix.

Replaces model.KVCache. What all prompts begin with (few-shot examples, the judge prompt) is one row for all of them, a
prompt is one row for its n samples, and only what a row generates is its own. A decode step therefore reads each shared
key once for all rows instead of once a row, and nothing is copied when a prompt fans out. This is shared-prefix or
cascade attention (Hydragen, Juravsky et al., arXiv 2402.05099). On the tiny model it makes judging 1.7 times and
responses 1.1 times as fast (all such ratios: benchmarks/README.md). Legend as in model.py.
"""

from copy import copy

import torch
from torch import Tensor

from minisr.fast.forward import attention_logits, grouped_attention, softmax
from minisr.model import ModelConfig


class PrefixCache:
    """The tokens of B rows: shared prefixes first, then the rows' own columns (L, B, G, capacity, D).

    Prefill: positions = prepare(T), then attend(layer, q, k, v) in each layer, then advance(T). Decoding: attend_one in
    each layer, then advance(1). Between the two, fan_out(n) turns each row into n rows that share its tokens."""

    def __init__(self, config: ModelConfig, rows: int, capacity: int, weight: Tensor):
        """`weight` gives dtype and device."""
        self.config = config
        self.prefixes: list[SharedPrefix] = []
        self.seq_lens = torch.zeros(rows, dtype=torch.long, device=weight.device)  # (B,) tokens of each row
        self._allocate(capacity, weight)

    def _allocate(self, capacity: int, weight: Tensor) -> None:
        config, rows = self.config, len(self.seq_lens)
        shape = (config.n_layers, rows, config.n_kv_heads, capacity, config.head_dim)
        self.k, self.v = weight.new_empty(shape), weight.new_empty(shape)
        self.n_columns = 0  # own columns in use
        self.left_pad = self.seq_lens.new_zeros(rows)  # (B,) how many of them are padding
        self.max_left_pad = 0
        self.bias = weight.new_zeros(rows, config.n_kv_heads, 1, capacity)  # (B, G, 1, S); -inf on padding

    def set_left_pad(self, left_pad: Tensor) -> None:
        """Declare the first left_pad (B,) own columns, not yet computed, to be padding."""
        self.left_pad, self.max_left_pad = left_pad, int(left_pad.max())
        columns = torch.arange(self.max_left_pad, device=left_pad.device)
        self.bias[..., :self.max_left_pad].masked_fill_((columns < left_pad[:, None])[:, None, None], -torch.inf)
        # Some of these columns are never computed, and a weight of 0 does not remove a NaN.
        self.k[:, :, :, :self.max_left_pad] = 0
        self.v[:, :, :, :self.max_left_pad] = 0

    def prepare(self, T: int) -> Tensor:
        """Set the attention mask of the next T columns; return their positions (B, T), arbitrary on padding."""
        columns = torch.arange(self.n_columns + T, device=self.seq_lens.device)  # (S,)
        queries = columns[self.n_columns:, None]  # (T, 1)
        visible = (columns <= queries) & (columns >= self.left_pad[:, None])[:, None]  # (B, T, S)
        self.mask = (visible | (columns == queries))[:, None]  # (B, 1, T, S); padding attends to itself
        pad_to_come = (self.left_pad - self.n_columns).clamp(min=0)[:, None]  # (B, 1)
        offsets = torch.arange(T, device=self.seq_lens.device)
        return (self.seq_lens[:, None] - pad_to_come + offsets).clamp(min=0)

    def advance(self, T: int) -> None:
        """All layers have stored the next T columns."""
        self.seq_lens = self.seq_lens + T
        if self.n_columns < self.max_left_pad:
            self.seq_lens = self.seq_lens - (self.left_pad - self.n_columns).clamp(0, T)
        self.n_columns += T

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k, v (B, G, T, D) of one layer; attend with q (B, H, T, D) to all tokens: (B, H, T, D)."""
        end = self.n_columns + k.shape[2]
        self.k[layer, :, :, self.n_columns:end] = k
        self.v[layer, :, :, self.n_columns:end] = v
        k, v, mask = self.k[layer, :, :, :end], self.v[layer, :, :, :end], self.mask  # (B, G, S, D)
        for prefix in reversed(self.prefixes):  # prefill computes so much that copying the prefix costs nothing
            prefix_k, prefix_v, is_token = prefix.expand_to_rows(layer)
            k, v = torch.cat([prefix_k, k], 2), torch.cat([prefix_v, v], 2)
            mask = torch.cat([is_token.expand(-1, -1, q.shape[2], -1), mask], 3)
        return grouped_attention(q, k, v, mask)

    def attend_one(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """attend() for one token a row: q (B, H, D), k and v (B, G, D) -> (B, H D)."""
        end = self.n_columns + 1
        keys, values = self.k[layer], self.v[layer]
        keys.select(2, self.n_columns).copy_(k)
        values.select(2, self.n_columns).copy_(v)
        keys, values = (x.flatten(0, 1).narrow(1, 0, end) for x in (keys, values))  # (B G, S, D)
        bias = self.bias.flatten(0, 1).narrow(2, 0, end)
        return attend_to_parts(layer, q, (keys, values, bias), self.prefixes)

    def row_view(self, rows: slice, skip_columns: int) -> "PrefixCache":
        """The same memory, restricted to some rows and without their first columns, which hold only padding.

        Rows are prefilled in groups through such views; the whole cache is then advanced once."""
        view = copy(self)
        view.k, view.v = self.k[:, rows, :, skip_columns:], self.v[:, rows, :, skip_columns:]
        view.seq_lens, view.left_pad = self.seq_lens[rows], self.left_pad[rows] - skip_columns
        view.max_left_pad = self.max_left_pad - skip_columns
        view.prefixes = [copy(prefix) for prefix in self.prefixes]
        for prefix in view.prefixes:
            prefix.slot = prefix.slot[rows]
        return view

    def fan_out(self, n: int, capacity: int) -> None:
        """Each row becomes n rows that share its tokens, with room for `capacity` tokens of their own."""
        rows = torch.arange(len(self.seq_lens) * n, device=self.seq_lens.device)
        for prefix in self.prefixes:
            prefix.slot = prefix.slot[rows // n] * n + rows % n
            prefix.slots_per_prefix *= n
        k, v, bias = (x.narrow(3, 0, self.n_columns) for x in (self.k, self.v, self.bias))
        self.prefixes.append(SharedPrefix(k, v, bias, rows, n))
        self.seq_lens = self.seq_lens[rows // n]
        self._allocate(capacity, self.k)

    def select_rows(self, rows: Tensor) -> None:
        """Only these rows continue."""
        self.seq_lens, self.left_pad, self.bias = self.seq_lens[rows], self.left_pad[rows], self.bias[rows]
        for old in (self.k, self.v):  # in place
            old[:, :len(rows), :, :self.n_columns] = old[:, rows, :, :self.n_columns]
        self.k, self.v = self.k[:, :len(rows)], self.v[:, :len(rows)]
        for prefix in self.prefixes:
            prefix.select_rows(rows)


def attend_to_parts(layer: int, q: Tensor, own: tuple[Tensor, Tensor, Tensor], prefixes: list) -> Tensor:
    """One query a row, q (B, H, D), on its own keys and values (B G, S, D) and on shared prefixes: (B, H D).

    own also holds a bias, see attention_logits(). The logits of all parts are concatenated for one softmax."""
    keys, values, bias = own
    B, H, D = q.shape
    G = len(keys) // B
    q = q.reshape(B * G, H // G, D)  # (B G, R, D)
    own_logits = attention_logits(q, keys, bias)  # (B G, R, S)
    if not prefixes:
        return torch.bmm(softmax(own_logits), values).view(B, H * D)
    q, own_logits = (x.view(B, G, H // G, -1) for x in (q, own_logits))
    logits = [*(prefix.attention_logits(layer, q) for prefix in prefixes), own_logits]  # each (B, G, R, S)
    *of_prefixes, own_weights = softmax(torch.cat(logits, -1)).split([x.shape[-1] for x in logits], -1)
    y = torch.bmm(own_weights.flatten(0, 1), values).view(B, G, H // G, D)
    for prefix, weights in zip(prefixes, of_prefixes):
        y = y + prefix.weighted_values(layer, weights)
    return y.view(B, H * D)


class SharedPrefix:
    """Keys and values of A prefixes (L, A, G, S, D). Up to `slots_per_prefix` rows attend to each of them."""

    def __init__(self, k: Tensor, v: Tensor, bias: Tensor, slot: Tensor, slots_per_prefix: int):
        self.k, self.v = k, v
        self.bias = bias  # (A, G, 1, S); -inf on padding
        self.slot = slot  # (B,) each row's place among the A * slots_per_prefix
        self.slots_per_prefix = slots_per_prefix

    def attention_logits(self, layer: int, q: Tensor) -> Tensor:
        """q (B, G, R, D) times the row's prefix keys: (B, G, R, S)."""
        keys, bias = self.k[layer].flatten(0, 1), self.bias.flatten(0, 1)
        return self._ungroup(attention_logits(self._group_by_prefix(q), keys, bias))

    def weighted_values(self, layer: int, weights: Tensor) -> Tensor:
        """Sum of the prefix values with weights (B, G, R, S): (B, G, R, D)."""
        return self._ungroup(torch.bmm(self._group_by_prefix(weights), self.v[layer].flatten(0, 1)))

    def _group_by_prefix(self, x: Tensor) -> Tensor:
        """Rows (B, G, R, X) -> (A G, slots R, X); a slot without a row holds zeros."""
        A, (_, G, R, X) = self.k.shape[1], x.shape
        if len(x) < A * self.slots_per_prefix:
            x = x.new_zeros(A * self.slots_per_prefix, G, R, X).index_copy_(0, self.slot, x)
        x = x.view(A, self.slots_per_prefix, G, R, X).transpose(1, 2)
        return x.reshape(A * G, self.slots_per_prefix * R, X)

    def _ungroup(self, x: Tensor) -> Tensor:
        """The reverse: (A G, slots R, X) -> (B, G, R, X)."""
        A, G = self.k.shape[1:3]
        x = x.view(A, G, self.slots_per_prefix, -1, x.shape[-1]).transpose(1, 2).flatten(0, 1)
        return x if len(self.slot) == len(x) else x.index_select(0, self.slot)

    def expand_to_rows(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """A copy for each row: keys and values (B, G, S, D), and is_token (B, 1, 1, S)."""
        rows = self.slot // self.slots_per_prefix
        return self.k[layer, rows], self.v[layer, rows], self.bias[rows, :1] == 0

    def select_rows(self, rows: Tensor) -> None:
        """Only these rows continue. Prefixes without any row are dropped once they are a fifth of all."""
        self.slot = self.slot[rows]
        prefix, place = self.slot // self.slots_per_prefix, self.slot % self.slots_per_prefix
        living, prefix = prefix.unique(return_inverse=True)
        if len(living) < 0.8 * self.k.shape[1]:
            self.k, self.v = self.k[:, living], self.v[:, living]
            self.bias = self.bias[living]
            self.slot = prefix * self.slots_per_prefix + place
