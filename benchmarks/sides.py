"""The sides of a comparison: minisr, transformers.generate, TRL's DPOTrainer, each in a process of its own.

A side loads a Hugging Face folder and does what it is asked by name; it times itself, so that no pickling is
timed, and its peak memory is nobody else's.
"""

import multiprocessing
import sys
import traceback
import warnings
from pathlib import Path

import torch

from minisr import InputError
from minisr.bench import Trainer, peak_mb, reset_peak, seconds
from minisr.dpo import dpo_loss, encode_pairs, pair_logps, reference_logps
from minisr.interop import hf
from minisr.sampler import SampleConfig, common_prefix, sample
from minisr.train import OptimConfig

BETA = 0.1


def in_one_line(main) -> None:
    """Run a benchmark; what is wrong with its input, or is not installed, ends it in one line."""
    try:
        main()
    except (InputError, OSError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")


class Process:
    """A side in its process: process("method", argument, ...) calls it there and waits."""

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
            raise RuntimeError(f"in the process of {method}:\n{value}")
        return value

    def end(self) -> None:
        self.pipe.send(None)
        self.process.join()


def _serve(pipe, make, arguments) -> None:
    """Answer calls until None comes."""
    side = None
    while (call := pipe.recv()) is not None:
        method, values = call
        try:
            side = side or make(*arguments)
            pipe.send((True, getattr(side, method)(*values)))
        except Exception:
            pipe.send((False, traceback.format_exc()))


class Side:
    """What the sides share: threads, and a clock and a memory gauge around any of their methods."""

    name = "minisr"

    def __init__(self, threads: int):
        torch.set_num_threads(threads)
        self.libraries = peak_mb()  # before a model is loaded

    def ready(self) -> str:
        return self.name

    def timed(self, times: int, method: str, *arguments) -> dict:
        """Call a method so many times; its mean seconds, result, and this process's peak memory meanwhile."""
        kept = []
        reset_peak()
        taken = seconds(lambda: [kept.append(getattr(self, method)(*arguments)) for _ in range(times)])
        return {"seconds": taken / times, "result": kept[0], "peak_mb": peak_mb(),
                "libraries_mb": self.libraries}

    def lengths(self, job: dict, key: int) -> list[int]:
        """Tokens of each row."""
        return [len(row) for row in self.sample(job, key)]


class Minisr(Side):
    """minisr's sampler."""

    def __init__(self, threads: int, folder):
        super().__init__(threads)
        self.model, self.tokenizer = hf.load(folder)

    def sample(self, job: dict, key: int) -> list[list[int]]:
        """The new ids of n rows a prompt, up to their stop; forced: none ever comes."""
        rows = len(job["prompts"]) * job["n"]
        config = SampleConfig(job["temperature"], job["top_p"], job["new_tokens"], rows)
        stop = (-1,) if job["forced"] else self.tokenizer.stop_ids
        drawn = sample(self.model, job["prompts"], job["n"], config, key=key, stop=stop)
        return [s.ids for row in drawn for s in row]


class Transformers(Side):
    """transformers.generate; with keep_prefix, what all prompts begin with is computed once, by hand."""

    def __init__(self, threads: int, folder, keep_prefix: bool = False):
        import transformers
        super().__init__(threads)
        transformers.utils.logging.set_verbosity_error()
        self.name = f"transformers {transformers.__version__}" + ", prefix kept by hand" * keep_prefix
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="sdpa", dtype=torch.float32).eval()
        self.eos = self.model.generation_config.eos_token_id
        self.model.generation_config = transformers.GenerationConfig()  # nothing but what we ask for
        self.keep_prefix, self.Cache = keep_prefix, transformers.DynamicCache

    @torch.inference_mode()
    def sample(self, job: dict, key: int) -> list[list[int]]:
        torch.manual_seed(key)
        n, stops = job["n"], [] if job["forced"] else self.eos if isinstance(self.eos, list) else [self.eos]
        prompts, settings = job["prompts"], {"num_return_sequences": n}
        shared = common_prefix(prompts) if self.keep_prefix else 0
        if shared:
            settings = {"past_key_values": self._prefix(prompts[0][:shared], len(prompts) * n)}
            prompts = [prompt for prompt in prompts for _ in range(n)]
        longest = max(map(len, prompts))
        gaps = [[0] * (longest - len(prompt)) for prompt in prompts]  # padding, after what is shared
        ids = [prompt[:shared] + gap + prompt[shared:] for prompt, gap in zip(prompts, gaps)]
        mask = [[1] * shared + gap + [1] * (len(prompt) - shared) for prompt, gap in zip(prompts, gaps)]
        if job["temperature"]:
            settings |= {"temperature": job["temperature"], "top_p": job["top_p"], "top_k": 0}
        out = self.model.generate(
            input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), max_new_tokens=job["new_tokens"],
            do_sample=job["temperature"] > 0, eos_token_id=stops or None, pad_token_id=0, use_cache=True,
            **settings)
        return [_until(row, stops) for row in out[:, longest:].tolist()]

    def _prefix(self, ids: list[int], rows: int):
        """The cache of what all prompts begin with, copied to every row."""
        cache = self.Cache(config=self.model.config)
        self.model(torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(rows)
        return cache


def _until(row: list[int], stops: list[int]) -> list[int]:
    """Up to the first stop, and with it."""
    return row[:next((i for i, token in enumerate(row) if token in stops), len(row)) + 1]


class MinisrDPO(Side):
    """minisr's DPO step; the reference's log-probabilities are computed before the first."""

    def __init__(self, threads: int, folder, pairs: list[dict], reference: str):
        super().__init__(threads)
        self.model, tokenizer = hf.load(folder)
        self.pairs = encode_pairs(tokenizer, pairs, self.model.config.max_seq_len)
        self.reference = reference_logps(self.model, self.pairs, len(pairs))
        nudge(block.parameters() for block in self.model.blocks)
        self.trainer = Trainer(self.model, OptimConfig())

    def prompts(self) -> list[tuple]:
        return self.pairs

    def step(self) -> float:
        """Forward, backward, clipping, AdamW at learning rate 0; the loss."""
        def losses():
            chosen, rejected, _ = pair_logps(self.model, self.pairs)
            yield dpo_loss(chosen, rejected, *self.reference, BETA)[0].mean()
        return self.trainer.step(losses())


class TRL(Side):
    """TRL's DPOTrainer: the lines of its loop that compute. Data loading, logging and callbacks are left
    out, which can only help it. `reference`: "in memory" or "precomputed"."""

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

    def prompts(self) -> list[tuple]:
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
    """Change the policy a little, the same way on every side: a policy that is its reference has the loss
    log 2 whatever its log-probabilities are."""
    for parameters in parameters_of_blocks:
        for weight in parameters:
            weight.mul_(1.02 if weight.dim() == 2 else 1.0)
