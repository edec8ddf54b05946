"""One run in one TOML file, strictly: an unknown key, a wrong type or an odd value is an error.

Every key belongs to the arrow it configures; its default and meaning stand in that module's
dataclass (SampleConfig, PromptConfig, JudgeConfig, OptimConfig, DPOConfig).
"""

import dataclasses
import json
import math
import tomllib
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

from minisr import InputError
from minisr.dpo import DPOConfig
from minisr.judge import JudgeConfig
from minisr.model import ModelConfig
from minisr.pairs import PairConfig
from minisr.prompts import PromptConfig
from minisr.runner.checkpoint import MODEL_KEYS_RENAMED
from minisr.runner.files import read_text
from minisr.sampler import SampleConfig
from minisr.train import OptimConfig


@dataclass(frozen=True)
class ResponseConfig(SampleConfig):
    """The candidates of each prompt."""

    candidates: int = 4  # N


@dataclass(frozen=True)
class SeedConfig:
    """Whose seed data, how much of it (from a folder: at most), and what is held out."""

    source: str = "world"  # "world": the tiny world's people; "english": minisr's own; or a folder
    ift: int = 600  # prompts with one answer (paper: 3,200)
    ranked: int = 500  # prompts with three ranked answers, the source of EFT (paper: 1,630 EFT)
    eft_by: str = "annotator"  # or "baseline": it writes, agreement decides (paper); "none": no EFT
    reasons: bool = True  # the annotator's judgements give reasons, not the score alone
    judge_evaluation: int = 250  # held-out prompts with three ranked answers
    evaluation: int = 512  # held-out prompts for answers (paper: 256)


@dataclass(frozen=True)
class Config:
    """A whole run, M0 to M_{T+1}."""

    seed: int = 0
    iterations: int = 2  # T rounds of DPO after M1: M2 .. M_{T+1}
    device: str = "auto"  # CUDA when there, else CPU
    threads: int = 2  # of the CPU; another number may change the last bit of a result
    seed_model: str = ""  # M0: a model folder, a .gguf file, package:NAME; "": minisr's own
    chat: str = ""  # chat template of M0, a name or a file; "": the one it came with
    seed_data: SeedConfig = field(default_factory=SeedConfig)
    sft: OptimConfig = field(default_factory=OptimConfig)
    prompts: PromptConfig = field(default_factory=PromptConfig)
    responses: ResponseConfig = field(default_factory=ResponseConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    pairs: PairConfig = field(default_factory=PairConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)
    evaluate: SampleConfig = field(default_factory=SampleConfig)  # of held-out prompts


@dataclass(frozen=True)
class PretrainConfig:
    """How a seed model M0 is made from the world's text."""

    seed: int = 0
    threads: int = 2
    tokens: int = 12_000_000  # of text
    tokenizer_documents: int = 5000
    model: ModelConfig = field(default_factory=ModelConfig)
    train: OptimConfig = field(default_factory=OptimConfig)


CHOICES = {"device": ("auto", "cpu", "cuda"), "eft_by": ("annotator", "baseline", "none"),
           "optimizer": ("adamw", "muon"), "by": ("self", "M1", "oracle", "random"),
           "rejected_from": ("self", "M1", "next"), "reference": ("previous", "M1"),
           "written_by": ("self", "people")}
# Smallest and largest sensible value; every other number must be at least 1.
LIMITS = {
    "seed": (0, 2**31), "iterations": (0, 100), "temperature": (0, 100), "top_p": (0, 1),
    "rouge": (0, math.inf), "own_shots": (0, 100), "attempts": (1, 1000), "warmup": (0, 1),
    "weight_decay": (0, 1), "dropout": (0, 0.99), "learning_rate": (0, 10),
    "final_learning_rate": (0, 10), "clip": (0, math.inf), "beta": (0, math.inf),
    "head_dim": (0, math.inf), "micro_batch": (0, math.inf), "nll": (0, math.inf),
    "replay": (0, math.inf), "norm_eps": (0, 1), "length_control": (0, 1), "threads": (1, 1024),
}

# Old name of a key -> its name now, in the sections that have the new one.
RENAMED = {**MODEL_KEYS_RENAMED}


def load_config(path: Path, kind=Config, overrides: tuple[str, ...] = ()):
    """Read a TOML file into Config or PretrainConfig; overrides are "section.key=value"."""
    try:
        table = tomllib.loads(read_text(path, "config"))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"config {path} is not valid TOML: {error}") from error
    for override in overrides:
        _override(table, override)
    return build(kind, table, str(path))


def _override(table: dict, override: str) -> None:
    """Set one key of the table from "judge.by=random"; the value is TOML, or else a string."""
    name, found, value = override.partition("=")
    if not found:
        raise InputError(f"--set {override}: write it as section.key=value, e.g. judge.by=random")
    try:
        value = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        pass  # a bare word is a string
    *sections, key = name.strip().split(".")
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise InputError(f"--set {override}: {section} is no section")
    table[key] = value


def build(kind, table: dict, where: str):
    """A dataclass from a TOML table; errors name the file, the section and the key."""
    hints = get_type_hints(kind)
    if unknown := sorted(set(table) - set(hints)):
        key = unknown[0]
        if RENAMED.get(key) in hints:
            raise InputError(f"{where}: {key!r} is now called {RENAMED[key]!r}")
        raise InputError(f"{where}: unknown key {key!r}; known: {', '.join(hints)}")
    values = {name: _value(hints[name], value, name, where) for name, value in table.items()}
    try:
        return kind(**values)
    except ValueError as error:  # values that do not go together
        raise InputError(f"{where}: {error}") from error


def _value(kind, value, name: str, where: str):
    """One key's value, checked."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise InputError(f"{where}: {name} must be a section [{name}]")
        return build(kind, value, f"{where} [{name}]")
    if get_origin(kind) is tuple:
        one = get_args(kind)[0]
        value = [float(v) if one is float and type(v) is int else v for v in value] \
            if isinstance(value, list) else value
        if not isinstance(value, list) or not all(isinstance(v, one) for v in value):
            raise InputError(f"{where}: {name} must be a list, each {_name(one)}")
        return tuple(value)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise InputError(f"{where}: {name} must be {_name(kind)}, not {value!r}")
    if name in CHOICES and value not in CHOICES[name]:
        raise InputError(f"{where}: {name} must be one of {', '.join(CHOICES[name])}, not {value!r}")
    if kind in (int, float):
        low, high = LIMITS.get(name, (1, math.inf))
        if not low <= value <= high:
            raise InputError(f"{where}: {name} must lie between {low} and {high}, not {value}")
    return value


def _name(kind: type | types.GenericAlias) -> str:
    return {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}[kind]


def differences(old: dict, new: dict, prefix: str = "") -> list[str]:
    """The keys in which two configs (as nested dicts) differ: "judge.by: 'self' -> 'random'"."""
    found = []
    for name in sorted(set(old) | set(new)):
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{name}.")
        elif a != b:
            found.append(f"{prefix}{name}: {a!r} -> {b!r}")
    return found


def to_toml(config) -> str:
    """The whole config, defaults included, as a TOML file that load_config reads back."""
    plain = dataclasses.asdict(config)
    lines = [f"{name} = {_toml(value)}" for name, value in plain.items() if not isinstance(value, dict)]
    for section, table in plain.items():
        if isinstance(table, dict):
            lines += ["", f"[{section}]", *(f"{name} = {_toml(value)}" for name, value in table.items())]
    return "\n".join(lines) + "\n"


def _toml(value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # a JSON text is one of TOML
    return repr(value)
