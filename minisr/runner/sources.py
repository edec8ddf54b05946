"""The files of others that a run was made from: the seed model, the seed data, the judge prompt.

A run holds copies of them. So it goes on where they have moved or are gone, and if one has changed, with its copy.
"""

import contextlib
import dataclasses
from pathlib import Path

from minisr import InputError
from minisr.interop.source import source_digest
from minisr.runner.checkpoint import SEED_MODEL, model_hash
from minisr.runner.files import file_digest, read_json, read_text
from minisr.runner.seed_data import find_file, source_path
from minisr.runner.storage import verify_checksum
from minisr.worlds.catalog import WORLDS

DATA_FILES = ("ift", "judged", "evaluation")


def with_stored_paths(old, new, folder: Path):
    """The new config with the old one's path of each source whose new path leads to the same content."""
    judge, seed_data = new.judge, new.seed_data
    if judge.template != old.judge.template and template_changed(judge.template, folder) is False:
        new = dataclasses.replace(new, judge=dataclasses.replace(judge, template=old.judge.template))
    if seed_data.source != old.seed_data.source and is_seed_data(seed_data, folder):
        new = dataclasses.replace(new, seed_data=dataclasses.replace(seed_data, source=old.seed_data.source))
    if new.seed_model != old.seed_model and is_seed_model(new.seed_model, folder):
        new = dataclasses.replace(new, seed_model=old.seed_model)
    return new


def changed_files(config, folder: Path) -> list[Path]:
    """The files that the config names and that have changed since the run copied them."""
    template = [Path(config.judge.template)] if template_changed(config.judge.template, folder) else []
    return template + changed_data(config.seed_data, folder)


def template_changed(path: str, folder: Path) -> bool | None:
    """Whether a judge prompt differs from the run's copy; None if one of them does not exist."""
    copy = folder / "judge.txt"
    if not path or not Path(path).exists() or not copy.exists():
        return None
    return read_text(Path(path), "judge prompt").rstrip("\n") != read_text(copy, "judge prompt").rstrip("\n")


def changed_data(config, folder: Path) -> list[Path]:
    """The files of the seed data that exist and differ from what the run has read."""
    read = digests_read(folder)
    return [path for name in read if (path := data_file(config, name)) and file_digest(path) != read[name]]


def is_seed_data(config, folder: Path) -> bool:
    """Whether the run has read its seed data from files like these."""
    found = {file_digest(path) for name in DATA_FILES if (path := data_file(config, name))}
    return bool(found) and found == set(digests_read(folder).values())


def digests_read(folder: Path) -> dict[str, str]:
    """The sha256 of the file of each set of the seed data that the run has read."""
    counts = folder / "seed" / "counts.json"
    if not counts.exists():  # data of a world, or nothing is read yet
        return {}
    verify_checksum(counts)
    read = read_json(counts, "counts")
    return {name: of_set["sha256"] for name, of_set in read.items() if of_set.get("sha256")}


def data_file(config, name: str) -> Path | None:
    """The file of one set of the seed data, if it exists."""
    with contextlib.suppress(InputError):
        return None if config.source in WORLDS else find_file(source_path(config), name, needed=False)
    return None


def is_seed_model(source: str, folder: Path) -> bool:
    """Whether the run's M0 is a copy of this source."""
    with contextlib.suppress(InputError):  # one of them does not exist
        return model_hash(folder / "M0", "from") == source_digest(source or str(SEED_MODEL))
    return False
