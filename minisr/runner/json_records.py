"""The records of a JSON or JSON Lines file that a user provides, whatever the file is called and whoever saved it."""

import json
import re
from pathlib import Path

from minisr import InputError
from minisr.runner.files import json_fault, read_bytes, read_text, short_reason, unique_keys

# The keys of an object that holds records: {"data": [...]} of many exports, LMFlow's {"instances": [...]}.
WRAPPERS = ("data", "instances", "examples", "records", "train")
# Other kinds of files, by their first bytes.
OTHER_FILES = {b"PAR1": "a Parquet file", b"ARROW1": "an Arrow file", b"\x1f\x8b": "compressed (gzip)",
               b"PK\x03\x04": "an archive (zip, xlsx)", b"\x28\xb5\x2f\xfd": "compressed (zstd)",
               b"SQLite format 3": "a database (SQLite)", b"version https://git-lfs": "a pointer of Git LFS"}
SCALARS = ("null", "true", "false", *"-0123456789")  # JSON, but no records
# What may stand between JSON values: any space, and characters that cannot be seen. Files that were joined have byte
# order marks there; text that was copied from a page has no-break and zero-width spaces.
SPACES = re.compile(r"[\s\ufeff\u200b\u2060]*")


def read_records(path: Path, what: str) -> list[tuple[str, object]]:
    """(place, value) of each record. `what` says in errors what the file is for.

    A place is "line 7", or "record 3 (line 7)" in a JSON list. NaN and infinity, which are not JSON, become None.
    Raises InputError with file and line for what is not JSON, and for a key that comes twice in one object."""
    where = f"{what} {path}"
    content = read_bytes(path)
    if kind := next((kind for start, kind in OTHER_FILES.items() if content.startswith(start)), None):
        raise InputError(f"{where} is {kind}, not JSON or JSON Lines; convert it to JSON Lines")
    text = read_text(path, what)
    lines = [(number, strip(line)) for number, line in enumerate(text.split("\n"), 1)]
    lines = [(number, line) for number, line in lines if line]
    if not lines:
        return []
    number, first = lines[0]
    if first[0] not in '{["' and not first.startswith(SCALARS):
        raise InputError(f"{where}, line {number} is not JSON or JSON Lines: {first[:40]!r}; convert the file (CSV, "
                         "with pandas: read_csv(...).to_json(FILE, orient=\"records\", lines=True))")
    # JSON Lines: each line is an object or a text. Indented JSON has lines of other kinds, such as "key": value.
    if len(lines) > 1 and all(line[0] == "{" or line[0] == line[-1] == '"' for _, line in lines):
        return [(f"line {number}", parse_line(line, where, number)) for number, line in lines]
    start = SPACES.match(text).end()
    if text[start:start + 1] == "[":
        items = enumerate(list_items(text, start, where), 1)
        return [(f"record {number} (line {line})", value) for number, (line, value) in items]
    value, end = decode(text, start, where)
    check_end(text, end, where)
    if has_columns(value):
        raise InputError(f"{where} holds columns, not records; write one record a line (pandas: orient=\"records\", "
                         "lines=True)")
    return [(f"record {number}", record) for number, record in enumerate(unwrap(value), 1)]


def strip(line: str) -> str:
    """A line without what may stand before and after a JSON value."""
    line = line[SPACES.match(line).end():]
    return line[:len(line) - SPACES.match(line[::-1]).end()]


def parse_line(line: str, where: str, number: int):
    """The value in one line of a JSON Lines file."""
    value, end = decode(line, 0, where, number)
    check_end(line, end, where, number)
    return value


def list_items(text: str, position: int, where: str):
    """(line, value) of each item of the JSON list that begins at a position of the text."""
    number = text.count("\n", 0, position) + 1
    while True:
        before, position = position, SPACES.match(text, position + 1).end()
        number += text.count("\n", before, position)
        if text[position:position + 1] == "]":
            break
        value, end = decode(text, position, where)
        yield number, value
        before, position = position, SPACES.match(text, end).end()
        number += text.count("\n", before, position)
        if text[position:position + 1] == "]":
            break
        if text[position:position + 1] != ",":
            raise InputError(f"{where}, line {number} is not valid JSON: expected a comma or the end of the list")
    check_end(text, position + 1, where)


def unwrap(value) -> list:
    """The records of an object that holds a list of them, or the value itself as the only record."""
    lists = [value[key] for key in WRAPPERS if isinstance(value, dict) and isinstance(value.get(key), list)]
    return lists[0] if lists else [value]


def has_columns(value) -> bool:
    """Whether an object is a table by columns: {"prompt": {"0": text, ...}, ...} or {"prompt": [text, ...], ...}."""
    def is_column(cells) -> bool:
        if isinstance(cells, dict):
            return bool(cells) and all(key.isdecimal() for key in cells)
        return isinstance(cells, list) and any(isinstance(c, str) for c in cells)

    return isinstance(value, dict) and len(value) > 1 and all(map(is_column, value.values()))


def decode(text: str, position: int, where: str, first_line: int = 1) -> tuple[object, int]:
    """The JSON value at a position of the text, and the position behind it."""
    try:
        return DECODER.raw_decode(text, position)
    except json.JSONDecodeError as error:
        line = error.lineno + first_line - 1
        raise InputError(f"{where}, line {line} is not valid JSON: {json_fault(error)}") from error
    except (RecursionError, ValueError) as error:  # nested too deeply, thousands of digits, or unique_keys
        line = text.count("\n", 0, position) + first_line
        raise InputError(f"{where}, line {line} cannot be read: {short_reason(error)}") from error


def check_end(text: str, position: int, where: str, first_line: int = 1) -> None:
    """Raise InputError if anything follows the only value of a text."""
    position = SPACES.match(text, position).end()
    if position < len(text):
        line = text.count("\n", 0, position) + first_line
        raise InputError(f"{where}, line {line} is not valid JSON: {text[position:position + 20]!r} follows the end "
                         "of a record; write one record a line, or all records as one list")


# strict=False accepts a tab or a line break inside a text.
DECODER = json.JSONDecoder(strict=False, object_pairs_hook=unique_keys, parse_constant=lambda name: None)
