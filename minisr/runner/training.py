"""The optimizer loop of a run: train.fit, with micro-batches shared by processes and a state that is stored."""

from dataclasses import replace

import torch
from tqdm import tqdm

from minisr import InputError, train
from minisr.rng import derive_seed
from minisr.runner import processes
from minisr.runner.files import write_jsonl
from minisr.runner.resumable import deciding_values, micro_batch_size
from minisr.runner.stop import Stop


class ResumableTraining:
    """One training of a RunLM, from its first step or from the state that an interrupted process stored."""

    def __init__(self, lm, batches: list, make_loss_fns, config):
        self.lm, self.work, self.batches, self.make_loss_fns = lm, lm.workspace, batches, make_loss_fns
        self.config = replace(config, micro_batch=micro_batch_size(config))
        self.dropout_seed = torch.initial_seed()  # what the caller set with torch.manual_seed
        self.optimizer = lm.prepare_training(self.config)
        self.state = lm.training_state(
            self.work.training_folder, self.work.training_made_from, batches, deciding_values(self.config))
        self.log = self.state.restore(lm.model, self.optimizer)  # one record a finished step
        processes.check_same(len(self.log), self.work.training_folder)

    def run(self) -> list[dict]:
        """Run the remaining steps; return and write the log. The state is stored every save_every steps and when a
        signal asks to stop."""
        bar = tqdm(self.batches, self.work.title, leave=False, initial=len(self.log), disable=None)
        for step in range(len(self.log), len(self.batches)):
            self.log.append(self.run_step(step))
            bar.update()
            self.save_or_stop()
        self.lm.model.eval()
        write_jsonl(self.work.training_folder / "train_log.jsonl", self.log)
        return self.log

    def run_step(self, step: int) -> dict:
        """One optimizer step; returns its record. If memory ran out, the config keeps the smaller micro-batch."""
        seed = derive_seed(self.dropout_seed, step)
        metrics, self.config = self.lm.gradients_within_memory(
            self.optimizer, self.make_loss_fns, self.batches[step], self.config, seed)
        rate = train.learning_rate(step, len(self.batches), self.config)
        try:
            grad_norm = train.optimizer_step(self.optimizer, rate, self.config.max_grad_norm)
        except FloatingPointError as error:
            raise InputError(f"{self.work.title}: {error} at step {step} of {len(self.batches)}; try a new run with a "
                             "lower learning_rate") from error
        return {"step": step, **metrics, "grad_norm": grad_norm, "learning_rate": rate}

    def save_or_stop(self) -> None:
        """Store the state if it is time to, or if a process was asked to stop, which then ends the training."""
        stop = processes.any_true(Stop.requested)
        if stop or len(self.log) % self.config.save_every == 0:
            self.state.save(self.log, self.lm.model, self.optimizer)
        if stop:
            processes.wait_for_all()  # process 0 saves for all
            raise KeyboardInterrupt
