"""LoRA (Hu et al., arXiv 2106.09685): a model computes with W + alpha / r B A in place of each weight W (out, in), and
only the two small matrices A (r, in) and B (out, r) are trained.

An alternative way to train: the optimizer's state is then a few percent of that of all weights. After the training, the
adapters are merged into the weights, so nothing else has to know of them. tiny_configs/README.md says when to use it.
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisr.interop.shape import fused_weight_sizes
from minisr.model import Decoder, upcast

# The matrices that each weight of a block consists of. Each has an adapter of its own, as if it were stored alone.
PARTS = {"qkv_proj": ("q", "k", "v"), "out_proj": ("o",), "gate_up_proj": ("gate", "up"), "down_proj": ("down",)}
TARGETS = tuple(part for parts in PARTS.values() for part in parts)


@dataclass(frozen=True)
class LoRAConfig:
    """The adapters of SFT and DPO."""

    rank: int = 0  # r; 0: no adapters, all weights are trained
    alpha: float = 32.0  # scales the adapters by alpha / rank
    targets: tuple[str, ...] = TARGETS  # the matrices of every block that have an adapter

    def __post_init__(self):
        if not self.targets or set(self.targets) - set(TARGETS):
            raise ValueError(f"targets must be some of {', '.join(TARGETS)}, not {list(self.targets)}")


class LoRALinear(nn.Module):
    """x -> W x + alpha / r B A x, with the frozen W of `linear`, whose parts have these numbers of rows."""

    def __init__(self, linear: nn.Linear, parts: dict[str, int], config: LoRAConfig):
        super().__init__()
        self.linear, self.parts, self.scale = linear, parts, config.alpha / config.rank
        W = linear.weight
        like = {"dtype": upcast(W[:0]).dtype, "device": W.device}  # float32 beside bfloat16 weights
        self.A, self.B = nn.ParameterDict(), nn.ParameterDict()
        bound = W.shape[1]**-0.5
        for part, rows in parts.items():
            if part in config.targets:
                self.A[part] = torch.empty(config.rank, W.shape[1]).uniform_(-bound, bound).to(**like)
                self.B[part] = torch.zeros(rows, config.rank, **like)  # so that the training starts with W

    def forward(self, x: Tensor) -> Tensor:
        low_rank = self.scale * F.linear(x, torch.cat(list(self.A.values())).to(x.dtype))  # (B, T, n r) for n adapters
        low_rank = dict(zip(self.A, low_rank.chunk(len(self.A), dim=-1)))
        changes = []
        for part, rows in self.parts.items():
            if part in self.A:
                changes.append(F.linear(low_rank[part], self.B[part].to(x.dtype)))  # (B, T, rows)
            else:
                changes.append(x.new_zeros(*x.shape[:-1], rows))
        return self.linear(x) + torch.cat(changes, dim=-1)

    def merged_weight(self) -> Tensor:
        W = self.linear.weight
        changes = [self.B[part] @ self.A[part] if part in self.A else W.new_zeros(rows, W.shape[1])
                   for part, rows in self.parts.items()]
        return W + self.scale * torch.cat(changes)


def add_adapters(model: Decoder, config: LoRAConfig) -> Decoder:
    """The same weights, not copied, with adapters as the only parameters. `model` is not changed."""
    adapted = copy.deepcopy(model, {id(p): p for p in model.parameters()})  # new modules, the same tensors
    for module in adapted.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, weight.detach(), persistent=False)  # not trained, not in state_dict()
    for name, linear in list(adapted.blocks.named_modules()):
        parts = PARTS.get(name.rpartition(".")[2], ())
        if set(parts) & set(config.targets):
            rows = dict(zip(parts, fused_weight_sizes(name, model.config) or [len(linear.weight)]))
            adapted.blocks.set_submodule(name, LoRALinear(linear, rows, config))
    return adapted


@torch.no_grad()
def merge_adapters(model: Decoder, adapted: Decoder) -> Decoder:
    """A copy of `model` with the adapters of `adapted` added to its weights."""
    merged = copy.deepcopy(model)
    for name, module in adapted.named_modules():
        if isinstance(module, LoRALinear):
            merged.get_submodule(name).weight.copy_(module.merged_weight())
    return merged


class LoRATraining:
    """Mixed into FastLM. copy() and frozen_copy() share the weights. Training a copy adds adapters to it; the frozen
    copy, DPO's reference, has none."""

    lora: LoRAConfig

    def copy(self):
        self.graphs = None
        return copy.copy(self)

    def prepare_training(self, config):
        self.base, self.model = self.model, add_adapters(self.model, self.lora)
        return super().prepare_training(config)

    def fit(self, batches: list, make_loss_fns, config) -> list[dict]:
        log = super().fit(batches, make_loss_fns, config)
        self.model = merge_adapters(self.base, self.model)
        del self.base
        return log
