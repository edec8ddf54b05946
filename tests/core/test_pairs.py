"""Which responses become a preference pair, and that every prompt is accounted for."""

from collections import Counter
from random import Random

import pytest

from minisr.pairs import select_pairs


def select(*rewards: list, texts: list[list[str]] | None = None) -> tuple[list[tuple[str, str]], Counter]:
    """(chosen, rejected) of each pair; the responses are named a, b, c and so on unless texts are given."""
    texts = texts or [list("abcdef"[:len(row)]) for row in rewards]
    pairs, counts = select_pairs([f"x{i}" for i in range(len(rewards))], texts, list(rewards))
    return [(p["chosen"], p["rejected"]) for p in pairs], counts


def test_the_best_is_chosen_and_the_worst_rejected():
    pairs, counts = select_pairs(["x"], [["a", "b", "c"]], [[3.0, 5.0, 1.0]])
    assert pairs == [{"prompt": "x", "chosen": "b", "rejected": "c",
                      "chosen_reward": 5.0, "rejected_reward": 1.0}]
    assert counts == {"pairs": 1, "unread": 0, "tie": 0, "identical": 0}


@pytest.mark.parametrize("rewards, pair", [
    ([4.0, None, 2.0], ("a", "c")), ([None, 4.0, 2.0], ("b", "c")), ([2.0, 4.0, None], ("b", "a")),
    ([None, 0.0, 1.0, None], ("c", "b")),
])
def test_an_unparsed_response_is_neither_chosen_nor_rejected(rewards, pair):
    assert select(rewards)[0] == [pair]


def test_a_reward_of_zero_is_a_reward():
    assert select([0.0, 3.0])[0] == [("b", "a")]


@pytest.mark.parametrize("rewards", [[], [None], [5.0], [None, None], [4.0, None], [None, None, 0.0]])
def test_a_prompt_with_fewer_than_two_rewards_is_dropped_as_unread(rewards):
    assert select(rewards) == ([], Counter(pairs=0, unread=1, tie=0, identical=0))


def test_a_tie_drops_its_own_prompt_only():
    pairs, counts = select([5.0, 1.0], [3.0, 3.0, None], [1.0, 5.0])
    assert pairs == [("a", "b"), ("b", "a")]
    assert counts == {"pairs": 2, "unread": 0, "tie": 1, "identical": 0}


def test_fractions_of_a_point_decide():
    assert select([10 / 3, 11 / 3])[0] == [("b", "a")]
    assert select([11 / 3, 4.0, 10 / 3, 3.0])[0] == [("b", "d")]  # rounded, a and c would come first


def test_the_same_text_is_not_preferred_to_itself():
    pairs, counts = select([5.0, 1.0], texts=[["same", "same"]])
    assert pairs == [] and counts == {"pairs": 0, "unread": 0, "tie": 0, "identical": 1}


def test_of_equal_rewards_the_first_response_is_taken():
    assert select([1.0, 5.0, 5.0, 1.0])[0] == [("b", "a")]
    assert select([5.0, 1.0, 1.0, 5.0])[0] == [("a", "b")]


def test_pairs_are_in_the_order_of_prompts_with_their_own_responses():
    pairs, _ = select_pairs(["p", "q", "r"], [["p1", "p2"], ["q1", "q2"], ["r1", "r2"]],
                            [[1.0, 2.0], [None, 2.0], [2.0, 1.0]])
    found = [(p["prompt"], p["chosen"], p["rejected"]) for p in pairs]
    assert found == [("p", "p2", "p1"), ("r", "r1", "r2")]


def test_every_prompt_is_counted_once_and_no_pair_could_be_better():
    rng = Random(1)
    rewards = [[rng.choice([None, 0.0, 1.0, 4.5]) for _ in range(rng.randint(0, 4))] for _ in range(400)]
    texts = [[rng.choice("uvw") for _ in row] for row in rewards]
    pairs, counts = select_pairs(list(range(400)), texts, rewards)
    assert sum(counts.values()) == 400 and counts["pairs"] == len(pairs)
    assert min(counts[name] for name in ("pairs", "unread", "tie", "identical")) > 0
    for pair in pairs:
        known = sorted(r for r in rewards[pair["prompt"]] if r is not None)
        assert pair["chosen_reward"] == known[-1] > known[0] == pair["rejected_reward"]
        assert pair["chosen"] != pair["rejected"]


@pytest.mark.parametrize("texts, rewards", [
    ([["a", "b"]], [[1.0, 2.0], [1.0, 2.0]]), ([["a", "b", "c"]], [[1.0, 2.0]]),
])
def test_lists_of_different_length_are_an_error(texts, rewards):
    with pytest.raises(ValueError):
        select_pairs(["x"], texts, rewards)
