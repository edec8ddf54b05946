"""What others call our weights and our config, and what of theirs is the same arithmetic."""

import re

import torch
from torch import Tensor

from minisr import InputError
from minisr.interop.chat_templates import chat_template
from minisr.interop.shape import fused_weight_sizes, model_config
from minisr.model import ModelConfig

# Ours -> Hugging Face's, in the order in which ours holds them; "{}" is the number of the block.
WEIGHTS = {
    "embed.weight": ("model.embed_tokens.weight",),
    "norm.weight": ("model.norm.weight",),
    "head.weight": ("lm_head.weight",),
    "blocks.{}.attention_norm.weight": ("model.layers.{}.input_layernorm.weight",),
    "blocks.{}.attention.qkv_proj.weight": (
        "model.layers.{}.self_attn.q_proj.weight", "model.layers.{}.self_attn.k_proj.weight",
        "model.layers.{}.self_attn.v_proj.weight"),
    "blocks.{}.attention.out_proj.weight": ("model.layers.{}.self_attn.o_proj.weight",),
    "blocks.{}.feed_forward_norm.weight": ("model.layers.{}.post_attention_layernorm.weight",),
    "blocks.{}.feed_forward.gate_up_proj.weight": (
        "model.layers.{}.mlp.gate_proj.weight", "model.layers.{}.mlp.up_proj.weight"),
    "blocks.{}.feed_forward.down_proj.weight": ("model.layers.{}.mlp.down_proj.weight",),
}
# Hugging Face's -> ours, for the keys of config.json that are a matter of shape.
SHAPE = {
    "vocab_size": "vocab_size", "hidden_size": "dim", "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads", "num_key_value_heads": "n_kv_heads", "intermediate_size": "ffn_dim",
    "max_position_embeddings": "max_seq_len", "rms_norm_eps": "norm_eps",
}
ARCHITECTURES = ("llama", "mistral")


def weight_names(config: ModelConfig, weights: dict = WEIGHTS) -> dict[str, tuple[str, ...]]:
    """Their names for the parts of each of our weights; a tied head has none of its own."""
    numbers = range(config.n_layers)
    return {ours.format(i): tuple(part.format(i) for part in theirs) for ours, theirs in weights.items()
            for i in (numbers if "{}" in ours else [0])
            if not (config.tie_embeddings and ours == "head.weight")}


def weights_from(config: ModelConfig, stored: dict, where, weights: dict = WEIGHTS, read=lambda part: part):
    """Our weights, out of `stored`, from which they are taken; read() makes a tensor of a part."""
    ours = {}
    for name, theirs in weight_names(config, weights).items():
        if missing := [part for part in theirs if part not in stored]:
            raise InputError(f"{where}: no weight {missing[0]} in its files; the checkpoint is not complete")
        parts = [read(stored.pop(part)) for part in theirs]
        for part, tensor, rows in zip(theirs, parts, fused_weight_sizes(name, config)):
            if tensor.shape != (rows, config.dim) or not tensor.is_floating_point():
                raise InputError(f"{where}: the model's shape and weights do not agree: {part} is "
                                 f"{tensor.dtype} {list(tensor.shape)}, not {[rows, config.dim]} numbers")
        ours[name] = parts[0] if len(parts) == 1 else torch.cat(parts)
    return ours


def weights_to_hf(config: ModelConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The way back: not a number changes."""
    theirs = {}
    for ours, names in weight_names(config).items():
        theirs |= dict(zip(names, weights[ours].split(fused_weight_sizes(ours, config) or len(weights[ours]))))
    return theirs


def config_from_hf(theirs: dict, where) -> ModelConfig:
    """A config.json as our config; InputError names the first feature that we do not compute."""
    if unknown := _unsupported(theirs):
        raise InputError(f"{where}: {unknown} is not what minisr computes; it reads Llama-like decoders "
                         f"(model_type {' or '.join(ARCHITECTURES)}) that have no such feature")
    rope = _rope(theirs)
    for name in SHAPE:
        if theirs.get(name) is None and name != "num_key_value_heads":
            raise InputError(f"{where} does not tell {name}")
    shape = {ours: theirs[name] for name, ours in SHAPE.items() if theirs.get(name) is not None}
    shape.setdefault("n_kv_heads", shape["n_heads"])
    try:
        return model_config(**shape, head_dim=theirs.get("head_dim") or 0,
                           rope_theta=float(rope.get("rope_theta", 10000.0)), rope_scaling=_scaling(rope),
                           tie_embeddings=bool(theirs.get("tie_word_embeddings", False)))
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"{where}: {type(error).__name__}: {error}") from error


def _unsupported(theirs: dict) -> str | None:
    """The first feature in a config.json that changes the arithmetic."""
    context, window = theirs.get("max_position_embeddings", 0), theirs.get("sliding_window")
    rope = _rope(theirs)
    odd = {
        f"model_type {theirs.get('model_type')!r}": theirs.get("model_type") not in ARCHITECTURES,
        "attention bias": theirs.get("attention_bias") or theirs.get("qkv_bias"),
        "a bias in the feed-forward": theirs.get("mlp_bias"),
        f"activation {theirs.get('hidden_act')!r}": theirs.get("hidden_act", "silu") not in ("silu", "swish"),
        f"a sliding window ({window}) shorter than the context": window and window < context,
        "a mixture of experts": theirs.get("num_local_experts") or theirs.get("num_experts"),
        "quantized weights": theirs.get("quantization_config"),
        "partial rotary embedding": any(c.get("partial_rotary_factor", 1) != 1 for c in (theirs, rope)),
        f"RoPE scaling {rope['rope_type']!r}": rope["rope_type"] not in ("default", "linear", "llama3"),
    }
    return next((name for name, found in odd.items() if found), None)


def _rope(theirs: dict) -> dict:
    """The RoPE parameters, in the place where this or an older version of transformers keeps them."""
    rope = dict(theirs.get("rope_parameters") or theirs.get("rope_scaling") or {})
    if rope.get("rope_theta") is None:
        rope["rope_theta"] = theirs.get("rope_theta") or 10000.0
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    return rope


def _scaling(rope: dict) -> tuple[float, ...]:
    if rope["rope_type"] == "default":
        return ()
    keys = ["factor"]
    if rope["rope_type"] == "llama3":
        keys += ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    return tuple(float(rope[key]) for key in keys)


def config_to_hf(config: ModelConfig) -> dict:
    """Our config as a config.json for LlamaForCausalLM."""
    scaling = None
    if len(config.rope_scaling) == 1:
        scaling = {"rope_type": "linear", "factor": config.rope_scaling[0]}
    if len(config.rope_scaling) == 4:
        factor, low, high, context = config.rope_scaling
        scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                   "original_max_position_embeddings": int(context)}
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama",
            **{theirs: getattr(config, ours) for theirs, ours in SHAPE.items()},
            "head_dim": config.head_dim, "rope_theta": config.rope_theta, "rope_scaling": scaling,
            "tie_word_embeddings": config.tie_embeddings, "hidden_act": "silu", "attention_bias": False,
            "mlp_bias": False, "attention_dropout": 0.0, "pretraining_tp": 1, "use_cache": True}


def recognise_chat(jinja: str | None, specials) -> str:
    """Which of our chat templates a model's own (Jinja, never run) is: by its markers.

    A system message that it adds to a chat without one is kept."""
    jinja = (jinja or "").replace("\\n", "\n")
    if "<|im_start|>" in jinja and "<|im_start|>" in specials:
        system = re.search(r"<\|im_start\|>system\n[^'\"{}<>]*<\|im_end\|>\n", jinja)
        return (system[0] if system else "") + chat_template("chatml")
    if "<|start_header_id|>" in specials:
        return chat_template("llama3")
    if "[INST]" in jinja and {"<s>", "</s>"} <= set(specials):
        return chat_template("llama2")
    if "<|user|>" in jinja and "</s>" in specials and "<|user|>" not in specials:  # TinyLlama, Zephyr
        return chat_template("zephyr")
    if "</s>" not in specials:
        raise InputError("none of minisr's chat templates goes with this model: name one (--chat; in a "
                         "config: chat), or a text file with {prompt} and {response}")
    return chat_template("tiny" if "<|user|>" in specials else "plain")


def jinja_of(template: str) -> str:
    """A chat template of ours as Jinja for others: a user's turn, then the model's, and nothing else."""
    before, _, after = template.partition("{response}")
    opening, _, closing = before.partition("{prompt}")

    def text(part):
        return "{{ " + repr(part) + " }}" if part else ""
    return ("{% for message in messages %}{% if loop.index0 == 0 and message['role'] == 'user' %}"
            + text(opening) + "{{ message['content'] }}" + text(closing)
            + "{% elif loop.index0 == 1 and message['role'] == 'assistant' %}{{ message['content'] }}"
            + text(after) + "{% else %}{{ raise_exception('this template takes a user message, then an "
            "assistant message, and no other') }}{% endif %}{% endfor %}")
