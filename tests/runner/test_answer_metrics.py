"""Metrics of answers that the oracle scored."""

from minisr.runner.evaluation import answer_metrics


def test_answer_metrics_by_hand():
    flawless, poor = [True] * 5, [True, False, False, True, False]
    metrics = answer_metrics([
        {"sampled": "abcd", "greedy": "x", "sampled_points": flawless, "greedy_points": poor},
        {"sampled": "ab", "greedy": "y", "sampled_points": poor, "greedy_points": poor},
    ])
    assert metrics["flawless"] == 0.5 and metrics["flawless_greedy"] == 0
    assert metrics["mean_score"] == 3.5 and metrics["mean_score_greedy"] == 2
    assert metrics["criteria"] == [1, 0.5, 0.5, 1, 0.5] and metrics["criteria_greedy"] == [1, 0, 0, 1, 0]
    assert metrics["length"] == 3
    assert metrics["mean_score_ci95"] == [2, 5] and metrics["flawless_greedy_ci95"] == [0, 0]
