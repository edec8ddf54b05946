"""One DPO training on each engine: the frozen reference, the margin, and the two optional terms."""

from functools import partial
from math import log

import pytest
import torch
from tiny import PAIRS, tiny_lm, tiny_model, with_log

from minisr import dpo
from minisr.dpo import DPOConfig, dpo_loss, encode_pairs, train_dpo
from minisr.lm import LM
from minisr.sft import encode_examples

REPLAY = [{"prompt": "Rate it.", "response": "Score: 4"},
          {"prompt": "Rate this.", "response": "Bad. Score: 1"}]
NO_STEP = {"learning_rate": 0.0, "min_learning_rate": 0.0}


@pytest.fixture
def train(engine, monkeypatch):
    """Train on PAIRS: the trained LM, the four log-probabilities of each call of dpo_loss, and the log."""
    def run(lm=None, eft=(), pairs=PAIRS, **config):
        calls = []

        def spy(*arguments):
            calls.append([logps.detach().clone() for logps in arguments[:4]])
            return dpo_loss(*arguments)

        monkeypatch.setattr(dpo, "fit_dpo", partial(fit_dpo, preference_loss=spy))
        trained = train_dpo(with_log(lm or tiny_lm(engine)), pairs, list(eft), DPOConfig(**{"batch_size": 2, **config}),
                            seed=0)
        return trained, calls, trained.log
    fit_dpo = dpo.fit_dpo
    return run


def sorted_pairs(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """The (chosen, rejected) values of pairs in a fixed order, because batches are shuffled."""
    return torch.tensor(sorted(torch.stack([chosen, rejected], 1).tolist()))


@torch.no_grad()
def plain_logps(model) -> tuple[torch.Tensor, torch.Tensor]:
    """log p of PAIRS under the present weights, with the plain engine."""
    lm = LM(model, tiny_lm().tokenizer)
    return lm.pair_logps(encode_pairs(lm, PAIRS))


# The reference.


@pytest.fixture
def references(monkeypatch):
    """Every reference that train_dpo creates."""
    created = []

    def spy(policy, reference, *others):
        created.append(reference)
        before = plain_logps(reference.model)
        fit_dpo(policy, reference, *others)
        reference.logps_before, reference.logps_after = before, plain_logps(reference.model)

    fit_dpo = dpo.fit_dpo
    monkeypatch.setattr(dpo, "fit_dpo", spy)
    return created


def test_the_reference_and_M_t_do_not_move(engine, references):
    lm = tiny_lm(engine)
    before = {name: weight.clone() for name, weight in lm.model.state_dict().items()}
    logps_before = plain_logps(lm.model)
    trained = train_dpo(lm, PAIRS, REPLAY, DPOConfig(learning_rate=1e-2, epochs=10, batch_size=2, replay_weight=0.1), 0)
    [reference] = references
    for moved, logps in zip(plain_logps(trained.model), logps_before):
        assert (moved - logps).abs().max() > 1  # the policy has moved
    for logps in (reference.logps_before, reference.logps_after, plain_logps(lm.model)):
        assert torch.equal(torch.stack(logps), torch.stack(logps_before))
    with torch.no_grad():  # as the training reads it
        as_read = reference.pair_logps(encode_pairs(lm, PAIRS))
    torch.testing.assert_close(torch.stack(as_read), torch.stack(logps_before), atol=1e-4, rtol=1e-5)
    for name, weight in lm.model.state_dict().items():
        assert torch.equal(weight, before[name]), name
        assert not torch.equal(weight, trained.model.state_dict()[name]), name


def test_the_log_probabilities_of_the_reference_carry_no_gradient(engine):
    lm = tiny_lm(engine)
    logps = lm.frozen_copy().pair_logps(encode_pairs(lm, PAIRS))
    assert not any(values.requires_grad for values in logps)


def test_the_reference_is_M_t_in_every_epoch(train):
    _, calls, _ = train(epochs=4, learning_rate=1e-2)
    assert len(calls) == 8  # 3 pairs, two at a time
    for first, second in zip(calls[::2], calls[1::2]):
        p_w, p_l, r_w, r_l = (torch.cat(both) for both in zip(first, second))
        expected = sorted_pairs(*plain_logps(tiny_model()))
        torch.testing.assert_close(sorted_pairs(r_w, r_l), expected, atol=1e-3, rtol=0)
    assert (p_w - p_l - r_w + r_l > 1).all()  # the policy has moved away


def test_each_pair_is_compared_with_its_own_reference(train):
    _, calls, _ = train(epochs=3, **NO_STEP)
    assert len(calls) == 6
    for p_w, p_l, r_w, r_l in calls:
        torch.testing.assert_close((p_w, p_l), (r_w, r_l), atol=1e-3, rtol=0)


def test_the_reference_has_no_dropout_though_the_policy_has(train, engine):
    lm = tiny_lm(engine)
    lm.model.train()
    for module in lm.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5  # as an earlier training may have left it
    _, [[p_w, p_l, r_w, r_l]], _ = train(lm, dropout=0.5, batch_size=3, **NO_STEP)
    expected = sorted_pairs(*plain_logps(tiny_model()))
    torch.testing.assert_close(sorted_pairs(r_w, r_l), expected, atol=1e-3, rtol=0)
    assert (p_w - r_w).abs().max() > 0.1 and (p_l - r_l).abs().max() > 0.1


# What training does.


def test_training_raises_the_margin_of_every_pair(train):
    trained, _, log_records = train(epochs=10, learning_rate=5e-3)
    (p_w, p_l), (r_w, r_l) = plain_logps(trained.model), plain_logps(tiny_model())
    assert (p_w - r_w - (p_l - r_l) > 5).all()
    first, last = log_records[0], log_records[-1]
    assert [first["dpo_loss"], first["margin"]] == pytest.approx([log(2), 0], abs=1e-3)
    assert last["dpo_loss"] < first["dpo_loss"] and last["margin"] > 0.5 and last["accuracy"] == 1


def test_the_log_holds_the_mean_log_probabilities_of_both_responses(train):
    _, _, [record] = train(batch_size=3, **NO_STEP)
    chosen, rejected = plain_logps(tiny_model())
    assert record["chosen_logp"] == pytest.approx(chosen.mean().item(), abs=1e-3)
    assert record["rejected_logp"] == pytest.approx(rejected.mean().item(), abs=1e-3)
    assert record["accuracy"] in (0, 1 / 3, 2 / 3, 1)


def test_without_pairs_the_model_stays_the_same(train, engine):
    trained, calls, records = train(pairs=[])
    assert calls == records == []
    for weight, other in zip(trained.model.parameters(), tiny_model().parameters()):
        assert torch.equal(weight, other)


def test_nll_weight_adds_the_chosen_responses_mean_loss_per_token(train):
    model, losses = tiny_model(), []
    for prompt, chosen, _ in encode_pairs(tiny_lm(), PAIRS):
        logps = model(torch.tensor([prompt + chosen]))[0, len(prompt) - 1:-1].log_softmax(-1)
        losses.append(-logps[range(len(chosen)), chosen].mean().item())
    for weight in (0.0, 2.0):  # long or short, each response counts the same
        _, _, [record] = train(nll_weight=weight, batch_size=3, **NO_STEP)
        assert record["loss"] == pytest.approx(log(2) + weight * sum(losses) / 3, abs=1e-4)


def test_replay_weight_adds_the_loss_of_the_replayed_examples(train):
    lm = tiny_lm()
    examples = encode_examples(lm, REPLAY)
    loss = lm.target_loss(examples).item() / sum(sum(example.mask) for example in examples)
    for weight in (0.0, 0.5):
        _, _, records = train(eft=REPLAY, replay_weight=weight, batch_size=3, epochs=3, **NO_STEP)
        assert [r["loss"] for r in records] == pytest.approx([log(2) + weight * loss] * 3, abs=1e-4)


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_micro_batches_change_no_metric_and_no_gradient(train, micro_batch):
    settings = {"batch_size": 3, "nll_weight": 0.5, "replay_weight": 0.5, **NO_STEP}
    _, _, [whole] = train(eft=REPLAY, **settings)
    _, calls, [parts] = train(eft=REPLAY, micro_batch=micro_batch, **settings)
    assert len(calls) == -(-3 // micro_batch)
    assert parts == {name: pytest.approx(value, rel=1e-4, abs=1e-5) for name, value in whole.items()}


def test_replay_lasts_as_long_as_the_pairs(train):
    _, _, records = train(eft=REPLAY * 2, pairs=PAIRS[:1], replay_weight=1.0, batch_size=8, epochs=3)
    assert len(records) == 3


def test_replay_takes_one_example_for_each_pair(engine):
    lm = tiny_lm(engine)
    config = DPOConfig(batch_size=2, epochs=2, replay_weight=1.0)
    batches = dpo.dpo_batches(lm, PAIRS, REPLAY * 4, config, seed=0)
    assert [len(pairs) for pairs, _ in batches] in ([2, 1, 2, 1], [2, 1, 1, 2], [1, 2, 2, 1], [1, 2, 1, 2])
    assert [len(replayed) for _, replayed in batches] == [2] * 4
