"""GGUF files of Llama-like decoders: weights dequantized to float32, tokenizer from the file (extra "gguf").

A GGUF file keeps the rows of q and k in the order of Meta's RoPE, which turns neighbours (2i, 2i + 1);
ours turns halves (i, i + D/2), as Hugging Face's.
"""

import json
from dataclasses import replace
from pathlib import Path

import torch

from minisr import InputError
from minisr.interop.names import recognise_chat, weights_from
from minisr.interop.shape import fused_weight_sizes, model_config
from minisr.interop.tokenizer_json import TokenizerJSON
from minisr.model import ModelConfig, rope_frequencies
from minisr.runner.checkpoint import assemble, check_sizes, first_line
from minisr.runner.files import need
from minisr.tokenizer import SentencePiece, Tokenizer

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
DIGITS = ("smollm",)  # names of pre-tokenizers that split numbers into digits, then as GPT-2 does
PLAIN_GPT2 = ("gpt-2",)
LLAMA3 = ("llama-bpe", "llama3", "llama-v3", "smaug-bpe")
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def load(path: Path, device: str = "cpu", chat: str = ""):
    """(decoder, tokenizer) of a file; chat is a chat template's text, "" the file's own."""
    library = need("gguf", "gguf")
    try:
        reader = library.GGUFReader(path)
        about = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    except Exception as error:  # the reader fails in many ways on a damaged file
        raise InputError(f"{path} is no whole GGUF file: {first_line(error)}") from error
    config = read_config(about, tensors, path)
    try:
        vocabulary = read_vocabulary(about)
    except InputError:
        raise
    except Exception as error:  # the libraries raise nothing more special
        raise InputError(f"{path}: no usable tokenizer: {first_line(error)}") from error
    chat = chat or recognise_chat(about.get("tokenizer.chat_template"), vocabulary.specials)
    tokenizer = Tokenizer(vocabulary, chat)
    check_sizes(path, config, tokenizer)
    weights = read_weights(library, tensors, config, path)
    if odd := sorted(tensors.keys() - {"rope_freqs.weight"}):
        raise InputError(f"{path}: minisr has no place for the tensor {odd[0]}")
    return assemble(config, weights, device), tokenizer


def read_config(about: dict, tensors: dict, path: Path) -> ModelConfig:
    """The file's description as our config; InputError names a feature that we do not compute."""
    if about.get("general.architecture") != "llama":
        raise InputError(f"{path}: architecture {about.get('general.architecture')!r} is not what minisr "
                         "computes; it reads llama")
    if about.get("llama.expert_count"):
        raise InputError(f"{path}: a mixture of experts is not what minisr computes")
    scaling = about.get("llama.rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise InputError(f"{path}: RoPE scaling {scaling!r} is not what minisr computes")
    if about.get("llama.attention.key_length", 0) > about.get("llama.rope.dimension_count", 0):
        raise InputError(f"{path}: partial rotary embedding is not what minisr computes")
    try:
        n_heads = about["llama.attention.head_count"]
        linear = about.get("llama.rope.scaling.factor", 1.0)
        config = model_config(
            vocab_size=int(tensors["token_embd.weight"].shape[1]),
            dim=about["llama.embedding_length"],
            n_layers=about["llama.block_count"],
            n_heads=n_heads,
            n_kv_heads=about.get("llama.attention.head_count_kv", n_heads),
            ffn_dim=about["llama.feed_forward_length"],
            max_seq_len=about["llama.context_length"],
            head_dim=about.get("llama.rope.dimension_count", 0),
            tie_embeddings="output.weight" not in tensors,
            rope_theta=float(about.get("llama.rope.freq_base", 10000.0)),
            rope_scaling=() if linear == 1 else (float(linear),),
            norm_eps=float(f"{about['llama.attention.layer_norm_rms_epsilon']:.6g}"))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} does not tell the model's shape: {first_line(error)}") from error
    return _llama3_scaling(config, tensors, path)


def _llama3_scaling(config: ModelConfig, tensors: dict, path: Path) -> ModelConfig:
    """Llama 3's RoPE scaling, which a file tells only by the divisor of each frequency."""
    if "rope_freqs.weight" not in tensors:
        return config
    divisors = torch.from_numpy(tensors["rope_freqs.weight"].data.copy()).float()
    scaled = replace(config, rope_scaling=(float(divisors.max()), 1.0, 4.0, 8192.0))
    if not torch.allclose(rope_frequencies(config, "cpu") / rope_frequencies(scaled, "cpu"), divisors, rtol=1e-3):
        raise InputError(f"{path}: rope_freqs is no scaling of Llama 3's kind")
    return scaled


def read_weights(library, tensors: dict, config: ModelConfig, path: Path) -> dict[str, torch.Tensor]:
    """Our weights, in float32."""
    def read(tensor):
        return torch.from_numpy(library.quants.dequantize(tensor.data, tensor.tensor_type).copy()).float()

    weights = weights_from(config, tensors, path, WEIGHTS, read)
    for name, weight in weights.items():
        if "qkv_proj" in name:
            q, k, v = weight.split(fused_weight_sizes(name, config))
            weights[name] = torch.cat([*(neighbours_to_halves(x, config.head_dim) for x in (q, k)), v])
    return weights


def neighbours_to_halves(weight: torch.Tensor, D: int) -> torch.Tensor:
    """Rows of each head (2i, 2i + 1) -> (i, i + D/2): (H D, C)."""
    return weight.view(-1, D // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def read_vocabulary(about: dict):
    """The tokenizer that the file describes, byte-level BPE or SentencePiece."""
    kind = about.get("tokenizer.ggml.model")
    if kind == "gpt2":
        return _byte_level(about)
    if kind == "llama":
        return _sentencepiece(about)
    raise ValueError(f"minisr reads tokenizers of the kinds gpt2 and llama, not {kind!r}")


def _byte_level(about: dict) -> TokenizerJSON:
    """GPT-2's kind: bytes as letters, split as the model's family does, merged by rank."""
    tokenizers = need("tokenizers", "gguf")
    tokens, types = about["tokenizer.ggml.tokens"], about["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in about["tokenizer.ggml.merges"]]
    split, family = tokenizers.pre_tokenizers, about.get("tokenizer.ggml.pre", "(not told)")
    made = tokenizers.Tokenizer(tokenizers.models.BPE(
        {token: i for i, token in enumerate(tokens)}, merges, ignore_merges=family in LLAMA3))
    if family in LLAMA3:
        steps = [split.Split(tokenizers.Regex(LLAMA3_SPLIT), "isolated"),
                 split.ByteLevel(add_prefix_space=False, use_regex=False)]
    elif family in (*DIGITS, *PLAIN_GPT2):
        steps = [split.Digits(individual_digits=True)] if family in DIGITS else []
        steps += [split.ByteLevel(add_prefix_space=False)]
    else:
        raise ValueError(f"unknown pre-tokenizer {family!r}")
    made.pre_tokenizer, made.decoder = split.Sequence(steps), tokenizers.decoders.ByteLevel()
    for kind, add in ((CONTROL, made.add_special_tokens), (USER_DEFINED, made.add_tokens)):
        add([tokenizers.AddedToken(token, special=kind == CONTROL, normalized=False)
             for token, sort in zip(tokens, types) if sort == kind])
    if about.get("tokenizer.ggml.add_bos_token"):
        i = about["tokenizer.ggml.bos_token_id"]
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{tokens[i]} $A", pair=f"{tokens[i]} $A $B:1", special_tokens=[(tokens[i], i)])
    return TokenizerJSON(json.dumps(json.loads(made.to_str()), ensure_ascii=False).encode())


def _sentencepiece(about: dict) -> SentencePiece:
    """Llama 2's kind: the pieces put back into a SentencePiece model, without normalization."""
    proto = need("sentencepiece.sentencepiece_model_pb2", "gguf").ModelProto()
    for token, score, sort in zip(about["tokenizer.ggml.tokens"], about["tokenizer.ggml.scores"],
                                  about["tokenizer.ggml.token_type"]):
        proto.pieces.add(piece=token, score=score, type=sort)
    spec = proto.trainer_spec
    spec.model_type, spec.byte_fallback, spec.vocab_size = 2, True, len(proto.pieces)
    spec.bos_id, spec.eos_id = (about[f"tokenizer.ggml.{end}_token_id"] for end in ("bos", "eos"))
    spec.unk_id = about.get("tokenizer.ggml.unknown_token_id", 0)
    normal = proto.normalizer_spec
    normal.name, normal.remove_extra_whitespaces = "identity", False
    normal.add_dummy_prefix = about.get("tokenizer.ggml.add_space_prefix", True)
    return SentencePiece(proto.SerializeToString())
