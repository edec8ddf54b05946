"""Checks of a ModelConfig and of weights of unknown origin: a config file, a checkpoint, another library."""

import math
import os
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from minisr import InputError
from minisr.model import ModelConfig

GIT_LFS_POINTER = b"version https://git-lfs.github.com/"
MAX_SIZE = 2**24  # of any dimension: a larger one is an error, not a model
MODEL_KEYS_RENAMED = {
    "width": "dim", "layers": "n_layers", "heads": "n_heads", "kv_heads": "n_kv_heads", "hidden": "ffn_dim",
    "context": "max_seq_len", "head_width": "head_dim", "tied": "tie_embeddings",
}


def model_config(**values) -> ModelConfig:
    """Raises ValueError, before any memory is allocated, if a value is impossible or values do not go together."""
    for field in fields(ModelConfig):
        check_value(field, values.get(field.name, field.default))
    values["rope_scaling"] = tuple(values.get("rope_scaling", ()))
    n_heads, n_kv_heads = values.get("n_heads", ModelConfig.n_heads), values.get("n_kv_heads", ModelConfig.n_kv_heads)
    head_dim = values.get("head_dim", 0)
    if not head_dim and values.get("dim", ModelConfig.dim) % (2 * n_heads) or n_heads % n_kv_heads:
        raise ValueError("dim must be an even multiple of n_heads, and n_heads a multiple of n_kv_heads")
    if head_dim % 2:
        raise ValueError("head_dim must be even")
    check_rope(values.get("rope_theta", ModelConfig.rope_theta), values["rope_scaling"])
    return ModelConfig(**values)


def check_rope(theta: float, scaling: tuple[float, ...]) -> None:
    if theta == 0 or len(scaling) not in (0, 1, 4) or not all(0 < number < math.inf for number in scaling):
        raise ValueError(f"rope_theta and the numbers of rope_scaling, which are 0, 1 or 4, must be greater than 0 and "
                         f"finite, not {theta} and {scaling}")
    if len(scaling) == 4 and scaling[1] >= scaling[2]:
        raise ValueError(f"in Llama 3's RoPE scaling, low_freq_factor ({scaling[1]}) must be less than "
                         f"high_freq_factor ({scaling[2]})")


def check_value(field, value) -> None:
    if field.type is int:
        smallest = 0 if field.name in ("n_layers", "head_dim") else 1
        if type(value) is not int or value < smallest:
            raise ValueError(f"{field.name} must be a whole number of at least {smallest}, not {value!r}")
        if value > MAX_SIZE:
            raise ValueError(f"{field.name} is {value}; the largest possible value is {MAX_SIZE}")
    if field.type is bool and type(value) is not bool:
        raise ValueError(f"{field.name} must be true or false, not {value!r}")
    if field.type is float and not (type(value) in (int, float) and 0 <= value < math.inf):
        raise ValueError(f"{field.name} must be a number of at least 0, not {value!r}")


def check_downloaded(path: Path) -> None:
    """Raise InputError for what git leaves in place of a large file if Git LFS is not installed."""
    with open(path, "rb") as file:
        if file.read(len(GIT_LFS_POINTER)) == GIT_LFS_POINTER:
            raise InputError(f"{path} is a pointer of Git LFS, not the file itself; run git lfs pull in its folder")


def check_links(folder: Path, names: Iterable[str]) -> None:
    """Raise InputError if one of these files is a link that leads nowhere, which would count as a missing file."""
    for path in (folder / name for name in names):
        if path.is_symlink() and not path.exists():
            raise InputError(f"{path} is a link to {os.readlink(path)}, which does not exist; copy the files that the "
                             "links lead to (cp -rL), or download the folder again")


def check_weight(name: str, weight: Tensor, where) -> None:
    """Raise InputError unless a weight consists of floating-point numbers that are finite in float32."""
    if not weight.is_floating_point():
        raise InputError(f"{where}: the weight {name} is of type {weight.dtype}; expected floating-point numbers")
    if not torch.isfinite(weight.float()).all():
        raise InputError(f"{where}: the weight {name} contains NaN or infinity: the file is damaged, or the training "
                         "diverged; use another checkpoint")


def fused_weight_sizes(name: str, config: ModelConfig) -> list[int]:
    """The rows of each matrix that a weight is made of; [] if it is one."""
    if "qkv_proj" in name:
        q, k = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        return [q, k, k]
    return [config.ffn_dim] * 2 if "gate_up_proj" in name else []
