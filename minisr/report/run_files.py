"""Reads the files of a run that may be unfinished: a file that does not exist yet is empty."""

from pathlib import Path

from minisr.runner.files import check_object, read_json
from minisr.runner.storage import read_step, verify_checksum


def read_records(path: Path) -> list[dict]:
    """The records of a JSONL file."""
    return read_step(path) if path.exists() else []


def read_object_if_any(path: Path) -> dict:
    """The content of a JSON file."""
    if not path.exists():
        return {}
    verify_checksum(path)
    return check_object(read_json(path, "report"), path)


def read_each(folder: Path, names: list[str], file: str) -> dict:
    """{model: content of its file} of all models for which the file has any content."""
    read = read_records if file.endswith(".jsonl") else read_object_if_any
    contents = {name: read(folder / name / file) for name in names}
    return {name: content for name, content in contents.items() if content}
