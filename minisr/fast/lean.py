"""Three operations of the decoder with their derivatives written out: less memory and time in training.

Left to autograd, the first two keep what is cheap to compute again, and the third takes twice as many
operations. Legend as in model.py; F is ffn_dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function


class Norm(Function):
    """RMSNorm of x (..., C): x r weight, where r = 1 / sqrt(mean(x^2) + eps). Keeps x and r (..., 1)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        r = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, r)
        return (x * r).to(x.dtype) * weight

    @staticmethod
    def backward(ctx, grad: Tensor):
        """dr/dx = -r^3 x / C, so the gradient is weight grad r - x r^3 sum(weight grad x) / C."""
        x, weight, r = ctx.saved_tensors
        product = (grad * x).float()
        share = (product @ weight.float())[..., None] * r**3 / x.shape[-1]  # (..., 1)
        for_x = torch.addcmul(grad * weight * r, x, share, value=-1)
        for_weight = r.reshape(1, -1) @ product.flatten(0, -2)  # (1, C)
        return for_x, for_weight[0], None


class SwiGLU(Function):
    """silu(gate) * up times the weight down (C, F), gate and up side by side (..., 2 F). Keeps only these."""

    @staticmethod
    def forward(ctx, gate_up: Tensor, down: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up, down)
        gate, up = gate_up.chunk(2, -1)
        return F.linear(F.silu(gate) * up, down)

    @staticmethod
    def backward(ctx, grad: Tensor):
        gate_up, down = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        silu, inner, for_gate_up = F.silu(gate), grad @ down, torch.empty_like(gate_up)
        for_gate, for_up = for_gate_up.chunk(2, -1)  # (..., F), as silu and inner
        torch.mul(inner, silu, out=for_up)  # written where they belong: cat would copy both
        torch.ops.aten.silu_backward.grad_input(inner.mul_(up), gate, grad_input=for_gate)
        return for_gate_up, grad.flatten(0, -2).t() @ silu.mul_(up).flatten(0, -2)


class Rotate(Function):
    """turn(), whose derivative turns the other way. Keeps nothing of x."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return turn(x, cos, sin)

    @staticmethod
    def backward(ctx, grad: Tensor):
        cos, sin = ctx.saved_tensors
        return turn(grad, cos, sin, -1), None, None


def turn(x: Tensor, cos: Tensor, sin: Tensor, way: int = 1) -> Tensor:
    """x (..., D) times cos, plus its halves swapped times sin, whose first half is negated."""
    # Not addcmul, which rounds once less: an export would differ from transformers by 7e-5, not 1e-5.
    return torch.add(x * cos, x.roll(x.shape[-1] // 2, -1) * sin, alpha=way).to(x.dtype)
