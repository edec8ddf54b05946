"""minisr.rng.uniform on tensors, so that random numbers are made on the GPU: the same numbers, bit for bit."""

import numpy as np
import torch
from torch import Tensor

from minisr.rng import GOLDEN_GAMMA
from minisr.sampler import MAX_ATTEMPTS


def seeds_to_tensor(seeds: np.ndarray, device) -> Tensor:
    """uint64 seeds as int64, the same 64 bits."""
    return torch.from_numpy(seeds.astype(np.int64)).to(device)


def uniform(seeds: Tensor, counter: int) -> Tensor:
    """A float32 in [0, 1) for each seed (int64). Replaces rng.uniform."""
    return splitmix64(seeds + to_int64((counter + 1) * GOLDEN_GAMMA))


def first_uniforms(seeds: Tensor, steps: int) -> Tensor:
    """uniform(seeds, MAX_ATTEMPTS * step) of every step: (steps, B). They are the first attempts of sample_top_p."""
    counters = [to_int64((MAX_ATTEMPTS * step + 1) * GOLDEN_GAMMA) for step in range(steps)]
    return splitmix64(seeds + torch.tensor(counters, dtype=torch.long, device=seeds.device)[:, None])


def uniforms(seeds: Tensor, counters: Tensor) -> Tensor:
    """uniform() at each of these counters (N,), which may lie on a GPU: (N, B)."""
    return splitmix64(seeds + (counters + 1)[:, None] * to_int64(GOLDEN_GAMMA))


def splitmix64(x: Tensor) -> Tensor:
    x = (x ^ shift_right(x, 30)) * to_int64(0xBF58476D1CE4E5B9)
    x = (x ^ shift_right(x, 27)) * to_int64(0x94D049BB133111EB)
    x = x ^ shift_right(x, 31)
    return shift_right(x, 40).float() / 2**24


def shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift. PyTorch's ``>>`` copies the sign bit of a negative number."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def to_int64(value: int) -> int:
    """The low 64 bits of a Python integer, read as a signed number."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value
