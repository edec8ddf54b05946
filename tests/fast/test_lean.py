"""Derivatives written out beside those that autograd finds, and how little is kept for them."""

import pytest
import torch
import torch.nn.functional as F
from minisr.fast.lean import Norm, Rotate, SwiGLU

from minisr.dpo import Packed


def norm(x, weight):
    return F.rms_norm(x, weight.shape, weight, 0.3)  # an eps that matters


def swiglu(gate_up, down):
    gate, up = gate_up.chunk(2, -1)
    return (gate * gate.sigmoid() * up) @ down.t()


ANGLES = torch.arange(12.0, dtype=torch.float64).view(4, 3) / 5  # (T, D/2)


def rotated(x):
    """Pair (x_i, x_{i+D/2}) as a complex number, turned."""
    turned = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(ANGLES), ANGLES)
    return torch.cat([turned.real, turned.imag], -1)


def rotate(x):
    cos, sin = ANGLES.cos().to(x.dtype), ANGLES.sin().to(x.dtype)
    return Rotate.apply(x, torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1))


CASES = {"norm": (lambda x, weight: Norm.apply(x, weight, 0.3), norm, (2, 3, 8), (8,)),
         "norm of rows": (lambda x, weight: Norm.apply(x, weight, 0.3), norm, (5, 8), (8,)),
         "swiglu": (SwiGLU.apply, swiglu, (2, 3, 12), (4, 6)),
         "swiglu of rows": (SwiGLU.apply, swiglu, (5, 12), (4, 6)),
         "rotate": (rotate, rotated, (2, 3, 4, 6))}


def made(case, dtype=torch.float64):
    """The operation, its formula, and random inputs."""
    ours, formula, *shapes = CASES[case]
    generator = torch.Generator().manual_seed(0)
    return ours, formula, [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
                           .requires_grad_() for shape in shapes]


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_formula(case):
    ours, formula, inputs = made(case)
    found, expected = ours(*inputs), formula(*inputs)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)  # Norm's mean is float32's
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for a, b in zip(torch.autograd.grad(found, inputs, grad), torch.autograd.grad(expected, inputs, grad)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        assert b.abs().max() > 0.1


@pytest.mark.parametrize("case", ["norm", "swiglu", "rotate"])
def test_bfloat16_comes_out_as_it_went_in(case):
    ours, formula, inputs = made(case, torch.bfloat16)
    found, expected = ours(*inputs), formula(*(x.float() for x in inputs))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected.float(), atol=0.05, rtol=0.05)
    for a, x in zip(torch.autograd.grad(found.sum(), inputs), torch.autograd.grad(expected.sum(), inputs)):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a, x.bfloat16(), atol=0.1, rtol=0.1)


def kept(run, *known):
    """Numbers that autograd keeps of run(), beside tensors already there."""
    sizes = {}
    there = {x.untyped_storage().data_ptr() for x in known}

    def note(x):
        if x.untyped_storage().data_ptr() not in there:
            sizes[x.untyped_storage().data_ptr()] = (x, x.untyped_storage().nbytes() // x.element_size())
        return x
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        run()
    return sum(size for _, size in sizes.values())


def test_nothing_is_kept_that_is_cheap_to_compute_again():
    x, weight = made("norm")[2]
    assert kept(lambda: Norm.apply(x, weight, 0.3), x, weight) == 6  # r, one number a row
    gate_up, down = made("swiglu")[2]
    assert kept(lambda: SwiGLU.apply(gate_up, down), gate_up, down) == 0
    x, = made("rotate")[2]
    assert kept(lambda: rotate(x)) == 2 * 4 * 6  # cos and sin
    packed = Packed([([1, 2], [3], [4, 5]), ([6], [7, 8], [9])], "cpu")
    heads = torch.randn(len(packed.cells), 2, 4, requires_grad=True)
    assert kept(lambda: packed._on_grid(heads * 1.0), packed.cells) == 0
