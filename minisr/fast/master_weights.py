"""Training bfloat16 weights: the optimizer updates float32 copies, so that small updates are not lost to rounding.

Replaces train.make_optimizer for bfloat16 models.
"""

import weakref

import torch

from minisr.model import Decoder
from minisr.train import TrainConfig, make_optimizer


def make_master_optimizer(model: Decoder, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW on float32 master weights. Gradients move to them after each backward pass, updates back after a step.

    When the optimizer is deleted, the hooks on the model go too, and with them the master weights."""
    masters = {name: p.detach().float().requires_grad_() for name, p in model.named_parameters()}
    optimizer = make_optimizer(masters.items(), config)

    def add_gradient_to(master):
        def hook(p):
            if master.grad is None:
                master.grad = p.grad.float()
            else:
                master.grad += p.grad
            p.grad = None
        return hook

    @torch.no_grad()
    def update_model(*_):
        for name, p in model.named_parameters():
            p.copy_(masters[name])

    hooks = [p.register_post_accumulate_grad_hook(add_gradient_to(masters[name]))
             for name, p in model.named_parameters()]
    optimizer.register_step_post_hook(update_model)
    weakref.finalize(optimizer, remove_hooks, hooks)
    return optimizer


def remove_hooks(hooks: list) -> None:
    for hook in hooks:
        hook.remove()
