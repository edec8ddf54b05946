"""The golden vectors: minisr computes their outputs, and the files are the output of their generator."""

import json
import runpy
from pathlib import Path

import pytest
import torch

from minisr.dpo import dpo_loss, sequence_logprobs
from minisr.evaluate import judge_metrics
from minisr.judge import parse_score
from minisr.pairs import select_pairs

FOLDER = Path(__file__).parents[1] / "vectors"
NAMES = ("judge_parsing", "pair_selection", "sequence_logprobs", "dpo_loss", "judge_metrics")


def load(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def cases(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", load(name)["cases"], ids=str)


@cases("judge_parsing")
def test_judge_parsing(case):
    assert parse_score(case["text"]) == case["score"]


@cases("pair_selection")
def test_pair_selection(case):
    pairs, counts = select_pairs(["x"], [case["responses"]], [case["rewards"]])
    if reason := case.get("dropped"):
        assert pairs == [] and counts[reason] == 1
    else:
        [pair] = pairs
        assert [case["responses"].index(pair[side]) for side in ("chosen", "rejected")] == [
            case["chosen"], case["rejected"]]


def test_sequence_logprobs():
    vectors = load("sequence_logprobs")
    ids, mask = (torch.tensor([case[name] for case in vectors["cases"]]) for name in ("ids", "mask"))
    logits = torch.tensor(vectors["logits"])[ids]
    expected = [case["logprob"] for case in vectors["cases"]]
    assert sequence_logprobs(logits, ids, mask.bool()).tolist() == pytest.approx(expected, abs=1e-5)


@cases("dpo_loss")
def test_dpo_loss(case):
    names = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
    four = [torch.tensor([float(case[name])], dtype=torch.float64, requires_grad=True) for name in names]
    loss, chosen, rejected = dpo_loss(*four, case["beta"])
    loss.sum().backward()
    assert [loss.item(), chosen.item(), rejected.item()] == pytest.approx(
        [case["loss"], case["chosen_reward"], case["rejected_reward"]], abs=1e-10)
    gradient = {name: side.grad.item() for name, side in zip(names, four)}
    assert gradient == pytest.approx(case["gradient"], abs=1e-10)


@cases("judge_metrics")
def test_judge_metrics(case):
    metrics = judge_metrics(case["truth"], case["given"])
    for name, expected in case["expected"].items():
        assert metrics[name] == (None if expected is None else pytest.approx(expected, abs=1e-10)), name


@pytest.mark.parametrize("name", NAMES)
def test_the_file_is_the_output_of_its_generator(name):
    # Numbers approximately: the last bit of exp and log differs between machines.
    generator = runpy.run_path(str(FOLDER / "make.py"))
    made = json.loads(generator["text"](generator[name]()))
    assert flat(made) == [pytest.approx(x, abs=1e-9) if isinstance(x, float) else x for x in flat(load(name))]


def flat(value) -> list:
    """The leaves of a JSON value in order, keys included."""
    if isinstance(value, dict):
        return [leaf for name, v in value.items() for leaf in (name, *flat(v))]
    return [leaf for v in value for leaf in flat(v)] if isinstance(value, list) else [value]


def test_every_vector_file_is_used_and_states_its_rule():
    assert {path.stem for path in FOLDER.glob("*.json")} == set(NAMES)
    for name in NAMES:
        assert len(load(name)["description"]) > 100 and len(load(name)["cases"]) >= 5
