"""M_t -> M_{t+1}: direct preference optimization on the model's own pairs (section 2.3; Rafailov et al., 2023)."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minisr.model import upcast
from minisr.rng import derive_seed
from minisr.sft import Example, check_length, encode_examples, make_target_loss_fns
from minisr.train import TrainConfig, make_batches, micro_batches


@dataclass(frozen=True)
class DPOConfig(TrainConfig):
    """DPO, and two optional terms that are not in the paper (0: off)."""

    beta: float = 0.1
    nll_weight: float = 0.0  # weight of -log p(y_w | x) / |y_w| (Iterative RPO, Pang et al., 2024, eq. 1)
    replay_weight: float = 0.0  # weight of the SFT loss on a batch of EFT examples, added in every step


class EncodedPair(NamedTuple):
    """Token ids of a preference pair; each response ends with its end token."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    def example(self, response: list[int]) -> Example:
        """The prompt and one of the responses, with the mask on the response."""
        return Example(self.prompt + response, [False] * len(self.prompt) + [True] * len(response))


def sequence_logprobs(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """log p(response | prompt), the *sum* over response tokens: (B,).

    logits (B, T, V) at t - 1 predict ids (B, T) at t; mask (B, T) is True on response tokens."""
    logps = upcast(logits[:, :-1]).log_softmax(-1)  # (B, T-1, V)
    token_logps = logps.gather(-1, ids[:, 1:, None])[..., 0]  # (B, T-1)
    return (token_logps * mask[:, 1:]).sum(-1)


def dpo_loss(policy_chosen_logps: Tensor, policy_rejected_logps: Tensor,
             reference_chosen_logps: Tensor, reference_rejected_logps: Tensor,
             beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, chosen reward and rejected reward of each pair, all (B,).

    -log sigmoid(beta [log pi(y_w)/ref(y_w) - log pi(y_l)/ref(y_l)])  (Rafailov et al., eq. 7);
    the implicit reward is beta log pi(y)/ref(y)."""
    chosen = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected = beta * (policy_rejected_logps - reference_rejected_logps)
    return -F.logsigmoid(chosen - rejected), chosen.detach(), rejected.detach()


def train_dpo(lm, pairs: list[dict], eft: list[dict], config: DPOConfig, seed: int):
    """M_{t+1}: a copy of M_t (lm), trained on preference pairs, with EFT records replayed if config asks for it.

    Without any pair there is nothing to learn, and M_{t+1} is M_t."""
    policy = lm.copy()
    reference = lm.frozen_copy()  # M_t, out of reach of any gradient
    batches = dpo_batches(lm, pairs, eft, config, seed)
    torch.manual_seed(derive_seed(seed, "dropout"))
    fit_dpo(policy, reference, batches, config)
    return policy


def fit_dpo(policy, reference, batches: list[tuple], config: DPOConfig, preference_loss=dpo_loss) -> None:
    """Train the policy in place on batches of (pairs, replayed examples), see dpo_batches.

    Control experiments replace dpo_loss with another preference_loss."""

    def pair_loss(part: list[EncodedPair], batch_size: int):
        chosen, rejected = policy.pair_logps(part)  # (B,) each
        with torch.no_grad():
            reference_chosen, reference_rejected = reference.pair_logps(part)
        losses, reward_w, reward_l = preference_loss(  # implicit rewards, not the judge's
            chosen, rejected, reference_chosen, reference_rejected, config.beta)
        nll = -chosen / torch.tensor([len(pair.chosen) for pair in part], device=chosen.device)  # (B,)
        metrics = {"dpo_loss": losses, "margin": reward_w - reward_l, "accuracy": (reward_w > reward_l).float(),
                   "chosen_logp": chosen, "rejected_logp": rejected}
        return ((losses + config.nll_weight * nll).sum() / batch_size,
                {name: values.sum().item() / batch_size for name, values in metrics.items()})

    def make_loss_fns(batch: tuple, train_config: TrainConfig):
        pairs, replayed = batch
        loss_fns = [partial(pair_loss, part, len(pairs)) for part in micro_batches(pairs, train_config)]
        return loss_fns + make_target_loss_fns(policy, replayed, train_config, config.replay_weight)

    policy.fit(batches, make_loss_fns, config)


def dpo_batches(lm, pairs: list[dict], eft: list[dict], config: DPOConfig, seed: int) -> list[tuple]:
    """One (encoded pairs, EFT examples to replay) per optimizer step."""
    encoded = encode_pairs(lm, pairs)
    order = make_batches([sum(map(len, pair)) for pair in encoded], config, seed)
    pair_batches = [[encoded[i] for i in batch] for batch in order]
    replay_batches = [[] for _ in pair_batches]
    if config.replay_weight and eft:
        examples = encode_examples(lm, eft)
        epochs = 1 + len(pair_batches) * config.batch_size // len(examples)  # enough for one batch per step
        order = make_batches([len(example.ids) for example in examples], config, derive_seed(seed, "replay"), epochs)
        replay_batches = [[examples[i] for i in batch] for batch in order[:len(pair_batches)]]
    return list(zip(pair_batches, replay_batches))


def encode_pairs(lm, pairs: list[dict]) -> list[EncodedPair]:
    """Tokenize preference pairs. Raises InputError if one is longer than the model's max_seq_len."""
    encoded = []
    for number, pair in enumerate(pairs, 1):
        ids = EncodedPair(lm.tokenizer.encode_prompt(pair["prompt"]), lm.tokenizer.encode_response(pair["chosen"]),
                          lm.tokenizer.encode_response(pair["rejected"]))
        check_length(lm, f"pair {number}", len(ids.prompt) + max(len(ids.chosen), len(ids.rejected)))
        encoded.append(ids)
    return encoded
