"""Evaluation: win rates between models, and the judge's agreement with human rankings (sections 3.1.2 and 3.2).

A run calls these functions after each model, for reporting only.
"""

import numpy as np

from minisr.judge import MAX_SCORE

RESAMPLES = 2000  # of every bootstrap


def win_rates(scores: list[float], other_scores: list[float], seed: int = 0) -> dict:
    """Shares of prompts on which the first model scores higher ("win"), equally ("tie") and lower ("lose").

    Each with a 95 % confidence interval from a paired bootstrap over prompts; None without prompts."""
    signs = np.sign(np.array(scores) - np.array(other_scores))
    rates = {}
    for name, sign in (("win", 1), ("tie", 0), ("lose", -1)):
        rates[name] = mean(list(signs == sign))
        rates[f"{name}_ci95"] = bootstrap_ci(signs == sign, seed)
    return rates


def bootstrap_ci(groups, seed: int = 0) -> list[float] | None:
    """95 % bootstrap confidence interval of the mean of all values, [low, high]; None without any.

    Each item is a value, or a group of values that belong together: whole groups are resampled."""
    if len(groups) == 0:
        return None
    sums, sizes = np.array([np.sum(group, dtype=float) for group in groups]), np.array([np.size(g) for g in groups])
    picks = np.random.default_rng(seed).integers(len(groups), size=(RESAMPLES, len(groups)))
    low, high = np.quantile(sums[picks].sum(1) / sizes[picks].sum(1), (0.025, 0.975))
    return [float(low), float(high)]


def judge_metrics(human_scores: list[list[float]], model_rewards: list[list[float | None]]) -> dict:
    """The paper's five judge metrics (section 3.1.2), over the responses of each instruction.

    A reward is None where no judgement could be parsed. Instructions on which the annotator gave all responses the
    same score rank nothing and are left out. In "pairwise" and "exact" a reward of None counts as wrong; "spearman" and
    "kendall" are over the other responses (0 with fewer than two of them)."""
    pairwise, exact, five_best, spearman, kendall = [], [], [], [], []
    for human, model in zip(human_scores, model_rewards, strict=True):
        ordered = ordered_correctly(human, model)
        if not ordered:
            continue
        pairwise.append(ordered)
        exact.append(all(ordered))
        five_best += [h == max(human) for h, m in zip(human, model) if m == MAX_SCORE]
        scored = [i for i, reward in enumerate(model) if reward is not None]
        human, model = [human[i] for i in scored], [model[i] for i in scored]
        spearman.append(correlation(ranks(human), ranks(model)))
        kendall.append(correlation(pair_signs(human), pair_signs(model)))
    return {"pairwise": mean([hit for ordered in pairwise for hit in ordered]),
            "pairwise_ci95": bootstrap_ci(pairwise), "five_best": mean(five_best), "exact": mean(exact),
            "spearman": mean(spearman), "kendall": mean(kendall)}


def ordered_correctly(human: list[float], model: list[float | None]) -> list[bool]:
    """For each pair of responses that the annotator scored differently: does the model order it the same way?"""
    result = []
    for i in range(len(human)):
        for j in range(i):
            if human[i] == human[j]:
                continue
            scored = model[i] is not None and model[j] is not None and model[i] != model[j]
            result.append(scored and (human[i] > human[j]) == (model[i] > model[j]))
    return result


def ranks(values: list[float]) -> np.ndarray:
    """1 for the smallest; equal values share the mean of their ranks."""
    v = np.array(values, dtype=float)
    return (v[:, None] > v).sum(1) + ((v[:, None] == v).sum(1) + 1) / 2


def pair_signs(values: list[float]) -> np.ndarray:
    """Sign of the difference of every two values. The correlation of two such vectors is Kendall's tau-b."""
    v = np.array(values, dtype=float)
    return np.sign(v[:, None] - v).flatten()


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's r; 0 where one side does not vary."""
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def mean(values: list) -> float | None:
    return float(np.mean(values)) if values else None
