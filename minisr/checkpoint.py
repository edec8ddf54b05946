"""M_t on disk: a folder with model.pt, tokenizer.model and meta.json.

model.pt holds plain tensors and numbers and is read with weights_only=True: nothing is executed.
meta.json says what made it, its hash and its parent's; a file that does not match is refused.
"""

import hashlib
import io
import pickle
import warnings
from dataclasses import asdict
from pathlib import Path

import torch

from minisr.model import Decoder, ModelConfig
from minisr.records import InputError, read_json, write_bytes, write_json
from minisr.tokenizer import Tokenizer

SEED_MODEL = Path(__file__).parent / "world" / "M0"  # pretrained on the tiny world, ships with minisr


def save_model(folder: Path, model: Decoder, tokenizer: Tokenizer, meta: dict) -> None:
    """Write a model folder; meta.json comes last, so that a folder that has it is whole."""
    buffer = io.BytesIO()
    weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    torch.save({"config": asdict(model.config), "weights": weights}, buffer)
    write_bytes(folder / "model.pt", buffer.getvalue())
    write_bytes(folder / "tokenizer.model", tokenizer.model)
    write_json(folder / "meta.json", {"hash": digest(buffer.getvalue()), **meta})


def load_model(folder: Path, device: str = "cpu") -> tuple[Decoder, Tokenizer]:
    """The model and tokenizer of a folder, in eval mode. InputError names what is wrong with it."""
    folder = Path(folder)
    recorded, content = model_hash(folder), _read(folder / "model.pt")
    if digest(content) != recorded:
        raise InputError(f"{folder / 'model.pt'} is not the file that meta.json describes (truncated or "
                         "changed); delete the folder to have it made again")
    try:
        with warnings.catch_warnings(action="ignore"):  # the error says it in one line
            stored = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
        if not isinstance(stored, dict):
            raise TypeError("model.pt holds something else")
        model = Decoder(ModelConfig(**stored["config"]))
        model.load_state_dict(stored["weights"])
        tokenizer = Tokenizer(_read(folder / "tokenizer.model"))
    except (RuntimeError, pickle.UnpicklingError, LookupError, TypeError, ValueError,
            ArithmeticError, EOFError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{folder} is no minisr model of this version: {reason}") from error
    if len(tokenizer) != model.config.vocab_size:
        raise InputError(f"{folder}: tokenizer.model has {len(tokenizer)} pieces, model.pt "
                         f"{model.config.vocab_size}; they do not belong together")
    return model.to(device).eval(), tokenizer


def model_hash(folder: Path) -> str:
    """The hash that meta.json records for a model folder."""
    if (Path(folder) / "config.toml").exists():
        raise InputError(f"{folder} is a run; choose one of its models, e.g. {folder}/M1")
    if not Path(folder).is_dir():
        raise InputError(f"no model folder {folder}; a run keeps them as M0, SFT, M1, M2, ...")
    meta = read_json(Path(folder) / "meta.json", "model description")
    if not isinstance(meta, dict) or "hash" not in meta:
        raise InputError(f"{folder}/meta.json does not tell the model's hash")
    return meta["hash"]


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
