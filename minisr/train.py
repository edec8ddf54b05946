"""The optimizer loop that pretraining, SFT and DPO share: schedule, clipping, log."""

import math
from collections import Counter
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from minisr import InputError
from minisr.model import ModelConfig, out_of_memory, part_rows
from minisr.runner.files import write_jsonl
from minisr.runner.resume import TrainingState
from minisr.runner.stop import Stop


@dataclass(frozen=True)
class OptimConfig:
    """How a model is trained, whatever the loss."""

    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-4  # reached by a cosine (paper, section 3.1.3)
    warmup: float = 0.05  # share of the steps
    batch_size: int = 16
    micro_batch: int = 0  # examples in memory at once, their gradients added up; 0: the whole batch
    recompute: bool = False  # activations in the backward pass: less memory, a third slower
    epochs: int = 1
    weight_decay: float = 0.0
    clip: float = 1.0  # largest norm of the gradient; 0: any
    dropout: float = 0.0
    save_every: int = 50  # steps after which an unfinished training's state is kept
    optimizer: str = "adamw"  # or "muon": Muon for the matrices, AdamW for the rest


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Linear warm-up, then a cosine from learning_rate down to final_learning_rate."""
    warmup = max(1, round(config.warmup * steps))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / (steps - warmup)
    span = config.learning_rate - config.final_learning_rate
    return config.final_learning_rate + span * (1 + math.cos(math.pi * progress)) / 2


def optimizers(masters: dict, config: OptimConfig, shape: ModelConfig) -> list[torch.optim.Optimizer]:
    """AdamW; with "muon" only for what is no matrix inside a block (Jordan et al., 2024)."""
    matrices = {name: p for name, p in masters.items() if name.startswith("blocks.") and p.dim() == 2}
    others = [p for name, p in masters.items() if name not in matrices]
    if config.optimizer == "adamw":
        groups = [{"params": matrices.values(), "weight_decay": config.weight_decay},
                  {"params": others, "weight_decay": 0.0}]
        return [torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)]
    return [_muon(matrices, config, shape),
            torch.optim.AdamW(others, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0,
                              fused=True)]


def _muon(matrices: dict, config: OptimConfig, shape: ModelConfig) -> torch.optim.Optimizer:
    """It makes each update orthogonal, so q, k, v and gate, up, one weight each, are to it what they are:
    matrices of their own, in the same memory."""
    rows = {name: part_rows(name, shape) or len(p) for name, p in matrices.items()}
    parts = {name: [part.requires_grad_() for part in p.detach().split(rows[name])]
             for name, p in matrices.items()}
    muon = torch.optim.Muon(sum(parts.values(), []), lr=config.learning_rate,
                            weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")

    def hand_on_gradients(*_):
        for name, p in matrices.items():
            for part, grad in zip(parts[name], p.grad.split(rows[name])):
                part.grad = grad
    muon.register_step_pre_hook(hand_on_gradients)
    return muon


def master_weights(model) -> dict[str, torch.Tensor]:
    """What the optimizer updates: the weights, or float32 copies where they are bfloat16, in which
    a small step would round to nothing."""
    return {name: p if p.dtype == torch.float32 else p.detach().float().requires_grad_()
            for name, p in model.named_parameters()}


def backward(loss: torch.Tensor, model, masters: dict) -> None:
    """Add the loss's gradients to the master weights'."""
    loss.backward()
    for name, p in model.named_parameters():
        if p is not masters[name] and p.grad is not None:
            grad = p.grad.float()
            masters[name].grad = grad if masters[name].grad is None else masters[name].grad + grad
            p.grad = None


def micro_batches(batch: list, config: OptimConfig) -> list[list]:
    """A batch in parts that fit into memory."""
    size = config.micro_batch or len(batch)
    return [batch[i:i + size] for i in range(0, len(batch), size)]


def fit(model, batches: list, loss_parts, config: OptimConfig, title: str, log_file=None,
        made_from=None) -> list[dict]:
    """Train model on batches in the order given; loss_parts(batch, config) yields (loss, figures), the
    shares of each micro-batch in the batch's loss and in the figures to log.

    Returns one record a step, which also goes to log_file. With made_from, all that decides the outcome
    beside batches and config, the state is kept beside log_file every save_every steps and when a signal
    asks to stop, and is where the next call goes on. The model is left in eval mode."""
    model.train()
    model.recompute = config.recompute
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = config.dropout
    masters = master_weights(model)
    chosen = optimizers(masters, config, model.config)
    kept = made_from and TrainingState(log_file.parent, made_from, batches, config)
    log = kept.restore(masters, chosen) if kept else []
    copy_back(model, masters)
    bar = tqdm(batches, title, leave=False, initial=len(log))
    for step in range(len(log), len(batches)):
        figures, config = gradients(model, masters, loss_parts, batches[step], config)
        norm = torch.nn.utils.clip_grad_norm_(masters.values(), config.clip or math.inf)
        if not torch.isfinite(norm):
            raise InputError(f"{title}: loss or gradient is not finite at step {step} of {len(batches)}, "
                             f"batch {str(batches[step])[:80]}; a new run with a lower learning_rate may do")
        rate = learning_rate(step, len(batches), config)
        update(model, masters, chosen, rate)
        log.append({"step": step, **figures, "grad_norm": norm.item(), "learning_rate": rate})
        bar.update()
        if kept and (Stop.asked or len(log) % config.save_every == 0):
            kept.save(len(log), log, masters, chosen)
        Stop.check()
    model.eval()
    if log_file:
        write_jsonl(log_file, log)
    return log


def gradients(model, masters: dict, loss_parts, batch, config: OptimConfig) -> tuple[Counter, OptimConfig]:
    """The gradients of a batch in the masters, and the figures to log. Where memory does not suffice the
    micro-batch is halved, and stays so: the same sum in more parts."""
    random = torch.get_rng_state()
    while True:
        figures = Counter()
        try:
            for loss, share in loss_parts(batch, config):
                backward(loss, model, masters)
                figures.update({"loss": loss.item(), **share})
            return figures, config
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            size = (config.micro_batch or config.batch_size) // 2
            if size < 1:
                raise InputError("not enough memory for one example at a time; a new run with recompute = "
                                 "true or a shorter context may do") from error
        config = replace(config, micro_batch=size)
        for name, p in model.named_parameters():
            p.grad = masters[name].grad = None
        torch.set_rng_state(random)


@torch.no_grad()
def update(model, masters: dict, chosen: list[torch.optim.Optimizer], rate: float) -> None:
    """One step of the optimizers at this learning rate; the gradients are spent."""
    for optimizer in chosen:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    for p in masters.values():
        p.grad = None
    copy_back(model, masters)


@torch.no_grad()
def copy_back(model, masters: dict) -> None:
    """The model's weights from the masters, where they are not the same."""
    for name, p in model.named_parameters():
        if p is not masters[name]:
            p.copy_(masters[name])
