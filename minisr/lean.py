"""Two operations of the decoder with their derivatives written out: less memory in training.

Left to autograd, both keep what is cheap to compute again: of SmolLM2-135M a third of all that is kept.
Legend as in model.py; F is the inner width of the feed-forward.
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
