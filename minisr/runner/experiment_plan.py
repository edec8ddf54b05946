"""Experiment files: one base config, its variants, and the seeds of each.

    base = "../tiny.toml"
    seeds = [0, 1, 2, 3, 4]
    variant_seeds = [0, 1, 2]  # seeds of each variant, a subset of seeds; default: all of them
    common.threads = 1         # changes to every run; two runs with one thread each (--jobs 2) finish
                               # sooner than one run after another with two threads
    [variants.base]            # changes to the base runs
    iterations = 3
    [variants.random]          # changes that define the variant "random"
    judge.by = "random"
    seeds = [0, 1, 2, 3, 4]    # seeds of this variant only
"""

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path

from minisr import InputError
from minisr.runner.config import Config, check_path, command_of, load_config, toml_value
from minisr.runner.files import parse_toml, read_text
from minisr.runner.run import check_config

REQUIRED_KEYS = {"base", "seeds"}
OPTIONAL_KEYS = {"variant_seeds", "common", "variants"}


@dataclass(frozen=True)
class Plan:
    """A checked experiment file. Changes are "section.key=value" strings, as --set takes them."""

    base: Path  # the base config's file
    common: tuple[str, ...]  # changes to every run
    variants: dict[str, tuple[str, ...]]  # {name: changes}, "base" first
    seeds: dict[str, list[int]]  # {name: seeds}

    def changes(self, variant: str, seed: int) -> tuple[str, ...]:
        """All changes to the base config that make one run's config."""
        return (f"seed={seed}", *self.common, *self.variants[variant])

    def config(self, variant: str, seed: int = 0) -> Config:
        """One run's config."""
        return load_config(self.base, overrides=self.changes(variant, seed))


def read_plan(path: Path, only: list[str] | None = None) -> Plan:
    """Read and check an experiment file, including the config of each variant.

    With `only`, other variants but the base will not run: the programs and files that they name may be missing."""
    content = _read_sections(path)
    variants = {"base": {}} | content.get("variants", {})
    seeds = _seeds_by_variant(path, content, variants)
    changes = {}
    for name, table in variants.items():
        changes[name] = tuple(overrides({key: table[key] for key in table if key != "seeds"}))
    common = tuple(overrides(content.get("common", {})))
    plan = Plan(Path(path).parent / os.path.expanduser(content["base"]), common, changes, seeds)
    for name in plan.variants:  # report a wrong config before the first run starts
        try:
            config = plan.config(name)
            if not only or name == "base" or name in only:
                check_config(config)
        except InputError as error:
            raise InputError(f"experiment {path}, {name}: {error}") from error
    return plan


def _read_sections(path: Path) -> dict:
    """The content of an experiment file, its keys and their types checked."""
    content = parse_toml(read_text(path, "experiment"), f"experiment {path}")
    command = command_of(content)
    if command in ("run", "pretrain"):
        raise InputError(f"config {path} belongs to another command: minisr {command} {path}")
    if set(content) - OPTIONAL_KEYS != REQUIRED_KEYS:
        raise InputError(f"experiment {path} must have base and seeds, and may have variant_seeds, common "
                         "and [variants.NAME]")
    sections = [content.get("common", {}), content.get("variants", {})]
    if isinstance(sections[1], dict):
        sections += sections[1].values()
    if not isinstance(content["base"], str) or not all(isinstance(table, dict) for table in sections):
        raise InputError(f"experiment {path}: base must be a file name, common and each variant a section")
    if any("seed" in table for table in (sections[0], *sections[2:])):
        raise InputError(f"experiment {path}: the key seed would give all runs of a variant the same seed; name a list "
                         "under seeds, such as [0, 1, 2]")
    check_path(content["base"], "base", f"experiment {path}")
    return content


def _seeds_by_variant(path: Path, content: dict, variants: dict) -> dict[str, list[int]]:
    """{variant: its seeds}; each list must be a part of the experiment's seeds."""
    every = content["seeds"]
    default = content.get("variant_seeds", every)
    seeds = {}
    for name, table in variants.items():
        seeds[name] = table.get("seeds", every if name == "base" else default)
    for given in (every, default, *seeds.values()):
        is_list = isinstance(given, list) and given and all(type(seed) is int and seed >= 0 for seed in given)
        if not is_list or len(set(given)) < len(given) or not set(given) <= set(every):
            raise InputError(f"experiment {path}: seeds must be a list of different numbers from 0 on, such as "
                             "[0, 1, 2]; variant_seeds and the seeds of a variant must be parts of it")
    return seeds


def overrides(table: dict, prefix: str = "") -> list[str]:
    """A nested table as --set takes it: {"judge": {"by": "random"}} becomes ["judge.by=random"]."""
    changes = []
    for name, value in table.items():
        if isinstance(value, dict):
            changes += overrides(value, f"{prefix}{name}.")
        else:
            changes.append(f"{prefix}{name}={format_value(value)}")
    return changes


def format_value(value) -> str:
    """A value in TOML; a text without quotes, unless TOML would read it as something else, such as "true"."""
    if isinstance(value, list):
        value = tuple(value)
    if not isinstance(value, str):
        return toml_value(value)
    try:
        tomllib.loads(f"value = {value}")
    except (RecursionError, ValueError):
        return value
    return toml_value(value)
