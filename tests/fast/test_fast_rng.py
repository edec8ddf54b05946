"""Random numbers on tensors: those of minisr.rng, bit for bit."""

from random import Random

import numpy as np
import pytest
import torch
from generated import for_all
from hypothesis import strategies as st

from minisr import rng
from minisr.fast.rng import first_uniforms, seeds_to_tensor, shift_right, to_int64, uniform, uniforms


def random_seeds(bits, count=500):
    random = Random(bits)
    return np.array([0, 1, 2**bits - 1, *(random.randrange(2**bits) for _ in range(count))], dtype=np.uint64)


@pytest.mark.parametrize("bits", [63, 64])  # seeds have 63 bits; with 64 the tensor's integers are negative
@pytest.mark.parametrize("counter", [0, 1, 63, 64, 64 * 319, 2**40])
def test_uniform_is_that_of_the_core_bit_for_bit(bits, counter):
    seeds = random_seeds(bits)
    numbers, expected = uniform(seeds_to_tensor(seeds, "cpu"), counter), rng.uniform(seeds, counter)
    assert numbers.dtype == torch.float32 and expected.dtype == np.float32
    assert torch.equal(numbers, torch.from_numpy(expected))


@for_all(seed=st.integers(0, 2**63 - 1), prompts=st.integers(1, 4), n=st.integers(1, 4), step=st.integers(0, 500),
         attempt=st.integers(0, 63))
def test_every_attempt_of_every_row_uses_the_number_of_the_core(seed, prompts, n, step, attempt):
    seeds = rng.row_seeds(seed, prompts, n).flatten()
    expected = torch.from_numpy(rng.uniform(seeds, 64 * step + attempt))
    assert torch.equal(uniform(seeds_to_tensor(seeds, "cpu"), 64 * step + attempt), expected)


def test_the_first_numbers_of_all_steps_are_those_of_each_step():
    seeds = random_seeds(63, count=20)
    numbers = first_uniforms(seeds_to_tensor(seeds, "cpu"), 300)
    expected = np.stack([rng.uniform(seeds, 64 * step) for step in range(300)])
    assert torch.equal(numbers, torch.from_numpy(expected))


def test_the_numbers_of_several_counters_are_those_of_each():
    seeds, counters = random_seeds(63, count=20), [0, 5, 64, 64 * 319 + 63]
    numbers = uniforms(seeds_to_tensor(seeds, "cpu"), torch.tensor(counters))
    expected = np.stack([rng.uniform(seeds, counter) for counter in counters])
    assert torch.equal(numbers, torch.from_numpy(expected))


def test_integers_of_64_bits_are_read_as_signed_and_shifted_as_unsigned():
    for value in (0, 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64 + 5):
        assert to_int64(value) % 2**64 == value % 2**64 and -2**63 <= to_int64(value) < 2**63
        for bits in (1, 27, 30, 31, 40):
            assert shift_right(torch.tensor(to_int64(value)), bits).item() == value % 2**64 >> bits
