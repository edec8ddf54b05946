"""The numbers behind the charts of a run's page, computed from the run's files.

An *estimate* is (value, low, high): a value with its 95 % interval, or the value three times if it has none.
"""

from collections import defaultdict
from statistics import mean

import numpy as np

from minisr.judge import MAX_SCORE
from minisr.runner.experiment import lookup

Estimate = tuple[float, float, float]


def estimate(metrics: dict, metric: str) -> Estimate | None:
    """A model's metric, such as "judge.pairwise", as an estimate; None if it was not measured."""
    value = lookup(metrics, metric)
    if value is None:
        return None
    low, high = lookup(metrics, f"{metric}_ci95") or (value, value)
    return value, low, high


def comparisons(metrics: dict) -> dict:
    """{"M2 against M1": win rates} of all models that metrics.json compares, each pair once."""
    names = list(metrics)
    found = {}
    for i, name in enumerate(names):
        others = {"versus_sft": names[0], "versus_m1": names[min(i, 1)], "versus_previous": names[i - 1]}
        for key, other in others.items():
            if key in metrics[name]:
                found[f"{name} against {other}"] = metrics[name][key]
    return found


def failure_rates(metrics: dict) -> list[Estimate]:
    """For each criterion, the share of sampled answers that miss its point."""
    return [(1 - share, 1 - share, 1 - share) for share in metrics["criteria"]]


def calibration(records: list[dict]) -> list[tuple]:
    """(true score, mean reward, count) over the ranked responses that have a reward."""
    rewards = defaultdict(list)
    for record in records:
        for true_score, reward in zip(record["scores"], record["rewards"]):
            if reward is not None:
                rewards[true_score].append(reward)
    return [(true_score, mean(given), len(given)) for true_score, given in sorted(rewards.items())]


def score_shares(counts: dict) -> list[float]:
    """Shares of the scores 0 to 5, rounded to whole points, and last of the unparsed judgements."""
    shares = [0.0] * (MAX_SCORE + 2)
    for score, count in counts.items():
        position = -1 if score == "unread" else int(float(score) + 0.5)
        shares[position] += count / sum(counts.values())
    return shares


def lengths(records: list[dict]) -> Estimate:
    """Mean length of the sampled answers in characters, with the 10th and 90th percentile."""
    sizes = [len(record["sampled"]) for record in records]
    low, high = np.quantile(sizes, (0.1, 0.9))
    return mean(sizes), float(low), float(high)


def dpo_steps(log: list[dict]) -> list[dict]:
    """The optimizer steps of a training log that have a DPO loss."""
    return [step for step in log if "dpo_loss" in step]
