"""Random numbers by coordinates: what is drawn for a sample does not depend on who stands beside it.

A shared stream would give a row other numbers when the batch, the order or the place of resuming changes.
"""

import hashlib

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's step


def key(*coordinates) -> int:
    """A 63-bit number that belongs to these coordinates alone, e.g. key(seed, "responses", t)."""
    digest = hashlib.blake2b(repr(coordinates).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def first_numbers(keys: Tensor, steps: int) -> Tensor:
    """The number with which each row (B,) first tries at each step: (steps, B), in one go."""
    counters = [_signed((64 * t + 1) * GOLDEN) for t in range(steps)]
    return _mix(keys + torch.tensor(counters, dtype=torch.long, device=keys.device)[:, None])


def row_key(key: int, prompt: int, n: int) -> int:
    """The coordinates of one sample as a 63-bit number."""
    return (key ^ (prompt * 0x8CB92BA72F3D8DD7 + n * 0xD1B54A32D192ED03)) & (2**63 - 1)


def uniform(keys: Tensor, counter: int) -> Tensor:
    """A number in [0, 1) for each key (int64): the splitmix64 hash of key and counter."""
    return _mix(keys + _signed((counter + 1) * GOLDEN))


def _mix(x: Tensor) -> Tensor:
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ _shift_right(x, shift)) * _signed(factor)
    x = x ^ _shift_right(x, 31)
    return _shift_right(x, 40).float() / 2**24


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's >> on int64 keeps the sign."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _signed(value: int) -> int:
    """The low 64 bits of an integer as torch's int64."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value
