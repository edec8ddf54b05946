"""One decode step, one token a row, in fewer operations.

Replaces ``model(ids[:, None], cache)[:, -1]``. A step of a small model, or of few rows, takes as long as it has
operations, whatever their size: so there are no modules and no time dimension here. Large products are split by output
rows where that lets every core of a CPU read a part of the weights. On the tiny model it makes responses 1.5 times
as fast. Legend as in model.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minisr.fast.cache import PrefixCache
from minisr.fast.forward import rope_cos_signed_sin, rotate
from minisr.model import Decoder, RMSNorm, upcast

MIN_SPLIT_NUMEL = 2**18  # numbers in a matrix that no longer stays in a core's own cache between two steps


class DecodeStep:
    """step(ids (B,), cache) returns the next logits (B, V)."""

    def __init__(self, model: Decoder, max_len: int):
        """For rows of up to max_len tokens."""
        cos, signed_sin = rope_cos_signed_sin(torch.arange(max_len, device=model.device)[None], model.config)
        self.cos, self.signed_sin = cos[0, 0], signed_sin[0, 0]  # (max_len, D)
        self.config, self.embedding = model.config, model.embed.weight.detach()
        wide = upcast(self.embedding[:0]).dtype
        self.scale, self.norm_eps = model.config.dim**0.5, model.config.norm_eps
        self.eps = torch.tensor(self.scale * model.config.norm_eps**0.5, dtype=wide, device=model.device)
        self.blocks = [(self._norm_weight(block.attention_norm), FastLinear(block.attention.qkv_proj),
                        FastLinear(block.attention.out_proj), self._norm_weight(block.feed_forward_norm),
                        FastLinear(block.feed_forward.gate_up_proj), FastLinear(block.feed_forward.down_proj))
                       for block in model.blocks]
        self.norm, self.head = self._norm_weight(model.norm), FastLinear(model.head)

    def _norm_weight(self, norm: RMSNorm) -> Tensor:
        weight = norm.weight.detach()
        return weight if weight.is_cuda else upcast(weight) * self.scale

    def __call__(self, ids: Tensor, cache: PrefixCache) -> Tensor:
        H, G, D = self.config.n_heads, self.config.n_kv_heads, self.config.head_dim
        cos, sin = self.cos[cache.seq_lens][:, None], self.signed_sin[cache.seq_lens][:, None]  # (B, 1, D)
        x = F.embedding(ids, self.embedding)  # (B, C)
        for layer, (attention_norm, qkv, out, feed_forward_norm, gate_up, down) in enumerate(self.blocks):
            heads = qkv(self.rms_norm(x, attention_norm)).contiguous().view(-1, H + 2 * G, D)
            qk, v = heads.split((H + G, G), 1)
            q, k = rotate(qk, cos, sin).split((H, G), 1)
            x = out(cache.attend_one(layer, q, k, v), residual=x)
            gate, up = gate_up(self.rms_norm(x, feed_forward_norm)).chunk(2, -1)
            x = down(F.silu(gate) * up, residual=x)
        cache.advance(1)
        return self.head(self.rms_norm(x, self.norm))

    def rms_norm(self, x: Tensor, scaled_weight: Tensor) -> Tensor:
        """sqrt(C) x / sqrt(sum(x^2) + C eps) times the weight; scaled_weight includes the sqrt(C).

        A GPU has one kernel for all of it, which takes the weight as it is."""
        if x.is_cuda:
            return F.rms_norm(x, scaled_weight.shape, scaled_weight, self.norm_eps)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=self.eps.dtype)
        return (x / torch.hypot(length, self.eps) * scaled_weight).to(x.dtype)


class FastLinear:
    """x (B, C) times a layer's weight (N, C): (B, N).

    A CPU's BLAS divides the rows of the first matrix among its threads, so for few rows of x all but one thread wait.
    A large weight therefore comes first, one part a thread. With two threads, the products of SmolLM2 timed alone take
    a quarter of the time for 1 row, a third for 4 and three quarters for 64."""

    def __init__(self, layer: torch.nn.Linear):
        weight = layer.weight.detach()
        self.weight = weight.t()  # (C, N)
        parts = torch.get_num_threads()
        if weight.numel() >= MIN_SPLIT_NUMEL and not weight.is_cuda and len(weight) % parts == 0:
            self.weight = weight.reshape(parts, -1, weight.shape[1])  # (parts, N / parts, C)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The product, added to `residual` (B, N) if it is given."""
        if self.weight.dim() == 2:
            return torch.mm(x, self.weight) if residual is None else torch.addmm(residual, x, self.weight)
        y = torch.bmm(self.weight, x.t().expand(len(self.weight), -1, -1)).view(-1, len(x)).t()
        return y if residual is None else residual + y
