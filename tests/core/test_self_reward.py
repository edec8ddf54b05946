"""Figure 1 in memory, on each engine: which model does what with which data."""

import pytest
import torch
from loop_in_memory import CONFIG, run_loop, seed_data

from minisr.loop import self_reward
from minisr.pairs import select_pairs
from minisr.prompts import normalize


@pytest.fixture
def run(engine):
    return run_loop(engine, torch.float32)


def test_the_models_and_their_steps_are_those_of_the_paper(run):
    models, steps = run
    assert [model.name for model in models] == ["SFT", "M1", "M2", "M3"]
    iteration = ["new_prompts", "respond", "judge", "select_pairs", "train_dpo"]
    assert [(step.model, step.name) for step in steps] == [
        ("M0", "train_sft"), ("M0", "train_sft"), *(("M1", name) for name in iteration),
        *(("M2", name) for name in iteration)]


def test_the_baseline_is_trained_on_ift_and_M1_on_ift_and_eft(run):
    _, [baseline, M1, *_] = run
    data = seed_data()
    assert len(data.ift) == 64 and len(data.eft) > 30
    assert baseline.inputs == ("SFT", data.ift) and M1.inputs == ("M1", data.ift + data.eft)


def test_each_step_receives_what_the_steps_before_it_made(run):
    models, steps = run
    for model, iteration in zip(models[1:], (steps[2:7], steps[7:12])):
        x, y, r, pairs, trained = (step.result for step in iteration)
        assert [step.inputs for step in iteration] == [(), (x,), (x, y), (x, y, r), (pairs,)]
        assert [record["prompt"] for record in y] == [record["prompt"] for record in r] == x
        assert trained.name == model.next_name and len(x) >= 4


def test_new_prompts_are_neither_seeds_nor_held_out(run):
    models, steps = run
    known = {normalize(record["prompt"]) for record in seed_data().ift} | set(map(normalize, seed_data().held_out))
    for step in (steps[2], steps[7]):
        assert known.isdisjoint(map(normalize, step.result))
    assert models[1].counts["prompts"]["accepted"] == len(steps[2].result)


def test_pairs_are_the_best_and_the_worst_of_the_models_own_responses(run):
    models, steps = run
    total = 0
    for model, (_, respond, judge, select, _) in zip(models[1:], (steps[2:7], steps[7:12])):
        assert all(len(record["responses"]) == CONFIG.responses.candidates for record in respond.result)
        rewards = {record["prompt"]: record["rewards"] for record in judge.result}
        for pair in select.result:
            known = [reward for reward in rewards[pair["prompt"]] if reward is not None]
            assert (pair["chosen_reward"], pair["rejected_reward"]) == (max(known), min(known))
        responses = [record["responses"] for record in respond.result]
        assert (select.result, model.counts["pairs"]) == select_pairs(select.inputs[0], responses, [*rewards.values()])
        total += len(select.result)
    assert total >= 3


def test_every_trained_model_has_weights_of_its_own(run):
    models, steps = run
    weights = [torch.cat([p.flatten() for p in model.lm.model.parameters()]) for model in models]
    for i, own in enumerate(weights):
        assert own.isfinite().all()
        assert not any(torch.equal(own, other) for other in weights[:i])


def test_by_default_a_step_is_just_called():
    class Step:
        """Records the steps of one iteration."""

        def new_prompts(self):
            return "x"

        def respond(self, x):
            return x + "y"

        def judge(self, x, y):
            return x + y + "r"

        def select_pairs(self, x, y, r):
            return (x, y, r)

        def train_dpo(self, pairs):
            return pairs

    assert self_reward(Step()) == ("x", "xy", "xxyr")
