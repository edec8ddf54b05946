"""Statistics over the seeds of an experiment: means with 95 % intervals, and paired differences.

`results` is the content of results.json, {variant: {model: {metric: [value on each seed]}}}.
"""

import numpy as np

from minisr.runner.experiment import METRICS

# Half-width of a 95 % interval of a mean, in standard errors: Student's t for n - 1 = 1, 2, ..., 19.
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
             2.120, 2.110, 2.101, 2.093)


def mean_and_interval(values: list[float]) -> tuple[float, float]:
    """Mean over seeds and the half-width of its 95 % interval (Student's t; 0 for one seed)."""
    if len(values) < 2:
        return values[0], 0.0
    degrees_of_freedom = len(values) - 1
    half_width = student_t(degrees_of_freedom) * np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values)), float(half_width)


def student_t(degrees_of_freedom: int) -> float:
    """The 97.5 % quantile of Student's t; with 20 or more degrees of freedom to three digits (a normal quantile and
    the first two terms of the Cornish-Fisher expansion)."""
    if degrees_of_freedom <= len(STUDENT_T):
        return STUDENT_T[degrees_of_freedom - 1]
    return 1.95996 + 2.3722 / degrees_of_freedom + 2.8225 / degrees_of_freedom**2


def over_seeds(results: dict, metric: str) -> tuple[dict, dict]:
    """One metric of all models, as the chart `figures.rows` takes it.

    Returns {model: [(mean, low, high) of each variant]}, with None where a seed has no value, and {model:
    [the values behind each]}. Models without any estimate are left out."""
    models = dict.fromkeys(model for variant in results.values() for model in variant)
    estimates, values = {}, {}
    for model in models:
        by_variant = [variant.get(model, {}).get(metric) or [None] for variant in results.values()]
        of_model = [_estimate(row) for row in by_variant]
        if any(of_model):
            estimates[model], values[model] = of_model, by_variant
    return estimates, values


def _estimate(values: list[float | None]) -> tuple[float, float, float] | None:
    """(mean, low, high), or None if a value is missing."""
    if None in values:
        return None
    mean, half_width = mean_and_interval(values)
    return mean, mean - half_width, mean + half_width


def paired(first: dict, second: dict) -> dict:
    """{metric: [first - second on each seed that both models have]}.

    Runs of one seed share their data, M0 and often M1, so the difference varies less than either value."""
    shared = [seed for seed in first["seed"] if seed in second["seed"]]
    differences = {}
    for metric in METRICS:
        if metric in first and metric in second:
            differences[metric] = [_difference(first, second, metric, seed) for seed in shared]
    return differences


def _difference(first: dict, second: dict, metric: str, seed: int) -> float | None:
    """first - second on one seed, or None if a value is missing."""
    a = first[metric][first["seed"].index(seed)]
    b = second[metric][second["seed"].index(seed)]
    return None if a is None or b is None else a - b


def is_copy_of_base(results: dict, variant: str, model: str) -> bool:
    """Whether a variant's model is the base's: they have seeds in common, and no metric differs on any of them."""
    base = results.get("base", {})
    if variant == "base" or model not in base:
        return False
    if not has_common_seeds(results[variant][model], base[model]):
        return False
    differences = paired(results[variant][model], base[model])
    return not any(any(values) for values in differences.values())


def has_common_seeds(first: dict, second: dict) -> bool:
    return not set(first["seed"]).isdisjoint(second["seed"])


def compare_with_base(results: dict) -> dict:
    """{comparison: {metric: [difference on each seed]}}.

    Compares the base's M2, M3, ... with its M1, and each model that a variant trained itself with the same
    model of the base."""
    base = results.get("base", {})
    comparisons = {}
    for model in list(base)[2:]:
        comparisons[f"base {model} - M1"] = paired(base[model], base["M1"])
    for variant, models in results.items():
        for model in models:
            if variant == "base" or model not in base or not has_common_seeds(models[model], base[model]):
                continue
            if not is_copy_of_base(results, variant, model):
                comparisons[f"{variant} {model} - base {model}"] = paired(models[model], base[model])
    return comparisons
