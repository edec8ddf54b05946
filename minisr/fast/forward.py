"""The decoder's forward pass with a choice of attention, reading the weights of a core Decoder.

Replaces Decoder.hidden_states where only some tokens need an output, or where rows share keys. The last feed-forward
network and the head run only on selected tokens: with one target in three, that saves 15 % of SmolLM2-135M's matrix
products.
Legend as in model.py; N is the number of selected tokens.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from minisr.model import Block, Decoder, ModelConfig, RMSNorm, rope_cos_sin, upcast

EAGER_MAX_LEN = 128  # tokens of a row, up to which matrix products are faster than a CPU's fused attention
EAGER_MAX_LEN_BFLOAT16 = 384  # faster even at 500, but the memory grows with the square of the length


def final_hidden(model: Decoder, ids: Tensor, positions: Tensor, attention_fn, select: Tensor | None = None,
                 gradient_checkpointing: bool = False) -> Tensor:
    """The last layer's output, normalized: (B, T, C), or (N, C) of the tokens at `select` in the flattened (B T).

    ids (B, T), positions (B or 1, T), select (N,).
    attention_fn(layer, q, k, v) attends with q (B, H, T, D) and new k, v (B, G, T, D): (B, H, T, D)."""
    x = model.dropout(model.embed(ids))  # (B, T, C)
    cos, sin = rope_cos_signed_sin(positions, model.config)
    for layer, block in enumerate(model.blocks):
        is_last = layer == model.config.n_layers - 1
        inputs = (block, x, cos, sin, partial(attention_fn, layer), select if is_last else None)
        x = checkpoint(run_block, *inputs, use_reentrant=False) if gradient_checkpointing else run_block(*inputs)
    if select is not None and not model.blocks:
        x = x.flatten(0, 1)[select]
    return rms_norm(model.norm, x)


def run_block(block: Block, *inputs) -> Tensor:
    """block_forward(block, *inputs). A block whose weights are elsewhere until it computes, as FSDP's are, has a method
    call(function, *inputs), which gathers them, returns function(*inputs), and frees them."""
    call = getattr(block, "call", None)
    return call(block_forward, block, *inputs) if call else block_forward(block, *inputs)


def block_forward(block: Block, x: Tensor, cos: Tensor, sin: Tensor, attention_fn, select: Tensor | None) -> Tensor:
    """Block.forward with another attention; after it, only the selected tokens continue: (B, T, C), or (N, C).

    x (B, T, C), cos and sin as from rope_cos_signed_sin, select (N,)."""
    attention, (B, T, _) = block.attention, x.shape
    H, G, D = attention.config.n_heads, attention.config.n_kv_heads, attention.config.head_dim
    qkv = attention.qkv_proj(rms_norm(block.attention_norm, x)).view(B, T, H + 2 * G, D).transpose(1, 2)
    qk, v = qkv.split((H + G, G), dim=1)
    q, k = rotate(qk, cos, sin).split((H, G), dim=1)
    y = attention_fn(q, k, v)  # (B, H, T, D)
    x = x + block.dropout(attention.out_proj(y.transpose(1, 2).reshape(B, T, H * D)))
    if select is not None:
        x = x.flatten(0, 1).index_select(0, select)  # (N, C)
    return x + block.dropout(block.feed_forward(rms_norm(block.feed_forward_norm, x)))


def rope_cos_signed_sin(positions: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """model.rope_cos_sin with the first half of the sines negated, as rotate() needs them."""
    cos, sin = rope_cos_sin(positions, config)
    first, second = sin.chunk(2, dim=-1)
    return cos, torch.cat([-first, second], dim=-1)


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Replaces model.apply_rope for x (B, H, T, D): one roll swaps the halves, in half the time on a CPU."""
    return (x * cos + x.roll(x.shape[-1] // 2, -1) * signed_sin).to(x.dtype)


def rms_norm(norm: RMSNorm, x: Tensor) -> Tensor:
    """One fused kernel on a GPU. On a CPU, PyTorch's own backward pass takes three times as long as the formula's."""
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps) if x.is_cuda else norm(x)


def causal_attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every token attends to itself and those before it; there is no padding on the left.

    q (B, H, T, D), k and v (B, G, T, D): (B, H, T, D)."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def choose_causal_attention(ids: Tensor, dtype: torch.dtype):
    """causal_attention on rows of ids (B, T), as matrix products where these are faster.

    In float32 the fused kernel is about as fast, because with is_causal it skips half of the work."""
    B, T = ids.shape
    if ids.is_cuda or dtype != torch.bfloat16 or T > EAGER_MAX_LEN_BFLOAT16:
        return causal_attention
    attention = MaskedAttention(torch.ones(T, T, dtype=torch.bool).tril().expand(B, 1, T, T))
    return lambda layer, q, k, v: attention(q, k, v)


class MaskedAttention:
    """Attention under the same mask (B, 1, T, T) in all layers.

    On a CPU, PyTorch's fused kernel is slower than matrix products for short rows, and gains nothing from bfloat16."""

    def __init__(self, mask: Tensor):
        self.mask = mask
        self.bias: Tensor | None = None  # the mask as a bias on the attention logits: 0 or -inf

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of q (B, H, T, D) on k, v (B, G, T, D): (B, H, T, D)."""
        max_len = EAGER_MAX_LEN_BFLOAT16 if q.dtype == torch.bfloat16 else EAGER_MAX_LEN
        if q.is_cuda or q.shape[2] > max_len:
            return grouped_attention(q, k, v, self.mask)
        return self.eager(q, k, v)

    def eager(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(D)) v by two matrix products."""
        (B, H, T, D), G = q.shape, k.shape[1]
        if self.bias is None:
            bias = torch.zeros_like(self.mask, dtype=q.dtype).masked_fill(~self.mask, -torch.inf)
            self.bias = bias.expand(B, H, T, T).reshape(B * G, -1, T)  # (B G, R T, T)
        q, k, v = q.reshape(B * G, -1, D), k.flatten(0, 1), v.flatten(0, 1)  # (B G, R T, D), (B G, T, D)
        return torch.bmm(softmax(attention_logits(q, k, self.bias)), v).view(B, H, T, D)


def attention_logits(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
    """q (B G, Q, D) times keys (B G, S, D), over sqrt(D), plus bias (B G, 1 or Q, S): (B G, Q, S)."""
    return bias.baddbmm(q, k.transpose(1, 2), alpha=q.shape[-1]**-0.5)


def softmax(x: Tensor) -> Tensor:
    """Computed in float32 where x is bfloat16; a GPU's kernel does that by itself."""
    return x.softmax(-1) if x.is_cuda else upcast(x).softmax(-1).to(x.dtype)


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention of q (B, H, T, D) on k, v (B, G, S, D) under mask (B, 1, T, S): (B, H, T, D).

    The R = H / G queries that share a key are laid side by side in time, so no key is copied and no kernel has to
    support grouped queries together with a mask."""
    B, H, T, D = q.shape
    G = k.shape[1]
    mask = mask.repeat(1, 1, H // G, 1)  # (B, 1, R T, S)
    q = q.reshape(B, G, (H // G) * T, D)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(B, H, T, D)
