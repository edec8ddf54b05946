"""M_t -> M_{t+1}: direct preference optimization on the model's own pairs (section 2.4).

The reference is the model the step began from. It is frozen in the plainest way there is: its
log-probabilities of all pairs are computed before the first update and never again.
"""

from dataclasses import dataclass
from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor

from minisr import InputError
from minisr.fast.cache import scores, softmax
from minisr.rng import key as coordinates
from minisr.sft import encode_examples, schedule, target_loss_parts, token_logps
from minisr.train import OptimConfig, fit, micro_batches

SHORT = 128  # tokens of a row, up to which a CPU's attention kernel takes longer than attention written out


@dataclass(frozen=True)
class DPOConfig(OptimConfig):
    """DPO, and what the paper does not have (0, false: off) or tried and left."""

    beta: float = 0.1
    nll: float = 0.0  # weight of the chosen response's loss a token (Iterative RPO, eq. 1)
    replay: float = 0.0  # weight of the loss on replayed EFT examples, one for each pair
    reference: str = "previous"  # M_t, the step's own start; "M1": the same for every step
    consistency: bool = False  # labels smoothed by how often single judgements disagree (after CREAM)
    positives_only: bool = False  # no DPO: M0 fine-tuned on seed data and answers of reward 5 (appendix A.4)


def sequence_logprobs(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """log p(response | prompt), the *sum* over response tokens: (B,).

    logits (B, T, V) at t - 1 predict ids (B, T) at t; mask (B, T) is True on response tokens."""
    logps = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]  # (B, T-1)
    return (logps * mask[:, 1:]).sum(-1)


def dpo_loss(policy_chosen_logps: Tensor, policy_rejected_logps: Tensor,
             reference_chosen_logps: Tensor, reference_rejected_logps: Tensor,
             beta: float, smoothing: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, chosen reward and rejected reward of each pair, all (B,).

    -log sigmoid(beta [log pi(y_w)/ref(y_w) - log pi(y_l)/ref(y_l)])  (Rafailov et al., eq. 7);
    the implicit reward is beta log pi(y)/ref(y). smoothing is the chance that a label is wrong."""
    chosen = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected = beta * (policy_rejected_logps - reference_rejected_logps)
    losses = -F.logsigmoid(chosen - rejected)
    if smoothing:
        losses = (1 - smoothing) * losses - smoothing * F.logsigmoid(rejected - chosen)
    return losses, chosen.detach(), rejected.detach()


def encode_pairs(tokenizer, pairs: list[dict], context: int) -> list[tuple]:
    """Pair records -> [(prompt ids, chosen ids, rejected ids)], each response with its end."""
    encoded = []
    for number, pair in enumerate(pairs, 1):
        prompt = tokenizer.encode_prompt(pair["prompt"])
        sides = [tokenizer.encode_response(pair[side]) for side in ("chosen", "rejected")]
        longest = len(prompt) + max(map(len, sides))
        if longest > context:
            raise InputError(f"pair {number} has {longest} tokens, the model's context is {context}: "
                             "shorten it or leave it out")
        encoded.append((prompt, *sides))
    return encoded


class Packed:
    """Pairs as [prompt | chosen | rejected], one after the other in one row of M tokens: each prompt is
    computed once for both responses, and no padding but in attention, on a grid of B x T.

    Stands where the decoder takes a KV cache: it says who looks at whom. Each response's positions
    go on from the prompt's, and the rejected response does not see the chosen one."""

    def __init__(self, pairs: list[tuple], device):
        lengths = torch.tensor([[len(part) for part in pair] for pair in pairs], device=device)  # (B, 3)
        ends = lengths.cumsum(1)
        column = torch.arange(int(ends.max()), device=device)  # (T,)
        there, rejected = column < ends[:, 2:], column >= ends[:, 1:2]  # (B, T) each
        chosen = (column >= ends[:, :1]) & ~rejected
        apart = rejected[:, :, None] & chosen[:, None, :]
        self.mask = ((column <= column[:, None]) & ~apart)[:, None]  # (B, 1, T, T)
        self.bias: Tensor | None = None  # the same, to be added to scores
        self.cells = there.flatten().nonzero()[:, 0]  # (M,) where on the grid the tokens stand
        self.ids = torch.tensor([[token for pair in pairs for part in pair for token in part]], device=device)
        self.positions = (column - rejected * lengths[:, 1:2])[there][None]  # (1, M)
        # What predicts a response's token: the one before, or, of the rejected's first, the prompt's last.
        place = torch.arange(len(self.cells), device=device)
        first = rejected & (column == ends[:, 1:2])
        before = place - 1 - (first * lengths[:, 1:2])[there]
        self.targets = (chosen | rejected)[there].nonzero()[:, 0]  # chosen, rejected of each pair
        self.sources = before[self.targets]
        self.sizes = lengths[:, 1:].flatten()  # (2 B,) tokens of chosen, rejected, chosen, ...

    def begin(self, new: int) -> Tensor:
        return self.positions

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (1, H, M, D), k, v (1, G, M, D): (1, H, M, D)."""
        q, k, v = (self._on_grid(x[0].transpose(0, 1)) for x in (q, k, v))  # (B, H or G, T, D)
        if q.is_cuda or q.shape[2] > SHORT:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, enable_gqa=True)
        else:
            y = self._written_out(q, k, v)
        return y.transpose(1, 2).flatten(0, 1).index_select(0, self.cells).transpose(0, 1)[None]

    def _written_out(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(D)) v on the grid: (B, H, T, D)."""
        B, H, T, D = q.shape
        G = k.shape[1]
        if self.bias is None:
            hidden = torch.zeros_like(self.mask, dtype=q.dtype).masked_fill(~self.mask, -torch.inf)
            self.bias = hidden.expand(B, H, T, T).reshape(B * G, -1, T)  # (B G, R T, T)
        q, k, v = q.reshape(B * G, -1, D), k.flatten(0, 1), v.flatten(0, 1)  # (B G, R T, D), (B G, T, D)
        return torch.bmm(softmax(scores(q, k, self.bias)), v).view(B, H, T, D)

    def _on_grid(self, x: Tensor) -> Tensor:
        """(M, H, D) -> (B, H, T, D), zeros where no token is."""
        B, _, T, _ = self.mask.shape
        grid = x.new_zeros(B * T, *x.shape[1:]).index_put((self.cells,), x)  # index_copy would keep x
        return grid.unflatten(0, (B, T)).transpose(1, 2)

    def end(self, new: int) -> None:
        """Nothing is kept."""


def pair_logps(model, pairs: list[tuple]) -> tuple[Tensor, Tensor, Tensor]:
    """log p of chosen (B,), of rejected (B,), and the chosen ones' loss a token (B,)."""
    packed = Packed(pairs, model.device)
    x = model.hidden(packed.ids, packed, packed.sources)  # (N, C) of the N response tokens
    logps = token_logps(model.head, x, packed.ids[0, packed.targets])  # (N,)
    sums = torch.segment_reduce(logps, "sum", lengths=packed.sizes)
    chosen, rejected = sums[0::2], sums[1::2]
    return chosen, rejected, -chosen / packed.sizes[0::2]


@torch.no_grad()
def reference_logps(model, pairs: list[tuple], batch_size: int) -> tuple[Tensor, Tensor]:
    """The frozen reference: log p of every chosen and rejected response under the model as it is."""
    model.eval()
    order = sorted(range(len(pairs)), key=lambda i: sum(map(len, pairs[i])))  # like lengths, little padding
    logps = torch.zeros(2, len(pairs), device=model.device)
    for i in range(0, len(order), batch_size):
        batch = order[i:i + batch_size]
        logps[:, batch] = torch.stack(pair_logps(model, [pairs[j] for j in batch])[:2])
    return logps[0], logps[1]


def train_dpo(model, tokenizer, pairs: list[dict], replay: list[dict], config: DPOConfig, key: int,
              title: str, log_file=None, known: dict | None = None, made_from=None):
    """Train M_t in place into M_{t+1} on preference pairs; `replay` are EFT records; returns it.

    `known` are log-probabilities of (prompt, response) under the reference, e.g. recorded when it wrote
    them; those of others are computed with M_t as it is."""
    encoded = encode_pairs(tokenizer, pairs, model.config.max_seq_len)
    ref_chosen, ref_rejected = _reference(model, pairs, encoded, known or {}, config)
    smoothing = 1 - sum(p["agreement"] for p in pairs) / len(pairs) if config.consistency else 0.0
    batches = schedule([sum(map(len, pair)) for pair in encoded], config.batch_size, config.epochs, key)
    batches = list(zip_longest(batches, _replay_batches(tokenizer, replay, batches, model, config, key)))
    torch.manual_seed(coordinates(key, "dropout"))

    def loss_parts(batches, config):
        batch, replayed = batches
        for part in micro_batches(batch, config):
            chosen, rejected, nll = pair_logps(model, [encoded[i] for i in part])
            losses, r_w, r_l = dpo_loss(chosen, rejected, ref_chosen[part], ref_rejected[part], config.beta,
                                        smoothing)
            figures = {"dpo_loss": losses, "margin": r_w - r_l, "accuracy": (r_w > r_l).float(),
                       "chosen_logp": chosen, "rejected_logp": rejected}
            yield ((losses + config.nll * nll).sum() / len(batch),
                   {name: values.sum().item() / len(batch) for name, values in figures.items()})
        if config.replay:
            for loss in target_loss_parts(model, replayed, config):
                yield config.replay * loss, {}

    fit(model, batches, loss_parts, config, title, log_file, made_from and (made_from, pairs))
    return model


def known_logps(model, tokenizer, pairs: list[dict], batch_size: int) -> dict:
    """{(prompt, response): log p under this model}, of each pair's two responses."""
    logps = reference_logps(model, encode_pairs(tokenizer, pairs, model.config.max_seq_len), batch_size)
    return {(pair["prompt"], pair[side]): logp for side, values in zip(("chosen", "rejected"), logps)
            for pair, logp in zip(pairs, values.tolist())}


def _reference(model, pairs, encoded, known, config) -> Tensor:
    """The reference's log p of chosen and rejected (2, B): recorded while sampling, or else computed."""
    logps = torch.tensor([[known.get((p["prompt"], p[side]), torch.nan) for p in pairs]
                          for side in ("chosen", "rejected")], device=model.device)
    rest = logps.isnan().any(0).nonzero()[:, 0].tolist()
    if rest:
        missing = [encoded[i] for i in rest]
        logps[:, rest] = torch.stack(reference_logps(model, missing, config.micro_batch or config.batch_size))
    return logps


def _replay_batches(tokenizer, replay, batches, model, config, key) -> list[list[tuple]]:
    """As many EFT batches as there are pair batches, of the same size."""
    if not config.replay:
        return []
    encoded = encode_examples(tokenizer, replay, model.config.max_seq_len)
    epochs = 1 + len(batches) * config.batch_size // len(encoded)
    order = schedule([len(ids) for ids, _ in encoded], config.batch_size, epochs,
                     coordinates(key, "replay"))
    return [[encoded[i] for i in batch] for batch in order[:len(batches)]]
