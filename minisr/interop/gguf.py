"""GGUF files of Llama-like decoders: weights dequantized to float32, tokenizer from the file (extra "gguf").

A GGUF file stores the rows of q and k in the order of Meta's RoPE, which rotates the pairs (2i, 2i + 1) of a
head. minisr and Hugging Face rotate the pairs (i, i + D/2), so these rows are permuted. """

import json
from dataclasses import replace
from pathlib import Path

import torch

from minisr import InputError
from minisr.interop.chat_templates import recognize_chat_template
from minisr.interop.names import weights_from
from minisr.interop.shape import fused_weight_sizes, model_config
from minisr.interop.tokenizer_json import TokenizerJSON
from minisr.model import Decoder, ModelConfig, rope_frequencies
from minisr.runner.checkpoint import build_decoder, check_vocab_size
from minisr.runner.files import need, short_reason
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
CONTROL, USER_DEFINED = 3, 4  # token types: special tokens, and words that are never split
BPE = 2  # TrainerSpec.ModelType of SentencePiece
# Names of pre-tokenizers, by how they split a text before BPE.
GPT2 = ("gpt-2",)
GPT2_WITH_DIGITS = ("smollm",)  # as GPT-2, and every digit separately
LLAMA3 = ("llama-bpe", "llama3", "llama-v3", "smaug-bpe")
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def load(path: Path, device: str = "cpu", template: str = "") -> tuple[Decoder, Tokenizer]:
    """The model of a file. `template` is the text of a chat template; "" means the file's own."""
    gguf = need("gguf", "gguf")
    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    except Exception as error:  # on a damaged file the reader can raise many types
        raise InputError(f"{path} is not a complete GGUF file: {short_reason(error)}") from error
    config = read_config(metadata, tensors, path)
    try:
        vocabulary = read_vocabulary(metadata)
    except InputError:
        raise
    except Exception as error:  # the tokenizer libraries raise no more specific type
        raise InputError(f"{path} has no usable tokenizer: {short_reason(error)}") from error
    if not template:
        template = recognize_chat_template(metadata.get("tokenizer.chat_template"), vocabulary.specials)
    tokenizer = Tokenizer(vocabulary, template)
    check_vocab_size(path, config, tokenizer)
    weights = read_weights(gguf, tensors, config, path)
    for name in sorted(tensors):
        if name != "rope_freqs.weight":
            raise InputError(f"{path}: minisr does not support the tensor {name}")
    return build_decoder(config, weights, device), tokenizer


def read_config(metadata: dict, tensors: dict, path: Path) -> ModelConfig:
    """The file's metadata as a ModelConfig. InputError names an unsupported feature."""
    check_supported(metadata, path)
    try:
        n_heads = metadata["llama.attention.head_count"]
        linear_factor = metadata.get("llama.rope.scaling.factor", 1.0)
        config = model_config(
            vocab_size=int(tensors["token_embd.weight"].shape[1]),
            dim=metadata["llama.embedding_length"],
            n_layers=metadata["llama.block_count"],
            n_heads=n_heads,
            n_kv_heads=metadata.get("llama.attention.head_count_kv", n_heads),
            ffn_dim=metadata["llama.feed_forward_length"],
            max_seq_len=metadata["llama.context_length"],
            head_dim=metadata.get("llama.rope.dimension_count", 0),
            tie_embeddings="output.weight" not in tensors,
            rope_theta=float(metadata.get("llama.rope.freq_base", 10000.0)),
            rope_scaling=() if linear_factor == 1 else (float(linear_factor),),
            norm_eps=float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}"))  # stored in float32
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} does not describe the model's shape: {short_reason(error)}") from error
    return with_llama3_scaling(config, tensors, path)


def check_supported(metadata: dict, path: Path) -> None:
    """Raise InputError for a feature that changes what the model computes and that minisr lacks."""
    architecture = metadata.get("general.architecture")
    scaling = metadata.get("llama.rope.scaling.type", "none")
    key_length = metadata.get("llama.attention.key_length", 0)
    if architecture != "llama":
        raise InputError(f"{path}: minisr does not support the architecture {architecture!r}; it reads llama")
    if metadata.get("llama.expert_count"):
        raise InputError(f"{path}: minisr does not support a mixture of experts")
    if scaling not in ("none", "linear"):
        raise InputError(f"{path}: minisr does not support RoPE scaling {scaling!r}")
    if key_length > metadata.get("llama.rope.dimension_count", 0):
        raise InputError(f"{path}: minisr does not support partial rotary embedding")


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
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
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


def byte_level_vocabulary(metadata: dict) -> TokenizerJSON:
    """Byte-level BPE as in GPT-2, with the pre-tokenizer of the model's family."""
    tokenizers = need("tokenizers", "gguf")
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
    if metadata.get("tokenizer.ggml.add_bos_token"):
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
    if family in LLAMA3:
        return split.Sequence([split.Split(tokenizers.Regex(LLAMA3_SPLIT), "isolated"),
                               split.ByteLevel(add_prefix_space=False, use_regex=False)])
    known = ", ".join(GPT2 + GPT2_WITH_DIGITS + LLAMA3)
    raise ValueError(f"minisr does not support the pre-tokenizer {family!r}; it knows {known}")


def sentencepiece_vocabulary(metadata: dict) -> SentencePiece:
    """SentencePiece as in Llama 2: a model built from the pieces in the file, without normalization."""
    proto = need("sentencepiece.sentencepiece_model_pb2", "gguf").ModelProto()
    for token, score, token_type in zip(*lists_of_same_length(metadata, "tokens", "scores", "token_type")):
        proto.pieces.add(piece=token, score=score, type=token_type)
    trainer = proto.trainer_spec
    trainer.model_type, trainer.byte_fallback, trainer.vocab_size = BPE, True, len(proto.pieces)
    trainer.bos_id = metadata["tokenizer.ggml.bos_token_id"]
    trainer.eos_id = metadata["tokenizer.ggml.eos_token_id"]
    trainer.unk_id = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    normalizer = proto.normalizer_spec
    normalizer.name, normalizer.remove_extra_whitespaces = "identity", False
    normalizer.add_dummy_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    return SentencePiece(proto.SerializeToString())
