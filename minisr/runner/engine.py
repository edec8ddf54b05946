"""The LM of a run: the plain or the fast engine, with work shared by processes, journaled, and resumable.

Batches do not depend on who computes them, so dealing them to processes, storing finished ones, resuming, and splitting
one where memory runs out are a single mechanism here, outside the sampler.
"""

import contextlib
from collections import Counter
from dataclasses import astuple, dataclass, field, replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from minisr import InputError
from minisr.dpo import encode_pairs
from minisr.lm import LM
from minisr.runner import processes
from minisr.runner.gradients import GradientSum, is_out_of_memory
from minisr.runner.journal import Journal, TrainingState
from minisr.runner.lora import LoRAConfig, LoRATraining
from minisr.runner.muon import make_muon
from minisr.runner.stop import Stop
from minisr.runner.training import ResumableTraining
from minisr.sampler import Completion

REFERENCE_BATCH = 16  # pairs
# What to do if there is not enough memory for a single item of a batch.
LESS_SAMPLING = "for the samples of one prompt; try a new run with fewer candidates or a smaller max_new_tokens"
SHORTER_PAIRS = "to score one preference pair; try a new run with a smaller responses.max_new_tokens"


@dataclass
class Workspace:
    """Where the current step of a run stores its unfinished work. All LMs of a run share one."""

    title: str = ""  # of progress bars
    journal: Journal | None = None  # finished batches of sampling
    training_folder: Path | None = None  # state of the training
    training_made_from: tuple = field(default=())  # values besides batches and config that determine its result

    @contextlib.contextmanager
    def step(self, **values):
        """Use these values until the step ends."""
        before = dict(vars(self))
        vars(self).update(values)
        try:
            yield
        finally:
            vars(self).update(before)

    def share(self, compute, batches: list[list], *key) -> list:
        """compute(batch) for each batch, concatenated. compute must return a list that JSON can store.

        Batches are dealt to the processes in turn. Finished ones are stored in the journal under the key and their
        number, and taken from it."""
        results = {}
        dealt = range(processes.rank(), len(batches), processes.size())
        for number in tqdm(dealt, self.title, leave=False, disable=None):
            results[number] = self.journal.get(*key, number) if self.journal else None
            if results[number] is None:
                results[number] = compute(batches[number])
                if self.journal:
                    self.journal.add(results[number], *key, number)
                if Stop.requested:
                    break
        gathered = processes.gather(results)
        Stop.check()
        everything = {number: values for part in gathered for number, values in part.items()}
        return [value for number in range(len(batches)) for value in everything[number]]


class RunLM:
    """Overrides of LM's loops over batches, for either engine."""

    workspace: Workspace
    training_state = TrainingState

    def map_batches(self, compute, batches: list[list[int]], seed: int) -> list[list[Completion]]:
        """Replaces LM.map_batches: see Workspace.share."""
        def compute_values(batch: list[int]) -> list:
            return [[astuple(completion) for completion in row] for row in compute(batch)]

        rows = self.share_batches(compute_values, batches, seed, advice=LESS_SAMPLING)
        return [[Completion(*values) for values in row] for row in rows]

    def share_batches(self, compute, batches: list[list], *key, advice: str) -> list:
        """Workspace.share; where memory runs out, a batch is split."""
        return self.workspace.share(partial(compute_within_memory, compute, advice=advice), batches, *key)

    def fit(self, batches: list, make_loss_fns, config) -> list[dict]:
        """Replaces LM.fit: in a run, the training can be resumed."""
        if self.workspace.training_folder is None:
            return super().fit(batches, make_loss_fns, config)
        return ResumableTraining(self, batches, make_loss_fns, config).run()

    def gradients_within_memory(self, optimizer, make_loss_fns, batch, config, seed) -> tuple[Counter, object]:
        """Replaces train.accumulate_gradients: the processes share the micro-batches, and where memory runs out, their
        size is halved from here on. Returns the metrics and the config that worked."""
        while True:
            gradient = GradientSum(optimizer, make_loss_fns(batch, config), seed)
            gradient.compute()
            if gradient.error and not is_out_of_memory(gradient.error):
                raise gradient.error
            gathered = processes.gather((gradient.metrics, gradient.error is not None))
            if not any(failed for _, failed in gathered):
                return gradient.total_metrics([metrics for metrics, _ in gathered]), config
            if config.micro_batch == 1:
                raise InputError("not enough memory to train on one example at a time; to resume with less memory, add "
                                 "--set SECTION.gradient_checkpointing=true to the same command (SECTION: sft, dpo, "
                                 "or train in minisr pretrain; needs the fast engine), or start a new run with a "
                                 "smaller model")
            config = replace(config, micro_batch=config.micro_batch // 2)
            optimizer.zero_grad()
            self.model.zero_grad()

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


def compute_within_memory(compute, batch: list, advice: str) -> list:
    """compute(batch); where memory runs out, one half of it and then the other.

    Raises InputError with this advice if there is not enough memory for a single item."""
    try:
        return compute(batch)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        if len(batch) == 1:
            raise InputError(f"not enough memory {advice}") from error
    middle = len(batch) // 2  # outside of `except`, which would keep the failed batch in memory
    first, second = batch[:middle], batch[middle:]
    return compute_within_memory(compute, first, advice) + compute_within_memory(compute, second, advice)


class PlainRunLM(RunLM, LM):
    """engine = "plain"."""


def run_lm_class(engine: str, lora_config: LoRAConfig | None = None, sharded: bool = False) -> type[LM]:
    """The class for a config's engine. It trains adapters, or shards of the weights, if the config says so."""
    if engine == "plain":
        return PlainRunLM
    try:
        from minisr.fast import FastLM
    except ImportError as error:
        raise InputError('engine = "fast" needs the folder minisr/fast, which is missing; set engine = "plain"'
                         ) from error

    class FastRunLM(RunLM, FastLM):
        """engine = "fast"."""

        def record_reference(self, pairs: list[dict]) -> None:
            """Record the log-probabilities that sampling did not, before training reads them.

            Computed in training, they would depend on which process met a pair before."""
            missing = [pair for pair in encode_pairs(self, pairs) if None in self.lookup(pair)]
            batches = [missing[i:i + REFERENCE_BATCH] for i in range(0, len(missing), REFERENCE_BATCH)]
            self.record_pairs(missing, self.share_batches(self.compute_logps, batches, "reference",
                                                           advice=SHORTER_PAIRS))

    if sharded and processes.size() > 1:
        from minisr.runner.sharding import ShardedTraining  # imports much of torch.distributed

        class ShardedRunLM(ShardedTraining, FastRunLM):
            """engine = "fast" with sharded = true."""
        return ShardedRunLM
    if lora_config is None or lora_config.rank == 0:
        return FastRunLM

    class LoRARunLM(LoRATraining, FastRunLM):
        """engine = "fast" with [lora]."""
        lora = lora_config
    return LoRARunLM
