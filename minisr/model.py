"""The decoder: a small Llama-style transformer. The KV cache (cache.py) is handed to it.

Shape legend, used in every module:
    B  rows of a batch        H  query heads           V  vocabulary
    T  new tokens             G  key/value heads       L  layers
    S  tokens seen so far     R  = H / G queries that share one key/value head
    C  dim                    D  head_dim

Differs from Llama in nothing but size. Read from the top; stop when satisfied.
"""

import math
from dataclasses import dataclass, fields
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minisr.fast.cache import KVCache
from minisr.fast.lean import Norm, Rotate, SwiGLU


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder."""

    vocab_size: int = 1152
    dim: int = 128
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int = 2
    ffn_dim: int = 344  # inner dimension of the SwiGLU feed-forward
    max_seq_len: int = 256  # the longest sequence, prompt and response together
    head_dim: int = 0  # 0: dim / n_heads
    rope_theta: float = 10000.0
    rope_scaling: tuple[float, ...] = ()  # (factor,), or Llama 3's (factor, low, high, original context)
    norm_eps: float = 1e-5
    tie_embeddings: bool = True  # one matrix for the embedding and the head

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int:
                if type(value) is not int or value < (field.name not in ("n_layers", "head_dim")):
                    raise ValueError(f"{field.name} must be a whole number of 1 or more, not {value!r}")
                if value > 2**24:  # told before memory is taken
                    raise ValueError(f"{field.name} cannot be {value}")
            elif field.type is float and not (type(value) in (int, float) and 0 <= value < math.inf):
                raise ValueError(f"{field.name} must be a number, not negative, not {value!r}")
        if not self.head_dim and self.dim % (2 * self.n_heads) or self.n_heads % self.n_kv_heads:
            raise ValueError("dim must be an even multiple of n_heads, and n_heads a multiple of n_kv_heads")
        object.__setattr__(self, "head_dim", self.head_dim or self.dim // self.n_heads)
        object.__setattr__(self, "rope_scaling", tuple(self.rope_scaling))
        if self.head_dim % 2 or len(self.rope_scaling) not in (0, 1, 4) or 0 in self.rope_scaling:
            raise ValueError("head_dim must be even, and rope_scaling have 0, 1 or 4 numbers, none 0")


class Decoder(nn.Module):
    """token ids (B, T) -> logits (B, T, V). All state but the weights is in the cache it is handed."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.dropout = nn.Dropout(0.0)  # a training sets it
        self.recompute = False  # activations in the backward pass: a third slower, far less memory
        self.tie()

    def tie(self) -> None:
        """One matrix for embedding and head, if the config says so; again after weights were replaced."""
        if self.config.tie_embeddings:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        return self.head(self.hidden(ids, cache))  # (B, T, V)

    def hidden(self, ids: Tensor, cache: KVCache | None = None, wanted: Tensor | None = None) -> Tensor:
        """The last layer's output (B, T, C), before the head; or of N `wanted` tokens alone, by their
        numbers in the flattened (B T): (N, C). The last feed-forward is computed for no others."""
        new = ids.shape[1]
        positions = torch.arange(new, device=ids.device)[None] if cache is None else cache.begin(new)
        x = self.dropout(self.embed(ids))  # (B, T, C)
        rotation = rotary(positions, self.config)
        for layer, block in enumerate(self.blocks):
            # Without a cache (training) there is no padding on the left, so causal is all it takes.
            attend = causal if cache is None else partial(cache.attend, layer)
            rest = (rotation, attend, wanted if layer == self.config.n_layers - 1 else None)
            if self.recompute and self.training:
                x = checkpoint(block, x, *rest, use_reentrant=False)
            else:
                x = block(x, *rest)
        if cache is not None:
            cache.end(new)
        if wanted is not None and not self.blocks:
            x = x.flatten(0, 1)[wanted]
        return self.norm(x)

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device


class Block(nn.Module):
    """Pre-norm: attention, then feed-forward, each added to the stream."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config)
        self.attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x, rotation, attend, wanted=None):
        x = x + self.dropout(self.attention(self.attention_norm(x), rotation, attend))
        if wanted is not None:
            x = x.flatten(0, 1).index_select(0, wanted)  # (N, C)
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), times a weight. On a CPU, PyTorch's own is three times as slow to train."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.eps, self.weight = config.norm_eps, nn.Parameter(torch.ones(config.dim))

    def forward(self, x):
        if x.is_cuda:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return Norm.apply(x, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions: R query heads share one key/value head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        heads = config.n_heads + 2 * config.n_kv_heads
        self.qkv_proj = nn.Linear(config.dim, heads * self.head_dim, bias=False)  # one product for all
        self.out_proj = nn.Linear(self.n_heads * self.head_dim, config.dim, bias=False)

    def forward(self, x, rotation, attend):
        B, T, _ = x.shape
        heads = self.qkv_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H + 2 G, T, D)
        turning, v = heads.split((self.n_heads + self.n_kv_heads, self.n_kv_heads), 1)
        q, k = rotate(turning, rotation).split((self.n_heads, self.n_kv_heads), 1)
        y = attend(q, k, v)  # (B, H, T, D)
        return self.out_proj(y.transpose(1, 2).reshape(B, T, -1))


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each of q (B, H, T, D) looks at k, v (B, G, T, D) up to its own place."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_up_proj = nn.Linear(config.dim, 2 * config.ffn_dim, bias=False)
        self.down_proj = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x):
        return SwiGLU.apply(self.gate_up_proj(x), self.down_proj.weight)


def rotary(positions: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin (B, 1, T, D) of the angle position * frequency; the sines of the first half negated."""
    angle = positions[:, None, :, None].float() * frequencies(config, positions.device)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


@lru_cache
def frequencies(config: ModelConfig, device) -> Tensor:
    """theta^(-2i/D), and slower for a context longer than that of pretraining: (D/2,).

    Linear scaling divides all by a factor. Llama 3 does so where a turn is longer than context / low,
    not where it is shorter than context / high, and in between a share of it."""
    D = config.head_dim
    exponent = torch.arange(0, D, 2, device=device, dtype=torch.float32) / D
    frequency = 1.0 / config.rope_theta**exponent  # Llama's own rounding: at position 8000 the last bit shows
    if not config.rope_scaling:
        return frequency
    factor, *rest = config.rope_scaling
    if not rest:
        return frequency / factor
    low, high, context = rest
    turns = context * frequency / (2 * math.pi)  # full turns within the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency * (keep + (1 - keep) / factor)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (x_i, x_{i+D/2}) by its angle (RoPE, half-split as in Llama's HF weights): to
    x_i cos - x_{i+D/2} sin and x_{i+D/2} cos + x_i sin."""
    return Rotate.apply(x, *rotation)


def part_rows(name: str, config: ModelConfig) -> list[int]:
    """How many rows of a weight each matrix has that it is made of; [] if it is one."""
    q, k = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    return [q, k, k] if "qkv_proj" in name else [config.ffn_dim] * 2 if "gate_up_proj" in name else []


def init_weights(model: Decoder, generator: torch.Generator) -> None:
    """Normal with std 0.02; what writes to the stream (out, down) is scaled by 1/sqrt(2 L)."""
    for name, weight in model.named_parameters():
        if weight.dim() < 2:
            continue
        writes = name.endswith(("out_proj.weight", "down_proj.weight"))
        std = 0.02 / math.sqrt(2 * model.config.n_layers) if writes else 0.02
        nn.init.normal_(weight, std=std, generator=generator)


def out_of_memory(error: Exception) -> bool:
    """Whether this is what PyTorch raises then; a CPU's has no type of its own."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "alloc" in str(error).lower()
