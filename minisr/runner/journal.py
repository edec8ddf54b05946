"""Unfinished work on disk: finished batches of a step, and the state of a training.

Both carry a fingerprint of everything that decides their content. Work of another origin is ignored and done again.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path

import torch

from minisr import InputError
from minisr.runner import processes
from minisr.runner.files import file_digest, read_json, write_json, writing


class Journal:
    """The finished batches of a step: one line a batch, flushed to disk, each with its hash.

    A line that was cut short or damaged is ignored. Each process writes a journal of its own and reads all of them,
    so that a run can be resumed with another number of processes."""

    def __init__(self, path: Path, *made_from):
        self.path = path if processes.is_main() else path.with_name(f"{path.name}.{processes.rank()}")
        self.fingerprint = fingerprint(made_from)
        self.entries: dict[str, list] = {}
        for written in journal_files(path):
            self.read(written)

    def read(self, path: Path) -> None:
        for line in path.read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError, TypeError, UnicodeDecodeError):
                stored, content = json.loads(line)
                if stored == self._hash(content):
                    name, value = json.loads(content)
                    self.entries[name] = value

    def _hash(self, content: str) -> str:
        return short_hash(self.fingerprint + content)

    def get(self, *key):
        """The stored value, or None."""
        return self.entries.get(repr(key))

    def add(self, value, *key) -> None:
        content = json.dumps([repr(key), value])
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                # The line break comes first: the line before may have been cut short.
                file.write(b"\n" + json.dumps([self._hash(content), content]).encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror}; free some space, then run the same "
                             "command again to resume") from error


def journal_files(path: Path) -> list[Path]:
    """The journals that the processes of this run or an interrupted one have written: PATH, PATH.1, PATH.2, ..."""
    return [written for written in (path, *path.parent.glob(f"{path.name}.*")) if written.exists()]


def remove_journals(path: Path) -> None:
    if processes.is_main():
        for written in journal_files(path):
            written.unlink(missing_ok=True)


class TrainingState:
    """An unfinished training: weights and optimizer in FOLDER/training-STEP.pt, log in training.json.

    There is no random state: GradientSum seeds each loss by its step and index."""

    parts = 1  # files that hold a state

    def __init__(self, folder: Path, *made_from):
        self.folder, self.fingerprint = Path(folder), fingerprint(made_from)
        self.index = self.folder / "training.json"

    def save(self, log: list[dict], model, optimizer) -> None:
        """Save after len(log) steps. The previous state is removed when this one is complete.

        All processes hold the same state, and process 0 saves it."""
        if not processes.is_main():
            return
        step = len(log)
        path = self.folder / f"training-{step}.pt"
        previous = [old for old in self.folder.glob("training-*.pt") if old != path]
        with writing(path) as file:
            torch.save({"model": model.state_dict(), "parameters": trained_tensors(optimizer),
                        "optimizer": optimizer.state_dict()}, file)
        write_json(self.index, {"made_from": self.fingerprint, "step": step, "log": log, "hash": file_digest(path)})
        for old in previous:
            old.unlink(missing_ok=True)

    def restore(self, model, optimizer) -> list[dict]:
        """Restore everything; return the log, one record a finished step. [] without a state that can be trusted.

        Raises InputError if a sharded training saved the state."""
        found = self.read_index()
        if found is None:
            return []
        self.check_parts(found)
        path = self.folder / f"training-{found['step']}.pt"
        if not path.exists() or file_digest(path) != found["hash"]:
            return []
        stored = torch.load(path, weights_only=True, map_location="cpu")
        model.load_state_dict(stored["model"])
        with torch.no_grad():
            for parameter, value in zip(trained_tensors(optimizer), stored["parameters"]):
                parameter.copy_(value)
        optimizer.load_state_dict(stored["optimizer"])
        return found["log"]

    def read_index(self) -> dict | None:
        """The content of training.json, if it describes a state of this training."""
        try:
            found = read_json(self.index, "training state")
            if found["made_from"] != self.fingerprint or not {"step", "log", "hash"} <= found.keys():
                return None
            return found
        except (InputError, LookupError, TypeError, AttributeError):
            return None

    def check_parts(self, found: dict) -> None:
        """Raise InputError if a sharded training saved the state in another number of parts than this one would."""
        saved = len(found["hash"]) if isinstance(found["hash"], dict) else 1
        if saved != self.parts:
            raise InputError(f"{self.index}: {saved} process{'es' * (saved > 1)} saved the state of this sharded "
                             f"training, {processes.size()} cannot resume it; use --processes {saved}, or remove the "
                             "file to train this model anew")

    @staticmethod
    def remove(folder: Path) -> None:
        if not processes.is_main():
            return
        for pattern in ("training-*.pt*", "training.json*"):  # also what a kill left half-written
            for path in Path(folder).glob(pattern):
                path.unlink()


def trained_tensors(optimizer) -> list[torch.Tensor]:
    """What the optimizer updates: the weights, or their float32 master copies."""
    return [parameter.detach() for group in optimizer.param_groups for parameter in group["params"]]


def fingerprint(made_from: tuple) -> str:
    return short_hash(repr(made_from))


def short_hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
