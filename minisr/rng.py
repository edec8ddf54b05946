"""Counter-based random numbers: every number that draws a token is a hash of what it is used for.

With a shared stream, the numbers of one sample would depend on its neighbors in the batch. Here they depend only on the
sample's own seed: on the step, the index of the prompt and the index of the sample. Batch size and resuming do not
change them.
"""

import hashlib

import numpy as np

GOLDEN_GAMMA = 0x9E3779B97F4A7C15  # the increment of splitmix64 (Steele et al., 2014)


def derive_seed(*path) -> int:
    """A 63-bit seed hashed from `path`, e.g. ``derive_seed(0, "M1", "responses")``."""
    digest = hashlib.blake2b(repr(path).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def row_seeds(seed: int, prompts: int, n: int) -> np.ndarray:
    """One seed for each of n samples of each prompt: uint64 (prompts, n)."""
    # Two odd constants keep the seeds of different (i, j) apart; 63 bits fit into a signed int64.
    i, j = np.arange(prompts, dtype=np.uint64)[:, None], np.arange(n, dtype=np.uint64)
    mixed = np.uint64(seed) ^ (i * np.uint64(0x8CB92BA72F3D8DD7) + j * np.uint64(0xD1B54A32D192ED03))
    return mixed & np.uint64(2**63 - 1)


def uniform(seeds: np.ndarray, counter: int) -> np.ndarray:
    """A number in [0, 1) for each seed (uint64), with 24 random bits: the splitmix64 hash of seed and counter."""
    x = seeds + np.uint64((counter + 1) * GOLDEN_GAMMA % 2**64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(40)).astype(np.float32) / np.float32(2**24)
