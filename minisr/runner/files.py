"""Files on disk: JSONL records and whole files, written atomically, read with clear errors."""

import contextlib
import hashlib
import importlib
import json
import os
import unicodedata
from pathlib import Path

from minisr import InputError

TURNING = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")  # bidi controls


def need(module: str, extra: str):
    """Import a package that only an extra installs."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f'this needs the package {module}: pip install "minisr[{extra}]" '
                         f'(from a checkout: pip install ".[{extra}]")') from error


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file atomically."""
    with writing(path) as file:
        file.write(content)


@contextlib.contextmanager
def writing(path: Path):
    """A file opened beside its place; flushed to disk and renamed at the end: it is whole or not there."""
    path = Path(path)
    beside = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        if not isinstance(error, OSError | RuntimeError):  # torch.save tells of a full disk by the latter
            raise
        reason = getattr(error, "strerror", None) or "the disk may be full"
        raise InputError(f"cannot write {path}: {reason}; make room for it or choose another "
                         "folder") from error


def write_json(path: Path, value) -> None:
    write_bytes(path, json_bytes(value))


def write_jsonl(path: Path, records) -> None:
    """One record a line."""
    write_bytes(path, jsonl_bytes(records))


def jsonl_bytes(records) -> bytes:
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return text.encode(errors="backslashreplace")  # half a character, \\ud800, stays spelled as JSON has it


def json_bytes(value) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def read_bytes(path: Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def read_text(path: Path, what: str) -> str:
    """The text of a file that must exist; `what` says what it is for, in the error."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InputError(f"cannot read {what} {path}: {reason}") from error


def read_json(path: Path, what: str):
    text = read_text(path, what)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{what} {path} is not valid JSON: line {error.lineno}: {error.msg}; "
                         "remove it to have it made again") from error
    except (RecursionError, ValueError) as error:  # a number of thousands of digits
        raise InputError(f"{what} {path} is no JSON that can be read: {first_words(error)}") from error


def first_words(error: Exception) -> str:
    return " ".join(str(error).split())[:100]


def printable(text: str) -> str:
    """A text of unknown origin for the terminal: what moves the cursor or turns a line around is spelled
    out, as \\x1b."""
    def moves(c):
        return c != "\n" and (unicodedata.category(c) == "Cc" or unicodedata.bidirectional(c) in TURNING)
    return "".join(repr(c)[1:-1] if moves(c) else c for c in text)


def read_jsonl(path: Path, what: str, texts: tuple[str, ...] = ()) -> list[dict]:
    """Every line's record; the first broken line is named, and one that lacks one of these texts."""
    records = []
    # Not splitlines(): it also breaks at characters such as U+2028 that may stand inside a record.
    for number, line in enumerate(read_text(path, what).removesuffix("\n").split("\n"), 1):
        if not line and number == 1:
            break  # an empty file
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{what} {path}, line {number}, is not valid JSON: {error.msg}") from error
        except (RecursionError, ValueError) as error:
            raise InputError(f"{what} {path}, line {number}, is no JSON that can be read: "
                             f"{first_words(error)}") from error
        if not isinstance(record, dict):
            raise InputError(f"{what} {path}, line {number}, is not a JSON object {{...}}")
        for name in texts:
            if not isinstance(record.get(name), str):
                raise InputError(f"{what} {path}, line {number}, has no text {name!r}")
        records.append(record)
    return records


def file_digest(path: Path) -> str:
    """The sha256 of a file of any size."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
