"""M0 -> M1: supervised fine-tuning on IFT + EFT, loss on target tokens only (section 3.1.3)."""

from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from minisr import InputError
from minisr.rng import key as coordinates
from minisr.train import OptimConfig, fit, micro_batches

LOGITS = 2**25  # numbers held at once, 128 MB in float32


def encode_examples(tokenizer, examples: list[dict], context: int) -> list[tuple]:
    """{prompt, response} records -> (ids, mask); one that does not fit the context is an error."""
    encoded = [tokenizer.encode_chat(e["prompt"], e["response"]) for e in examples]
    for number, (ids, _) in enumerate(encoded, 1):
        if len(ids) > context:
            raise InputError(f"training example {number} has {len(ids)} tokens, the model's context "
                             f"is {context}: shorten it or leave it out")
    return encoded


def schedule(lengths: list[int], batch_size: int, epochs: int, key: int) -> list[list[int]]:
    """Indices of each batch: every example once an epoch, like lengths together, order shuffled."""
    rng, batches = Random(key), []
    for _ in range(epochs):
        order = list(range(len(lengths)))
        rng.shuffle(order)
        window = batch_size * 16  # sort within windows: little padding, still random
        chunks = [sorted(order[i:i + window], key=lengths.__getitem__)
                  for i in range(0, len(order), window)]
        order = [i for chunk in chunks for i in chunk]
        epoch = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
        rng.shuffle(epoch)
        batches += epoch
    return batches


def collate(encoded: list[tuple], device) -> tuple[Tensor, Tensor]:
    """(ids, mask) lists -> ids (B, T) and mask (B, T), padded on the right with masked zeros."""
    longest = max(len(ids) for ids, _ in encoded)
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in encoded])
    mask = torch.tensor([mask + [False] * (longest - len(mask)) for _, mask in encoded])
    return ids.to(device), mask.to(device)


def token_logps(head, x: Tensor, targets: Tensor) -> Tensor:
    """log p of the tokens targets (M,), each after the decoder's last state x (M, C): (M,).

    Logits of many tokens over a large vocabulary would fill the memory: they are made a chunk at a time,
    and made again in the backward pass."""
    rows = max(1, LOGITS // head.weight.shape[0])
    if len(x) <= rows:
        return _logps(head, x, targets)
    parts = [checkpoint(_logps, head, *chunk, use_reentrant=False)
             for chunk in zip(x.split(rows), targets.split(rows))]
    return torch.cat(parts)


def _logps(head, x: Tensor, targets: Tensor) -> Tensor:
    return -F.cross_entropy(head(x).float(), targets, reduction="none")


def target_loss(model, ids: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy summed over the target tokens of ids (B, T): the state at t - 1 predicts t.

    The head, a fifth of SmolLM2-135M's work, is computed only where there is a target."""
    counts = mask[:, 1:]
    sources = F.pad(counts, (0, 1)).flatten().nonzero()[:, 0]  # (N,)
    return -token_logps(model.head, model.hidden(ids, wanted=sources), ids[:, 1:][counts]).sum()


def target_loss_parts(model, batch: list[tuple], config: OptimConfig):
    """The mean loss a target token of a batch of (ids, mask), in its micro-batches' shares."""
    targets = sum(sum(mask[1:]) for _, mask in batch)
    for part in micro_batches(batch, config):
        yield target_loss(model, *collate(part, model.device)) / targets


def train_sft(model, tokenizer, examples: list[dict], config: OptimConfig, key: int,
              title: str, log_file=None, made_from=None):
    """Fine-tune model in place on {prompt, response} records; returns it. made_from as in train.fit."""
    encoded = encode_examples(tokenizer, examples, model.config.max_seq_len)
    batches = schedule([len(ids) for ids, _ in encoded], config.batch_size, config.epochs, key)
    torch.manual_seed(coordinates(key, "dropout"))

    def loss_parts(batch, config):
        for loss in target_loss_parts(model, [encoded[i] for i in batch], config):
            yield loss, {}

    fit(model, batches, loss_parts, config, title, log_file, made_from and (made_from, examples))
    return model
