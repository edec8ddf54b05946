"""A language model: decoder and tokenizer as one object.

The algorithm uses a model only through an LM, and computes with four operations: `sample`, `target_loss`,
`pair_logps` and `fit`. Overriding them replaces the engine (fast/ does). `map_batches`, `sample_batch` and
`prepare_training` are the points where a run on disk or an engine hooks in.
"""

import copy
from dataclasses import dataclass

from tqdm import tqdm

from minisr import InputError, sampler, train
from minisr.dpo import EncodedPair, sequence_logprobs
from minisr.model import Decoder
from minisr.rng import row_seeds
from minisr.sampler import Completion, SamplingConfig
from minisr.sft import Example, right_pad
from minisr.tokenizer import Tokenizer


class LM:
    """The plain engine: simple, not fast."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer):
        self.model, self.tokenizer = model, tokenizer

    def copy(self) -> "LM":
        """The same model with weights of its own."""
        clone = copy.copy(self)
        clone.model = copy.deepcopy(self.model)
        return clone

    def frozen_copy(self) -> "LM":
        """A copy in eval mode, with requires_grad off for all weights."""
        clone = self.copy()
        clone.model.eval().requires_grad_(False)
        return clone

    @property
    def max_seq_len(self) -> int:
        return self.model.config.max_seq_len

    def sample(self, prompts: list[list[int]], n: int, config: SamplingConfig, seed: int,
               stop_ids: tuple[int, ...]) -> list[list[Completion]]:
        """Complete each prompt (token ids) n times: result[i][j] is completion j of prompts[i].

        Raises InputError if a prompt is empty, or leaves no room for one new token within max_seq_len."""
        for i, prompt in enumerate(prompts):
            if not 0 < len(prompt) < self.max_seq_len:
                raise InputError(f"prompt {i + 1} has {len(prompt)} tokens; the model takes 1 to "
                                 f"{self.max_seq_len - 1}: shorten it or leave it out")
        seeds = row_seeds(seed, len(prompts), n)  # (P, n)

        def complete(batch: list[int]) -> list[list[Completion]]:
            return self.sample_batch([prompts[i] for i in batch], seeds[batch], config, stop_ids)

        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # similar lengths, little padding
        batch_size = max(1, config.rows // n)  # prompts
        batches = [by_length[i:i + batch_size] for i in range(0, len(prompts), batch_size)]
        results = dict(zip(by_length, self.map_batches(complete, batches, seed)))
        return [results[i] for i in range(len(prompts))]

    def map_batches(self, compute, batches: list[list[int]], seed: int) -> list:
        """compute(batch) for each batch of indices, concatenated: one result per index.

        A run on disk overrides this to store finished batches; `seed` identifies them."""
        progress = tqdm(batches, "sample", leave=False, disable=None)
        return [result for batch in progress for result in compute(batch)]

    def sample_batch(self, prompts, seeds, config, stop_ids) -> list[list[Completion]]:
        """One batch of `sample`."""
        return sampler.generate(self.model, prompts, seeds, config, stop_ids)

    def target_loss(self, examples: list[Example]):
        """Cross-entropy summed over the target tokens of the examples: a scalar."""
        ids, mask = right_pad(examples, self.model.device)  # (B, T)
        return -sequence_logprobs(self.model(ids), ids, mask).sum()

    def pair_logps(self, pairs: list[EncodedPair]):
        """log p(y_w | x) and log p(y_l | x) of each pair: (B,) and (B,)."""
        chosen = [pair.example(pair.chosen) for pair in pairs]
        rejected = [pair.example(pair.rejected) for pair in pairs]
        ids, mask = right_pad(chosen + rejected, self.model.device)  # (2 B, T)
        return sequence_logprobs(self.model(ids), ids, mask).chunk(2)

    def fit(self, batches: list, make_loss_fns, config: train.TrainConfig) -> list[dict]:
        """Train the weights in place; see train.fit."""
        return train.fit(self.model, self.prepare_training(config), batches, make_loss_fns, config)

    def prepare_training(self, config: train.TrainConfig):
        """Switch to training mode; return the optimizer."""
        train.set_training_mode(self.model, config.dropout)
        return train.make_optimizer(self.model.named_parameters(), config)


@dataclass(frozen=True)
class ResponseConfig(SamplingConfig):
    """How candidate responses are sampled (section 3.1.3)."""

    candidates: int = 4  # N


def respond(lm: LM, prompts: list[str], config: ResponseConfig, seed: int) -> list[dict]:
    """{y_i^1 .. y_i^N}: N candidate responses to each prompt.

    One record per prompt, e.g. {"prompt": "Write ...", "responses": ["Once ...", "There ..."],
    "finished": [True, False], "logps": [-12.3, None]}. A response is finished if it ended with a stop token and,
    encoded again for training, fits max_seq_len; otherwise it counts as cut off. logps: log p(response | prompt) if the
    engine recorded it while sampling, else None."""
    encoded = [lm.tokenizer.encode_prompt(x) for x in prompts]
    sampled = lm.sample(encoded, config.candidates, config, seed, lm.tokenizer.stop_ids)
    records = []
    for x, ids, completions in zip(prompts, encoded, sampled):
        record = {"prompt": x, "responses": [], "finished": [], "logps": []}
        for completion in completions:
            text = lm.tokenizer.decode_response(completion.ids)
            response_ids = lm.tokenizer.encode_response(text)  # may differ from the ids that were sampled
            fits = len(ids) + len(response_ids) <= lm.max_seq_len
            record["responses"].append(text)
            record["finished"].append(completion.finished and fits)
            record["logps"].append(completion.logp if response_ids == completion.ids else None)
        records.append(record)
    return records
