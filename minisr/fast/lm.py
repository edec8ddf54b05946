"""FastLM: an LM whose operations are the drop-in replacements of this folder.

Each replacement is held to the core function by a test in tests/fast: in float64 the same tokens, losses and gradients.
"""

import copy
from dataclasses import replace

import torch

from minisr.dpo import EncodedPair
from minisr.fast import losses, sampler
from minisr.fast.cuda_graphs import GraphDecoder
from minisr.fast.master_weights import make_master_optimizer
from minisr.lm import LM, ResponseConfig
from minisr.model import upcast
from minisr.sft import Example

REPLACEMENTS = ("prefix-sharing", "row-dropping", "decode-step", "prefill-groups", "unsorted-top-p",
                "target-selection", "packed-pairs", "cuda-graphs")


class FastLM(LM):
    """The fast engine. While it samples responses, it records log p of each finished one (not in bfloat16), and the
    frozen reference reads these records instead of running the model again."""

    without: frozenset[str] = frozenset()  # names of REPLACEMENTS not to use, to measure what they are worth

    def __init__(self, model, tokenizer):
        super().__init__(model, tokenizer)
        self.recorded: dict[tuple, float] = {}  # (prompt ids, response ids) -> log p under the present weights
        self.frozen = False
        self.gradient_checkpointing = False
        self.graphs: tuple | None = None  # ((config, stop_ids, options), GraphDecoder) of the last batch on a GPU

    def copy(self) -> "FastLM":
        self.graphs = None  # a copy is trained, which needs their memory
        clone = super().copy()
        clone.recorded = dict(self.recorded)
        return clone

    def frozen_copy(self) -> "FastLM":
        """Shares the weights: only a copy is ever trained, so nothing changes them."""
        self.graphs = None
        clone = copy.copy(self)
        clone.model.eval()
        clone.frozen = True
        return clone

    def sample_batch(self, prompts, seeds, config, stop_ids):
        # In bfloat16, rounding depends on the shapes of the products: sampling cannot record the values of training.
        is_exact = self.model.embed.weight.dtype != torch.bfloat16
        record = isinstance(config, ResponseConfig) and is_exact
        options = sampler.Options(record, self.without)
        if self.model.embed.weight.is_cuda and not self.without & {"cuda-graphs", "decode-step"}:
            options = replace(options, decoder=self.graph_decoder(config, stop_ids, options))
        results = sampler.generate(self.model, prompts, seeds, config, stop_ids, options)
        for prompt, completions in zip(prompts, results):
            for completion in completions:
                if completion.logp is not None:
                    self.record(prompt, completion.ids, completion.logp)
        return results

    def graph_decoder(self, config, stop_ids, options: sampler.Options) -> GraphDecoder:
        """Captured graphs serve all batches of a step, so they are kept until another step begins."""
        key = (config, stop_ids, options)
        if self.graphs is None or self.graphs[0] != key:
            self.graphs = None  # free the memory of the last step's
            decoding = sampler.DecodingConfig(config, stop_ids, options)
            self.graphs = key, GraphDecoder(self.model, config.max_new_tokens, decoding)
        return self.graphs[1]

    def record(self, prompt: list[int], response: list[int], logp: float) -> None:
        """Remember log p(response | prompt) under the present weights."""
        self.recorded[tuple(prompt), tuple(response)] = logp

    def target_loss(self, examples: list[Example]):
        if "target-selection" in self.without:
            return super().target_loss(examples)
        return losses.target_loss(self.model, examples, self.gradient_checkpointing)

    def pair_logps(self, pairs: list[EncodedPair]):
        if "packed-pairs" in self.without:
            return super().pair_logps(pairs)
        if not self.frozen:
            return losses.pair_logps(self.model, pairs, self.gradient_checkpointing)
        missing = [pair for pair in pairs if None in self.lookup(pair)]
        if missing:  # the weights never change, so each pair is computed at most once
            self.record_pairs(missing, self.compute_logps(missing))
        dtype = upcast(self.model.embed.weight[:0]).dtype
        return torch.tensor([self.lookup(pair) for pair in pairs], dtype=dtype, device=self.model.device).unbind(1)

    @torch.no_grad()
    def compute_logps(self, pairs: list[EncodedPair]) -> list[list[float]]:
        """[log p(y_w | x), log p(y_l | x)] of each pair."""
        chosen, rejected = losses.pair_logps(self.model, pairs)
        return torch.stack([chosen, rejected], 1).tolist()

    def record_pairs(self, pairs: list[EncodedPair], logps: list[list[float]]) -> None:
        for pair, (chosen, rejected) in zip(pairs, logps):
            self.record(pair.prompt, pair.chosen, chosen)
            self.record(pair.prompt, pair.rejected, rejected)

    def lookup(self, pair: EncodedPair) -> tuple[float | None, float | None]:
        """The recorded log p of the chosen and of the rejected response."""
        prompt = tuple(pair.prompt)
        return self.recorded.get((prompt, tuple(pair.chosen))), self.recorded.get((prompt, tuple(pair.rejected)))

    def prepare_training(self, config):
        self.recorded = {}  # the weights will change
        self.graphs = None
        self.gradient_checkpointing = getattr(config, "gradient_checkpointing", False)
        optimizer = super().prepare_training(config)
        if next(self.model.parameters()).dtype == torch.bfloat16:  # of what is trained: adapters are float32
            return make_master_optimizer(self.model, config)
        return optimizer
