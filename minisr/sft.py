"""M0 -> SFT baseline and M1: supervised fine-tuning, with the loss on target tokens only (section 3.1.3)."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from minisr import InputError
from minisr.rng import derive_seed
from minisr.train import TrainConfig, make_batches, micro_batches


class Example(NamedTuple):
    """Token ids, and the loss mask: True on the targets."""

    ids: list[int]
    mask: list[bool]


def train_sft(lm, examples: list[dict], config: TrainConfig, seed: int):
    """A copy of lm, fine-tuned on {"prompt", "response"} records."""
    encoded = encode_examples(lm, examples)
    order = make_batches([len(example.ids) for example in encoded], config, seed)
    batches = [[encoded[i] for i in batch] for batch in order]
    torch.manual_seed(derive_seed(seed, "dropout"))  # dropout draws from PyTorch's global stream
    trained = lm.copy()
    trained.fit(batches, partial(make_target_loss_fns, trained), config)
    return trained


def encode_examples(lm, examples: list[dict]) -> list[Example]:
    """Tokenize {"prompt", "response"} records. Raises InputError if one is longer than the model's max_seq_len."""
    encoded = [Example(*lm.tokenizer.encode_chat(e["prompt"], e["response"])) for e in examples]
    for number, example in enumerate(encoded, 1):
        check_length(lm, f"training example {number}", len(example.ids))
    return encoded


def check_length(lm, name: str, length: int) -> None:
    if length > lm.max_seq_len:
        raise InputError(f"{name} has {length} tokens; max_seq_len is {lm.max_seq_len}: shorten it or leave it out")


def make_target_loss_fns(lm, batch: list[Example], config: TrainConfig, weight: float = 1.0) -> list:
    """One function per micro-batch, see train.fit. Each computes the cross-entropy summed over its targets,
    divided by the number of targets in the whole batch."""
    targets = sum(sum(example.mask[1:]) for example in batch)  # the first token has nothing to predict it from

    def loss_fn(part: list[Example]):
        return weight * (lm.target_loss(part) / targets), {}

    return [partial(loss_fn, part) for part in micro_batches(batch, config)]


def right_pad(examples: list[Example], device) -> tuple[Tensor, Tensor]:
    """ids and mask (B, T), padded on the right with zeros that are not targets."""
    T = max(len(example.ids) for example in examples)
    ids = torch.tensor([example.ids + [0] * (T - len(example.ids)) for example in examples])
    mask = torch.tensor([example.mask + [False] * (T - len(example.mask)) for example in examples])
    return ids.to(device), mask.to(device)
