"""The sides of a comparison: minisr, transformers.generate and TRL's DPOTrainer, each in its own process.

Every side loads the same Hugging Face folder, and its methods are called by name. A side times itself, so that no
pickling is timed, and its peak memory includes nothing of the others.
"""

import argparse
import multiprocessing
import sys
import traceback
import warnings
from pathlib import Path

import torch

from minisr import InputError
from minisr.bench import Trainer, peak_mb, reset_peak, seconds
from minisr.dpo import dpo_loss, encode_pairs
from minisr.fast import FastLM
from minisr.fast.sampler import common_prefix_length
from minisr.interop import hf
from minisr.sampler import SamplingConfig
from minisr.train import TrainConfig

BETA = 0.1
NEVER = (-1,)  # stop ids that no model draws: every row reaches its maximum length


def in_one_line(main) -> None:
    """Run a benchmark. Wrong input or a missing package ends it with one line and exit code 2, without a traceback."""
    try:
        main()
    except (InputError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)


class OneLineParser(argparse.ArgumentParser):
    """Reports a wrong option in one line."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}; see --help\n")


class Process:
    """A side in another process: process("method", argument, ...) calls the method there and waits for its result."""

    def __init__(self, make, *arguments):
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, make, arguments), daemon=True)
        self.process.start()
        self.peer = self("ready")

    def __call__(self, method: str, *arguments):
        self.pipe.send((method, arguments))
        done, value = self.pipe.recv()
        if not done:
            raise RuntimeError(f"the process that runs {method} failed:\n{value}")
        return value

    def end(self) -> None:
        self.pipe.send(None)
        self.process.join()


def _serve(pipe, make, arguments) -> None:
    """Make the side and answer calls until None arrives."""
    side = None
    while (call := pipe.recv()) is not None:
        method, values = call
        try:
            side = side or make(*arguments)
            pipe.send((True, getattr(side, method)(*values)))
        except Exception:
            pipe.send((False, traceback.format_exc()))


class Side:
    """What all sides have in common: the number of threads, and a method that times any other."""

    name = "minisr"

    def __init__(self, threads: int):
        torch.set_num_threads(threads)
        self.libraries = peak_mb()  # before a model is loaded

    def ready(self) -> str:
        return self.name

    def timed(self, times: int, method: str, *arguments) -> dict:
        """Call a method `times` times. Returns its mean seconds, its first result, and the peak memory meanwhile."""
        results = []
        reset_peak()
        taken = seconds(lambda: [results.append(getattr(self, method)(*arguments)) for _ in range(times)])
        return {"seconds": taken / times, "result": results[0], "peak_mb": peak_mb(),
                "libraries_mb": self.libraries}

    def lengths(self, job: dict, seed: int) -> list[int]:
        """The number of tokens of each row."""
        return [len(row) for row in self.sample(job, seed)]


class Minisr(Side):
    """minisr's fast engine."""

    def __init__(self, threads: int, folder):
        super().__init__(threads)
        self.lm = FastLM(*hf.load(folder))

    def sample(self, job: dict, seed: int) -> list[list[int]]:
        """The new ids of n rows a prompt, each up to its stop token, or of the maximum length if that is forced."""
        rows = len(job["prompts"]) * job["n"]
        config = SamplingConfig(job["temperature"], job["top_p"], job["new_tokens"], rows)
        stop_ids = NEVER if job["forced"] else self.lm.tokenizer.stop_ids
        completions = self.lm.sample(job["prompts"], job["n"], config, seed, stop_ids)
        return [completion.ids for row in completions for completion in row]


class Transformers(Side):
    """transformers.generate. With share_prefix, the common prefix of all prompts is computed once, by hand."""

    def __init__(self, threads: int, folder, share_prefix: bool = False, dtype: torch.dtype = torch.float32):
        import transformers
        super().__init__(threads)
        transformers.utils.logging.set_verbosity_error()
        self.name = f"transformers {transformers.__version__}" + (", prefix shared by hand" if share_prefix else "")
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="sdpa", dtype=dtype).eval()
        self.eos = self.model.generation_config.eos_token_id
        self.model.generation_config = transformers.GenerationConfig()  # no settings besides those passed below
        self.share_prefix, self.Cache = share_prefix, transformers.DynamicCache

    def sample(self, job: dict, seed: int) -> list[list[int]]:
        """The same as Minisr.sample."""
        eos = self.eos if isinstance(self.eos, list) else [self.eos]
        return self.generate(job, seed, [] if job["forced"] else eos)

    @torch.inference_mode()
    def generate(self, job: dict, seed: int, stop_ids: list[int]) -> list[list[int]]:
        torch.manual_seed(seed)
        n, prompts, settings = job["n"], job["prompts"], {"num_return_sequences": job["n"]}
        shared = common_prefix_length(prompts) if self.share_prefix else 0
        if shared:
            settings = {"past_key_values": self._prefix(prompts[0][:shared], len(prompts) * n)}
            prompts = [prompt for prompt in prompts for _ in range(n)]
        longest = max(map(len, prompts))
        gaps = [[0] * (longest - len(prompt)) for prompt in prompts]  # padding, after the shared prefix
        ids = [prompt[:shared] + gap + prompt[shared:] for prompt, gap in zip(prompts, gaps)]
        mask = [[1] * shared + gap + [1] * (len(prompt) - shared) for prompt, gap in zip(prompts, gaps)]
        if job["temperature"]:
            settings |= {"temperature": job["temperature"], "top_p": job["top_p"], "top_k": 0}
        out = self.model.generate(
            input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), max_new_tokens=job["new_tokens"],
            do_sample=job["temperature"] > 0, eos_token_id=stop_ids or None, pad_token_id=0, use_cache=True,
            **settings)
        return [_cut_at_stop(row, stop_ids) for row in out[:, longest:].tolist()]

    def _prefix(self, ids: list[int], rows: int):
        """The cache of the common prefix, copied to every row."""
        cache = self.Cache(config=self.model.config)
        self.model(torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(rows)
        return cache


def _cut_at_stop(row: list[int], stop_ids: list[int]) -> list[int]:
    """The ids up to and including the first stop token."""
    return row[:next((i for i, token in enumerate(row) if token in stop_ids), len(row)) + 1]


class MinisrDPO(Side):
    """minisr's DPO step. The reference log-probabilities are computed before the first step."""

    def __init__(self, threads: int, folder, pairs: list[dict], reference: str):
        super().__init__(threads)
        self.lm = FastLM(*hf.load(folder))
        self.pairs = encode_pairs(self.lm, pairs)
        with torch.no_grad():
            self.reference = self.lm.pair_logps(self.pairs)
        nudge(block.parameters() for block in self.lm.model.blocks)
        self.trainer = Trainer(self.lm, TrainConfig())

    def pair_ids(self) -> list[tuple]:
        """Token ids of prompt, chosen and rejected of each pair."""
        return self.pairs

    def step(self) -> float:
        """Forward, backward, clipping, AdamW at learning rate 0. Returns the loss."""
        def loss():
            return dpo_loss(*self.lm.pair_logps(self.pairs), *self.reference, BETA)[0].mean(), {}
        return self.trainer.step([loss])


class TRL(Side):
    """TRL's DPOTrainer: only the computing lines of its loop, without data loading, logging and callbacks, which can
    only help it. `reference` is "in memory" or "precomputed"."""

    def __init__(self, threads: int, folder, pairs: list[dict], reference: str):
        warnings.simplefilter("ignore")
        import datasets
        import transformers
        import trl
        super().__init__(threads)
        datasets.disable_progress_bars()
        transformers.utils.logging.set_verbosity_error()
        self.name = f"TRL {trl.__version__}, reference {reference}"
        role = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        chats = [{k: [{"role": role[k], "content": pair[k]}] for k in role} for pair in pairs]
        out = folder.parent / "trl"
        config = trl.DPOConfig(
            str(out), beta=BETA, use_cpu=True, bf16=False, report_to=[], max_length=None, learning_rate=0.0,
            gradient_checkpointing=False, per_device_train_batch_size=len(pairs),
            precompute_ref_log_probs=reference == "precomputed")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="sdpa", dtype=torch.float32)
        self.trainer = trl.DPOTrainer(
            model, None, config, train_dataset=datasets.Dataset.from_list(chats),
            processing_class=transformers.AutoTokenizer.from_pretrained(folder))
        if reference == "precomputed":
            self.trainer.ref_model = None
        nudge(layer.parameters() for layer in model.model.layers)
        self.trainer.create_optimizer()
        self.trainer.current_gradient_accumulation_steps = 1
        self.rows = list(self.trainer.train_dataset)

    def pair_ids(self) -> list[tuple]:
        return [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in self.rows]

    def step(self) -> float:
        trainer = self.trainer
        loss = trainer.training_step(trainer.model, trainer.data_collator(self.rows))
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.model.zero_grad()
        return loss.item()


@torch.no_grad()
def nudge(parameters_of_blocks) -> None:
    """Change the policy a little, in the same way on every side. A policy equal to its reference would have the loss
    log 2, whatever its log-probabilities are."""
    for parameters in parameters_of_blocks:
        for weight in parameters:
            weight.mul_(1.02 if weight.dim() == 2 else 1.0)
