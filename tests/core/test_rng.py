"""Counter-based random numbers: uniform, independent, and the published splitmix64."""

from random import Random

import numpy as np
import pytest
from tiny import assert_drawn_from

from minisr.rng import derive_seed, row_seeds, uniform


def test_numbers_are_uniform_and_below_one():
    many_seeds = uniform(row_seeds(0, 25_000, 4).flatten(), 0)
    one_seed = np.concatenate([uniform(np.array([derive_seed("any")], dtype=np.uint64), counter)
                               for counter in range(20_000)])
    for u in (many_seeds.astype(np.float64), one_seed.astype(np.float64)):
        assert 0 <= u.min() and u.max() < 1
        assert u.mean() == pytest.approx(1 / 2, abs=5 / (12 * len(u)) ** 0.5)
        assert u.var() == pytest.approx(1 / 12, abs=5 / (180 * len(u)) ** 0.5)
        assert_drawn_from(np.full(100, 0.01), np.histogram(u, bins=100, range=(0, 1))[0])


def splitmix64(state, counter):  # Steele, Lea and Flood (2014), on integers of any size
    z = (state + (counter + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_uniform_is_the_upper_bits_of_splitmix64():
    assert splitmix64(1234567, 0) == 6457827717110365317  # the published test vector
    seeds = [0, 1, 2**63 - 1, *(Random(0).randrange(2**63) for _ in range(200))]
    for counter in (0, 1, 63, 64, 64 * 319):
        expected = [(splitmix64(seed, counter) >> 40) / 2**24 for seed in seeds]
        assert uniform(np.array(seeds, dtype=np.uint64), counter).tolist() == expected


@pytest.mark.parametrize("seed", [0, derive_seed(0, "responses")])
def test_no_two_samples_share_their_random_numbers_at_any_shift(seed):
    # Runs of three numbers, so that equality by chance is out of the question.
    seeds = row_seeds(seed, 300, 4).flatten()
    numbers = np.stack([uniform(seeds, step * 64) for step in range(40)], axis=1)  # first attempts of 40 tokens
    runs = np.lib.stride_tricks.sliding_window_view(numbers, 3, axis=1).reshape(-1, 3)
    assert len(np.unique(runs, axis=0)) == len(runs)


def test_a_row_seed_belongs_to_its_prompt_and_sample_whatever_their_number():
    seeds = row_seeds(7, 50, 8)
    assert seeds.shape == (50, 8) and seeds.dtype == np.uint64 and seeds.max() < 2**63
    assert len(np.unique(seeds)) == seeds.size
    assert (row_seeds(7, 3, 2) == seeds[:3, :2]).all()
    for i, j in ((0, 0), (0, 1), (1, 0), (49, 7)):  # on integers of any size
        assert seeds[i, j] == (7 ^ (i * 0x8CB92BA72F3D8DD7 + j * 0xD1B54A32D192ED03)) % 2**63


def test_a_derived_seed_belongs_to_its_path_alone_and_is_the_same_in_every_process():
    similar = [(0, 1), (1, 0), (0, "1"), ("0", 1), (0, 1, 0), (1,), (10,), ((0, 1),)]
    assert len({derive_seed(*path) for path in similar}) == len(similar)
    assert all(0 <= derive_seed(i) < 2**63 for i in range(1000))
    assert derive_seed(0, "M1", "responses") == 7846638067072308839  # b2sum -l 64, little-endian, >> 1
