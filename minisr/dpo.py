"""M_t -> M_{t+1}: direct preference optimization on the model's own pairs (section 2.4).

The reference is the model the step began from. It is frozen in the plainest way there is: its
log-probabilities of all pairs are computed before the first update and never again.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minisr.sampler import key as coordinates
from minisr.sft import collate, encode_examples, schedule, target_loss_parts
from minisr.train import OptimConfig, fit, micro_batches


@dataclass(frozen=True)
class DPOConfig(OptimConfig):
    """DPO, and two terms the paper does not have (0: off)."""

    beta: float = 0.1
    nll: float = 0.0  # weight of the chosen response's loss a token (Iterative RPO, eq. 1)
    replay: float = 0.0  # weight of the loss on replayed EFT examples, one for each pair


def sequence_logprobs(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """log p(response | prompt), the *sum* over response tokens: (B,).

    logits (B, T, V) at t - 1 predict ids (B, T) at t; mask (B, T) is True on response tokens."""
    logps = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]  # (B, T-1)
    return (logps * mask[:, 1:]).sum(-1)


def dpo_loss(policy_chosen_logps: Tensor, policy_rejected_logps: Tensor,
             reference_chosen_logps: Tensor, reference_rejected_logps: Tensor,
             beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, chosen reward and rejected reward of each pair, all (B,).

    -log sigmoid(beta [log pi(y_w)/ref(y_w) - log pi(y_l)/ref(y_l)])  (Rafailov et al., eq. 7);
    the implicit reward is beta log pi(y)/ref(y)."""
    chosen = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected = beta * (policy_rejected_logps - reference_rejected_logps)
    return -F.logsigmoid(chosen - rejected), chosen.detach(), rejected.detach()


def encode_pairs(tokenizer, pairs: list[dict], context: int) -> list[tuple]:
    """Pair records -> [(chosen, rejected)], each (ids, mask)."""
    sides = [encode_examples(tokenizer, [{"prompt": p["prompt"], "response": p[side]} for p in pairs],
                             context) for side in ("chosen", "rejected")]
    return list(zip(*sides))


def pair_logps(model, pairs: list[tuple]) -> tuple[Tensor, Tensor, Tensor]:
    """log p of chosen (B,), of rejected (B,), and the chosen ones' loss a token (B,)."""
    sides = [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]
    ids, mask = collate(sides, model.device)  # (2B, T)
    logps = sequence_logprobs(model(ids), ids, mask)
    chosen, rejected = logps.chunk(2)
    return chosen, rejected, -chosen / mask[:len(pairs)].sum(-1)


@torch.no_grad()
def reference_logps(model, pairs: list[tuple], batch_size: int) -> tuple[Tensor, Tensor]:
    """The frozen reference: log p of every chosen and rejected response under the model as it is."""
    model.eval()
    parts = [pair_logps(model, pairs[i:i + batch_size])[:2] for i in range(0, len(pairs), batch_size)]
    chosen, rejected = zip(*parts)
    return torch.cat(chosen), torch.cat(rejected)


def train_dpo(model, tokenizer, pairs: list[dict], replay: list[dict], config: DPOConfig, key: int,
              title: str, log_file=None):
    """Train M_t in place into M_{t+1} on preference pairs; `replay` are EFT records; returns it."""
    encoded = encode_pairs(tokenizer, pairs, model.config.context)
    ref_chosen, ref_rejected = reference_logps(model, encoded, config.micro_batch or config.batch_size)
    batches = schedule([len(c[0]) for c, _ in encoded], config.batch_size, config.epochs, key)
    replayed = iter(_replay_batches(tokenizer, replay, batches, model, config, key))
    torch.manual_seed(coordinates(key, "dropout"))

    def loss_parts(batch):
        for part in micro_batches(batch, config):
            chosen, rejected, nll = pair_logps(model, [encoded[i] for i in part])
            losses, r_w, r_l = dpo_loss(chosen, rejected, ref_chosen[part], ref_rejected[part], config.beta)
            figures = {"dpo_loss": losses, "margin": r_w - r_l, "accuracy": (r_w > r_l).float(),
                       "chosen_logp": chosen, "rejected_logp": rejected}
            yield ((losses + config.nll * nll).sum() / len(batch),
                   {name: values.sum().item() / len(batch) for name, values in figures.items()})
        if config.replay:
            for loss in target_loss_parts(model, next(replayed), config):
                yield config.replay * loss, {}

    fit(model, batches, loss_parts, config, title, log_file)
    return model


def _replay_batches(tokenizer, replay, batches, model, config, key) -> list[list[tuple]]:
    """As many EFT batches as there are pair batches, of the same size."""
    if not config.replay:
        return []
    encoded = encode_examples(tokenizer, replay, model.config.context)
    epochs = 1 + len(batches) * config.batch_size // len(encoded)
    order = schedule([len(ids) for ids, _ in encoded], config.batch_size, epochs,
                     coordinates(key, "replay"))
    return [[encoded[i] for i in batch] for batch in order[:len(batches)]]
