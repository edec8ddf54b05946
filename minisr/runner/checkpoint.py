"""M_t on disk: a folder with model.pt, the tokenizer, chat.txt and meta.json.

model.pt holds plain tensors and numbers and is read with weights_only=True: nothing is executed.
meta.json says what made it, its hash and its parent's; a file that does not match is refused.
"""

import hashlib
import pickle
import warnings
from dataclasses import asdict
from pathlib import Path

import torch

from minisr import InputError
from minisr.interop.chat_templates import chat_template
from minisr.interop.shape import MODEL_KEYS_RENAMED, model_config
from minisr.interop.tokenizer_json import TokenizerJSON
from minisr.model import Decoder, ModelConfig
from minisr.runner.files import (
    file_digest,
    read_bytes,
    read_json,
    read_text,
    write_bytes,
    write_json,
    writing,
)
from minisr.tokenizer import SentencePiece, Tokenizer

SEED_MODEL = Path(__file__).parents[1] / "worlds" / "tiny" / "M0"  # ships with minisr


def save_model(folder: Path, model: Decoder, tokenizer: Tokenizer, meta: dict) -> None:
    """Write a model folder; meta.json comes last, so that a folder that has it is whole."""
    weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()
               if not (model.config.tie_embeddings and name == "head.weight")}
    with writing(folder / "model.pt") as file:
        torch.save({"config": asdict(model.config), "weights": weights}, file)
    for name, content in tokenizer_files(tokenizer).items():
        write_bytes(folder / name, content)
    files = {name: digest(content) for name, content in tokenizer_files(tokenizer).items()}
    write_json(folder / "meta.json", {"hash": file_digest(folder / "model.pt"), "files": files, **meta})


def load_model(folder: Path, device: str = "cpu", dtype: torch.dtype | None = None) -> tuple[Decoder, Tokenizer]:
    """The model and tokenizer of a folder, in eval mode. InputError names what is wrong with it."""
    folder = Path(folder)
    recorded = model_hash(folder)
    if file_digest(folder / "model.pt") != recorded:
        raise InputError(f"{folder / 'model.pt'} is not the file that meta.json describes (truncated or "
                         "changed); remove meta.json to have the model made again")
    for name, expected in read_json(folder / "meta.json", "model description").get("files", {}).items():
        if file_digest(folder / name) != expected:
            raise InputError(f"{folder / name} is not the file that meta.json describes (truncated or "
                             "changed); remove meta.json to have the model made again")
    try:
        with warnings.catch_warnings(action="ignore"):  # the error says it in one line
            stored = torch.load(folder / "model.pt", weights_only=True, map_location="cpu")
        if not isinstance(stored, dict):
            raise TypeError("model.pt holds something else")
        config = {MODEL_KEYS_RENAMED.get(key, key): value for key, value in stored["config"].items()}
        config.pop("dropout", None)  # of the first versions; it belongs to a training
        model = assemble(model_config(**config), stored["weights"], device, dtype)
        tokenizer = load_tokenizer(folder)
    except InputError:
        raise
    except (RuntimeError, pickle.UnpicklingError, LookupError, TypeError, ValueError,
            ArithmeticError, AttributeError, EOFError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{folder} is no minisr model of this version, make it anew: {reason[:200]}"
                         ) from error
    check_sizes(folder, model.config, tokenizer)
    return model, tokenizer


def assemble(config: ModelConfig, weights: dict[str, torch.Tensor], device: str = "cpu",
             dtype: torch.dtype | None = None) -> Decoder:
    """A decoder in eval mode with these weights, by default in float32, on a GPU in bfloat16."""
    with torch.device("meta"):  # no memory, no random numbers for weights that are replaced at once
        model = Decoder(config)
    if config.tie_embeddings:
        weights = {**weights, "head.weight": weights["embed.weight"]}
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    default = torch.bfloat16 if "cuda" in device else torch.float32
    return model.to(device, dtype or default).eval()


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """What a model folder stores of a tokenizer, by file name."""
    vocabulary = tokenizer.vocabulary
    return {vocabulary.FILE: vocabulary.content, "chat.txt": tokenizer.template.encode()}


def load_tokenizer(folder: Path) -> Tokenizer:
    """tokenizer.model or tokenizer.json, and chat.txt (the tiny world's if there is none)."""
    kind = SentencePiece if (folder / SentencePiece.FILE).exists() else TokenizerJSON
    chat = folder / "chat.txt"
    return Tokenizer(kind(read_bytes(folder / kind.FILE)),
                     read_text(chat, "chat template") if chat.exists() else chat_template("tiny"))


def check_sizes(source: Path, config: ModelConfig, tokenizer: Tokenizer) -> None:
    """The embedding may be padded to a round size beyond the vocabulary, not more."""
    padded = {-(-len(tokenizer) // multiple) * multiple for multiple in (1, 8, 64, 128, 256)}
    if config.vocab_size not in padded:
        raise InputError(f"{source}: {tokenizer.vocabulary.FILE} has {len(tokenizer)} pieces, the model "
                         f"{config.vocab_size}; they do not belong together")


def model_hash(folder: Path, which: str = "hash") -> str:
    """The hash that meta.json records for a model folder, or with "parent_hash" that of its parent."""
    if (Path(folder) / "config.toml").exists():
        raise InputError(f"{folder} is a run; choose one of its models, e.g. {folder}/M1")
    if not Path(folder).is_dir():
        raise InputError(f"no model folder {folder}; a run keeps them as M0, SFT, M1, M2, ...")
    meta = read_json(Path(folder) / "meta.json", "model description")
    if not isinstance(meta, dict) or which not in meta:
        raise InputError(f"{folder}/meta.json does not tell the model's {which}")
    return meta[which]


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
