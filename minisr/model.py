"""The decoder: a small Llama-style transformer with a KV cache.

Shape legend, used in every module:
    B  rows of a batch            H  query heads           V  vocabulary size
    T  new tokens of each row     G  key/value heads       L  layers
    S  tokens so far, T included  D  dimension of a head   C  model dimension

The layout is that of Hugging Face's Llama. Weights are loaded from a checkpoint, or set by runner/pretrain.py.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder."""

    vocab_size: int = 1152
    dim: int = 128  # C
    n_layers: int = 4  # L
    n_heads: int = 4  # H
    n_kv_heads: int = 2  # G: each serves H / G query heads
    ffn_dim: int = 344  # inner dimension of the feed-forward network
    max_seq_len: int = 256  # of prompt and response together
    head_dim: int = 0  # D; 0: dim / n_heads
    rope_theta: float = 10000.0
    rope_scaling: tuple[float, ...] = ()  # linear: (factor,); Llama 3: (factor, low, high, original_max_seq_len)
    norm_eps: float = 1e-5
    tie_embeddings: bool = True  # the embedding and the output head share one matrix

    def __post_init__(self):
        # The dataclass is frozen, so that a config can be a dictionary key.
        object.__setattr__(self, "head_dim", self.head_dim or self.dim // self.n_heads)


class KVCache:
    """Keys and values of all tokens so far, for every layer: (L, B, G, max_len, D) each."""

    def __init__(self, model: "Decoder", batch_size: int, max_len: int):
        config, weight = model.config, model.embed.weight
        shape = (config.n_layers, batch_size, config.n_kv_heads, max_len, config.head_dim)
        self.k, self.v = weight.new_zeros(shape), weight.new_zeros(shape)
        self.length = 0  # tokens in the cache; Decoder.hidden_states advances it, after the last layer

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new k, v (B, G, T, D) of one layer; return all of its keys and values (B, G, S, D)."""
        end = self.length + k.shape[2]
        self.k[layer, :, :, self.length:end] = k
        self.v[layer, :, :, self.length:end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


class Decoder(nn.Module):
    """Token ids (B, T) -> logits (B, T, V). Logits at t predict the token at t + 1."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.dropout = nn.Dropout(0.0)  # the probability is set by train.set_training_mode
        self.tie_weights()

    def tie_weights(self) -> None:
        """Let embedding and head share one matrix, if the config says so."""
        if self.config.tie_embeddings:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, cache: KVCache | None = None, attention_mask: Tensor | None = None) -> Tensor:
        return self.head(self.hidden_states(ids, cache, attention_mask))  # (B, T, V)

    def hidden_states(self, ids: Tensor, cache: KVCache | None = None, attention_mask: Tensor | None = None) -> Tensor:
        """The last layer's output (B, T, C), normalized, before the head.

        ids (B, T) are the new tokens; `cache` holds those before them. attention_mask (B, S) is True on tokens and
        False on padding. It may be omitted if all padding is on the right: no token attends to what follows it."""
        B, T = ids.shape
        S = T + (cache.length if cache is not None else 0)
        if attention_mask is None:
            attention_mask = ids.new_ones(B, S, dtype=torch.bool)
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -T:]  # (B, T); padding does not count
        cos, sin = rope_cos_sin(positions, self.config)
        mask = causal_mask(attention_mask, T)  # (B, 1, T, S)
        x = self.dropout(self.embed(ids))  # (B, T, C)
        for block in self.blocks:
            x = block(x, cos, sin, mask, cache)
        if cache is not None:
            cache.length += T
        return self.norm(x)

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device


class Block(nn.Module):
    """Pre-norm transformer block: attention, then feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attention_norm = RMSNorm(config)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = RMSNorm(config)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, cache: KVCache | None) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), cos, sin, mask, cache))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class Attention(nn.Module):
    """Grouped-query attention with rotary position embeddings (RoPE)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        H, G, D = config.n_heads, config.n_kv_heads, config.head_dim
        self.qkv_proj = nn.Linear(config.dim, (H + 2 * G) * D, bias=False)  # queries, keys, values in one matrix
        self.out_proj = nn.Linear(H * D, config.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, cache: KVCache | None) -> Tensor:
        B, T, _ = x.shape
        H, G, D = self.config.n_heads, self.config.n_kv_heads, self.config.head_dim
        qkv = self.qkv_proj(x).view(B, T, H + 2 * G, D).transpose(1, 2)  # (B, H + 2 G, T, D)
        q, k, v = qkv.split((H, G, G), dim=1)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, G, S, D)
        # softmax(q k^T / sqrt(D)) v
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)  # (B, H, T, D)
        return self.out_proj(y.transpose(1, 2).reshape(B, T, H * D))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, 2020): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_up_proj = nn.Linear(config.dim, 2 * config.ffn_dim, bias=False)  # gate and up in one matrix
        self.down_proj = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)  # (B, T, ffn_dim) each
        return self.down_proj(F.silu(gate) * up)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), times a learned weight (Zhang and Sennrich, 2019)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.ones(config.dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = upcast(x)
        normalized = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normalized.to(x.dtype) * self.weight


def causal_mask(attention_mask: Tensor, T: int) -> Tensor:
    """Which of S tokens each of the last T may attend to: itself and the tokens before it, never padding.

    attention_mask (B, S) -> (B, 1, T, S). Padding attends to itself, because a softmax needs at least one term."""
    keys = torch.arange(attention_mask.shape[1], device=attention_mask.device)  # (S,)
    queries = keys[-T:, None]  # (T, 1)
    mask = (keys == queries) | ((keys < queries) & attention_mask[:, None])  # (B, T, S)
    return mask[:, None]


def rope_cos_sin(positions: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin of the angle position * frequency: positions (B, T) -> (B, 1, T, D) each."""
    angles = positions[:, None, :, None].float() * rope_frequencies(config, positions.device)  # (B, 1, T, D/2)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


@lru_cache
def rope_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """theta^(-2i/D) for i < D/2 (Su et al., 2021), scaled down for contexts longer than in pretraining: (D/2,).

    Linear scaling divides every frequency by a factor. Llama 3 divides the frequencies with fewer than `low` rotations
    over the original context, keeps those with more than `high`, and interpolates linearly in between."""
    exponents = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    if not config.rope_scaling:
        return frequencies
    if len(config.rope_scaling) == 1:
        return frequencies / config.rope_scaling[0]
    factor, low, high, original_max_seq_len = config.rope_scaling
    rotations = original_max_seq_len * frequencies / (2 * math.pi)
    smooth = ((rotations - low) / (high - low)).clamp(0, 1)
    return frequencies * (smooth + (1 - smooth) / factor)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x_i, x_{i + D/2}) of x (B, heads, T, D) by its angle: Hugging Face's half-split layout."""
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat([-second, first], dim=-1)
    return (x * cos + rotated * sin).to(x.dtype)


def upcast(x: Tensor) -> Tensor:
    """Convert half precision to float32; leave other dtypes as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
