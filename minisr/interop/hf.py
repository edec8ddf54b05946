"""Hugging Face folders of Llama-like decoders: config.json, weights, tokenizer (extra "hf").

Of several files of weights, transformers' choice is read. A .bin file is read with weights_only=True. minisr
stores q, k, v in one matrix, and gate, up in one. Both formats rotate the same halves of a head in RoPE, so no
number changes on the way in or out.
"""

import json
import os
import warnings
from dataclasses import replace
from pathlib import Path

import torch

from minisr import InputError
from minisr.interop import names
from minisr.interop.chat_templates import choose_chat_template, note, to_jinja
from minisr.interop.end_tokens import (
    CONFIGS,
    FLAGS,
    SETTINGS,
    added_tokens,
    ids_in_folder,
    read_settings,
    special_names,
    special_tokens,
    stop_strings,
)
from minisr.interop.jinja_templates import EXCHANGES, JinjaTemplate
from minisr.interop.sentencepiece_json import has_dummy_prefix, to_tokenizer_json, without_bos
from minisr.interop.shape import check_downloaded, check_links
from minisr.interop.tokenizer_json import TokenizerJSON
from minisr.model import Decoder, ModelConfig
from minisr.runner.checkpoint import GENERATION_CONFIG, build_decoder, check_vocab_size, tokenizer_files
from minisr.runner.files import import_extra, read_bytes, read_object, read_text, short_reason, write_bytes, write_json
from minisr.tokenizer import SentencePiece, Tokenizer

CONFIG = "config.json"
ADAPTER = "adapter_config.json"
# The first of these that exists holds the weights, or lists the shards that do. Transformers has the same order.
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json",
                "pytorch_model.bin", "pytorch_model.bin.index.json")
OTHER_FILES = (*CONFIGS, ADAPTER, SentencePiece.FILE, TokenizerJSON.FILE, *SETTINGS, "added_tokens.json",
               "chat_template.jinja", "chat.txt")
EMBEDDING, HEAD = names.HF_WEIGHTS["embed.weight"][0], names.HF_WEIGHTS["head.weight"][0]


def load(folder: Path, template: str = "") -> tuple[Decoder, Tokenizer]:
    """The model of a folder. `template` is the text of a chat template; "" means the folder's own."""
    if (folder / ADAPTER).exists():
        raise InputError(f"{folder} holds an adapter ({ADAPTER}), which changes the weights; merge it into them with "
                         "peft's merge_and_unload and save the result")
    for path in [*weight_files(folder), folder / SentencePiece.FILE, folder / TokenizerJSON.FILE]:
        if path.exists():
            check_downloaded(path)
    hf_config = read_object(folder / CONFIG)
    config = names.config_from_hf(hf_config, folder / CONFIG)
    tokenizer = load_tokenizer(folder, template)
    check_vocab_size(folder, config, tokenizer)
    check_token_ids(folder, hf_config, tokenizer)
    stored = read_weights(folder)
    config = tie_as_stored(config, stored)
    # Cloned, because a tensor is a view of its whole file, which would stay in memory.
    weights = names.weights_from(config, stored, folder, to_tensor=torch.clone)
    for name in sorted(stored):
        if not name.endswith("rotary_emb.inv_freq"):
            raise InputError(f"{folder}: minisr does not support the weight {name}")
    try:
        return build_decoder(config, weights), tokenizer
    except RuntimeError as error:
        raise InputError(f"{folder}: {CONFIG} and weights do not agree: {short_reason(error)}") from error


def files_to_read(folder: Path) -> list[str]:
    """The names of the files that a model is read from, whether they are there or not. Shards are left out."""
    weights = [name for name in WEIGHT_FILES if os.path.lexists(folder / name)]  # also a link that leads nowhere
    return [*OTHER_FILES, *weights[:1]]


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of a folder. No other file is read."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return read_index(folder / name) if name.endswith(".json") else [folder / name]
    raise InputError(f"{folder} has neither model.safetensors nor pytorch_model.bin, nor an index of shards")


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, by their names in the files."""
    tensors: dict[str, torch.Tensor] = {}
    for path in weight_files(folder):
        read = read_safetensors if path.suffix == ".safetensors" else read_bin
        for name, tensor in read(path).items():
            if name in tensors and not same_values(tensor, tensors[name]):
                raise InputError(f"{path}: the weight {name} has other values in another shard; the shards are of "
                                 "different checkpoints: download the folder again")
            tensors[name] = tensor
    return tensors


def read_index(index: Path) -> list[Path]:
    """The shards that an index names. They lie in the folder of the index or below it, and nowhere else."""
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index} does not map weights to shards; download it again")
    shards = []
    for name in weight_map.values():
        if not isinstance(name, str):
            raise InputError(f"{index} does not map weights to shards; download it again")
        is_outside = Path(name).is_absolute() or ".." in Path(name).parts
        if not is_outside:
            check_links(index.parent, [name])
        if is_outside or not (index.parent / name).is_file():
            raise InputError(f"{index} names the shard {name!r}, which does not exist in its folder; download it")
        shards.append(index.parent / name)
    return sorted(set(shards))


def tie_as_stored(config: ModelConfig, stored: dict[str, torch.Tensor]) -> ModelConfig:
    """Decide on tied weights as transformers does: only weights that the files do not contradict are tied.

    Removes from `stored` the second copy of a tied weight."""
    if not config.tie_embeddings or HEAD not in stored:
        return config
    head = stored.pop(HEAD)
    if same_values(head, stored.setdefault(EMBEDDING, head)):
        return config
    stored[HEAD] = head
    return replace(config, tie_embeddings=False)


def same_values(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.to(b.dtype), b)


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    safetensors = import_extra("safetensors.torch", "hf")
    try:
        return safetensors.load_file(path)
    except Exception as error:  # SafetensorError cannot be imported from a public module
        raise InputError(f"{path} is not a complete safetensors file: {short_reason(error)}") from error


def read_bin(path: Path) -> dict[str, torch.Tensor]:
    try:
        with warnings.catch_warnings(action="ignore"):  # the error is reported below, in one line
            stored = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # a damaged file can raise many types
        raise InputError(f"{path} is not a file of plain tensors: {short_reason(error)}") from error
    if not isinstance(stored, dict) or not all(isinstance(name, str) and isinstance(value, torch.Tensor)
                                               for name, value in stored.items()):
        raise InputError(f"{path} does not contain tensors by name")
    return stored


def check_token_ids(folder: Path, hf_config: dict, tokenizer: Tokenizer) -> None:
    """Raise InputError for a tokenizer without the special tokens that the configs name by their ids."""
    declared = [(CONFIG, key, hf_config.get(key)) for key in ("bos_token_id", "eos_token_id")]
    generation = read_settings(folder / GENERATION_CONFIG).get("eos_token_id")
    for file, key, value in [*declared, (GENERATION_CONFIG, "eos_token_id", generation)]:
        ids = [i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)]
        if max(ids, default=0) >= len(tokenizer):
            raise InputError(f"{folder}: {tokenizer.vocabulary.FILE} has {len(tokenizer)} pieces, but {file} has "
                             f"{key} = {value}; they do not belong together")


def load_tokenizer(folder: Path, template: str = "") -> Tokenizer:
    """Prefers tokenizer.json, because added tokens are only there; in a folder that minisr exported,
    tokenizer.model."""
    has_model, has_json = ((folder / kind.FILE).exists() for kind in (SentencePiece, TokenizerJSON))
    if not has_model and not has_json:
        raise InputError(f"{folder} has neither {SentencePiece.FILE} nor {TokenizerJSON.FILE}")
    exported_by_minisr = has_model and (folder / "chat.txt").exists()
    kind = TokenizerJSON if has_json and not exported_by_minisr else SentencePiece
    path = folder / kind.FILE
    content = read_text(path, "tokenizer").encode() if kind is TokenizerJSON else read_bytes(path)
    try:
        vocabulary = kind(content)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {short_reason(error)}") from error
    if len(vocabulary) == 0:
        raise InputError(f"{path} holds no pieces; download it again")
    if kind is TokenizerJSON:
        vocabulary = with_declared_tokens(folder, vocabulary)
    elif not exported_by_minisr:
        vocabulary = with_prefix_of_transformers(folder, vocabulary)
    stop_ids = ids_in_folder(folder, vocabulary.specials)
    if ignored := [text for text in stop_strings(folder) if text not in vocabulary.specials]:
        note(f"{folder}: minisr ignores the stop_strings {ignored} of {GENERATION_CONFIG}; only tokens end a response")
    if (folder / "chat.txt").exists() and not template:
        return Tokenizer(vocabulary, read_text(folder / "chat.txt", "chat template"), stop_ids)
    template = choose_chat_template(folder, vocabulary, read_jinja(folder), stop_ids, template)
    if missing := sorted(name for name in special_names(folder) - vocabulary.specials.keys() if name in template):
        raise InputError(f"{folder}: the chat template has {missing[0]!r}, which the tokenizer's settings call a "
                         "special token, but no file gives its id; save the tokenizer with transformers, which writes "
                         "a complete tokenizer.json")
    if kind is TokenizerJSON and differs_from_llama_tokenizer(folder, vocabulary, template):
        note(f"{folder}: LlamaTokenizer of transformers 5 does not follow {TokenizerJSON.FILE} where it adds a space "
             "before a text; minisr does, so token ids differ")
    return Tokenizer(vocabulary, template, stop_ids)


def with_declared_tokens(folder: Path, vocabulary: TokenizerJSON) -> TokenizerJSON:
    """The vocabulary with all tokens that the folder's settings declare as added or special, as in transformers.

    Without them, any text could spell a special token, and a chat template's tokens could be split into pieces."""
    content, names = json.loads(vocabulary.content), special_names(folder)
    before = content.get("added_tokens") or []
    ids = {name: vocabulary.pieces.token_to_id(name) for name in names - {token["content"] for token in before}}
    added = [*before, *({"id": i, "content": name, **FLAGS} for name, i in ids.items() if i is not None),
             *added_tokens(folder, len(vocabulary))]
    added = [{**token, "special": token.get("special", False) or token["content"] in names} for token in added]
    if added == before:
        return vocabulary
    content["added_tokens"] = sorted(added, key=lambda token: token["id"])
    return TokenizerJSON(json.dumps(content, ensure_ascii=False).encode())


def differs_from_llama_tokenizer(folder: Path, vocabulary: TokenizerJSON, template: str) -> bool:
    """Whether transformers 5 gives other ids: its LlamaTokenizer takes only the pieces from a tokenizer.json.

    It adds a space before texts as its settings say: legacy, add_prefix_space."""
    settings = read_settings(folder / "tokenizer_config.json")
    if not is_llama_tokenizer(settings):
        return False
    scheme = "always" if settings.get("legacy") else "first"
    if settings.get("add_prefix_space") is False:
        scheme = "never"
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    content = json.loads(vocabulary.content) | {"normalizer": None, "pre_tokenizer": metaspace}
    theirs = Tokenizer(TokenizerJSON(json.dumps(content, ensure_ascii=False).encode()), template)
    ours = Tokenizer(vocabulary, template)
    return any(ours.encode_chat(*exchange) != theirs.encode_chat(*exchange) for exchange in EXCHANGES)


def with_prefix_of_transformers(folder: Path, vocabulary: SentencePiece) -> SentencePiece | TokenizerJSON:
    """The vocabulary of a folder without tokenizer.json, with the dummy prefix as transformers adds it.

    With legacy=False, the default of LlamaTokenizer, it does not add it after a special token. Tokens that the folder
    adds to tokenizer.model in other files are in the vocabulary, too. add_bos_token=False: no BOS begins a text."""
    settings, added = read_settings(folder / "tokenizer_config.json"), added_tokens(folder, len(vocabulary))
    if settings.get("add_bos_token") is False:
        vocabulary = without_bos(vocabulary)
    is_llama = is_llama_tokenizer(settings)
    legacy = settings.get("legacy", not is_llama)
    if not added and (legacy and not is_llama or not has_dummy_prefix(vocabulary)):
        return vocabulary
    content = json.loads(to_tokenizer_json(vocabulary, prepend_scheme="always" if legacy else "first"))
    content["added_tokens"] += added
    return TokenizerJSON(json.dumps(content, ensure_ascii=False).encode())


def is_llama_tokenizer(settings: dict) -> bool:
    return str(settings.get("tokenizer_class")).startswith("LlamaTokenizer")


def read_jinja(folder: Path) -> JinjaTemplate:
    """The folder's Jinja template, if it has one, and the special tokens that the template may name."""
    settings = read_settings(folder / "tokenizer_config.json")
    if (folder / "chat_template.jinja").exists():
        jinja = read_text(folder / "chat_template.jinja", "chat template")
    else:
        jinja = default_template(settings.get("chat_template"), folder / "tokenizer_config.json")
    has_defaults = is_llama_tokenizer(settings) or not (folder / TokenizerJSON.FILE).exists()
    defaults = {"bos_token": "<s>", "eos_token": "</s>"} if has_defaults else {}
    defaults = {key: token for key, token in defaults.items() if settings.get(key, token) is not None}  # null: none
    return JinjaTemplate(jinja, defaults | special_tokens(folder))


def default_template(templates, path: Path) -> str | None:
    """Of several templates by name, the one called "default", which transformers uses, or None if there is none at all.

    They are a list of {"name", "template"} or an object."""
    if templates is None or isinstance(templates, str):
        return templates
    if isinstance(templates, list) and all(isinstance(entry, dict) for entry in templates):
        templates = {entry.get("name"): entry.get("template") for entry in templates}
    if templates == {}:
        return None
    if not isinstance(templates, dict) or not isinstance(templates.get("default"), str):
        found = f"; it has {', '.join(map(str, templates))}" if isinstance(templates, dict) else ""
        raise InputError(f"{path}: chat_template is neither a text nor templates by name, one of which is called "
                         f"default{found}; write the one to use into chat_template.jinja")
    return templates["default"]


def export(model: Decoder, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a folder that transformers can load. The same model gives the same bytes."""
    safetensors = import_extra("safetensors.torch", "hf")
    weights = names.weights_to_hf(model.config, model.state_dict())
    weights = {name: weight.contiguous() for name, weight in weights.items()}
    files = tokenizer_files(tokenizer)
    if isinstance(tokenizer.vocabulary, SentencePiece):
        files[TokenizerJSON.FILE] = to_tokenizer_json(tokenizer.vocabulary)
    files["model.safetensors"] = safetensors.save(weights, metadata={"format": "pt"})
    for name, content in files.items():
        write_bytes(folder / name, content)
    stop_ids = list(tokenizer.stop_ids)
    special_ids = {"bos_token_id": tokenizer.bos_ids[0] if tokenizer.bos_ids else None,
                   "eos_token_id": stop_ids if len(stop_ids) > 1 else stop_ids[0]}
    write_json(folder / "tokenizer_config.json", tokenizer_config(tokenizer, model.config.max_seq_len))
    write_json(folder / "generation_config.json",
               {**special_ids, "do_sample": True, "temperature": 0.7, "top_p": 0.9})
    dtype = str(model.embed.weight.dtype).removeprefix("torch.")
    write_json(folder / CONFIG, {**names.config_to_hf(model.config), "dtype": dtype, **special_ids})


def tokenizer_config(tokenizer: Tokenizer, max_seq_len: int) -> dict:
    """The contents of tokenizer_config.json."""
    special_tokens = {i: token for token, i in tokenizer.vocabulary.specials.items()}
    bos = special_tokens.get(tokenizer.bos_ids[0]) if tokenizer.bos_ids else None
    eos = special_tokens[tokenizer.eos_id]
    return {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_seq_len,
            "bos_token": bos, "eos_token": eos, "pad_token": eos,
            "clean_up_tokenization_spaces": False, "chat_template": to_jinja(tokenizer.template)}
