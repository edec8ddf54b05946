"""The files of others that a run was made from: the seed model, the seed data, the judge prompt.

A run works with its own copies, so it can be resumed after the originals have been moved, deleted or changed.
"""

import contextlib
import dataclasses
from pathlib import Path

from minisr import InputError
from minisr.interop.source import load_source, source_digest
from minisr.runner.checkpoint import SEED_MODEL, load_model, model_hash, tokenizer_files
from minisr.runner.files import file_digest, read_json, read_text
from minisr.runner.seed_data import find_file, source_path
from minisr.runner.storage import verify_checksum
from minisr.worlds.catalog import WORLDS

DATA_FILES = ("ift", "judged", "evaluation")


def keep_stored_paths(old, new, folder: Path):
    """The new config with the old one's path of each source whose new path leads to the same content."""
    judge, seed_data = new.judge, new.seed_data
    if judge.template != old.judge.template and same_template(judge.template, folder):
        new = dataclasses.replace(new, judge=dataclasses.replace(judge, template=old.judge.template))
    if seed_data.source != old.seed_data.source and same_seed_data(seed_data, folder):
        new = dataclasses.replace(new, seed_data=dataclasses.replace(seed_data, source=old.seed_data.source))
    if new.seed_model != old.seed_model and same_seed_model(new, folder):
        new = dataclasses.replace(new, seed_model=old.seed_model)
    return new


def changed_files(config, folder: Path) -> list[Path]:
    """The files that the config names and that have changed since the run copied them. Ignores what cannot be read."""
    template = [Path(config.judge.template)] if template_changed(config.judge.template, folder) else []
    return template + changed_data(config.seed_data, folder)


# The judge prompt.

def same_template(path: str, folder: Path) -> bool:
    """Whether the run's judge prompt is a copy of this file."""
    text = template_text(Path(path))
    return text is not None and text == template_text(folder / "judge.txt")


def template_changed(path: str, folder: Path) -> bool:
    """Whether a judge prompt differs from the run's copy. False if one of them cannot be read."""
    text, copy = template_text(Path(path)), template_text(folder / "judge.txt")
    return text is not None and copy is not None and text != copy


def template_text(path: Path) -> str | None:
    """The judge prompt in a file, None if it cannot be read."""
    with contextlib.suppress(InputError):
        return read_text(path, "judge prompt").rstrip("\n")
    return None


# The seed data.

def same_seed_data(config, folder: Path) -> bool:
    """Whether the run has read its seed data from files like these."""
    with contextlib.suppress(InputError, OSError):  # raised for a file that cannot be read
        found = {file_digest(path) for name in DATA_FILES if (path := data_file(config, name))}
        return bool(found) and found == set(recorded_digests(folder).values())
    return False


def changed_data(config, folder: Path) -> list[Path]:
    """The files of the seed data that can be read and differ from what the run has read."""
    changed = []
    for name, digest in recorded_digests(folder).items():
        with contextlib.suppress(InputError, OSError):
            if (path := data_file(config, name)) and file_digest(path) != digest:
                changed.append(path)
    return changed


def recorded_digests(folder: Path) -> dict[str, str]:
    """The sha256 of the file of each set of the seed data that the run has read, as far as seed/counts.json tells."""
    counts, sets = folder / "seed" / "counts.json", None
    with contextlib.suppress(InputError):  # raised if it is damaged, or missing: a world's data, or nothing read yet
        verify_checksum(counts)
        sets = read_json(counts, "counts")
    sets = sets if isinstance(sets, dict) else {}
    digests = {name: sets[name].get("sha256") for name in DATA_FILES if isinstance(sets.get(name), dict)}
    return {name: digest for name, digest in digests.items() if isinstance(digest, str)}


def data_file(config, name: str) -> Path | None:
    """The file of one set of the seed data; None if a world makes the set, or it has no file of its own."""
    return None if config.source in WORLDS else find_file(source_path(config), name, needed=False)


# The seed model.

def same_seed_model(config, folder: Path) -> bool:
    """Whether the run's M0 is a copy of the config's seed model: the same weights, shape, vocabulary, chat template
    and ids that end a response."""
    source = config.seed_model or str(SEED_MODEL)
    with contextlib.suppress(InputError, OSError):  # raised if one of them does not exist or cannot be read
        if model_hash(folder / "M0", "from") != source_digest(source):
            return False
        model, tokenizer = load_source(source, chat=config.chat)
        copy, its_tokenizer = load_model(folder / "M0")
        return model.config == copy.config and tokenizer_files(tokenizer) == tokenizer_files(its_tokenizer)
    return False
