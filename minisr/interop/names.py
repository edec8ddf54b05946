"""Names of weights and config keys in other formats, and which configs minisr can compute.

"Ours" are minisr's names; "theirs" are those of the other format.
"""

import torch
from torch import Tensor

from minisr import InputError
from minisr.interop.shape import check_weight, fused_weight_sizes, model_config
from minisr.model import ModelConfig

# Our weight -> Hugging Face's weights that it consists of, in order. "{}" is the number of the block.
HF_WEIGHTS = {
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
# Keys of Hugging Face's config.json -> fields of ModelConfig.
HF_CONFIG = {
    "vocab_size": "vocab_size", "hidden_size": "dim", "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads", "num_key_value_heads": "n_kv_heads", "intermediate_size": "ffn_dim",
    "max_position_embeddings": "max_seq_len", "rms_norm_eps": "norm_eps",
}
MODEL_TYPES = ("llama", "mistral")
MISTRAL_DEFAULTS = {"num_key_value_heads": 8, "sliding_window": 4096}  # of keys that a config.json omits
ROPE_TYPES = ("default", "linear", "llama3")


def weight_names(config: ModelConfig, mapping: dict = HF_WEIGHTS) -> dict[str, tuple[str, ...]]:
    """Our name -> their names, for all weights of a model. A tied head has no weight of its own."""
    names = {}
    for ours, theirs in mapping.items():
        if ours == "head.weight" and config.tie_embeddings:
            continue
        if "{}" not in ours:
            names[ours] = theirs
            continue
        for block in range(config.n_layers):
            names[ours.format(block)] = tuple(name.format(block) for name in theirs)
    return names


def weights_from(config: ModelConfig, stored: dict, where, mapping: dict = HF_WEIGHTS,
                 to_tensor=lambda value: value) -> dict[str, Tensor]:
    """Convert stored weights to ours.

    Removes from `stored` what it converts, so what remains is not part of the model. `to_tensor` makes a
    tensor of a stored value; `where` names the source in errors."""
    weights = {}
    for ours, theirs in weight_names(config, mapping).items():
        for name in theirs:
            if name not in stored:
                raise InputError(f"{where}: the weight {name} is missing; the checkpoint is not complete")
        parts = [to_tensor(stored.pop(name)) for name in theirs]
        for name, part in zip(theirs, parts):
            check_weight(name, part, where)
        for name, part, rows in zip(theirs, parts, fused_weight_sizes(ours, config)):
            check_shape(name, part, [rows, config.dim], where)
        weights[ours] = parts[0] if len(parts) == 1 else torch.cat(parts)
    return weights


def check_shape(name: str, part: Tensor, shape: list[int], where) -> None:
    """Torch would concatenate parts of other shapes without an error."""
    if list(part.shape) != shape:
        raise InputError(f"{where}: config and weights do not agree: {name} is of shape {list(part.shape)}; expected "
                         f"{shape}")


def weights_to_hf(config: ModelConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights by Hugging Face's names. No number changes."""
    converted = {}
    for ours, theirs in weight_names(config).items():
        sizes = fused_weight_sizes(ours, config)
        parts = weights[ours].split(sizes) if sizes else [weights[ours]]
        converted |= dict(zip(theirs, parts))
    return converted


def config_from_hf(hf_config: dict, where) -> ModelConfig:
    """The contents of a config.json as a ModelConfig. InputError names the first unsupported feature."""
    if hf_config.get("model_type") == "mistral":
        hf_config = MISTRAL_DEFAULTS | hf_config
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(hf_config.get(key) or {}, dict):
            raise InputError(f"{where}: {key} must be an object {{...}}, not {hf_config[key]!r}")
    if feature := unsupported_feature(hf_config):
        raise InputError(f"{where}: minisr does not support {feature}; it reads Llama-like decoders "
                         f"(model_type {' or '.join(MODEL_TYPES)}) without it")
    rope = rope_parameters(hf_config)
    values = {}
    for theirs, ours in HF_CONFIG.items():
        if hf_config.get(theirs) is not None:
            values[ours] = hf_config[theirs]
        elif theirs != "num_key_value_heads":
            raise InputError(f"{where}: the key {theirs} is missing")
    values.setdefault("n_kv_heads", values["n_heads"])
    try:
        return model_config(**values, head_dim=hf_config.get("head_dim") or 0,
                            rope_theta=rope["rope_theta"], rope_scaling=rope_scaling(rope),
                            tie_embeddings=hf_config.get("tie_word_embeddings") or False)
    except KeyError as error:
        raise InputError(f"{where}: the RoPE parameter {error} is missing") from error
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"{where}: {error}") from error


def unsupported_feature(hf_config: dict) -> str | None:
    """The first feature in a config.json that changes what the model computes and minisr lacks, or None."""
    get, rope = hf_config.get, rope_parameters(hf_config)
    window, max_seq_len = get("sliding_window"), get("max_position_embeddings") or 0
    features = {
        f"model_type {get('model_type')!r}": get("model_type") not in MODEL_TYPES,
        "attention bias": get("attention_bias") or get("qkv_bias"),
        "a bias in the feed-forward": get("mlp_bias"),
        f"activation {get('hidden_act')!r}": get("hidden_act", "silu") not in ("silu", "swish"),
        f"a sliding window ({window}) shorter than the context": window is not None and window < max_seq_len,
        "attention to later tokens (is_causal = false)": get("is_causal") is False,
        "a mixture of experts": get("num_local_experts") or get("num_experts"),
        "layers of different shapes (per_layer_config)": get("per_layer_config"),
        "quantized weights": get("quantization_config"),
        "RoPE parameters of each type of layer": any(isinstance(value, dict) for value in rope.values()),
        "partial rotary embedding": rope["partial_rotary_factor"] not in (None, 1),
        "weights in another file (transformers_weights)": get("transformers_weights"),
        f"RoPE scaling {rope['rope_type']!r}": rope["rope_type"] not in ROPE_TYPES,
    }
    return next((feature for feature, present in features.items() if present), None)


def rope_parameters(hf_config: dict) -> dict:
    """The RoPE parameters, which versions of transformers keep under different keys, in its order of precedence."""
    get = hf_config.get
    rope = dict(get("rope_scaling") or get("rope_parameters") or {})
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    if rope.get("rope_theta") is None:
        rope["rope_theta"] = 10000.0 if get("rope_theta") is None else get("rope_theta")
    if rope.get("partial_rotary_factor") is None:
        rope["partial_rotary_factor"] = get("partial_rotary_factor")
    rope.setdefault("original_max_position_embeddings", get("max_position_embeddings"))
    if "original_max_position_embeddings" in hf_config:
        rope["original_max_position_embeddings"] = get("original_max_position_embeddings")
    return rope


def rope_scaling(rope: dict) -> tuple[float, ...]:
    """ModelConfig.rope_scaling from RoPE parameters."""
    if rope["rope_type"] == "default":
        return ()
    keys = ["factor"]
    if rope["rope_type"] == "llama3":
        keys += ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    return tuple(float(rope[key]) for key in keys)


def config_to_hf(config: ModelConfig) -> dict:
    """A ModelConfig as the contents of a config.json for LlamaForCausalLM."""
    scaling = None
    if len(config.rope_scaling) == 1:
        scaling = {"rope_type": "linear", "factor": config.rope_scaling[0]}
    if len(config.rope_scaling) == 4:
        factor, low, high, original_max_seq_len = config.rope_scaling
        scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                   "original_max_position_embeddings": int(original_max_seq_len)}
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama",
            **{theirs: getattr(config, ours) for theirs, ours in HF_CONFIG.items()},
            "head_dim": config.head_dim, "rope_theta": config.rope_theta, "rope_scaling": scaling,
            "tie_word_embeddings": config.tie_embeddings, "hidden_act": "silu", "attention_bias": False,
            "mlp_bias": False, "attention_dropout": 0.0, "pretraining_tp": 1, "use_cache": True}
