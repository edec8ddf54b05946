"""Nothing lost: a run stopped at any instant goes on where it was, and trusts only what is whole.

- Sampling keeps each finished wave in a journal, training its state every so many steps.
- A finished file is *sealed*: its hash stands in hashes.json beside it, and is checked before use.
- A run's folder is locked while a process works in it.
- Ctrl-C and SIGTERM wait for the end of the wave or step, which is kept (stop.py).
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path

import torch

from minisr import InputError
from minisr.runner.files import file_digest, read_json, write_bytes, write_json, writing


@contextlib.contextmanager
def locked(folder: Path):
    """Only one process at a time works in a folder. The lock ends with its process, however that ends."""
    try:
        import fcntl
    except ImportError:  # Windows: there is no such lock, and so no protection
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")
    except OSError as error:
        raise InputError(f"cannot write into {folder}: {error.strerror}; make room for it or choose another "
                         "folder with --out") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"another minisr is at work in {folder}; wait for its end, or choose another "
                             "folder with --out") from error
        yield


class Journal:
    """What a stage has made so far: one line a wave, appended and flushed to disk, each with its hash.

    `made_from` is all that decides the content: a journal that was made from something else is begun anew,
    and a line that was cut short or damaged is made again."""

    def __init__(self, path: Path, *made_from):
        self.path, self.made_from = path, _hash(repr(made_from))
        self.kept: dict[str, list] = {}
        for line in path.read_bytes().split(b"\n") if path.exists() else ():
            with contextlib.suppress(ValueError, TypeError, UnicodeDecodeError):
                stored, content = json.loads(line)
                if stored == self._digest(content):
                    name, value = json.loads(content)
                    self.kept[name] = value

    def _digest(self, content: str) -> str:
        return _hash(self.made_from + content)

    def get(self, *coordinates):
        """What was kept under these coordinates, or None."""
        return self.kept.get(repr(coordinates))

    def add(self, value, *coordinates) -> None:
        content = json.dumps([repr(coordinates), value])
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                file.write(b"\n" + json.dumps([self._digest(content), content]).encode())  # after a cut line
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror}; make room for it, then the "
                             "same command goes on here") from error


class NoJournal:
    """For work that is not kept."""

    def get(self, *coordinates):
        return None

    def add(self, value, *coordinates) -> None:
        pass


UNKEPT = NoJournal()


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def write_sealed(path: Path, content: bytes) -> None:
    """Write a file after its hash: what is there and does not match is damaged."""
    seals = path.parent / "hashes.json"
    known = read_json(seals, "hashes") if seals.exists() else {}
    known = known if isinstance(known, dict) else {}  # damaged: check_seal has told, this file is made again
    write_json(seals, {**known, path.name: hashlib.sha256(content).hexdigest()})
    write_bytes(path, content)


def check_seal(path: Path) -> None:
    """InputError if a file is not what was written. One that never had a seal passes."""
    seals = path.parent / "hashes.json"
    if not seals.exists():
        return
    known = read_json(seals, "hashes")
    recorded = known.get(path.name) if isinstance(known, dict) else ""
    if recorded is not None and recorded != file_digest(path):
        raise InputError(f"{path} is not the file that minisr wrote there (damaged or edited); remove it to "
                         "have it made again")


class TrainingState:
    """An unfinished training: weights, optimizers, random state, log, in FOLDER/training-STEP.pt, and in
    training.json what it was made from and its hash."""

    def __init__(self, folder: Path, *made_from):
        self.folder, self.made_from = Path(folder), _hash(repr(made_from))
        self.index = self.folder / "training.json"

    def save(self, step: int, log: list[dict], masters: dict, optimizers: list) -> None:
        """After `step` steps. The state before stays until this one is whole."""
        path = self.folder / f"training-{step}.pt"
        before = [old for old in self.folder.glob("training-*.pt") if old != path]
        random = [torch.get_rng_state()]
        if torch.cuda.is_available():
            random += torch.cuda.get_rng_state_all()
        with writing(path) as file:
            torch.save({"masters": {name: p.detach() for name, p in masters.items()}, "random": random,
                        "optimizers": [optimizer.state_dict() for optimizer in optimizers]}, file)
        write_json(self.index, {"made_from": self.made_from, "step": step, "log": log,
                                "hash": file_digest(path)})
        for old in before:
            old.unlink(missing_ok=True)

    def restore(self, masters: dict, optimizers: list) -> list[dict]:
        """Set everything as it was; returns the log, one record a step done. [] if there is no state that
        can be trusted."""
        try:
            found = read_json(self.index, "training state")
            path = self.folder / f"training-{found['step']}.pt"
            if found["made_from"] != self.made_from or file_digest(path) != found["hash"]:
                return []
        except (InputError, LookupError, TypeError):
            return []
        stored = torch.load(path, weights_only=True, map_location="cpu")
        with torch.no_grad():
            for name, p in masters.items():
                p.copy_(stored["masters"][name])
        for optimizer, state in zip(optimizers, stored["optimizers"]):
            optimizer.load_state_dict(state)
        torch.set_rng_state(stored["random"][0])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all(stored["random"][1:])
        return found["log"]

    @staticmethod
    def remove(folder: Path) -> None:
        for pattern in ("training-*.pt*", "training.json*"):  # and what a kill left half-written
            for path in Path(folder).glob(pattern):
                path.unlink()
