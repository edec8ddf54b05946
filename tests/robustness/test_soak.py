"""What soak.py reports as growth, and what it takes for noise."""

from random import Random

import pytest
from soak import Sample, faults

LENGTHS = {"M2": 3.0, "M3": 4.0, "M4": 5.0}  # later iterations evaluate more models


def samples(runs=40, **growth):
    """Noisy samples; growth: {figure: how much is added to it over all}."""
    rng, made, minutes = Random(0), [], 0.0
    for run in range(3, runs + 3):
        for model, seconds in LENGTHS.items():
            figures = {"memory": 400 + rng.uniform(-10, 10), "descriptors": 9, "threads": 2,
                       "objects": 300_000, "seconds": seconds * rng.uniform(0.9, 1.1), "cpu": seconds}
            for name, most in growth.items():
                figures[name] += most * (run - 3) / runs
            minutes += figures["seconds"] / 60
            made.append(Sample(minutes, run, model, **figures))
    return made


def test_noise_and_decrease_are_no_fault():
    assert faults(samples()) == []
    assert faults(samples(memory=12, objects=6000, seconds=0.2)) == []
    assert faults(samples(memory=-100, objects=-100_000, seconds=-2)) == []


@pytest.mark.parametrize("figure, most", [("memory", 30), ("objects", 20_000), ("descriptors", 2),
                                          ("threads", 2), ("seconds", 3.0)])
def test_growth_is_reported(figure, most):
    [message] = faults(samples(**{figure: most}))
    assert message.startswith("FAULT: " + {"seconds": "iterations per second"}.get(figure, figure))


def test_cpu_seconds_are_for_information_only(capsys):
    assert faults(samples(cpu=5)) == []
    assert "of CPU time (for information) in each quarter, relative to the mean: 1." in capsys.readouterr().out


def test_a_few_iterations_are_not_enough():
    assert faults(samples(runs=2)) == ["too few iterations; run it for more minutes"]
