"""One DPO training: the frozen reference, the margin, and the two optional terms."""

import json
from math import log

import pytest
import torch
from tiny import PAIRS, tiny_model, tiny_tokenizer

from minisr import dpo
from minisr.dpo import DPOConfig, dpo_loss, encode_pairs, pair_logps, reference_logps, train_dpo
from minisr.sft import collate, encode_examples, target_loss

REPLAY = [{"prompt": "Rate it.", "response": "Score: 4"},
          {"prompt": "Rate this.", "response": "Bad. Score: 1"}]
FROZEN = {"learning_rate": 0.0, "final_learning_rate": 0.0}


def encoded() -> list[tuple]:
    return encode_pairs(tiny_tokenizer(), PAIRS, context=96)


@pytest.fixture
def train(monkeypatch, tmp_path):
    """Train on PAIRS: the model, the four log-probabilities of each call of dpo_loss, and the log."""
    def run(model=None, examples=(), pairs=PAIRS, known=None, **config):
        calls = []

        def spy(*arguments):
            calls.append([x.detach().clone() for x in arguments[:4]])
            return dpo_loss(*arguments)

        monkeypatch.setattr(dpo, "dpo_loss", spy)
        model = train_dpo(model or tiny_model(), tiny_tokenizer(), pairs, list(examples),
                          DPOConfig(**{"batch_size": 2, **config}), 0, "test", tmp_path / "log", known)
        return model, calls, [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    return run


def by_value(*columns: torch.Tensor) -> torch.Tensor:
    """Pairs (chosen, rejected) in an order of their own: batches come shuffled."""
    return torch.tensor(sorted(torch.stack(columns, 1).tolist()))


def reference_of(model) -> torch.Tensor:
    return by_value(*reference_logps(model, encoded(), 3))


def test_the_reference_is_the_model_the_step_began_from_in_every_epoch(train):
    _, calls, _ = train(epochs=4, learning_rate=1e-2)
    assert len(calls) == 8  # 3 pairs, two at a time
    for first, second in zip(calls[::2], calls[1::2]):
        p_w, p_l, r_w, r_l = (torch.cat(both) for both in zip(first, second))
        assert torch.allclose(by_value(r_w, r_l), reference_of(tiny_model()), atol=1e-3)
    assert (p_w - p_l - r_w + r_l > 1).all()  # the policy has moved away


def test_each_pair_meets_its_own_reference(train):
    _, calls, _ = train(epochs=3, **FROZEN)
    assert len(calls) == 6
    for p_w, p_l, r_w, r_l in calls:
        assert torch.allclose(p_w, r_w, atol=1e-3) and torch.allclose(p_l, r_l, atol=1e-3)


def test_the_reference_has_no_dropout_though_the_policy_has(train):
    model = tiny_model().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5  # as an earlier training may have left it
    _, [[p_w, p_l, r_w, r_l]], _ = train(model, dropout=0.5, batch_size=3, **FROZEN)
    assert torch.allclose(by_value(r_w, r_l), reference_of(tiny_model()), atol=1e-3)
    assert (p_w - r_w).abs().max() > 0.1 and (p_l - r_l).abs().max() > 0.1


def test_training_raises_the_margin_of_every_pair(train):
    model, _, records = train(epochs=10, learning_rate=5e-3)
    with torch.no_grad():
        (p_w, p_l, _), (r_w, r_l, _) = (pair_logps(m, encoded()) for m in (model, tiny_model()))
    assert (p_w - r_w - (p_l - r_l) > 5).all()
    first, last = records[0], records[-1]
    assert [first["dpo_loss"], first["margin"]] == pytest.approx([log(2), 0], abs=1e-3)
    assert last["dpo_loss"] < first["dpo_loss"] and last["margin"] > 0.5 and last["accuracy"] == 1


def test_nll_adds_the_chosen_responses_mean_loss_a_token(train):
    model, losses = tiny_model(), []
    for prompt, chosen, _ in encoded():
        ids = torch.tensor([prompt + chosen])
        logps = model(ids)[0, len(prompt) - 1:-1].log_softmax(-1)
        losses.append(-logps[range(len(chosen)), chosen].mean().item())
    for weight in (0.0, 2.0):  # long or short, each response counts the same
        _, _, [record] = train(nll=weight, batch_size=3, **FROZEN)
        assert record["loss"] == pytest.approx(log(2) + weight * sum(losses) / 3, abs=1e-4)


def test_replay_adds_the_loss_of_the_replayed_examples(train):
    ids, mask = collate(encode_examples(tiny_tokenizer(), REPLAY, 96), "cpu")
    loss = target_loss(tiny_model(), ids, mask).item() / mask.sum().item()
    for weight in (0.0, 0.5):
        _, _, records = train(examples=REPLAY, replay=weight, batch_size=3, epochs=3, **FROZEN)
        assert [r["loss"] for r in records] == pytest.approx([log(2) + weight * loss] * 3, abs=1e-4)


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_micro_batches_change_no_figure_and_no_gradient(micro_batch, train):
    settings = {"batch_size": 3, "nll": 0.5, "replay": 0.5, **FROZEN}
    _, _, [whole] = train(examples=REPLAY, **settings)
    _, calls, [parts] = train(examples=REPLAY, micro_batch=micro_batch, **settings)
    assert len(calls) == -(-3 // micro_batch)
    assert parts == {name: pytest.approx(value, rel=1e-4, abs=1e-5) for name, value in whole.items()}


def test_replay_lasts_as_long_as_the_pairs(train):
    _, _, records = train(examples=REPLAY * 2, pairs=PAIRS[:1], replay=1.0, batch_size=8, epochs=3)
    assert len(records) == 3


def test_what_was_recorded_while_sampling_is_the_reference_and_only_the_rest_is_computed(train, monkeypatch):
    chosen, rejected = reference_logps(tiny_model(), encoded(), 3)
    known = {(p["prompt"], p[side]): logps[i].item() + 0.5 for i, p in enumerate(PAIRS[:2])
             for side, logps in (("chosen", chosen), ("rejected", rejected))}
    known.pop((PAIRS[1]["prompt"], PAIRS[1]["rejected"]))
    computed = []
    monkeypatch.setattr(dpo, "reference_logps", lambda model, pairs, size: (
        computed.extend(pairs), reference_logps(model, pairs, size))[1])
    _, [[_, _, r_w, r_l]], _ = train(batch_size=3, known=known, **FROZEN)
    expected = chosen + torch.tensor([0.5, 0.0, 0.0]), rejected + torch.tensor([0.5, 0.0, 0.0])
    assert torch.allclose(by_value(r_w, r_l), by_value(*expected), atol=1e-4)
    assert computed == encoded()[1:]  # of the second only one side was known
