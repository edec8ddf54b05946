"""The chat templates that come with minisr, by name, and templates from the user's own files."""

from pathlib import Path

from minisr import InputError
from minisr.runner.files import read_text

FOLDER = Path(__file__).parent / "templates"


def chat_template(name: str) -> str:
    """The text of a template: one of minisr's by its name, or a file by its path."""
    path = FOLDER / f"{name}.txt"
    if not path.exists():
        path = Path(name)
    if not path.exists():
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.txt")))
        raise InputError(f"chat template {name!r} is neither a file nor one of {known}")
    return read_text(path, "chat template").removesuffix("\n")
