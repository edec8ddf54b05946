"""Files on disk: JSON, JSONL and whole files, written atomically and read with clear errors."""

import codecs
import contextlib
import hashlib
import importlib
import io
import json
import os
import re
import tomllib
import unicodedata
from pathlib import Path

from minisr import InputError
from minisr.runner import processes

# Unicode's bidirectional controls, which change the direction of the text after them.
BIDI_CONTROLS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
# What to do about a damaged file that a run made and can make once more.
RESTORE = "restore it from a copy, or move it away: minisr run (or experiment) then makes it again"
LONE_SURROGATE = "a lone surrogate (\\ud800 to \\udfff)"
# What a text file may begin with, and its encoding. UTF-32 comes first: its mark begins like that of UTF-16.
BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
                    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def import_extra(module: str, extra: str):
    """Import a package that only an extra of minisr installs."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f'this needs the package {error.name or module}: pip install "minisr[{extra}]" '
                         f'(from a checkout: pip install ".[{extra}]")') from error


@contextlib.contextmanager
def writing(path: Path, each_process: bool = False):
    """Open a file for writing that appears under its name only when it is complete.

    It is written to a temporary file in the same folder, flushed to disk, and renamed at the end. Of several
    processes only process 0 writes, or each one a file of its own."""
    if not (each_process or processes.is_main()):
        yield io.BytesIO()
        return
    path = Path(path)
    temporary = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError | RuntimeError):  # torch.save raises the latter on a full disk
            raise
        raise InputError(f"cannot write {path}: {write_failure(error)}") from error


def write_failure(error: Exception) -> str:
    """Why nothing could be written, and what to do."""
    reason = getattr(error, "strerror", None) or "the disk may be full"
    may_be_full = not isinstance(error, FileExistsError | NotADirectoryError | IsADirectoryError | PermissionError)
    return f"{reason}; {'free some space or ' if may_be_full else ''}choose another folder"


def write_bytes(path: Path, content: bytes) -> None:
    with writing(path) as file:
        file.write(content)


def write_json(path: Path, value) -> None:
    write_bytes(path, json_bytes(value))


def write_jsonl(path: Path, records) -> None:
    """One line for each record."""
    write_bytes(path, jsonl_bytes(records))


def json_bytes(value) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def jsonl_bytes(records) -> bytes:
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return text.encode(errors="backslashreplace")  # a lone surrogate becomes the JSON escape \udXXX


def read_bytes(path: Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def read_text(path: Path, what: str) -> str:
    """The text of a file that must exist, as any editor may have saved it. `what` says in errors what it is for.

    UTF-8, or UTF-16 or UTF-32 with a byte order mark. Lines end in "\\n", whatever they end in in the file."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {what} {path}: {error.strerror}") from error
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"cannot read {what} {path}: line {line} is not UTF-8 text; save the file as UTF-8") from error
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise InputError(f"cannot read {what} {path}: line {line} holds a NUL byte; save the file as UTF-8 text")
    return text


def parse_toml(text: str, where: str) -> dict:
    """The table of a TOML text."""
    try:
        return tomllib.loads(text)
    except (RecursionError, ValueError) as error:  # not only TOMLDecodeError: a number may have thousands of digits
        hint = "; write a path with backslashes in single quotes" if re.search("hex value|scaped", str(error)) else ""
        raise InputError(f"{where} is not valid TOML: {short_reason(error)}{hint}") from error


def parse_json(text: str, where: str):
    """The value of a JSON text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not valid JSON: line {error.lineno}: {json_fault(error)}") from error
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
        raise InputError(f"{where} cannot be parsed as JSON: {short_reason(error)}") from error


def json_fault(error: json.JSONDecodeError) -> str:
    """What is wrong with a JSON text. Names comments, and characters that cannot be seen or look like JSON's."""
    found = error.doc[error.pos:error.pos + 1]
    if found and not found.isascii():
        return f"{error.msg}, found U+{ord(found):04X} ({unicodedata.name(found, 'without a name').lower()})"
    is_comment = error.doc.startswith(("//", "/*", "#"), error.pos)
    return f"{error.msg}; JSON has no comments" if is_comment else error.msg


def unique_keys(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object of which no key comes twice, an object_pairs_hook."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} comes twice in one object")
    return found


def read_json(path: Path, what: str):
    """The value in a JSON file that minisr wrote and would write again. `what` says in errors what it is for."""
    text = read_text(path, what)
    try:
        return parse_json(text, f"{what} {path}")
    except InputError as error:
        raise InputError(f"{error}; {RESTORE}") from error


def read_jsonl(path: Path, what: str, texts: tuple[str, ...] = ()) -> list[dict]:
    """The records of a JSONL file that minisr wrote, one a line. Each must have a text under every key in `texts`."""
    # Not splitlines(): it also splits at characters such as U+2028, which a JSON text may contain.
    lines = read_text(path, what).removesuffix("\n").split("\n")
    if lines[0] == "":
        return []
    return [parse_record(line, f"{what} {path}, line {number},", texts)
            for number, line in enumerate(lines, 1)]


def parse_record(line: str, where: str, texts: tuple[str, ...]) -> dict:
    """The record in one line of a JSONL file."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not valid JSON: {json_fault(error)}") from error
    except (RecursionError, ValueError) as error:
        raise InputError(f"{where} cannot be parsed as JSON: {short_reason(error)}") from error
    if not isinstance(record, dict):
        raise InputError(f"{where} is not a JSON object {{...}}")
    for name in texts:
        if not isinstance(record.get(name), str):
            raise InputError(f"{where} has no text {name!r}")
    return record


def read_object(path: Path) -> dict:
    """The object in a JSON file of any origin."""
    return check_object(parse_json(read_text(path, "file"), f"file {path}"), path)


def check_object(value, where) -> dict:
    """The value that was read from a JSON file or a part of it, if it is an object."""
    if not isinstance(value, dict):
        raise InputError(f"{where} is not a JSON object {{...}}")
    return value


def check_encodable(text: str, where: str) -> None:
    """Raise InputError if a text has a lone surrogate."""
    if has_lone_surrogate(text):
        raise InputError(f"{where}: {LONE_SURROGATE} in the text {text[:60]!r}; remove it")


def has_lone_surrogate(text: str) -> bool:
    """Whether a text holds half of a surrogate pair, which JSON can escape and no tokenizer encodes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def file_digest(path: Path) -> str:
    """The sha256 of a file of any size."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def short_reason(error: Exception) -> str:
    """An error's message in one line of at most 200 characters; its type if it has no message.

    The messages of KeyError, TypeError, AttributeError and IndexError speak of Python, not of the file."""
    if isinstance(error, KeyError) and error.args:
        return f"{str(error.args[0])[:180]!r} is missing"
    if isinstance(error, TypeError | AttributeError | IndexError):
        return "a value in it is missing or of the wrong type"
    return " ".join(str(error).split())[:200] or type(error).__name__


def printable(text: str) -> str:
    """A text of unknown origin for the terminal: control characters are escaped, as in \\x1b."""
    return "".join(repr(c)[1:-1] if is_control(c) else c for c in text)


def is_control(c: str) -> bool:
    """Whether a character other than a line break moves the cursor or changes the direction of the text."""
    return c != "\n" and (unicodedata.category(c) == "Cc" or unicodedata.bidirectional(c) in BIDI_CONTROLS)
