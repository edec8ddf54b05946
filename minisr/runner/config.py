"""One run in one TOML file, checked strictly: an unknown key, a wrong type or a value out of range is an error.

Every section configures one step of the loop. Its keys are defined, with their meaning and default, in the dataclass of
that step in the core; the classes here add what only a run on disk or an experiment needs.
"""

import dataclasses
import json
import math
import os
import tomllib
import types
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

from minisr import InputError, dpo, judge, prompts, train
from minisr.interop.shape import MODEL_KEYS_RENAMED, model_config
from minisr.lm import ResponseConfig
from minisr.loop import LoopConfig
from minisr.model import ModelConfig
from minisr.runner.files import check_encodable, parse_toml, read_text
from minisr.runner.lora import LoRAConfig
from minisr.sampler import SamplingConfig


@dataclass(frozen=True)
class TrainConfig(train.TrainConfig):
    """How a model is trained."""

    micro_batch: int = 0  # examples in memory at once, their gradients added up; 0: a quarter of the batch
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third slower
    save_every: int = 50  # steps between two saved states of an unfinished training
    optimizer: str = "adamw"  # or "muon": Muon for the matrices, AdamW for the rest


@dataclass(frozen=True)
class PromptConfig(prompts.PromptConfig):
    """How new prompts are made."""

    source: str = "self"  # M_t writes them; "people": requests of the world itself, a control
    requests_only: bool = False  # drop generated prompts that are no request of the run's world


@dataclass(frozen=True)
class JudgeConfig(judge.JudgeConfig):
    """Who judges, and how."""

    by: str = "self"  # M_t; "M1", "word_points", "oracle", "random": controls; "command": a program of yours
    command: str = ""  # its command line, e.g. "python my_judge.py"; see tiny_configs/README.md
    timeout: int = 600  # seconds without a line from it until it counts as hung
    template: str = ""  # a text file with {prompt} and {response}; "": the one of the seed data's language


@dataclass(frozen=True)
class PairConfig:
    """Rules of other papers in place of this paper's, best against worst; see variants.py."""

    length_control: float = 0.0  # rho of Meta-Rewarding: choose the shortest of the nearly best responses
    rejected_from: str = "self"  # the worst; "M1": M1's, if worse (Temporal SR); "next": the best below the chosen one


@dataclass(frozen=True)
class DPOConfig(dpo.DPOConfig, TrainConfig):
    """DPO, and variants of it that the paper tried and dropped, or that come from other papers."""

    reference: str = "previous"  # M_t; "M1": the same reference in every iteration
    consistency: bool = False  # smooth the labels by how often single judgements disagree (as in CREAM)
    positives_only: bool = False  # no DPO: fine-tune M0 on seed data and responses of reward 5 (appendix A.4)


@dataclass(frozen=True)
class SeedConfig:
    """The seed data: its source, how much of it is used (from a folder: at most), and what is held out."""

    source: str = "world"  # "world": the tiny world's people; "words", "english": minisr's own data; or a folder
    ift: int = 600  # prompts with one response each (paper: 3,200)
    ranked: int = 500  # prompts with three ranked responses each, the source of EFT (paper: 1,630 EFT)
    eft_by: str = "annotator"  # or "baseline": it writes, agreement with the ranking selects (paper); "none": no EFT
    reasons: bool = True  # the annotator's judgements give reasons, not only the score
    judge_evaluation: int = 250  # held-out prompts with three ranked responses each
    evaluation: int = 512  # held-out prompts (paper: 256)
    edited: float = 0.6  # "words": the share of M0's answers that is edited before the annotator judges them
    too_long: str = "drop"  # records that M0's context cannot hold are left out and counted; "refuse": an error


@dataclass(frozen=True)
class Config(LoopConfig):
    """A whole run, M0 to M_{T+1}."""

    device: str = "auto"  # a GPU if there is one, else the CPU
    threads: int = 2  # of the CPU; another number may change the last bit of a result
    engine: str = "fast"  # "plain": the readable engine of the core
    sharded: bool = False  # several processes: each keeps a part of what the optimizer needs (FSDP2)
    dtype: str = "auto"  # bfloat16 on a GPU, else float32; "float64" for comparisons
    seed_model: str = ""  # M0: a model folder, a .gguf file, package:NAME; "": the one that ships with minisr
    chat: str = ""  # chat template of M0, a name or a file; "": its own
    sft: TrainConfig = field(default_factory=TrainConfig)
    prompts: PromptConfig = field(default_factory=PromptConfig)
    responses: ResponseConfig = field(default_factory=ResponseConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    seed_data: SeedConfig = field(default_factory=SeedConfig)
    pairs: PairConfig = field(default_factory=PairConfig)
    evaluate: SamplingConfig = field(default_factory=SamplingConfig)  # of held-out prompts


@dataclass(frozen=True)
class PretrainConfig:
    """How a seed model M0 is pretrained on the tiny world's text."""

    seed: int = 0
    threads: int = 2
    engine: str = "fast"
    tokens: int = 12_000_000  # of text
    tokenizer_documents: int = 5000
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


CHOICES = {
    "device": ("auto", "cpu", "cuda"), "engine": ("fast", "plain"), "dtype": ("auto", "float32", "bfloat16", "float64"),
    "eft_by": ("annotator", "baseline", "none"), "optimizer": ("adamw", "muon"),
    "by": ("self", "M1", "word_points", "oracle", "random", "command"), "rejected_from": ("self", "M1", "next"),
    "reference": ("previous", "M1"), "too_long": ("drop", "refuse"),
}
PATHS = ("seed_model", "chat", "template", "source")  # keys that may name a file or folder
PROMPT_SOURCES = ("self", "people")  # a key "source" of seed_data can be any folder
# Smallest and largest sensible value. Every other number must be at least 1.
LIMITS = {
    "seed": (0, 2**31), "iterations": (0, 100), "temperature": (0, 100), "top_p": (0, 1),
    "max_rouge_l": (0, 1), "generated_shots": (0, 100), "max_attempts_factor": (1, 1000),
    "warmup_fraction": (0, 1), "weight_decay": (0, 1), "dropout": (0, 0.99), "learning_rate": (0, 10),
    "min_learning_rate": (0, 10), "max_grad_norm": (0, math.inf), "beta": (0, math.inf), "head_dim": (0, math.inf),
    "micro_batch": (0, math.inf), "nll_weight": (0, math.inf), "replay_weight": (0, math.inf), "norm_eps": (0, 1),
    "length_control": (0, 1), "threads": (1, 1024), "rank": (0, 4096), "edited": (0, 1),
}
# Former names of keys. A config that uses one is rejected with its new name.
RENAMED = {
    **MODEL_KEYS_RENAMED, "recompute": "gradient_checkpointing", "clip": "max_grad_norm", "nll": "nll_weight",
    "replay": "replay_weight", "own_shots": "generated_shots", "rouge": "max_rouge_l", "warmup": "warmup_fraction",
    "final_learning_rate": "min_learning_rate", "attempts": "max_attempts_factor", "written_by": "source",
}


def load_config(path: Path, kind=Config, overrides: tuple[str, ...] = ()):
    """Read a TOML file into Config or PretrainConfig. Overrides are "section.key=value"."""
    table = parse_toml(read_text(path, "config"), f"config {path}")
    command = command_of(table)
    if command and set(table) - set(get_type_hints(kind)):
        raise InputError(f"config {path} belongs to another command: minisr {command} {path}")
    for override in overrides:
        apply_override(table, override)
    return build(kind, table, str(path))


def load_stored_config(path: Path) -> Config:
    """The config.toml of a run. Those of older versions have no prompts.round_size: a round was a batch."""
    config = load_config(path)
    if "round_size" in tomllib.loads(read_text(path, "config")).get("prompts", {}):
        return config
    return dataclasses.replace(config, prompts=dataclasses.replace(config.prompts, round_size=config.prompts.rows))


def command_of(table: dict) -> str | None:
    """The command whose configs have these keys, or None."""
    if {"base", "seeds"} <= set(table):
        return "experiment"
    kinds = {"run": Config, "pretrain": PretrainConfig}
    return next((name for name, kind in kinds.items() if set(table) <= set(get_type_hints(kind))), None)


def apply_override(table: dict, override: str) -> None:
    """Set one key of the table from "judge.by=random". The value is TOML, or else a string."""
    check_encodable(override, "--set")
    name, found, text = override.partition("=")
    if not found:
        raise InputError(f"--set {override}: write it as section.key=value, e.g. judge.by=random")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (RecursionError, ValueError):
        value = text  # a bare word is a string
    *sections, key = name.strip().split(".")
    if key in PATHS and not isinstance(value, str):
        value = text.strip()  # a folder called 2024
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise InputError(f"--set {override}: {section} is a key, not a section")
    table[key] = value


def build(kind, table: dict, where: str):
    """A dataclass from a TOML table. Errors name the file, the section and the key."""
    hints = get_type_hints(kind)
    for key in sorted(set(table) - set(hints)):
        if RENAMED.get(key) in hints:
            raise InputError(f"{where}: {key!r} is now called {RENAMED[key]!r}")
        raise InputError(f"{where}: unknown key {key!r}; known: {', '.join(hints)}")
    values = {name: checked_value(hints[name], value, name, where) for name, value in table.items()}
    if kind is PromptConfig and values.get("source", "self") not in PROMPT_SOURCES:
        raise InputError(f"{where}: source must be one of {', '.join(PROMPT_SOURCES)}, not {values['source']!r}")
    try:
        return model_config(**values) if kind is ModelConfig else kind(**values)
    except ValueError as error:  # values that do not go together
        raise InputError(f"{where}: {error}") from error


def checked_value(kind, value, name: str, where: str):
    """One key's value, converted to its type."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise InputError(f"{where}: {name} must be a section [{name}]")
        return build(kind, value, f"{where} [{name}]")
    if get_origin(kind) is tuple:
        return checked_list(get_args(kind)[0], value, name, where)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        shown = toml_value(value) if isinstance(value, bool) else value
        fix = f"; put it in quotes: {name} = \"{shown}\"" if kind is str else ""
        raise InputError(f"{where}: {name} must be {describe_type(kind)}, not {value!r}{fix}")
    if name in PATHS:
        check_path(value, name, where)
        value = os.path.expanduser(value)
    if name in CHOICES and value not in CHOICES[name]:
        raise InputError(f"{where}: {name} must be one of {', '.join(CHOICES[name])}, not {value!r}")
    if kind in (int, float):
        low, high = LIMITS.get(name, (1, math.inf))
        if not low <= value <= high:
            allowed = f"be at least {low}" if high == math.inf else f"lie between {low} and {high}"
            raise InputError(f"{where}: {name} must {allowed}, not {value}")
    return value


def check_path(value: str, name: str, where: str) -> None:
    """Raise InputError for a control character, such as the tab that TOML reads in a Windows path in double quotes."""
    if any(unicodedata.category(c) == "Cc" for c in value):
        raise InputError(f"{where}: {name} must be a path, but {value[:60]!r} holds a control character; write a path "
                         "with backslashes in single quotes")


def checked_list(kind, value, name: str, where: str) -> tuple:
    if isinstance(value, list) and kind is float:
        value = [float(item) if type(item) is int else item for item in value]
    if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
        raise InputError(f"{where}: {name} must be a list, each item {describe_type(kind)}")
    return tuple(value)


def describe_type(kind: type | types.GenericAlias) -> str:
    return {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}[kind]


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
    lines = [f"{name} = {toml_value(value)}" for name, value in plain.items() if not isinstance(value, dict)]
    for section, table in plain.items():
        if isinstance(table, dict):
            lines += ["", f"[{section}]", *(f"{name} = {toml_value(value)}" for name, value in table.items())]
    return "\n".join(lines) + "\n"


def toml_value(value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, str):  # a JSON string is a TOML string, except for this one character
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def check_learning_rate(section: str, config: TrainConfig) -> None:
    """Raise InputError if the learning rate would rise during training."""
    if config.min_learning_rate > config.learning_rate:
        raise InputError(f"{section}.min_learning_rate = {config.min_learning_rate:g} is larger than "
                         f"{section}.learning_rate = {config.learning_rate:g}: lower it, too")
