"""The LM of a run: the plain or the fast engine, with batches journaled, trainings resumable, memory recovered.

Batches do not depend on who computes them, so storing finished ones, resuming, and splitting one where memory runs out
are a single mechanism here, outside the sampler.
"""

import contextlib
from collections import Counter
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path

import torch
from tqdm import tqdm

from minisr import InputError, train
from minisr.lm import LM
from minisr.runner.files import write_jsonl
from minisr.runner.journal import Journal, TrainingState
from minisr.runner.lora import LoRAConfig, LoRATraining
from minisr.runner.muon import make_muon
from minisr.runner.resumable import deciding_values
from minisr.runner.stop import Stop
from minisr.sampler import Completion


@dataclass
class Workspace:
    """What the present step of a run stores its unfinished work in. All LMs of a run share one."""

    title: str = ""  # of progress bars
    journal: Journal | None = None  # finished batches of sampling
    training_folder: Path | None = None  # state of the training
    training_made_from: tuple = field(default=())  # what decides its outcome beside batches and config

    @contextlib.contextmanager
    def step(self, **values):
        """Use these values until the step ends."""
        before = dict(vars(self))
        vars(self).update(values)
        try:
            yield
        finally:
            vars(self).update(before)


class RunLM:
    """Overrides of LM's loops over batches, for either engine."""

    workspace: Workspace

    def map_batches(self, compute, batches: list[list[int]], seed: int) -> list[list[Completion]]:
        """Replaces LM.map_batches: finished batches are stored in the journal and taken from it."""
        journal, results = self.workspace.journal, []
        for number, batch in enumerate(tqdm(batches, self.workspace.title, leave=False, disable=None)):
            stored = journal.get(seed, number) if journal else None
            if stored is None:
                completions = compute_within_memory(compute, batch)
                if journal:
                    journal.add([[astuple(c) for c in row] for row in completions], seed, number)
                Stop.check()
            else:
                completions = [[Completion(*values) for values in row] for row in stored]
            results += completions
        return results

    def fit(self, batches: list, loss_fn, config) -> list[dict]:
        """Replaces LM.fit: the state is stored every save_every steps and when a signal asks to stop."""
        work = self.workspace
        if work.training_folder is None:
            return super().fit(batches, loss_fn, config)
        optimizer = self.prepare_training(config)
        state = TrainingState(work.training_folder, work.training_made_from, batches, deciding_values(config))
        log = state.restore(self.model, optimizer)
        bar = tqdm(batches, work.title, leave=False, initial=len(log), disable=None)
        for step in range(len(log), len(batches)):
            metrics, config = self.gradients_within_memory(optimizer, loss_fn, batches[step], config)
            rate = train.learning_rate(step, len(batches), config)
            try:
                grad_norm = train.optimizer_step(optimizer, rate, config.max_grad_norm)
            except FloatingPointError as error:
                raise InputError(f"{work.title}: {error} at step {step} of {len(batches)}; try a new run with a lower "
                                 "learning_rate") from error
            log.append({"step": step, **metrics, "grad_norm": grad_norm, "learning_rate": rate})
            bar.update()
            if Stop.requested or len(log) % config.save_every == 0:
                state.save(log, self.model, optimizer)
            Stop.check()
        self.model.eval()
        write_jsonl(work.training_folder / "train_log.jsonl", log)
        return log

    def gradients_within_memory(self, optimizer, loss_fn, batch, config) -> tuple[Counter, train.TrainConfig]:
        """train.accumulate_gradients; where memory runs out, the micro-batch is halved from here on: the same sum in
        more parts. Returns the metrics and the config that worked."""
        random = torch.get_rng_state()
        while True:
            try:
                return train.accumulate_gradients(loss_fn(batch, config)), config
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                size = (config.micro_batch or config.batch_size) // 2
                if size < 1:
                    raise InputError("not enough memory to train on one example at a time; try a new run with "
                                     "gradient_checkpointing = true or a smaller model") from error
            config = replace(config, micro_batch=size)
            optimizer.zero_grad()
            self.model.zero_grad()
            torch.set_rng_state(random)

    def prepare_training(self, config):
        optimizer = super().prepare_training(config)
        return make_muon(self.model, config) if config.optimizer == "muon" else optimizer


def best_lm(model, tokenizer) -> LM:
    """The fast engine if it is installed, else the plain one, for use outside of a run."""
    try:
        from minisr.fast import FastLM
    except ImportError:
        return LM(model, tokenizer)
    return FastLM(model, tokenizer)


def compute_within_memory(compute, batch: list[int]) -> list:
    """compute(batch); where memory runs out, one half of it and then the other."""
    try:
        return compute(batch)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        if len(batch) == 1:
            raise InputError("not enough memory for the samples of one prompt; try a new run with fewer candidates or "
                             "a smaller max_new_tokens") from error
    middle = len(batch) // 2  # outside of `except`, which would keep the failed batch in memory
    return compute_within_memory(compute, batch[:middle]) + compute_within_memory(compute, batch[middle:])


def is_out_of_memory(error: Exception) -> bool:
    """Whether PyTorch ran out of memory. On a CPU it raises a RuntimeError without a type of its own."""
    messages = ("can't allocate memory", "not enough memory")  # of Linux and macOS, of Windows
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(m in str(error) for m in messages)


class PlainRunLM(RunLM, LM):
    """engine = "plain"."""


def run_lm_class(engine: str, lora_config: LoRAConfig | None = None) -> type[LM]:
    """The class for a config's engine, which trains adapters if the config says so."""
    if engine == "plain":
        return PlainRunLM
    try:
        from minisr.fast import FastLM
    except ImportError as error:
        raise InputError('engine = "fast" needs the folder minisr/fast, which is missing; set engine = "plain"'
                         ) from error

    class FastRunLM(RunLM, FastLM):
        """engine = "fast"."""
    if lora_config is None or lora_config.rank == 0:
        return FastRunLM

    class LoRARunLM(LoRATraining, FastRunLM):
        """engine = "fast" with [lora]."""
        lora = lora_config
    return LoRARunLM
