"""How good a model is: answers held against the oracle, models against each other, the judge
against the true ranking (paper, sections 3.1.2, 3.2 and 3.3). Nothing here reaches training.

TIE_RULE says how equal scores count; it is printed beside the numbers.
"""

from collections import Counter

import numpy as np

TIE_RULE = ("pairs the annotator scored equally are left out; a pair that the model scores equally, "
            "or of which it left a response unread, counts as wrong; Spearman and Kendall (tau-b) are "
            "means over instructions, 0 where the model gives all responses one score")

RESAMPLES = 2000


def answer_metrics(answers: list[dict]) -> dict:
    """Figures of one model's answers: shares of flawless ones, mean scores, length, points by criterion.

    Each record has "sampled" and "greedy" texts, with their five points if there is an oracle. Length is
    in characters."""
    result = {"length": float(np.mean([len(record["sampled"]) for record in answers]))}
    if "sampled_points" not in answers[0]:
        return result
    for way, suffix in (("sampled", ""), ("greedy", "_greedy")):
        points = np.array([record[f"{way}_points"] for record in answers])  # (prompts, 5)
        flawless, scores = points.all(1), points.sum(1)
        result[f"flawless{suffix}"] = float(flawless.mean())
        result[f"flawless{suffix}_ci95"] = interval(flawless)
        result[f"mean_score{suffix}"] = float(scores.mean())
        result[f"mean_score{suffix}_ci95"] = interval(scores)
        result[f"criteria{suffix}"] = [float(share) for share in points.mean(0)]
    return result


def win_rates(scores: list[float], others: list[float], seed: int = 0) -> dict:
    """Shares of prompts on which the first scores more than, as much as, less than the second.

    With 95 % intervals from a paired bootstrap over prompts."""
    difference = np.sign(np.array(scores) - np.array(others))
    shares = {name: difference == sign for name, sign in (("win", 1), ("tie", 0), ("lose", -1))}
    result = {name: float(hit.mean()) for name, hit in shares.items()}
    result |= {f"{name}_ci95": interval(hit, seed) for name, hit in shares.items()}
    return result


def histogram(scores) -> dict[str, int]:
    """How often each score was given; "unread" for those that could not be read."""
    counts = Counter("unread" if score is None else f"{score:g}" for score in scores)
    return dict(sorted(counts.items()))


def interval(values, seed: int = 0) -> list[float]:
    """95 % bootstrap interval of the mean: [low, high]."""
    values = np.asarray(values, dtype=float)
    picks = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    return [float(q) for q in np.quantile(values[picks].mean(axis=1), (0.025, 0.975))]


def judge_metrics(truth: list[list[float]], given: list[list[float | None]]) -> dict:
    """The paper's five metrics (section 3.1.2), for the responses of each instruction.

    truth: the annotator's scores; given: the model's rewards, None where it was unread."""
    pairwise, exact, perfect_is_best, spearman, kendall = [], [], [], [], []
    for human, model in zip(truth, given, strict=True):
        agree = pair_agreement(human, model)
        if not agree:
            continue  # the annotator ranks nothing here
        pairwise.append(agree)
        exact.append(all(agree))
        perfect_is_best += [h == max(human) for h, m in zip(human, model) if m == 5]
        read = [(h, m) for h, m in zip(human, model) if m is not None]
        human_read, model_read = ([pair[k] for pair in read] for k in (0, 1))
        spearman.append(correlation(ranks(human_read), ranks(model_read)))
        kendall.append(correlation(order_signs(human_read), order_signs(model_read)))
    hits = [hit for agree in pairwise for hit in agree]
    return {"pairwise": _mean(hits), "pairwise_ci95": _cluster_interval(pairwise),
            "five_best": _mean(perfect_is_best), "exact": _mean(exact),
            "spearman": _mean(spearman), "kendall": _mean(kendall)}


def pair_agreement(human: list[float], model: list[float | None]) -> list[bool]:
    """For each pair of responses the annotator scored differently: does the model order it so?"""
    return [model[i] is not None and model[j] is not None
            and (human[i] > human[j]) == (model[i] > model[j]) and model[i] != model[j]
            for i in range(len(human)) for j in range(i) if human[i] != human[j]]


def ranks(values: list[float]) -> np.ndarray:
    """1 for the smallest; equal values share the mean of their ranks."""
    v = np.array(values, dtype=float)
    return (v[:, None] > v).sum(1) + ((v[:, None] == v).sum(1) + 1) / 2


def order_signs(values: list[float]) -> np.ndarray:
    """Sign of every pair's difference; their correlation is Kendall's tau-b."""
    v = np.array(values, dtype=float)
    return np.sign(v[:, None] - v).flatten()


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's r; 0 where one side does not vary."""
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def _mean(values: list) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _cluster_interval(groups: list[list[bool]]) -> list[float] | None:
    """Bootstrap interval of the pooled mean that resamples instructions, not their pairs."""
    if not groups:
        return None
    hits, sizes = np.array([sum(g) for g in groups]), np.array([len(g) for g in groups])
    picks = np.random.default_rng(0).integers(len(groups), size=(RESAMPLES, len(groups)))
    means = hits[picks].sum(1) / sizes[picks].sum(1)
    return [float(q) for q in np.quantile(means, (0.025, 0.975))]
