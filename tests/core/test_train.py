"""The optimizer loop: batches, learning rate, AdamW, clipping, dropout, micro-batches."""

from dataclasses import replace
from math import ceil, cos, inf, nan, pi

import pytest
import torch
from tiny import EXAMPLES, tiny_lm, tiny_model

from minisr.sft import encode_examples, train_sft
from minisr.train import TrainConfig, fit, learning_rate, make_batches, make_optimizer, micro_batches, optimizer_step

# Batches.

LENGTHS = [7 * i % 41 for i in range(150)]


@pytest.mark.parametrize("count, batch_size", [(150, 4), (150, 16), (3, 16), (1, 1)])
def test_every_example_comes_once_an_epoch(count, batch_size):
    batches = make_batches(LENGTHS[:count], TrainConfig(batch_size=batch_size, epochs=3), seed=1)
    per_epoch = ceil(count / batch_size)
    assert len(batches) == 3 * per_epoch
    for epoch in range(3):
        indices = [i for batch in batches[epoch * per_epoch:(epoch + 1) * per_epoch] for i in batch]
        assert sorted(indices) == list(range(count))
    assert max(map(len, batches)) <= batch_size


def test_the_order_depends_on_the_seed_and_differs_by_epoch():
    config = TrainConfig(batch_size=4, epochs=2)
    batches = make_batches(LENGTHS, config, seed=1)
    assert batches == make_batches(LENGTHS, config, seed=1) != make_batches(LENGTHS, config, seed=2)
    assert sorted(map(sorted, batches[:38])) != sorted(map(sorted, batches[38:]))
    assert make_batches(LENGTHS, TrainConfig(batch_size=4), seed=1, epochs=2) == batches


def test_similar_lengths_are_batched_together():
    def padding(batches):
        return sum(max(LENGTHS[i] for i in batch) - LENGTHS[j] for batch in batches for j in batch)

    batches = make_batches(LENGTHS, TrainConfig(batch_size=4), seed=1)
    in_order = [range(i, min(i + 4, 150)) for i in range(0, 150, 4)]
    assert padding(batches) < 0.25 * padding(in_order)
    first_lengths = [LENGTHS[batch[0]] for batch in make_batches(LENGTHS[:60], TrainConfig(batch_size=4), seed=1)]
    assert first_lengths != sorted(first_lengths)  # but the batches are in no order of length


@pytest.mark.parametrize("size, parts", [(0, [[1, 2, 3, 4, 5]]), (2, [[1, 2], [3, 4], [5]]), (9, [[1, 2, 3, 4, 5]])])
def test_micro_batches_are_the_batch_in_parts(size, parts):
    assert micro_batches([1, 2, 3, 4, 5], TrainConfig(micro_batch=size)) == parts


# The learning rate.


def test_the_learning_rate_by_hand():
    config = TrainConfig(learning_rate=1.0, min_learning_rate=0.2, warmup_fraction=0.1)
    rates = [learning_rate(step, 100, config) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * k for k in range(1, 11)])  # linear, 1/10 to 1
    assert rates[10] == pytest.approx(1.0)  # the cosine begins at the top
    assert rates[40] == pytest.approx(0.2 + 0.8 * (1 + cos(pi / 3)) / 2) == pytest.approx(0.8)
    assert rates[55] == pytest.approx(0.6)  # half way: the mean of both ends
    assert rates[100] == pytest.approx(0.2)
    assert all(a > b for a, b in zip(rates[10:], rates[11:]))


@pytest.mark.parametrize("rates", [[1.0], [1.0, 1.0], [1.0, 1.0, 0.6]])
def test_very_short_trainings_have_a_learning_rate(rates):
    config = TrainConfig(learning_rate=1.0, min_learning_rate=0.2, warmup_fraction=0.05)  # at least one step of it
    assert [learning_rate(step, len(rates), config) for step in range(len(rates))] == pytest.approx(rates)


# One optimizer step.


def test_adamws_steps_by_hand():
    # Only the matrices inside the blocks decay.
    model, rate = tiny_model(), 0.01
    parameters = dict(model.named_parameters())
    optimizer = make_optimizer(model.named_parameters(), TrainConfig(weight_decay=0.1))
    by_hand = {name: p.detach().double() for name, p in parameters.items()}
    mean, square = dict.fromkeys(by_hand, 0.0), dict.fromkeys(by_hand, 0.0)
    generator = torch.Generator().manual_seed(0)
    for t in range(1, 5):
        for name, p in parameters.items():
            p.grad = torch.randn(p.shape, generator=generator)
            gradient, decays = p.grad.double(), name.startswith("blocks") and p.dim() == 2
            mean[name] = 0.9 * mean[name] + 0.1 * gradient
            square[name] = 0.95 * square[name] + 0.05 * gradient**2
            by_hand[name] = by_hand[name] * (1 - rate * 0.1 * decays) - rate * (
                mean[name] / (1 - 0.9**t)) / ((square[name] / (1 - 0.95**t)).sqrt() + 1e-8)
        optimizer_step(optimizer, rate, max_grad_norm=0.0)
        assert all(p.grad is None for p in parameters.values())
    assert len(by_hand) == 14
    for name, p in by_hand.items():
        torch.testing.assert_close(parameters[name].detach().double(), p, atol=1e-6, rtol=1e-5)


@pytest.fixture
def steps(monkeypatch):
    """Make AdamW record the gradient norm and the learning rates it is given, and change no weight."""
    recorded = []

    def step(self):
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        recorded.append({"norm": sum(g.square().sum() for g in gradients).sqrt().item(),
                         "rates": {group["lr"] for group in self.param_groups}})

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    return recorded


def fit_model(model, factors, config):
    """Train on the loss `factor * mean(logits^2)`; each factor is a batch."""
    def make_loss_fns(factor, config):
        return [lambda: (factor * model(torch.tensor([[1, 2]])).square().mean(), {})]
    return fit(model, make_optimizer(model.named_parameters(), config), factors, make_loss_fns, config)


def test_a_gradient_above_the_largest_norm_is_scaled_down_to_it(steps):
    small, large = fit_model(tiny_model(), [1e-3, 1000], TrainConfig(max_grad_norm=0.5))
    assert steps[0]["norm"] == pytest.approx(small["grad_norm"], rel=1e-4) and small["grad_norm"] < 0.5
    assert steps[1]["norm"] == pytest.approx(0.5, rel=1e-4) and large["grad_norm"] > 0.5  # the log has it unclipped


def test_a_largest_norm_of_0_means_no_clipping(steps):
    [record] = fit_model(tiny_model(), [1000], TrainConfig(max_grad_norm=0.0))
    assert steps[0]["norm"] == pytest.approx(record["grad_norm"], rel=1e-4) and record["grad_norm"] > 1


def test_each_step_has_its_own_gradient_and_learning_rate(steps):
    config = TrainConfig(max_grad_norm=1e9)
    log = fit_model(tiny_model(), [1.0] * 4, config)
    assert [s["norm"] for s in steps] == pytest.approx([steps[0]["norm"]] * 4)
    assert [s["rates"] for s in steps] == [{learning_rate(k, 4, config)} for k in range(4)]
    assert [record["learning_rate"] for record in log] == [learning_rate(k, 4, config) for k in range(4)]


@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_a_loss_that_is_not_finite_stops_the_training_and_changes_no_weight(bad):
    model, before = tiny_model(), []

    def make_loss_fns(factor, config):
        before.append(model.embed.weight.detach().clone())
        return [lambda: (model(torch.tensor([[1, 2]])).square().mean() * factor, {})]

    optimizer = make_optimizer(model.named_parameters(), TrainConfig())
    with pytest.raises(FloatingPointError, match="not finite"):
        fit(model, optimizer, [1.0, 1.0, bad, 1.0], make_loss_fns, TrainConfig())
    assert len(before) == 3 and torch.equal(model.embed.weight, before[-1])
    assert not torch.equal(before[0], before[1])


# Whole trainings, on each engine.


def test_dropout_is_on_during_training_and_off_after_it(engine):
    lm, seen = tiny_lm(engine), []

    def make_loss_fns(batch, config):
        seen.extend((m.training, m.p) for m in lm.model.modules() if isinstance(m, torch.nn.Dropout))
        return [lambda: (lm.model(torch.tensor([[1, 2]])).square().mean(), {})]

    lm.fit([0], make_loss_fns, TrainConfig(dropout=0.3))
    assert set(seen) == {(True, 0.3)} and not any(m.training for m in lm.model.modules())


def test_dropout_acts_on_the_loss_in_training_mode_only(engine):
    lm = tiny_lm(engine)
    example = encode_examples(lm, EXAMPLES[:1])
    fixed = {lm.target_loss(example).item() for _ in range(3)}
    lm.prepare_training(TrainConfig(dropout=0.5))
    assert len(fixed) == 1 and len({lm.target_loss(example).item() for _ in range(3)}) == 3


def change_of_weights(engine, config):
    """How one epoch on EXAMPLES changes the weights. Plain gradient descent: Adam inflates what is nearly zero."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", lambda groups, lr, **_: torch.optim.SGD(groups, lr))
        lm = tiny_lm(engine)
        trained = train_sft(lm, EXAMPLES, config, seed=0)
    return torch.cat([(after - before).detach().flatten() for before, after in
                      zip(lm.model.parameters(), trained.model.parameters())])


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_micro_batches_do_not_change_the_result(engine, micro_batch):
    config = TrainConfig(batch_size=3, learning_rate=1.0, warmup_fraction=0.0, max_grad_norm=1e9)
    whole, parts = (change_of_weights(engine, c) for c in (config, replace(config, micro_batch=micro_batch)))
    assert whole.abs().max() > 1e-2 and (parts - whole).abs().max() < 1e-6


def test_only_one_micro_batch_is_computed_at_once(engine):
    lm, rows = tiny_lm(engine), []
    lm.model.embed.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    train_sft(lm, EXAMPLES, TrainConfig(batch_size=3, micro_batch=2), seed=0)
    assert rows == [2, 1]


def test_training_is_the_same_for_the_same_seed(engine):
    def embedding(seed, numbers_drawn_before):
        torch.rand(numbers_drawn_before)  # the global random state must not matter
        lm = train_sft(tiny_lm(engine), EXAMPLES, TrainConfig(epochs=2, dropout=0.2), seed)
        return lm.model.embed.weight

    assert torch.equal(embedding(0, numbers_drawn_before=1), embedding(0, numbers_drawn_before=2))
    assert not torch.equal(embedding(0, numbers_drawn_before=1), embedding(1, numbers_drawn_before=1))
