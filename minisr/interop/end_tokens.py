"""Which token ids end a response, according to a model's files.

They may be declared in several places: config.json, generation_config.json and tokenizer_config.json of a Hugging
Face folder, or the keys eos, eot and eom of a GGUF file. All of them count. Of the stop_strings in
generation_config.json, those that are special tokens count.
"""

from pathlib import Path

from minisr import InputError
from minisr.runner.files import read_object

CONFIGS = ("config.json", "generation_config.json")  # both have the key eos_token_id
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")  # both have the keys bos_token, eos_token, ...
# The properties of an added token in tokenizer.json, where a file declares none.
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
GGUF_KEYS = tuple(f"tokenizer.ggml.{kind}_token_id" for kind in ("eos", "eot", "eom"))
# Used where files declare less than the model has: GGUF files, which often lack a key (llama.cpp searches for such
# names too), folders that declare nothing, and model folders without generation_config.json.
NAMES = {"</s>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>"}


def ids_by_name(specials: dict[str, int]) -> set[int]:
    """The ids of common end tokens that a vocabulary has."""
    return {i for name, i in specials.items() if name in NAMES}


def ids_in_folder(folder: Path, specials: dict[str, int]) -> set[int]:
    """The ids that the files of a Hugging Face folder declare; if none does, those of common names."""
    ids = set()
    for name in CONFIGS:
        ids |= declared_ids(read_settings(folder / name), "eos_token_id", folder / name)
    for text in (special_tokens(folder).get("eos_token"), *stop_strings(folder)):
        if text in specials:
            ids.add(specials[text])
    return ids or ids_by_name(specials)


def stop_strings(folder: Path) -> list[str]:
    """The texts that end a response according to generation_config.json: one, a list of them, or none (null)."""
    path = folder / CONFIGS[1]
    value = read_settings(path).get("stop_strings")
    texts = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"{path}: stop_strings must be a text or a list of texts, not {value!r}")
    return texts


def ids_in_gguf(metadata: dict, specials: dict[str, int], path: Path) -> set[int]:
    """The ids that a GGUF file declares, and those of common names."""
    ids = ids_by_name(specials).union(*(declared_ids(metadata, key, path) for key in GGUF_KEYS))
    if beyond := sorted(i for i in ids if i >= len(metadata["tokenizer.ggml.tokens"])):
        raise InputError(f"{path}: a response ends with token {beyond[0]}, which its vocabulary lacks")
    return ids


def declared_ids(settings: dict, key: str, path: Path) -> set[int]:
    """The ids under a key: one, a list of them, or none (null). Negative ids stand for no token."""
    value = settings.get(key)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int for i in ids):
        raise InputError(f"{path}: {key} must be a token id or a list of token ids, not {value!r}")
    return {i for i in ids if i >= 0}


def special_tokens(folder: Path) -> dict[str, str]:
    """The text of "bos_token", "eos_token" and others, from the tokenizer's settings. tokenizer_config.json wins."""
    tokens = {}
    for name in SETTINGS:
        for key, value in read_settings(folder / name).items():
            text = value.get("content") if isinstance(value, dict) else value  # an AddedToken with its properties
            if key.endswith("_token") and isinstance(text, str):
                tokens.setdefault(key, text)
    return tokens


def special_names(folder: Path) -> set[str]:
    """All tokens that the tokenizer's settings name as special, whatever tokenizer.json says of them."""
    names = set(special_tokens(folder).values())
    for file in SETTINGS:
        settings = read_settings(folder / file)
        added = settings.get("added_tokens_decoder") or {}
        found = [token for token in added.values() if isinstance(token, dict) and token.get("special")]
        for key in ("additional_special_tokens", "extra_special_tokens"):
            more = settings.get(key) or []
            found += more.values() if isinstance(more, dict) else more
        names |= {token.get("content") if isinstance(token, dict) else token for token in found}
    return {name for name in names if isinstance(name, str) and name}


def added_tokens(folder: Path, n_pieces: int) -> list[dict]:
    """The tokens that a folder's settings add after the pieces of its tokenizer, as in a tokenizer.json.

    Raises InputError if their ids leave out one."""
    declared = read_settings(folder / SETTINGS[0]).get("added_tokens_decoder") or {}
    found = {int(i): token for i, token in declared.items()}
    special = special_names(folder)
    for text, i in read_settings(folder / "added_tokens.json").items():
        found.setdefault(i, {"content": text, "special": text in special})
    added = [{"id": i, **FLAGS, **found[i]} for i in sorted(found) if i >= n_pieces]
    if [token["id"] for token in added] != list(range(n_pieces, n_pieces + len(added))):
        raise InputError(f"{folder}: the ids of added tokens do not follow the {n_pieces} pieces of its tokenizer "
                         "one by one; save the tokenizer with transformers, which writes a complete tokenizer.json")
    return added


def read_settings(path: Path) -> dict:
    """The object in a JSON file; {} if there is no such file."""
    return read_object(path) if path.exists() else {}
