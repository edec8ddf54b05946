"""GGUF files of Llama-like decoders: weights dequantized to float32, tokenizer from the file (extra "gguf").

The metadata mean what they mean to llama.cpp, its default values included.

A GGUF file stores the rows of q and k in the order of Meta's RoPE, which rotates the pairs (2i, 2i + 1) of a
head. minisr and Hugging Face rotate the pairs (i, i + D/2), so these rows are permuted.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import torch

from minisr import InputError
from minisr.interop.chat_templates import choose_chat_template
from minisr.interop.end_tokens import ids_in_gguf
from minisr.interop.jinja_templates import JinjaTemplate
from minisr.interop.names import weights_from
from minisr.interop.shape import check_downloaded, fused_weight_sizes, model_config
from minisr.interop.tokenizer_json import TokenizerJSON
from minisr.model import Decoder, ModelConfig, rope_frequencies
from minisr.runner.checkpoint import build_decoder, check_vocab_size
from minisr.runner.files import import_extra, short_reason
from minisr.tokenizer import SentencePiece, Tokenizer

# Our weight -> the tensors that it consists of, in order. "{}" is the number of the block.
WEIGHTS = {
    "embed.weight": ("token_embd.weight",),
    "norm.weight": ("output_norm.weight",),
    "head.weight": ("output.weight",),
    "blocks.{}.attention_norm.weight": ("blk.{}.attn_norm.weight",),
    "blocks.{}.attention.qkv_proj.weight": (
        "blk.{}.attn_q.weight", "blk.{}.attn_k.weight", "blk.{}.attn_v.weight"),
    "blocks.{}.attention.out_proj.weight": ("blk.{}.attn_output.weight",),
    "blocks.{}.feed_forward_norm.weight": ("blk.{}.ffn_norm.weight",),
    "blocks.{}.feed_forward.gate_up_proj.weight": ("blk.{}.ffn_gate.weight", "blk.{}.ffn_up.weight"),
    "blocks.{}.feed_forward.down_proj.weight": ("blk.{}.ffn_down.weight",),
}
# Keys of the metadata, after "llama.".
KEYS_READ = {
    "attention.causal", "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.layer_norm_rms_epsilon", "attention.sliding_window", "attention.value_length", "block_count",
    "context_length", "embedding_length", "expert_count", "feed_forward_length", "rope.dimension_count",
    "rope.freq_base", "rope.scale_linear", "rope.scaling.factor", "rope.scaling.type",
}
KEYS_WITHOUT_EFFECT = {  # on a Llama without experts whose RoPE scaling minisr supports
    "attention.layer_norm_epsilon", "expert_used_count", "rope.scaling.finetuned",
    "rope.scaling.original_context_length", "tensor_data_layout", "vocab_size",
}
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)  # the name of a part of a split file
CONTROL, USER_DEFINED = 3, 4  # token types: special tokens, and words that are never split
BPE = 2  # TrainerSpec.ModelType of SentencePiece
SENTENCEPIECE_IDS = {"bos": 1, "eos": 2}  # of a file that does not name them
# Names of pre-tokenizers, by how they split a text before BPE.
GPT2 = ("gpt-2",)
GPT2_WITH_DIGITS = ("smollm",)  # as GPT-2, and every digit separately
LLAMA3 = ("llama-bpe", "llama3", "llama-v3")  # a word in the vocabulary needs no merges
LLAMA3_WITH_MERGES = ("smaug-bpe",)  # splits a text as Llama 3, then merges as GPT-2
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def is_gguf(path: Path) -> bool:
    """Whether a file is a GGUF file, by its first four bytes. By its suffix it may be a damaged one."""
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF" or path.suffix.lower() == ".gguf"


def load(path: Path, template: str = "") -> tuple[Decoder, Tokenizer]:
    """The model of a file. `template` is the text of a chat template; "" means the file's own."""
    gguf = import_extra("gguf", "gguf")
    metadata, tensors = read_parts(gguf, path)
    config = read_config(metadata, tensors, path)
    try:
        vocabulary = read_vocabulary(metadata)
    except InputError:
        raise
    except Exception as error:  # the tokenizer libraries raise no more specific type
        raise InputError(f"{path} has no usable tokenizer: {short_reason(error)}") from error
    stop_ids = ids_in_gguf(metadata, vocabulary.specials, path)
    template = choose_chat_template(path, vocabulary, read_jinja(metadata), stop_ids, template)
    tokenizer = Tokenizer(vocabulary, template, stop_ids)
    check_vocab_size(path, config, tokenizer)
    weights = read_weights(gguf, tensors, config, path)
    for name in sorted(tensors):
        if name != "rope_freqs.weight":
            raise InputError(f"{path}: minisr does not support the tensor {name}")
    return build_decoder(config, weights), tokenizer


def split_files(path: Path) -> list[Path]:
    """All parts of a split file, in order, given any one of them. A file that is not split is returned alone."""
    match = PART.fullmatch(path.name)
    if not match:
        return [path]
    name, _, count = match.groups()
    return [path.with_name(f"{name}-{number:05d}-of-{count}{path.suffix}") for number in range(1, int(count) + 1)]


def read_parts(gguf, path: Path) -> tuple[dict, dict]:
    """The metadata of the first part, and the tensors of all parts by their names."""
    parts = split_files(path)
    contents = [read_file(gguf, part) for part in parts]
    tensors = {}
    for number, (part, (metadata, its_tensors)) in enumerate(zip(parts, contents), 1):
        place = metadata.get("split.no", 0) + 1, metadata.get("split.count", 1) or 1
        if place != (number, len(parts)):
            raise InputError(f"{part} is part {place[0]} of {place[1]} of a split file, but not by its name; restore "
                             "its name, NAME-00001-of-00002.gguf and so on")
        if twice := sorted(tensors.keys() & its_tensors.keys()):
            raise InputError(f"{part}: the tensor {twice[0]} is in an earlier part, too")
        tensors |= its_tensors
    metadata = contents[0][0]
    count = metadata.get("split.tensors.count", len(tensors))
    if len(tensors) != count:
        raise InputError(f"{path}: all parts together have {len(tensors)} tensors, not {count} as the first one says; "
                         "they do not belong together")
    return metadata, tensors


def read_file(gguf, path: Path) -> tuple[dict, dict]:
    """The metadata and the tensors of one file."""
    if not path.is_file():
        raise InputError(f"{path} is missing: a split file needs all of its parts in one folder; download it")
    check_downloaded(path)
    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    except Exception as error:  # on a damaged file the reader can raise many types
        raise InputError(f"{path} is not a complete GGUF file: {short_reason(error)}") from error
    if reader.byte_order == "S":  # the reader swaps the bytes of metadata, but not of quantized tensors
        raise InputError(f"{path} is a file for machines of another byte order; convert it with gguf-convert-endian of "
                         "the package gguf")
    return metadata, tensors


def read_config(metadata: dict, tensors: dict, path: Path) -> ModelConfig:
    """The file's metadata as a ModelConfig. InputError names an unsupported feature."""
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise InputError(f"{path}: minisr does not support the architecture {architecture!r}; it reads llama")
    keys = {name.removeprefix("llama."): value for name, value in metadata.items() if name.startswith("llama.")}
    if feature := unsupported_feature(keys):
        raise InputError(f"{path}: minisr does not support {feature}")
    try:
        n_heads = keys["attention.head_count"]
        config = model_config(
            vocab_size=int(tensors["token_embd.weight"].shape[1]),
            dim=keys["embedding_length"],
            n_layers=keys["block_count"],
            n_heads=n_heads,
            n_kv_heads=keys.get("attention.head_count_kv", n_heads),
            ffn_dim=keys["feed_forward_length"],
            max_seq_len=keys["context_length"],
            head_dim=keys.get("attention.key_length") or keys.get("rope.dimension_count") or 0,
            tie_embeddings="output.weight" not in tensors,
            rope_theta=float(keys.get("rope.freq_base", 10000.0)),
            rope_scaling=linear_scaling(keys),
            norm_eps=float(f"{keys['attention.layer_norm_rms_epsilon']:.6g}"))  # stored in float32
    except (KeyError, TypeError, ValueError) as error:
        name = f"llama.{error.args[0]}" if isinstance(error, KeyError) else short_reason(error)
        raise InputError(f"{path} does not describe the model's shape: {name}") from error
    lengths = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    if {keys.get(name, config.head_dim) for name in lengths} != {config.head_dim}:
        raise InputError(f"{path}: minisr does not support partial rotary embedding, nor keys and values of different "
                         f"lengths ({', '.join(f'{name} = {keys[name]}' for name in lengths if name in keys)})")
    return with_llama3_scaling(config, tensors, path)


def unsupported_feature(keys: dict) -> str | None:
    """The first feature in the metadata that changes what the model computes and minisr lacks, or None."""
    scaling, window = keys.get("rope.scaling.type", "linear"), keys.get("attention.sliding_window", 0)
    unknown = sorted(name for name in keys.keys() - KEYS_READ - KEYS_WITHOUT_EFFECT if keys[name])
    features = {
        "a mixture of experts": keys.get("expert_count"),
        f"RoPE scaling {scaling!r}": scaling not in ("none", "linear"),
        f"a sliding window ({window}) shorter than the context": 0 < window < keys.get("context_length", 0),
        "attention to later tokens (attention.causal = false)": not keys.get("attention.causal", True),
        f"the key llama.{' and llama.'.join(unknown)}": unknown,
    }
    return next((feature for feature, present in features.items() if present), None)


def linear_scaling(keys: dict) -> tuple[float, ...]:
    """ModelConfig.rope_scaling. A factor of 0 means none; "rope.scale_linear" is the older key."""
    factor = float(keys.get("rope.scaling.factor", keys.get("rope.scale_linear", 0)))
    return () if keys.get("rope.scaling.type") == "none" or factor in (0, 1) else (factor,)


def with_llama3_scaling(config: ModelConfig, tensors: dict, path: Path) -> ModelConfig:
    """Llama 3's RoPE scaling. A file contains only the resulting divisor of each frequency."""
    if "rope_freqs.weight" not in tensors:
        return config
    divisors = torch.from_numpy(tensors["rope_freqs.weight"].data.copy()).float()
    scaled = replace(config, rope_scaling=(float(divisors.max()), 1.0, 4.0, 8192.0))
    expected = rope_frequencies(config, "cpu") / rope_frequencies(scaled, "cpu")
    if not torch.allclose(expected, divisors, rtol=1e-3):
        raise InputError(f"{path}: minisr does not support this RoPE scaling (rope_freqs); it reads "
                         "Llama 3's")
    return scaled


def read_weights(gguf, tensors: dict, config: ModelConfig, path: Path) -> dict[str, torch.Tensor]:
    """Our weights, in float32. Removes from `tensors` what it reads."""
    def dequantize(tensor):
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise InputError(f"{path}: minisr does not support the type {tensor.tensor_type.name} of the tensor "
                             f"{tensor.name}") from error
        return torch.from_numpy(values.copy()).float()

    weights = weights_from(config, tensors, path, WEIGHTS, dequantize)
    for name, weight in weights.items():
        if "qkv_proj" in name:
            q, k, v = weight.split(fused_weight_sizes(name, config))
            q, k = pairs_to_halves(q, config.head_dim), pairs_to_halves(k, config.head_dim)
            weights[name] = torch.cat([q, k, v])
    return weights


def pairs_to_halves(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Permute the rows (heads * D, C) so that the pair (2i, 2i + 1) of each head becomes (i, i + D/2)."""
    pairs = weight.view(-1, head_dim // 2, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)


def read_vocabulary(metadata: dict):
    """The vocabulary in the file: byte-level BPE or SentencePiece."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        return byte_level_vocabulary(metadata)
    if kind == "llama":
        return sentencepiece_vocabulary(metadata)
    raise ValueError(f"minisr does not support a tokenizer of kind {kind!r}; it reads gpt2 and llama")


def lists_of_same_length(metadata: dict, *names: str) -> list[list]:
    """Lists with one value for each token."""
    lists = {name: metadata[f"tokenizer.ggml.{name}"] for name in names}
    if len({len(values) for values in lists.values()}) > 1:
        lengths = ", ".join(f"{len(values)} {name}" for name, values in lists.items())
        raise ValueError(f"its lists do not belong together: {lengths}")
    return list(lists.values())


def read_jinja(metadata: dict) -> JinjaTemplate:
    """The file's Jinja template, if it has one, and the special tokens that the template may name."""
    pieces, tokens = metadata["tokenizer.ggml.tokens"], {}
    defaults = SENTENCEPIECE_IDS if metadata.get("tokenizer.ggml.model") == "llama" else {}
    for name in ("bos", "eos"):
        i = metadata.get(f"tokenizer.ggml.{name}_token_id", defaults.get(name))
        if i is not None and i < len(pieces):
            tokens[f"{name}_token"] = pieces[i]
    return JinjaTemplate(metadata.get("tokenizer.chat_template"), tokens)


def byte_level_vocabulary(metadata: dict) -> TokenizerJSON:
    """Byte-level BPE as in GPT-2, with the pre-tokenizer of the model's family."""
    tokenizers = import_extra("tokenizers", "gguf")
    tokens, types = lists_of_same_length(metadata, "tokens", "token_type")
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    family = metadata.get("tokenizer.ggml.pre")
    result = tokenizers.Tokenizer(tokenizers.models.BPE(
        {token: i for i, token in enumerate(tokens)}, merges, ignore_merges=family in LLAMA3))
    result.pre_tokenizer = pre_tokenizer(tokenizers, family)
    result.decoder = tokenizers.decoders.ByteLevel()
    for token_type, add in ((CONTROL, result.add_special_tokens), (USER_DEFINED, result.add_tokens)):
        chosen = [token for token, its_type in zip(tokens, types) if its_type == token_type]
        add([tokenizers.AddedToken(token, special=token_type == CONTROL, normalized=False)
             for token in chosen])
    if metadata.get("tokenizer.ggml.add_bos_token", family in LLAMA3):
        bos_id = metadata["tokenizer.ggml.bos_token_id"]
        bos = tokens[bos_id]
        result.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B:1", special_tokens=[(bos, bos_id)])
    return TokenizerJSON(json.dumps(json.loads(result.to_str()), ensure_ascii=False).encode())


def pre_tokenizer(tokenizers, family: str | None):
    """How models of a family split a text before BPE."""
    split = tokenizers.pre_tokenizers
    if family in GPT2:
        return split.Sequence([split.ByteLevel(add_prefix_space=False)])
    if family in GPT2_WITH_DIGITS:
        return split.Sequence([split.Digits(individual_digits=True), split.ByteLevel(add_prefix_space=False)])
    if family in LLAMA3 + LLAMA3_WITH_MERGES:
        return split.Sequence([split.Split(tokenizers.Regex(LLAMA3_SPLIT), "isolated"),
                               split.ByteLevel(add_prefix_space=False, use_regex=False)])
    known = ", ".join(GPT2 + GPT2_WITH_DIGITS + LLAMA3 + LLAMA3_WITH_MERGES)
    raise ValueError(f"minisr does not support the pre-tokenizer {family!r}; it knows {known}")


def sentencepiece_vocabulary(metadata: dict) -> SentencePiece:
    """SentencePiece as in Llama 2: a model built from the pieces in the file, without normalization."""
    proto = import_extra("sentencepiece.sentencepiece_model_pb2", "gguf").ModelProto()
    tokens, scores, types = lists_of_same_length(metadata, "tokens", "scores", "token_type")
    for token, score, token_type in zip(tokens, scores, types):
        proto.pieces.add(piece=token, score=score, type=token_type)
    trainer = proto.trainer_spec
    trainer.model_type, trainer.byte_fallback, trainer.vocab_size = BPE, True, len(proto.pieces)
    trainer.bos_id = metadata.get("tokenizer.ggml.bos_token_id", SENTENCEPIECE_IDS["bos"])
    trainer.eos_id = metadata.get("tokenizer.ggml.eos_token_id", SENTENCEPIECE_IDS["eos"])
    trainer.unk_id = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    # SentencePiece finds these tokens by their pieces. It has no BOS token if that piece is not a control symbol.
    bos_id = trainer.bos_id if metadata.get("tokenizer.ggml.add_bos_token", True) else trainer.unk_id
    trainer.bos_piece, trainer.eos_piece = tokens[bos_id], tokens[trainer.eos_id]
    trainer.unk_piece = tokens[trainer.unk_id]
    normalizer = proto.normalizer_spec
    normalizer.name, normalizer.remove_extra_whitespaces = "identity", False
    normalizer.add_dummy_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    return SentencePiece(proto.SerializeToString())
