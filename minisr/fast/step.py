"""The decoder for one new token a row: the arithmetic of model.py in fewer operations.

Legend as in model.py. A step of a small model, or of few rows, takes as long as it has operations, whatever
their size; so here are no modules and no axis of time, and every product is written the way that is fast.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minisr.fast.cache import KVCache
from minisr.fast.lean import turn
from minisr.model import Decoder, rotary

LARGE = 2**18  # numbers in a matrix that is no longer in a core's own cache when its turn comes again


class Step:
    """step(ids (B,), cache) is model(ids[:, None], cache)[:, -1], the next logits (B, V)."""

    def __init__(self, model: Decoder, longest: int):
        """For rows of up to `longest` tokens."""
        rotation = rotary(torch.arange(longest, device=model.device)[None], model.config)
        self.cos, self.sin = (x[0, 0] for x in rotation)  # (longest, D) each
        self.config, self.embed = model.config, model.embed.weight.detach()
        self.scale = model.config.dim**0.5
        self.eps = torch.tensor(self.scale * model.config.norm_eps**0.5, device=model.device)
        self.blocks = [(self._norm(block.attention_norm), Product(block.attention.qkv_proj),
                        Product(block.attention.out_proj), self._norm(block.feed_forward_norm),
                        Product(block.feed_forward.gate_up_proj), Product(block.feed_forward.down_proj))
                       for block in model.blocks]
        self.norm, self.head = self._norm(model.norm), Product(model.head)

    def _norm(self, norm) -> Tensor:
        return norm.weight.detach().float() * self.scale

    def __call__(self, ids: Tensor, cache: KVCache) -> Tensor:
        H, G, D = self.config.n_heads, self.config.n_kv_heads, self.config.head_dim
        cos, sin = self.cos[cache.seen][:, None], self.sin[cache.seen][:, None]  # (B, 1, D)
        x = F.embedding(ids, self.embed)  # (B, C)
        for layer, (norm, qkv, out, second_norm, gate_up, down) in enumerate(self.blocks):
            heads = qkv(self.normed(x, norm)).contiguous().view(-1, H + 2 * G, D)
            turning, v = heads.split((H + G, G), 1)
            q, k = turn(turning, cos, sin).split((H, G), 1)
            x = out(cache.look(layer, q, k, v), x)
            gate, up = gate_up(self.normed(x, second_norm)).chunk(2, -1)
            x = down(F.silu(gate) * up, x)
        cache.end(1)
        return self.head(self.normed(x, self.norm))

    def normed(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm: sqrt(C) x / sqrt(sum of x^2 + C eps), times its weight; weight holds the sqrt(C)."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return (x / torch.hypot(length, self.eps) * weight).to(x.dtype)


class Product:
    """x (B, C) times a layer's weight (N, C): (B, N)."""

    def __init__(self, layer: torch.nn.Linear):
        weight = layer.weight.detach()
        self.weight = weight.t()  # (C, N)
        # A CPU's BLAS shares the rows of the first matrix among its threads: of a few rows of x that keeps
        # one thread waiting. So a large weight comes first, a part a thread. With two threads the products
        # of SmolLM2, timed alone, take a quarter of the time for one row, a third for four, 3/4 for 64.
        parts = torch.get_num_threads()
        if weight.numel() >= LARGE and not weight.is_cuda and len(weight) % parts == 0:
            self.weight = weight.reshape(parts, -1, weight.shape[1])  # (parts, N / parts, C)

    def __call__(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """The product, added to `onto` (B, N)."""
        if self.weight.dim() == 2:
            return torch.mm(x, self.weight) if onto is None else torch.addmm(onto, x, self.weight)
        y = torch.bmm(self.weight, x.t().expand(len(self.weight), -1, -1)).view(-1, len(x)).t()
        return y if onto is None else onto + y
