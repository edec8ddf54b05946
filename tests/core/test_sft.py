"""The loss of supervised fine-tuning, the order of its batches, and the optimizer loop."""

import json
from dataclasses import replace
from math import ceil, cos, log, pi
from types import SimpleNamespace

import pytest
import torch
from tiny import llama_weights, tiny_model, tiny_tokenizer

from minisr import InputError, sft
from minisr.sft import collate, encode_examples, schedule, target_loss, train_sft
from minisr.train import (
    OptimConfig,
    backward,
    fit,
    learning_rate,
    master_weights,
    optimizers,
    update,
)

EXAMPLES = [{"prompt": "Write a story.", "response": "Once there was a fox. The end."},
            {"prompt": "Plan a day with the king.", "response": "First we call the king. Have fun."},
            {"prompt": "News?", "response": "Today we saw a bear."}]


def saying(logits):
    """A model whose logits are these, whatever it reads."""
    head = torch.nn.Linear(logits.shape[-1], logits.shape[-1], bias=False)
    head.weight.data = torch.eye(logits.shape[-1])
    return SimpleNamespace(hidden=lambda ids, wanted: logits.flatten(0, 1)[wanted], head=head)


def test_the_loss_is_the_mean_cross_entropy_of_the_targets_by_hand():
    ids = torch.tensor([[0, 1, 0, 1], [1, 1, 0, 0]])
    mask = torch.tensor([[False, False, True, True], [False, True, False, False]])
    # Softmax of [0, log 3] is 1/4, 3/4; of [0, 0] it is 1/2, 1/2. Logits at t - 1 stand for ids at t.
    a, b = [0.0, log(3)], [0.0, 0.0]
    logits = torch.tensor([[b, a, a, [9.0, -9.0]], [a, b, b, b]])
    by_hand = -(log(1 / 4) + log(3 / 4) + log(3 / 4)) / 3  # id 0, then 1; in the second row 1
    assert target_loss(saying(logits), ids, mask).item() / 3 == pytest.approx(by_hand, abs=1e-6)


def test_prompt_and_padding_bear_no_loss_and_the_end_token_does():
    tokenizer = tiny_tokenizer()
    encoded = encode_examples(tokenizer, EXAMPLES, context=96)
    ids, mask = collate(encoded, "cpu")
    torch.manual_seed(0)
    logits = torch.randn(*ids.shape, len(tokenizer), requires_grad=True)
    target_loss(saying(logits), ids, mask).backward()
    bearing = logits.grad.abs().sum(-1) > 0  # (B, T)
    for row, example in enumerate(EXAMPLES):
        asked = len(tokenizer.encode_prompt(example["prompt"]))
        answered = len(tokenizer.encode(example["response"])) + 1
        expected = [asked - 1 <= t < asked - 1 + answered for t in range(ids.shape[1])]
        assert bearing[row].tolist() == expected
        last = asked + answered - 1
        assert ids[row, last] == tokenizer.eos_id
        assert logits.grad[row, last - 1, tokenizer.eos_id] < 0  # a step makes the end more probable


def test_padding_does_not_change_the_loss():
    model, encoded = tiny_model(), encode_examples(tiny_tokenizer(), EXAMPLES, context=96)
    assert len({len(ids) for ids, _ in encoded}) > 1  # or nothing would be padded

    def loss_of(batch, config=None):
        ids, mask = collate(batch, "cpu")
        return target_loss(model, ids, mask).item() / mask[:, 1:].sum().item()

    counts = [sum(mask) for _, mask in encoded]
    alone = sum(loss_of([example]) * count for example, count in zip(encoded, counts)) / sum(counts)
    assert loss_of(encoded) == pytest.approx(alone, abs=1e-5)


def test_an_example_longer_than_the_context_is_refused_by_its_number():
    tokenizer = tiny_tokenizer()
    context = max(len(tokenizer.encode_chat(e["prompt"], e["response"])[0]) for e in EXAMPLES)
    assert len(encode_examples(tokenizer, EXAMPLES, context)) == 3
    long = {"prompt": "Long.", "response": "\n" * context}
    with pytest.raises(InputError, match=rf"training example 3 .*context is {context}"):
        encode_examples(tokenizer, [*EXAMPLES[:2], long, EXAMPLES[2]], context)


LENGTHS = [7 * i % 41 for i in range(150)]


@pytest.mark.parametrize("count, batch_size", [(150, 4), (150, 16), (3, 16), (1, 1)])
def test_every_example_comes_once_an_epoch(count, batch_size):
    batches = schedule(LENGTHS[:count], batch_size, epochs=3, key=1)
    each = ceil(count / batch_size)
    assert len(batches) == 3 * each
    for epoch in range(3):
        flat = [i for batch in batches[epoch * each:(epoch + 1) * each] for i in batch]
        assert sorted(flat) == list(range(count))
    assert max(map(len, batches)) <= batch_size


def test_the_order_belongs_to_the_key_and_differs_by_epoch():
    batches = schedule(LENGTHS, 4, 2, key=1)
    assert batches == schedule(LENGTHS, 4, 2, key=1) != schedule(LENGTHS, 4, 2, key=2)
    assert sorted(map(sorted, batches[:38])) != sorted(map(sorted, batches[38:]))


def test_like_lengths_are_batched_together():
    def padding(batches):
        return sum(max(LENGTHS[i] for i in batch) - LENGTHS[j] for batch in batches for j in batch)

    batches = schedule(LENGTHS, 4, 1, key=1)
    in_order = [range(i, min(i + 4, 150)) for i in range(0, 150, 4)]
    assert padding(batches) < 0.25 * padding(in_order)
    firsts = [LENGTHS[batch[0]] for batch in schedule(LENGTHS[:60], 4, 1, key=1)]
    assert firsts != sorted(firsts)  # but the batches come in no order of length


def test_the_learning_rate_by_hand():
    config = OptimConfig(learning_rate=1.0, final_learning_rate=0.2, warmup=0.1)
    rates = [learning_rate(step, 100, config) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * k for k in range(1, 11)])  # linear, 1/10 to 1
    assert rates[10] == pytest.approx(1.0)  # the cosine begins at the top
    assert rates[40] == pytest.approx(0.2 + 0.8 * (1 + cos(pi / 3)) / 2) == pytest.approx(0.8)
    assert rates[55] == pytest.approx(0.6)  # half way: the mean of both ends
    assert rates[100] == pytest.approx(0.2)
    assert all(a > b for a, b in zip(rates[10:], rates[11:]))


@pytest.mark.parametrize("rates", [[1.0], [1.0, 1.0], [1.0, 1.0, 0.6]])
def test_very_short_trainings_have_a_learning_rate(rates):
    config = OptimConfig(learning_rate=1.0, final_learning_rate=0.2, warmup=0.05)  # at least one step of it
    assert [learning_rate(step, len(rates), config) for step in range(len(rates))] == pytest.approx(rates)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_lowers_the_loss(optimizer, tmp_path):
    config = OptimConfig(learning_rate=1e-2, batch_size=2, epochs=10, optimizer=optimizer)
    train_sft(tiny_model(), tiny_tokenizer(), EXAMPLES, config, 0, "test", tmp_path / "log.jsonl")
    steps = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps] == list(range(20))
    assert [s["learning_rate"] for s in steps] == [learning_rate(k, 20, config) for k in range(20)]
    assert max(s["loss"] for s in steps[-2:]) < 0.8 * min(s["loss"] for s in steps[:2])


def test_muon_takes_q_k_v_and_gate_up_for_matrices_of_their_own():
    model = tiny_model()
    masters = dict(model.named_parameters())
    config = OptimConfig(optimizer="muon", learning_rate=0.01)
    chosen, rate = optimizers(masters, config, model.config), 0.01
    apart = llama_weights(model.config, {name: p.detach().clone() for name, p in masters.items()})
    apart = {name: p.requires_grad_() for name, p in apart.items() if "layers" in name and p.dim() == 2}
    alone = [torch.optim.Muon([p], lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
             for p in apart.values()]
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for p in masters.values():
            p.grad = torch.randn(p.shape, generator=generator)
        for name, grad in llama_weights(model.config, {n: p.grad for n, p in masters.items()}).items():
            if name in apart:
                apart[name].grad = grad
        update(model, masters, chosen, rate)
        for optimizer in alone:
            optimizer.step()
    assert all(p.grad is None for p in masters.values())
    found = llama_weights(model.config, {name: p.detach() for name, p in masters.items()})
    assert len(apart) == 14  # seven a block
    for name, p in apart.items():
        torch.testing.assert_close(found[name], p.detach(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_adamws_steps_by_hand(optimizer):
    # It decays the matrices of blocks alone; beside Muon, which takes those, it decays nothing.
    model, rate = tiny_model(), 0.01
    masters = dict(model.named_parameters())
    chosen = optimizers(masters, OptimConfig(optimizer=optimizer, weight_decay=0.1), model.config)
    matrices = {name for name, p in masters.items() if name.startswith("blocks") and p.dim() == 2}
    by_hand = {name: p.detach().double() for name, p in masters.items()
               if optimizer == "adamw" or name not in matrices}
    mean, square = (dict.fromkeys(by_hand, 0.0) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    for t in range(1, 5):
        for p in masters.values():
            p.grad = torch.randn(p.shape, generator=generator)
        for name, p in by_hand.items():
            grad = masters[name].grad.double()
            mean[name] = 0.9 * mean[name] + 0.1 * grad
            square[name] = 0.95 * square[name] + 0.05 * grad**2
            by_hand[name] = p * (1 - rate * 0.1 * (name in matrices)) - rate * (
                mean[name] / (1 - 0.9**t)) / ((square[name] / (1 - 0.95**t)).sqrt() + 1e-8)
        update(model, masters, chosen, rate)
    assert len(by_hand) == {"adamw": 14, "muon": 6}[optimizer]
    for name, p in by_hand.items():
        torch.testing.assert_close(masters[name].detach().double(), p, atol=1e-6, rtol=1e-5)


def test_training_is_the_same_for_the_same_key():
    def trained(key, others_drew):
        model = tiny_model()
        torch.rand(others_drew)  # the stream that all share must not matter
        train_sft(model, tiny_tokenizer(), EXAMPLES, OptimConfig(epochs=2, dropout=0.2), key, "test")
        return model.embed.weight

    assert torch.equal(trained(0, others_drew=1), trained(0, others_drew=2))
    assert not torch.equal(trained(0, others_drew=1), trained(1, others_drew=1))


def test_dropout_is_on_while_training_and_off_after():
    model, seen = tiny_model(), []

    def loss_of(batch, config=None):
        seen.extend((m.training, m.p) for m in model.modules() if isinstance(m, torch.nn.Dropout))
        yield model(torch.tensor([[1, 2]])).square().mean(), {}

    fit(model, [0], loss_of, OptimConfig(dropout=0.3), "test")
    assert set(seen) == {(True, 0.3)} and not any(m.training for m in model.modules())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_training_and_names_the_step(bad):
    model = tiny_model()
    before = []

    def loss_of(factor, config):
        before.append(model.embed.weight.detach().clone())
        yield model(torch.tensor([[1, 2]])).square().mean() * factor, {}

    with pytest.raises(InputError, match="M1: .*not finite at step 2.*learning_rate"):
        fit(model, [1.0, 1.0, bad, 1.0], loss_of, OptimConfig(), "M1")
    assert len(before) == 3 and torch.equal(model.embed.weight, before[-1])  # the bad step is not taken


@pytest.fixture
def steps(monkeypatch):
    """Make the optimizer record what it is given, and do nothing."""
    taken = []

    def step(self):
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        taken.append({"norm": sum(g.square().sum() for g in grads).sqrt().item(),
                      "rates": {group["lr"] for group in self.param_groups}})

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    return taken


def gradient_of(model):
    return lambda factor, config: [(factor * model(torch.tensor([[1, 2]])).square().mean(), {})]


def test_a_gradient_above_the_clip_is_scaled_to_it(steps):
    model = tiny_model()
    small, large = fit(model, [1e-3, 1000], gradient_of(model), OptimConfig(clip=0.5), "test")
    assert steps[0]["norm"] == pytest.approx(small["grad_norm"], rel=1e-4) and small["grad_norm"] < 0.5
    assert steps[1]["norm"] == pytest.approx(0.5, rel=1e-4) and large["grad_norm"] > 0.5  # logged unclipped


def test_each_step_has_its_own_gradient_and_learning_rate(steps):
    model, config = tiny_model(), OptimConfig(clip=1e9)
    fit(model, [1.0] * 4, gradient_of(model), config, "test")
    assert [s["norm"] for s in steps] == pytest.approx([steps[0]["norm"]] * 4)
    assert [s["rates"] for s in steps] == [{learning_rate(k, 4, config)} for k in range(4)]


def weights_after(config, key=0, examples=EXAMPLES, dtype=torch.float32):
    model = tiny_model().to(dtype)
    train_sft(model, tiny_tokenizer(), examples, config, key, "test")
    return torch.cat([p.detach().float().flatten() for p in model.parameters()])


@pytest.mark.parametrize("saving", [{"micro_batch": 1}, {"micro_batch": 2}, {"recompute": True}])
def test_what_saves_memory_changes_no_result(saving):
    whole = OptimConfig(batch_size=3, epochs=1, learning_rate=1.0, warmup=0.0, clip=1e9)
    with pytest.MonkeyPatch.context() as patch:  # plain gradient descent: Adam blows up what is nearly zero
        patch.setattr(torch.optim, "AdamW", lambda groups, lr, **_: torch.optim.SGD(groups, lr))
        moved = weights_after(whole) - torch.cat([p.detach().flatten() for p in tiny_model().parameters()])
        difference = weights_after(replace(whole, **saving)) - weights_after(whole)
    assert moved.abs().max() > 1e-2 and difference.abs().max() < 1e-6


def test_a_micro_batch_is_all_that_is_in_memory_at_once():
    rows = []
    model = tiny_model()
    model.embed.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    train_sft(model, tiny_tokenizer(), EXAMPLES, OptimConfig(batch_size=3, micro_batch=2), 0, "test")
    assert rows == [2, 1]


def test_bfloat16_weights_gather_steps_too_small_for_them():
    # Steps of 1e-5 vanish beside weights of 0.3 in bfloat16 unless a float32 copy adds them up.
    config = OptimConfig(learning_rate=1e-5, final_learning_rate=1e-5, warmup=0.0, batch_size=3, epochs=300)
    start = torch.cat([p.detach().flatten() for p in tiny_model().bfloat16().parameters()]).float()
    exact = weights_after(config) - start
    rounded = weights_after(config, dtype=torch.bfloat16) - start
    norms = start == 1  # 1 + 1e-5 is 1 in bfloat16
    assert rounded[norms].abs().max() > 1e-3
    assert torch.corrcoef(torch.stack([exact, rounded]))[0, 1] > 0.6


def test_gradients_of_micro_batches_add_up_beside_bfloat16_weights():
    model = tiny_model().bfloat16()
    masters = master_weights(model)

    def gradient(*tokens):
        for token in tokens:
            backward(model(torch.tensor([[token, 2]])).float().square().mean(), model, masters)
        found = {name: p.grad for name, p in masters.items()}
        for p in masters.values():
            p.grad = None
        return found
    first, second, both = gradient(5), gradient(6), gradient(5, 6)
    assert all(p.grad is None for p in model.parameters())
    for name in masters:
        assert torch.equal(both[name], first[name] + second[name]) and second[name].any(), name


@pytest.mark.parametrize("logits", [1, 7 * 500, 2**24])  # one token at a time, seven, all together
def test_chunks_of_logits_change_neither_loss_nor_gradient(monkeypatch, logits):
    monkeypatch.setattr(sft, "LOGITS", logits)
    model, (ids, mask) = tiny_model(), collate(encode_examples(tiny_tokenizer(), EXAMPLES, 96), "cpu")
    loss = target_loss(model, ids, mask)
    loss.backward()
    plain = tiny_model()
    wanted = torch.nn.functional.cross_entropy(plain(ids)[:, :-1][mask[:, 1:]], ids[:, 1:][mask[:, 1:]],
                                               reduction="sum")
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    for weight, other in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(weight.grad, other.grad, atol=1e-4, rtol=1e-4)
