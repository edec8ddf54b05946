"""Metrics of models and judges, against hand arithmetic, scipy and simulation."""

from math import sqrt

import numpy as np
import pytest

from minisr.evaluate import (
    bootstrap_ci,
    correlation,
    judge_metrics,
    ordered_correctly,
    pair_signs,
    ranks,
    win_rates,
)


def random_ranking(rng: np.random.Generator) -> tuple[list, list]:
    """Two rankings of the same responses, with many ties but neither of them constant."""
    while True:
        size = int(rng.integers(2, 8))
        a, b = rng.integers(0, 4, size).tolist(), rng.choice([0, 1, 2.5, 4, 5], size).tolist()
        if len(set(a)) > 1 and len(set(b)) > 1:
            return a, b


def test_the_five_metrics_by_hand():
    truth = [[5, 3, 1], [2, 2, 4], [1, 1, 1], [4, 2]]
    given = [[5, 4, 4], [None, 5, 3], [5, 5, 0], [3.5, 1.25]]
    # 1st: 5>3 and 5>1 found, 3>1 a tie of the model: 2 of 3. 2nd: one unparsed, one inverted: 0 of 2.
    # 3rd: the annotator ranks nothing. 4th: 1 of 1.
    metrics = judge_metrics(truth, given)
    assert metrics["pairwise"] == pytest.approx(3 / 6)
    assert metrics["exact"] == pytest.approx(1 / 3)
    assert metrics["five_best"] == pytest.approx(1 / 2)  # the second one's 5 is not one of its best
    # Ranks of the first: 3 2 1 against 3 1.5 1.5, r = 1.5 / sqrt(2 * 1.5); tau-b = 2 / sqrt(3 * 2).
    assert metrics["spearman"] == pytest.approx((1.5 / sqrt(3) - 1 + 1) / 3)
    assert metrics["kendall"] == pytest.approx((2 / sqrt(6) - 1 + 1) / 3)


def test_pairs_that_the_annotator_ties_do_not_count():
    assert ordered_correctly([3, 3, 1], [0, 5, 0]) == [False, True]


def test_an_unparsed_response_makes_its_pairs_wrong_and_is_left_out_of_the_correlations():
    metrics = judge_metrics([[3, 2, 1]], [[5, None, 0]])
    assert metrics["pairwise"] == pytest.approx(1 / 3)
    assert [metrics["spearman"], metrics["kendall"]] == pytest.approx([1, 1])


@pytest.mark.parametrize("given", [[4, None, None], [None, None, None], [4, 4, None]])
def test_with_too_little_to_rank_the_correlation_is_0(given):
    metrics = judge_metrics([[3, 2, 1]], [given])
    assert metrics["pairwise"] == metrics["exact"] == metrics["spearman"] == metrics["kendall"] == 0


def test_a_perfect_judge_gets_1_everywhere():
    truth = [[5, 3, 1], [2, 2, 5], [0, 5]]
    metrics = judge_metrics(truth, truth)
    for name in ("pairwise", "five_best", "exact", "spearman", "kendall"):
        assert metrics[name] == pytest.approx(1), name
    assert metrics["pairwise_ci95"] == [1, 1]


def test_a_judge_that_inverts_gets_minus_1():
    metrics = judge_metrics([[5, 3, 1]], [[0, 2, 4]])
    assert [metrics[name] for name in ("pairwise", "spearman", "kendall")] == pytest.approx([0, -1, -1])


@pytest.mark.parametrize("score", [0, 3, 5])
def test_a_constant_judge_gets_0(score):
    metrics = judge_metrics([[5, 3, 1], [2, 4, 4]], [[score] * 3] * 2)
    assert metrics["pairwise"] == metrics["exact"] == metrics["spearman"] == metrics["kendall"] == 0
    assert metrics["five_best"] == (pytest.approx(3 / 6) if score == 5 else None)


def test_without_any_ranking_there_is_no_metric():
    assert set(judge_metrics([[1, 1]], [[0, 5]]).values()) == {None}


def test_spearman_and_kendall_equal_scipy():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b = random_ranking(rng)
        assert ranks(b).tolist() == stats.rankdata(b).tolist()
        spearman, kendall = correlation(ranks(a), ranks(b)), correlation(pair_signs(a), pair_signs(b))
        assert spearman == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)
        assert kendall == pytest.approx(stats.kendalltau(a, b, variant="b").statistic, abs=1e-12)


def test_correlations_are_means_over_instructions_of_scipys():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(1)
    truth, given = zip(*(random_ranking(rng) for _ in range(30)))
    metrics = judge_metrics(truth, given)
    for name, statistic in (("spearman", stats.spearmanr), ("kendall", stats.kendalltau)):
        each = [statistic(a, b).statistic for a, b in zip(truth, given)]
        assert metrics[name] == pytest.approx(np.mean(each), abs=1e-12)


def test_win_rates_by_hand():
    rates = win_rates([5, 3, 3, 1], [4, 3, 1, 0])
    assert (rates["win"], rates["tie"], rates["lose"]) == (0.75, 0.25, 0)
    assert rates["lose_ci95"] == [0, 0]
    swapped = win_rates([4, 3, 1, 0], [5, 3, 3, 1])
    assert (swapped["win"], swapped["tie"], swapped["lose"]) == (0, 0.25, 0.75)


def test_without_prompts_there_is_no_win_rate():
    assert set(win_rates([], []).values()) == {None}


def test_win_tie_and_lose_are_all_there_is():
    rng = np.random.default_rng(0)
    for seed in range(20):
        rates = win_rates(rng.integers(0, 6, 50).tolist(), rng.integers(0, 6, 50).tolist(), seed)
        assert rates["win"] + rates["tie"] + rates["lose"] == pytest.approx(1)
        assert all(rates[f"{x}_ci95"][0] <= rates[x] <= rates[f"{x}_ci95"][1] for x in ("win", "tie", "lose"))


def test_the_interval_contains_the_true_mean_19_times_in_20():
    rng = np.random.default_rng(0)
    intervals = [bootstrap_ci(rng.random(100) < 0.6, seed) for seed in range(200)]
    hits = sum(low <= 0.6 <= high for low, high in intervals)
    assert 0.91 <= hits / 200 <= 0.985  # 0.95 more or less two and a half standard errors


def test_the_interval_is_as_wide_as_the_normal_approximation_says():
    values = [0, 1] * 200
    low, high = bootstrap_ci(values)
    assert [low, high] == pytest.approx([0.5 - 1.96 * 0.5 / 20, 0.5 + 1.96 * 0.5 / 20], abs=0.006)
    assert bootstrap_ci(values) == [low, high] and bootstrap_ci([2.5] * 7) == [2.5, 2.5]


def test_the_pairwise_interval_resamples_instructions():
    # All three pairs of an instruction right, or all wrong: as uncertain as 40 values, not as 120.
    truth, right = [[3, 2, 1]] * 40, [k % 2 == 0 for k in range(40)]
    given = [[3, 2, 1] if r else [1, 2, 3] for r in right]
    low, high = judge_metrics(truth, given)["pairwise_ci95"]
    half = 1.96 * 0.5 / sqrt(40)
    assert [low, high] == pytest.approx([0.5 - half, 0.5 + half], abs=0.02)


def test_the_pairwise_interval_counts_an_instruction_by_its_pairs():
    # Half the instructions have one pair, wrong; half have six, right: 6 of 7 pairs, not one half.
    truth, given = [[1, 2], [1, 2, 3, 4]] * 40, [[2, 1], [1, 2, 3, 4]] * 40
    metrics = judge_metrics(truth, given)
    low, high = metrics["pairwise_ci95"]
    assert metrics["pairwise"] == pytest.approx(6 / 7) and low < 6 / 7 < high and high - low < 0.15
