"""Training bfloat16 weights with float32 copies, in which small steps add up."""

import weakref

import pytest
import torch
from tiny import EXAMPLES, tiny_lm, tiny_model

from minisr.fast.master_weights import make_master_optimizer
from minisr.runner.lora import LoRAConfig, add_adapters
from minisr.sft import train_sft
from minisr.train import TrainConfig, optimizer_step


def flat_weights(model):
    return torch.cat([p.detach().float().flatten() for p in model.parameters()])


def weights_after(config, dtype):
    lm = tiny_lm("fast")
    lm.model.to(dtype)
    return flat_weights(train_sft(lm, EXAMPLES, config, seed=0).model)


def test_steps_too_small_for_bfloat16_add_up():
    # A step of 3e-5 rounds to nothing beside a weight of 0.3 in bfloat16, unless a float32 copy adds them up.
    config = TrainConfig(learning_rate=3e-5, min_learning_rate=3e-5, warmup_fraction=0.0, batch_size=3, epochs=100)
    start = flat_weights(tiny_model().bfloat16())
    exact = weights_after(config, torch.float32) - start
    rounded = weights_after(config, torch.bfloat16) - start
    norms = start == 1  # 1 + 3e-5 is 1 in bfloat16
    assert rounded[norms].abs().max() > 1e-3
    assert torch.corrcoef(torch.stack([exact, rounded]))[0, 1] > 0.6


@pytest.fixture
def model_and_masters():
    """A bfloat16 model, its optimizer, and its float32 weights by name."""
    model = tiny_model().bfloat16()
    optimizer = make_master_optimizer(model, TrainConfig())
    names = {name: p.shape for name, p in model.named_parameters()}
    masters = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(p.shape for p in masters) == sorted(names.values())
    return [model, optimizer, masters]


def test_gradients_of_micro_batches_add_up_in_float32(model_and_masters):
    model, optimizer, masters = model_and_masters

    def gradients(*tokens):
        for token in tokens:
            model(torch.tensor([[token, 2]])).float().square().mean().backward()
        found = [p.grad for p in masters]
        optimizer.zero_grad()
        return found

    first, second, both = gradients(5), gradients(6), gradients(5, 6)
    assert all(p.grad is None for p in model.parameters())  # moved, not copied
    for a, b, total in zip(first, second, both):
        assert total.dtype == torch.float32 and torch.equal(total, a + b) and b.any()


def test_after_a_step_the_model_is_its_masters_rounded(model_and_masters):
    model, optimizer, masters = model_and_masters
    before = flat_weights(model)
    model(torch.tensor([[5, 2]])).float().square().mean().backward()
    norm = optimizer_step(optimizer, 0.01, max_grad_norm=1.0)
    assert norm > 0 and not torch.equal(flat_weights(model), before)
    rounded = {tuple(p.bfloat16().flatten().tolist()) for p in masters}
    assert {tuple(p.flatten().tolist()) for p in model.parameters()} == rounded
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_a_finished_training_leaves_no_hook_and_no_master_weights(model_and_masters):
    model, optimizer, masters = model_and_masters
    masters = [weakref.ref(p) for p in masters]
    del optimizer
    model_and_masters[1:] = []
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert [ref() for ref in masters] == [None] * len(masters)
    model(torch.tensor([[5, 2]])).float().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_adapters_in_float32_have_no_masters_although_the_weights_are_in_bfloat16():
    lm = tiny_lm("fast")
    lm.model = add_adapters(lm.model.to(torch.bfloat16), LoRAConfig(rank=2))
    optimizer = lm.prepare_training(TrainConfig())
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in lm.model.parameters()}


def test_only_bfloat16_models_have_masters():
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32),
                            (torch.float64, torch.float64)):
        lm = tiny_lm("fast")
        lm.model.to(dtype)
        optimizer = lm.prepare_training(TrainConfig())
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert {p.dtype for group in optimizer.param_groups for p in group["params"]} == {expected}
        assert (trained == {id(p) for p in lm.model.parameters()}) == (dtype != torch.bfloat16)
