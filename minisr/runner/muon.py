"""Muon (Jordan et al., 2024) for the matrices inside the blocks, AdamW for everything else.

Chosen with optimizer = "muon", as in tiny_configs/pretrain.toml.
"""

import torch

from minisr.interop.shape import fused_weight_sizes
from minisr.model import Decoder, ModelConfig
from minisr.train import TrainConfig


def make_muon(model: Decoder, config: TrainConfig) -> torch.optim.Optimizer:
    """Muon for the matrices inside the blocks and AdamW for all other weights, as one optimizer."""
    parameters = dict(model.named_parameters())
    matrices = {name: p for name, p in parameters.items() if name.startswith("blocks.") and p.dim() == 2}
    others = [p for name, p in parameters.items() if name not in matrices]
    adamw = torch.optim.AdamW(others, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return OptimizerPair(SplitMuon(matrices, config, model.config), adamw)


class SplitMuon(torch.optim.Muon):
    """Muon makes every update orthogonal, so q, k, v and gate, up, stored as one weight each, must be separate matrices
    to it: views of the same memory."""

    def __init__(self, matrices: dict, config: TrainConfig, shape: ModelConfig):
        self.matrices = list(matrices.values())
        views = []
        for name, p in matrices.items():
            sizes = fused_weight_sizes(name, shape) or len(p)
            parts = [part.requires_grad_() for part in p.detach().split(sizes)]
            p.register_post_accumulate_grad_hook(share_gradient_with(parts, sizes))
            views += parts
        super().__init__(views, lr=config.learning_rate, weight_decay=config.weight_decay,
                         adjust_lr_fn="match_rms_adamw")

    def zero_grad(self):
        super().zero_grad()
        for p in self.matrices:
            p.grad = None


def share_gradient_with(parts: list[torch.Tensor], sizes):
    """A hook that gives each part its rows of the gradient, in the same memory."""
    def hook(p):
        for part, gradient in zip(parts, p.grad.split(sizes)):
            part.grad = gradient
    return hook


class OptimizerPair:
    """Two optimizers with the interface of one."""

    def __init__(self, muon: SplitMuon, adamw: torch.optim.AdamW):
        self.optimizers = (muon, adamw)

    @property
    def param_groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def state_dict(self) -> list[dict]:
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states: list[dict]) -> None:
        for optimizer, state in zip(self.optimizers, states):
            optimizer.load_state_dict(state)
