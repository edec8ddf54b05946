"""What may change between two parts of one run: keys of the config that change at most rounding.

- threads, save_every, gradient_checkpointing, timeout: how the same numbers are computed and stored.
- rows, micro_batch, engine, device: how many samples or examples are computed side by side,
  and by which code. A sample's random numbers do not depend on its batch, so only rounding differs, which may change a
  sampled token.

With dropout, micro_batch, engine and device decide which units are dropped, so they may not change; the default and
the same value spelled out are no change.
"""

import dataclasses
from pathlib import Path

import torch

from minisr.runner.files import read_jsonl, write_jsonl

CHANGES = "config_changes.jsonl"
FREE = ("threads", "save_every", "gradient_checkpointing", "rows", "timeout")
FREE_WITHOUT_DROPOUT = ("micro_batch", "engine", "device")
DEFAULT_MICRO_BATCHES = 4  # of a batch, so that up to four processes can share them


def deciding_values(config) -> dict:
    """The values of a config, or of a section of one, that decide results, as nested dicts."""
    if getattr(config, "rank", None) == 0:  # [lora] is off, whatever else it says
        return {"rank": 0}
    values = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            values[field.name] = deciding_values(value)
        elif not is_free(config, field.name):
            values[field.name] = value
    if "dtype" in values:
        values["dtype"] = dtype_name(config)
    if "device" in values:
        values["device"] = "cuda" if on_gpu(config) else "cpu"
    if "micro_batch" in values:
        values["micro_batch"] = micro_batch_size(config)
    return values


def is_free(section, name: str) -> bool:
    """Whether a key of a section may change between two parts of a run."""
    return name in FREE or name in FREE_WITHOUT_DROPOUT and not uses_dropout(section)


def uses_dropout(section) -> bool:
    """Whether a section, or a section in it, has dropout."""
    return any(getattr(part, "dropout", 0) for part in (section, *vars(section).values()))


def dtype_name(config) -> str:
    """The config's dtype; "auto" is bfloat16 if the fast engine runs on a GPU, else float32."""
    if config.dtype != "auto":
        return config.dtype
    return "bfloat16" if on_gpu(config) and config.engine == "fast" else "float32"


def on_gpu(config) -> bool:
    """Whether a run with this config uses a GPU of this machine."""
    return config.device == "cuda" or config.device == "auto" and torch.cuda.is_available()


def micro_batch_size(config) -> int:
    """Examples in memory at once: micro_batch, by default a part of the batch."""
    return min(config.micro_batch or -(-config.batch_size // DEFAULT_MICRO_BATCHES), config.batch_size)


def record_changes(folder: Path, changes: list[str]) -> None:
    """Append to config_changes.jsonl what changes from here on, and which results were made before."""
    path = folder / CHANGES
    records = read_jsonl(path, "config changes") if path.exists() else []
    results = [*folder.glob("*/*.jsonl"), *folder.glob("*/meta.json")]
    made_before = sorted(result.relative_to(folder).as_posix() for result in results)
    write_jsonl(path, [*records, {"changes": changes, "made_before": made_before}])
