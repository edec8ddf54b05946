"""Tests on generated inputs: each is tried on a hundred of them, with -m slow on thousands more."""

import itertools
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


def for_all(slow: int = 10_000, **inputs):
    """A decorator that runs a test on generated inputs: 100 of them, and `slow` ones with -m slow.

    The inputs are the same in every run, so that no test fails by chance."""
    def decorate(function):
        def test(examples):
            how = settings(max_examples=examples, derandomize=True, database=None, deadline=None)
            how(given(**inputs)(function))()
        test.__doc__ = function.__doc__
        return pytest.mark.parametrize("examples", [100, pytest.param(slow, marks=pytest.mark.slow)])(test)
    return decorate


def one_of(*values) -> st.SearchStrategy:
    return st.sampled_from(values)


def tuples_of(*choices, longest: int, shortest: int = 0) -> st.SearchStrategy:
    """Lists of tuples with one of each choice: fewer decisions for hypothesis than tuples of strategies."""
    return st.lists(one_of(*itertools.product(*choices)), min_size=shortest, max_size=longest)


def texts_with(*pieces: str, most: int = 8) -> st.SearchStrategy:
    """Texts that mix these pieces with arbitrary characters."""
    return st.lists(one_of(*pieces) | st.characters(codec="utf-8"), max_size=most).map("".join)


@cache
def all_sequences(length: int) -> list[tuple[int, ...]]:
    """All sequences of this length of the numbers below it."""
    return list(itertools.product(range(length), repeat=length))
