"""The optimizer loop that pretraining, SFT and DPO share: schedule, clipping, log."""

import math
from dataclasses import dataclass

import torch
from tqdm import tqdm

from minisr.records import InputError, write_jsonl


@dataclass(frozen=True)
class OptimConfig:
    """How a model is trained, whatever the loss."""

    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-4  # reached by a cosine (paper, section 3.1.3)
    warmup: float = 0.05  # share of the steps
    batch_size: int = 16
    epochs: int = 1
    weight_decay: float = 0.0
    clip: float = 1.0  # largest norm of the gradient
    dropout: float = 0.0
    optimizer: str = "adamw"  # or "muon": Muon for the matrices, AdamW for the rest


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Linear warm-up, then a cosine from learning_rate down to final_learning_rate."""
    warmup = max(1, round(config.warmup * steps))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / (steps - warmup)
    span = config.learning_rate - config.final_learning_rate
    return config.final_learning_rate + span * (1 + math.cos(math.pi * progress)) / 2


def optimizers(model, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """AdamW; with "muon" only for what is no matrix inside a block (Jordan et al., 2024)."""
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    ids = set(map(id, matrices))
    others = [p for p in model.parameters() if id(p) not in ids]
    if config.optimizer == "adamw":
        groups = [{"params": matrices, "weight_decay": config.weight_decay},
                  {"params": others, "weight_decay": 0.0}]
        return [torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95))]
    return [torch.optim.Muon(matrices, lr=config.learning_rate, weight_decay=config.weight_decay,
                             adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)]


def fit(model, batches: list, loss_of, config: OptimConfig, title: str, log_file=None) -> list[dict]:
    """Train model on batches in the order given; loss_of(batch) -> (loss, figures to log).

    Returns one record a step, which also goes to log_file. The model is left in eval mode."""
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = config.dropout
    chosen, log = optimizers(model, config), []
    for step, batch in enumerate(tqdm(batches, title, leave=False)):
        rate = learning_rate(step, len(batches), config)
        loss, figures = loss_of(batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        if not torch.isfinite(norm):
            raise InputError(f"{title}: loss or gradient is not finite at step {step}; "
                             "lower learning_rate")
        for optimizer in chosen:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        log.append({"step": step, "loss": loss.item(), **figures, "grad_norm": norm.item(),
                    "learning_rate": rate})
    model.eval()
    if log_file:
        write_jsonl(log_file, log)
    return log
