"""A model on disk: a folder with model.pt, the tokenizer, chat.txt and meta.json.

model.pt contains only tensors and numbers, and is read with weights_only=True, so nothing in it is executed.
meta.json records the hash of model.pt, who made it, and the hash of its parent. A file that does not match is
rejected.
"""

import hashlib
import pickle
import warnings
from dataclasses import asdict
from pathlib import Path

import torch

from minisr import InputError
from minisr.interop.chat_templates import chat_template
from minisr.interop.end_tokens import declared_ids, ids_by_name, read_settings
from minisr.interop.shape import MODEL_KEYS_RENAMED, check_weight, model_config
from minisr.interop.tokenizer_json import TokenizerJSON
from minisr.model import Decoder, ModelConfig
from minisr.runner import processes
from minisr.runner.files import (
    check_object,
    file_digest,
    json_bytes,
    parse_json,
    read_bytes,
    read_text,
    short_reason,
    write_bytes,
    write_json,
    writing,
)
from minisr.tokenizer import SentencePiece, Tokenizer

GENERATION_CONFIG = "generation_config.json"
SEED_MODEL = Path(__file__).parents[1] / "worlds" / "tiny" / "M0"  # ships with minisr
RESTORE_MODEL = "restore it from a copy, or make the model again in another folder"  # what to do about a damaged model
MODEL_KEYS_REMOVED = ("dropout",)  # keys in model.pt files of older versions; it is now a setting of a training


def save_model(folder: Path, model: Decoder, tokenizer: Tokenizer, meta: dict) -> None:
    """Write a model folder. meta.json is written last, so a folder that has it is complete.

    Of several processes with the same model, process 0 writes it."""
    if not processes.is_main():
        return
    weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    if model.config.tie_embeddings:
        del weights["head.weight"]
    with writing(folder / "model.pt") as file:
        torch.save({"config": asdict(model.config), "weights": weights}, file)
    files = tokenizer_files(tokenizer)
    for name, content in files.items():
        write_bytes(folder / name, content)
    digests = {name: digest(content) for name, content in files.items()}
    write_json(folder / "meta.json", {"hash": file_digest(folder / "model.pt"), "files": digests, **meta})


def load_model(folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32
               ) -> tuple[Decoder, Tokenizer]:
    """The model and tokenizer of a folder, in eval mode. Raises InputError if a file is damaged."""
    folder = Path(folder)
    check_model_files(folder)
    try:
        config, weights = read_model_file(folder / "model.pt")
        for name, weight in weights.items():
            check_weight(name, weight, folder / "model.pt")
        model = build_decoder(config, weights, device, dtype)
        tokenizer = load_tokenizer(folder)
    except InputError:
        raise
    except (RuntimeError, pickle.UnpicklingError, LookupError, TypeError, ValueError, ArithmeticError,
            AttributeError, EOFError) as error:
        raise InputError(f"{folder} is not a minisr model of this version; make it again: "
                         f"{short_reason(error)}") from error
    check_vocab_size(folder, model.config, tokenizer)
    return model, tokenizer


def check_model_files(folder: Path) -> None:
    """Raise InputError if a file of a model folder is missing or not what meta.json describes."""
    check_file(folder / "model.pt", model_hash(folder))
    meta = read_meta(folder)
    for name, expected in check_object(meta.get("files", {}), f"{folder}/meta.json: files").items():
        check_file(folder / name, expected)


def check_file(path: Path, expected: str) -> None:
    if not path.exists():
        raise InputError(f"{path} is missing; {RESTORE_MODEL}")
    if file_digest(path) != expected:
        raise InputError(f"{path} is not the file that meta.json describes (truncated or changed); {RESTORE_MODEL}")


def read_meta(folder: Path) -> dict:
    """meta.json of a model folder."""
    path = folder / "meta.json"
    text = read_text(path, "model description")
    try:
        meta = parse_json(text, f"model description {path}")
    except InputError as error:
        raise InputError(f"{error}; {RESTORE_MODEL}") from error
    if not isinstance(meta, dict):
        raise InputError(f"model description {path} is not a JSON object {{...}}; {RESTORE_MODEL}")
    return meta


def read_model_file(path: Path) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """Shape and weights in a model.pt, of this or an older version."""
    with warnings.catch_warnings(action="ignore"):  # the caller reports the error in one line
        stored = torch.load(path, weights_only=True, map_location="cpu")
    if not isinstance(stored, dict):
        raise TypeError(f"{path.name} does not contain a config and weights")
    config = {MODEL_KEYS_RENAMED.get(key, key): value for key, value in stored["config"].items()
              if key not in MODEL_KEYS_REMOVED}
    return model_config(**config), stored["weights"]


def build_decoder(config: ModelConfig, weights: dict[str, torch.Tensor], device: str = "cpu",
                  dtype: torch.dtype = torch.float32) -> Decoder:
    """A decoder with these weights, in eval mode."""
    with torch.device("meta"):  # without memory or random numbers for weights that are replaced at once
        model = Decoder(config)
    if config.tie_embeddings:
        weights = {**weights, "head.weight": weights["embed.weight"]}
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    return model.to(device, dtype).eval()


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The files that store a tokenizer in a model folder, by name."""
    vocabulary, template, stop_ids = tokenizer.vocabulary, tokenizer.template, tokenizer.stop_ids
    files = {vocabulary.FILE: vocabulary.content, "chat.txt": template.encode()}
    if stop_ids != Tokenizer(vocabulary, template, ids_by_name(vocabulary.specials)).stop_ids:
        files[GENERATION_CONFIG] = json_bytes({"eos_token_id": list(stop_ids)})
    return files


def load_tokenizer(folder: Path) -> Tokenizer:
    """The vocabulary in tokenizer.model or tokenizer.json, with chat.txt (if missing: the tiny world's).

    The ids that end a response are in generation_config.json; if that is missing, they are found by common names."""
    kind = SentencePiece if (folder / SentencePiece.FILE).exists() else TokenizerJSON
    chat = folder / "chat.txt"
    template = read_text(chat, "chat template") if chat.exists() else chat_template("tiny")
    vocabulary, declared = kind(read_bytes(folder / kind.FILE)), folder / GENERATION_CONFIG
    if declared.exists():
        return Tokenizer(vocabulary, template, declared_ids(read_settings(declared), "eos_token_id", declared))
    return Tokenizer(vocabulary, template, ids_by_name(vocabulary.specials))


def check_vocab_size(source: Path, config: ModelConfig, tokenizer: Tokenizer) -> None:
    """The embedding may have more rows than the vocabulary has tokens: rows are added for speed, or for later."""
    if config.vocab_size < len(tokenizer):
        raise InputError(f"{source}: {tokenizer.vocabulary.FILE} has {len(tokenizer)} pieces, the model only "
                         f"{config.vocab_size}; they do not belong together")


def model_hash(folder: Path, which: str = "hash") -> str:
    """The model's hash as recorded in meta.json; with which="parent_hash", its parent's."""
    folder = Path(folder)
    if (folder / "config.toml").exists():
        raise InputError(f"{folder} is a run; choose one of its models, e.g. {folder}/M1")
    if not folder.is_dir():
        raise InputError(f"there is no model folder {folder}; the models of a run are in M0, SFT, M1, ...")
    meta = read_meta(folder)
    if which not in meta:
        raise InputError(f"{folder}/meta.json does not contain {which!r}; {RESTORE_MODEL}")
    return meta[which]


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
