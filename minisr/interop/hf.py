"""Hugging Face folders of Llama-like decoders: config.json, weights, tokenizer (extra "hf").

Weights come from *.safetensors (with or without an index of shards) or from pytorch_model.bin,
which is read with weights_only=True. q, k, v and gate, up are one matrix each here; the order of halves
in RoPE is the same: no number changes on the way in or out.
"""

import warnings
from pathlib import Path

import torch

from minisr import InputError
from minisr.interop import names
from minisr.interop.sentencepiece_json import tokenizer_json
from minisr.interop.tokenizer_json import TokenizerJSON
from minisr.runner.checkpoint import assemble, check_sizes, first_line, tokenizer_files
from minisr.runner.files import need, read_bytes, read_json, write_bytes, write_json
from minisr.tokenizer import SentencePiece, Tokenizer

CONFIG = "config.json"


def load(folder: Path, device: str = "cpu", chat: str = ""):
    """(decoder, tokenizer) of a folder; chat is a chat template's text, "" the folder's own."""
    config = names.config_from_hf(_object(folder / CONFIG), folder / CONFIG)
    tokenizer = load_tokenizer(folder, chat)
    check_sizes(folder, config, tokenizer)
    stored = read_weights(folder)
    # Copies, because a tensor read is a view of the file: all of it would stay in memory with one of them.
    weights = names.weights_from(config, stored, folder, read=torch.clone)
    odd = sorted(name for name in stored if not name.endswith("rotary_emb.inv_freq")
                 and not (config.tie_embeddings and name == "lm_head.weight"))
    if odd:
        raise InputError(f"{folder}: minisr has no place for the weight {odd[0]}")
    try:
        return assemble(config, weights, device), tokenizer
    except RuntimeError as error:
        raise InputError(f"{folder}: config.json and weights do not agree: "
                         f"{str(error).splitlines()[-1].strip()}") from error


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder by Hugging Face's names."""
    for stem, read in (("model.safetensors", _read_safetensors), ("pytorch_model.bin", _read_bin)):
        index = folder / f"{stem}.index.json"
        if index.exists():
            shards = _shards(index)
            tensors: dict[str, torch.Tensor] = {}
            for name in shards:
                tensors |= read(folder / Path(name).name)  # .name: an index leads nowhere else
            return tensors
        if (folder / stem).exists():
            return read(folder / stem)
    raise InputError(f"{folder} has neither model.safetensors nor pytorch_model.bin, nor their index")


def _shards(index: Path) -> list[str]:
    """The file names in an index; all must be there."""
    places = _object(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(n, str) for n in places.values()):
        raise InputError(f"{index} has no map from weights to shards")
    shards = sorted(set(places.values()))
    for name in shards:
        if not (index.parent / Path(name).name).is_file():
            raise InputError(f"{index} names the shard {name!r}, which is not there")
    return shards


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    safetensors = need("safetensors.torch", "hf")
    try:
        return safetensors.load_file(path)
    except Exception as error:  # SafetensorError has no home of its own to import from
        raise InputError(f"{path} is no whole safetensors file: {first_line(error)}") from error


def _read_bin(path: Path) -> dict[str, torch.Tensor]:
    try:
        with warnings.catch_warnings(action="ignore"):  # the error says it in one line
            stored = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # a damaged file fails in many ways
        raise InputError(f"{path} is no file of plain tensors: {first_line(error)}") from error
    if not isinstance(stored, dict) or not all(isinstance(name, str) and isinstance(value, torch.Tensor)
                                               for name, value in stored.items()):
        raise InputError(f"{path} holds something else than tensors by name")
    return stored


def load_tokenizer(folder: Path, chat: str = "") -> Tokenizer:
    """tokenizer.json, in which alone pieces may have been added; of an export of ours tokenizer.model."""
    model, as_json = folder / SentencePiece.FILE, folder / TokenizerJSON.FILE
    if not model.exists() and not as_json.exists():
        raise InputError(f"{folder} has neither tokenizer.model nor tokenizer.json")
    try:
        ours = model.exists() and (folder / "chat.txt").exists()
        kind = TokenizerJSON if as_json.exists() and not ours else SentencePiece
        vocabulary = kind(read_bytes(folder / kind.FILE))
    except InputError:
        raise
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{folder}: {first_line(error)}") from error
    return Tokenizer(vocabulary, chat or _chat(folder, vocabulary))


def _chat(folder: Path, vocabulary) -> str:
    """The folder's chat template: ours, or the one of ours that its Jinja looks like."""
    if (folder / "chat.txt").exists():
        return read_bytes(folder / "chat.txt").decode()
    settings = folder / "tokenizer_config.json"
    jinja = _object(settings).get("chat_template") if settings.exists() else None
    if isinstance(jinja, list):  # several by name
        jinja = next((one.get("template") for one in jinja if one.get("name") == "default"), None)
    if (folder / "chat_template.jinja").exists():
        jinja = read_bytes(folder / "chat_template.jinja").decode()
    return names.recognise_chat(jinja, vocabulary.specials)


def _object(path: Path) -> dict:
    value = read_json(path, "description")
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a JSON object {{...}}")
    return value


def export(model, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a folder that transformers loads as it is; the same model gives the same bytes."""
    safetensors = need("safetensors.torch", "hf")
    weights = names.weights_to_hf(model.config, model.state_dict())
    named = {name: weight.contiguous() for name, weight in weights.items()}
    dtype = str(model.embed.weight.dtype).removeprefix("torch.")
    ends = list(tokenizer.stop_ids)
    ids = {"bos_token_id": (tokenizer.bos_ids or [None])[0], "eos_token_id": ends if ends[1:] else ends[0]}
    files = tokenizer_files(tokenizer)
    if isinstance(tokenizer.vocabulary, SentencePiece):
        files = files | {TokenizerJSON.FILE: tokenizer_json(tokenizer.vocabulary)}
    files["model.safetensors"] = safetensors.save(named, metadata={"format": "pt"})
    for name, content in files.items():
        write_bytes(folder / name, content)
    write_json(folder / "tokenizer_config.json", _tokenizer_config(tokenizer, model.config.max_seq_len))
    write_json(folder / "generation_config.json",
               {**ids, "do_sample": True, "temperature": 0.7, "top_p": 0.9})
    write_json(folder / CONFIG, {**names.config_to_hf(model.config), "dtype": dtype, **ids})


def _tokenizer_config(tokenizer: Tokenizer, context: int) -> dict:
    pieces = {i: name for name, i in tokenizer.vocabulary.specials.items()}
    bos = pieces.get((tokenizer.bos_ids or [None])[0])
    return {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context,
            "bos_token": bos, "eos_token": pieces[tokenizer.eos_id], "pad_token": pieces[tokenizer.eos_id],
            "clean_up_tokenization_spaces": False, "chat_template": names.jinja_of(tokenizer.template)}
