"""Muon for the matrices inside the blocks, AdamW for the rest, against torch's own optimizers."""

import pytest
import torch
from tiny import EXAMPLES, llama_weights, tiny_model, tiny_tokenizer, with_log

from minisr.runner.config import TrainConfig
from minisr.runner.engine import Workspace, run_lm_class
from minisr.runner.muon import make_muon
from minisr.sft import train_sft
from minisr.train import optimizer_step


def random_gradients(parameters, seed):
    """A random gradient of every parameter, from a backward pass, so that hooks run."""
    generator = torch.Generator().manual_seed(seed)
    directions = {name: torch.randn(p.shape, generator=generator) for name, p in parameters.items()}
    sum((p * directions[name]).sum() for name, p in parameters.items()).backward()
    return directions


def test_q_k_v_and_gate_up_are_matrices_of_their_own():
    model, rate = tiny_model(), 0.01
    parameters = dict(model.named_parameters())
    optimizer = make_muon(model, TrainConfig(learning_rate=rate))
    separate = llama_weights(model.config, {name: p.detach().clone() for name, p in parameters.items()})
    separate = {name: p.requires_grad_() for name, p in separate.items() if "layers" in name and p.dim() == 2}
    single = [torch.optim.Muon([p], lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
              for p in separate.values()]
    for step in range(3):
        for name, gradient in llama_weights(model.config, random_gradients(parameters, step)).items():
            if name in separate:
                separate[name].grad = gradient
        optimizer_step(optimizer, rate, max_grad_norm=0.0)
        for muon in single:
            muon.step()
    assert all(p.grad is None for p in parameters.values())
    found = llama_weights(model.config, {name: p.detach() for name, p in parameters.items()})
    assert len(separate) == 14  # seven in each block
    for name, p in separate.items():
        torch.testing.assert_close(found[name], p.detach(), atol=1e-6, rtol=1e-5)


def test_the_rest_takes_adamws_steps_and_does_not_decay():
    model, rate = tiny_model(), 0.01
    parameters = dict(model.named_parameters())
    optimizer = make_muon(model, TrainConfig(weight_decay=0.1))
    others = {name for name, p in parameters.items() if not (name.startswith("blocks") and p.dim() == 2)}
    by_hand = {name: parameters[name].detach().double() for name in others}
    mean, square = dict.fromkeys(others, 0.0), dict.fromkeys(others, 0.0)
    for t in range(1, 5):
        gradients = random_gradients(parameters, t)
        for name in others:
            gradient = gradients[name].double()
            mean[name] = 0.9 * mean[name] + 0.1 * gradient
            square[name] = 0.95 * square[name] + 0.05 * gradient**2
            by_hand[name] = by_hand[name] - rate * (
                mean[name] / (1 - 0.9**t)) / ((square[name] / (1 - 0.95**t)).sqrt() + 1e-8)
        optimizer_step(optimizer, rate, max_grad_norm=0.0)
    assert len(others) == 6
    for name in others:
        torch.testing.assert_close(parameters[name].detach().double(), by_hand[name], atol=1e-6, rtol=1e-5)


def test_clipping_counts_every_weight_once():
    model = tiny_model()
    parameters = dict(model.named_parameters())
    optimizer = make_muon(model, TrainConfig())
    gradients = random_gradients(parameters, 0)
    norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm().item()
    assert optimizer_step(optimizer, 0.0, max_grad_norm=0.5) == pytest.approx(norm, rel=1e-5)


def test_training_with_muon_lowers_the_loss(engine):
    lm = run_lm_class(engine)(tiny_model(), tiny_tokenizer())
    lm.workspace = Workspace()
    config = TrainConfig(learning_rate=1e-2, batch_size=2, epochs=10, optimizer="muon")
    log = train_sft(with_log(lm), EXAMPLES, config, seed=0).log
    assert [record["step"] for record in log] == list(range(20))
    assert max(record["loss"] for record in log[-2:]) < 0.8 * min(record["loss"] for record in log[:2])
