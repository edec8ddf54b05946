"""What makes a run's folder trustworthy: one process at a time, and files that are checked before they are used."""

import contextlib
import hashlib
import os
from pathlib import Path

from minisr import InputError
from minisr.runner import processes
from minisr.runner.files import (
    RESTORE,
    check_object,
    file_digest,
    read_json,
    read_jsonl,
    write_bytes,
    write_failure,
    write_json,
)
from minisr.runner.journal import fingerprint

# What the records of each step have, by the name of its file. Files of any version of minisr have these keys.
RECORD_KEYS = {
    "prompts": {"prompt": str},
    "responses": {"prompt": str, "responses": list, "finished": list},
    "rewards": {"rewards": list, "scores": list, "judgements": list},
    "pairs": {"prompt": str, "chosen": str, "rejected": str, "chosen_reward": int | float,
              "rejected_reward": int | float},
    "answers": {"prompt": str, "sampled": str, "greedy": str},
    "judge_evaluation": {"prompt": str, "scores": list, "rewards": list, "given": list, "judgements": list},
}


def check_run(folder: Path) -> None:
    """Raise InputError unless a folder is a run's; the message names a run near it."""
    if not os.path.exists(folder):
        raise InputError(f"there is no folder {folder}")
    if (folder / "config.toml").exists():
        return
    run = folder.parent if folder.name else folder.resolve().parent  # "." has no name
    if (folder / "meta.json").exists() and (run / "config.toml").exists():
        raise InputError(f"{folder} is a model; give its run: {run}")
    runs = sorted(folder.glob("*/config.toml"))
    example = f"; it holds runs, e.g. {runs[0].parent}" if runs else "; minisr run makes one"
    raise InputError(f"{folder} is no run: it has no config.toml{example}")


@contextlib.contextmanager
def folder_lock(folder: Path, has_out: bool = True):
    """Only one run at a time works in a folder. Process 0 holds the lock, which ends with it, however it ends.

    has_out: whether the command has an option --out, with which its errors advise to choose another folder."""
    if not processes.is_main():
        yield
        return
    try:
        import fcntl
    except ImportError:  # Windows has no such lock
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")
    except OSError as error:
        in_place = f"{error.strerror}; make it writable, or copy the run"
        advice = f"{write_failure(error)} with --out" if has_out else in_place
        raise InputError(f"cannot write into {folder}: {advice}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            advice = ", or choose another folder with --out" if has_out else ""
            raise InputError(f"another minisr process works in {folder}; wait until it ends{advice}") from error
        yield


def write_with_checksum(path: Path, content: bytes, inputs: tuple | None = None) -> None:
    """Record the checksum in hashes.json beside the file, then write the file.

    With inputs, also record a hash of what the file was made from."""
    known = read_checksums(path.parent)
    if inputs is not None:
        known["made_from"] = {**known.get("made_from", {}), path.name: fingerprint(inputs)}
    write_json(path.parent / "hashes.json", {**known, path.name: hashlib.sha256(content).hexdigest()})
    write_bytes(path, content)


def read_step(path: Path) -> list[dict]:
    """The records of a step's file. Raises InputError for a file that is not what was written, or lacks a key."""
    verify_checksum(path)
    records = read_jsonl(path, path.stem)
    for number, record in enumerate(records, 1):
        for key, kind in RECORD_KEYS.get(path.stem, {}).items():
            if not isinstance(record.get(key), kind):
                raise InputError(f"{path}, line {number}: {key!r} is missing or of the wrong type; {RESTORE}")
    return records


def check_inputs(path: Path, inputs: tuple) -> None:
    """Raise InputError if the file of a step was made from other inputs. A file without a record of them passes."""
    made_from = read_checksums(path.parent).get("made_from", {})
    recorded = check_object(made_from, f"{path.parent}/hashes.json: made_from").get(path.name)
    if recorded not in (None, fingerprint(inputs)):
        raise InputError(f"{path} was made from other results of the steps before it than the present ones; move it "
                         "away, and it is made again")


def read_checksums(folder: Path) -> dict:
    """The content of hashes.json; nothing if it is missing or damaged, which verify_checksum reports."""
    index = folder / "hashes.json"
    known = read_json(index, "hashes") if index.exists() else {}
    return known if isinstance(known, dict) else {}


def verify_checksum(path: Path) -> None:
    """Raise InputError if a file is not what was written. A file without a recorded checksum passes."""
    index = path.parent / "hashes.json"
    if not index.exists():
        return
    known = read_json(index, "hashes")
    if not isinstance(known, dict):
        raise InputError(f"{index} is not what minisr wrote there (damaged or edited); restore it from a copy, or move "
                         "it away: then the files beside it are used unchecked")
    recorded = known.get(path.name)
    if recorded is not None and recorded != file_digest(path):
        raise InputError(f"{path} is not the file that minisr wrote there (damaged or edited); {RESTORE}")
