"""The optimizer loop that SFT and DPO share: batches, learning rate, gradient accumulation, clipping, AdamW."""

import math
from collections import Counter
from dataclasses import dataclass
from random import Random

import torch
from torch import nn
from tqdm import tqdm


@dataclass(frozen=True)
class TrainConfig:
    """Optimizer settings shared by SFT and DPO."""

    learning_rate: float = 1e-3
    min_learning_rate: float = 1e-4  # approached by a cosine at the end (section 3.1.3)
    warmup_fraction: float = 0.05  # of the steps
    batch_size: int = 16
    micro_batch: int = 0  # examples in memory at once, their gradients added up; 0: the whole batch
    epochs: int = 1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # 0: no clipping
    dropout: float = 0.0


def fit(model: nn.Module, optimizer, batches: list, make_loss_fns, config: TrainConfig) -> list[dict]:
    """Train the model in place, one optimizer step per batch; return one log record per step.

    make_loss_fns(batch, config) returns one function per micro-batch, which computes (loss, metrics) divided by the
    size of the whole batch, so that they add up. Each micro-batch's graph is freed before the next one is built. The
    config is an argument so that the caller decides on the size of the micro-batches.

    Raises FloatingPointError if the norm of the gradients is not finite."""
    log = []
    for step, batch in enumerate(tqdm(batches, "train", leave=False, disable=None)):
        metrics = accumulate_gradients(make_loss_fns(batch, config))
        rate = learning_rate(step, len(batches), config)
        grad_norm = optimizer_step(optimizer, rate, config.max_grad_norm)
        log.append({"step": step, **metrics, "grad_norm": grad_norm, "learning_rate": rate})
    model.eval()
    return log


def accumulate_gradients(loss_fns) -> Counter:
    """Add up the gradients of all micro-batches of a batch; return the batch's metrics."""
    metrics = Counter()
    for loss_fn in loss_fns:
        loss, values = loss_fn()
        loss.backward()
        metrics.update({"loss": loss.item(), **values})  # Counter.update adds
    return metrics


def optimizer_step(optimizer, rate: float, max_grad_norm: float) -> float:
    """Clip the gradients and update the weights at this learning rate; return the norm before clipping.

    Raises FloatingPointError, and updates nothing, if the norm is not finite."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf)
    if not torch.isfinite(norm):
        raise FloatingPointError("the gradient norm is not finite")
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    return norm.item()


def make_optimizer(named_parameters, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; weight decay applies to the matrices inside the blocks only."""
    matrices, others = [], []
    for name, parameter in named_parameters:
        (matrices if name.startswith("blocks.") and parameter.dim() == 2 else others).append(parameter)
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)


def learning_rate(step: int, steps: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine from learning_rate down to min_learning_rate."""
    warmup = max(1, round(config.warmup_fraction * steps))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / (steps - warmup)
    cosine = (1 + math.cos(math.pi * progress)) / 2  # from 1 to 0
    return config.min_learning_rate + (config.learning_rate - config.min_learning_rate) * cosine


def make_batches(lengths: list[int], config: TrainConfig, seed: int, epochs: int | None = None) -> list[list[int]]:
    """Indices of each batch: every example once an epoch, in random order, similar lengths together."""
    rng, batches, size = Random(seed), [], config.batch_size
    for _ in range(config.epochs if epochs is None else epochs):
        order = list(range(len(lengths)))
        rng.shuffle(order)
        window = 16 * size  # sorting within windows reduces padding and keeps the order random
        windows = [sorted(order[i:i + window], key=lengths.__getitem__) for i in range(0, len(order), window)]
        order = [i for indices in windows for i in indices]
        epoch = [order[i:i + size] for i in range(0, len(order), size)]
        rng.shuffle(epoch)
        batches += epoch
    return batches


def micro_batches(batch: list, config: TrainConfig) -> list[list]:
    """Split a batch into micro-batches."""
    size = config.micro_batch or max(1, len(batch))
    return [batch[i:i + size] for i in range(0, len(batch), size)]


def set_training_mode(model: nn.Module, dropout: float) -> None:
    """Training mode, with this dropout probability in every dropout layer."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
