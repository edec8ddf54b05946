"""Helpers of several tests: a tokenizer, decoders that are random or have a known output, a Llama to compare with."""

import json
from functools import cache
from random import Random

import numpy as np
import pytest
import torch

from minisr.interop.chat_templates import chat_template
from minisr.lm import LM
from minisr.model import Decoder, KVCache, ModelConfig
from minisr.runner.pretrain import train_tokenizer
from minisr.tokenizer import Tokenizer
from minisr.worlds.tiny.corpus import document

# Nine tokens in parts, for a cache: every split in two, all at once, one by one, and uneven ones.
SPLITS_OF_NINE = [*([n, 9 - n] for n in range(1, 9)), [9], [1] * 9, [3, 1, 4, 1]]
ENGINES = {"plain": LM}  # by name; a test of an operation runs on each
try:
    from minisr.fast import FastLM
    ENGINES["fast"] = FastLM
except ImportError:  # the core's tests also pass without this folder
    pass

EXAMPLES = [{"prompt": "Write a story.", "response": "Once there was a fox. The end."},
            {"prompt": "Plan a day with the king.", "response": "First we call the king. Have fun."},
            {"prompt": "News?", "response": "Today we saw a bear."}]
PAIRS = [{"prompt": "Write a story.", "chosen": "Once there was a fox.", "rejected": "No."},
         {"prompt": "News?", "chosen": "Today we saw a bear.", "rejected": "Today we saw. The end. The end."},
         {"prompt": "Plan a day with the king.", "chosen": "Have fun.", "rejected": "It felt sad."}]


def random_ids(rows: int, length: int, seed: int) -> torch.Tensor:
    """Ids (rows, length) from 1 on: 0 is the padding token of the Llama of as_llama, which has no gradient there."""
    return torch.randint(1, 60, (rows, length), generator=torch.Generator().manual_seed(seed))



@cache
def tiny_tokenizer() -> Tokenizer:
    rng = Random(0)
    return train_tokenizer([document(rng) for _ in range(300)], 500, chat_template("tiny"))


def tiny_model(vocab_size: int | None = None, context: int = 96, seed: int = 0) -> Decoder:
    """A random decoder in eval mode."""
    torch.manual_seed(seed)
    model = Decoder(ModelConfig(vocab_size=vocab_size or len(tiny_tokenizer()), dim=16, n_layers=2, n_heads=2,
                                n_kv_heads=1, ffn_dim=24, max_seq_len=context)).eval()
    with torch.no_grad():
        model.embed.weight.mul_(0.3)  # tied to the head: keeps probabilities away from 0 and 1
    return model


def tiny_lm(engine: str = "plain", **shape) -> LM:
    """A random decoder and the throw-away tokenizer."""
    return ENGINES[engine](tiny_model(**shape), tiny_tokenizer())


class LogMixin:
    """Stores the log of the last training in .log."""

    def fit(self, batches, make_loss_fns, config):
        self.log = super().fit(batches, make_loss_fns, config)
        return self.log


def with_log(lm: LM) -> LM:
    """The same LM. A trained copy of it holds the log of its training in .log."""
    lm.__class__ = type("LoggingLM", (LogMixin, type(lm)), {})
    return lm


def bigram(logits: torch.Tensor, context: int = 96) -> Decoder:
    """A decoder without blocks: after token a, the logits are logits[a] (V, V)."""
    V = len(logits)
    model = Decoder(ModelConfig(vocab_size=V, dim=V, n_layers=0, n_heads=1, n_kv_heads=1, max_seq_len=context,
                                norm_eps=0.0, tie_embeddings=False)).eval()
    with torch.no_grad():
        model.embed.weight.copy_(torch.eye(V))
        model.head.weight.copy_(logits.T / V**0.5)  # RMSNorm turns the 1 of a one-hot row into sqrt(V)
    return model


def chain(follows: dict[int, int], vocab_size: int, context: int = 96) -> Decoder:
    """A decoder without blocks: after token a comes follows[a], with probability 1 to 30 digits."""
    logits = torch.zeros(vocab_size, vocab_size)
    for a, b in follows.items():
        logits[a, b] = 80
    return bigram(logits, context)


def speaker(text: str, context: int = 96) -> Decoder:
    """A decoder whose response to any prompt is this text, in which no token may occur twice."""
    tokenizer = tiny_tokenizer()
    ids = [tokenizer.vocabulary.specials["<|assistant|>"], *tokenizer.encode(text), tokenizer.eos_id]
    assert len(set(ids)) == len(ids), f"{text!r} repeats a token"
    return chain(dict(zip(ids, ids[1:])), len(tokenizer), context)


def llama_weights(c: ModelConfig, ours: dict) -> dict:
    """Our weights, or their gradients, under the names of transformers, with fused matrices split."""
    D, theirs = c.head_dim, {}
    for i in range(c.n_layers):
        layer, block = f"model.layers.{i}", f"blocks.{i}"
        qkv = ours[f"{block}.attention.qkv_proj.weight"]
        q, k, v = qkv[:c.n_heads * D], qkv[c.n_heads * D:-c.n_kv_heads * D], qkv[-c.n_kv_heads * D:]
        gate_up = ours[f"{block}.feed_forward.gate_up_proj.weight"]
        theirs |= {f"{layer}.self_attn.q_proj": q, f"{layer}.self_attn.k_proj": k,
                   f"{layer}.self_attn.v_proj": v,
                   f"{layer}.self_attn.o_proj": ours[f"{block}.attention.out_proj.weight"],
                   f"{layer}.mlp.gate_proj": gate_up[:c.ffn_dim], f"{layer}.mlp.up_proj": gate_up[c.ffn_dim:],
                   f"{layer}.mlp.down_proj": ours[f"{block}.feed_forward.down_proj.weight"],
                   f"{layer}.input_layernorm": ours[f"{block}.attention_norm.weight"],
                   f"{layer}.post_attention_layernorm": ours[f"{block}.feed_forward_norm.weight"]}
    theirs |= {"model.embed_tokens": ours["embed.weight"], "model.norm": ours["norm.weight"]}
    if "head.weight" in ours:
        theirs["lm_head"] = ours["head.weight"]
    return {f"{name}.weight": weight.clone() for name, weight in theirs.items()}


def as_llama(model: Decoder):
    """A Llama of transformers with the same weights."""
    transformers = pytest.importorskip("transformers")
    c = model.config
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.ffn_dim, num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, rms_norm_eps=c.norm_eps,
        max_position_embeddings=c.max_seq_len, tie_word_embeddings=c.tie_embeddings, pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta})).eval()
    llama.load_state_dict(llama_weights(c, model.state_dict()))
    return llama


def random_llama(kind: str = "Llama", **changes):
    """A random Llama or Mistral of transformers, in eval mode, whose logits are of scale 1 and more."""
    transformers = pytest.importorskip("transformers")
    shape = dict(vocab_size=len(tiny_tokenizer()), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
                 tie_word_embeddings=False)
    config = getattr(transformers, f"{kind}Config")(**{**shape, **changes})
    llama = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in llama.parameters():
            centre, std = (1, 0.2) if weight.dim() == 1 else (0, 0.25 if len(weight) > 100 else 0.15)
            weight.copy_(centre + std * torch.randn(weight.shape, generator=generator))
    return llama


@torch.no_grad()
def assert_same_logits(model: Decoder, llama, length: int = 256, atol: float = 1e-5) -> None:
    """Ours are theirs, of the whole at once and with the cache, the second half token by token."""
    ids = torch.randint(len(tiny_tokenizer()), (2, length), generator=torch.Generator().manual_seed(1))
    expected = llama(ids).logits
    assert expected.std() > 1  # else the bound would say little
    torch.testing.assert_close(model(ids), expected, atol=atol, rtol=0)
    parts = ids.split([length // 2] + [1] * (length - length // 2), dim=1)
    cache = KVCache(model, 2, length)
    torch.testing.assert_close(torch.cat([model(part, cache) for part in parts], dim=1), expected, atol=atol, rtol=0)
    if "fast" in ENGINES:
        assert_same_cached_logits(model, parts, expected, atol)


def assert_same_cached_logits(model: Decoder, parts, expected, atol: float) -> None:
    """The same with the fast engine's cache and decode step."""
    from minisr.fast.cache import PrefixCache
    from minisr.fast.decode_step import DecodeStep
    from minisr.fast.sampler import extend
    first, *rest = parts
    cache = PrefixCache(model.config, len(first), expected.shape[1], model.embed.weight)
    everything = torch.arange(first.numel())
    logits = [model.head(extend(model, first, cache, everything)).view(*first.shape, -1)]
    step = DecodeStep(model, expected.shape[1])
    logits += [step(part[:, 0], cache)[:, None] for part in rest]
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, atol=atol, rtol=0)


def assert_drawn_from(expected, counts) -> None:
    """A chi-square test: counts are those of draws with the expected probabilities."""
    expected, counts = np.asarray(expected), np.asarray(counts)
    assert counts[expected == 0].sum() == 0
    mean = expected[expected > 0] * counts.sum()
    chi_square, freedom = ((counts[expected > 0] - mean) ** 2 / mean).sum(), len(mean) - 1
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5  # mean and 5 deviations of chi-square


@cache
def byte_level_json(*specials: str) -> str:
    """A tokenizer.json of GPT-2's kind with these special tokens, trained by the tokenizers library."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    rng = Random(1)
    made.train_from_iterator([document(rng) + "\n\n" for _ in range(100)], tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(specials), show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    return made.to_str()


def as_folder(llama, folder, **how):
    llama.save_pretrained(folder, **how)
    (folder / "tokenizer.model").write_bytes(tiny_tokenizer().vocabulary.content)
    return folder


def as_bin(folder, **how):
    """The folder's weights in the older format."""
    (folder / "model.safetensors").rename(folder / "x.safetensors")
    weights = pytest.importorskip("safetensors.torch").load_file(folder / "x.safetensors")
    (folder / "x.safetensors").unlink()
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])  # so it stored a tied head
    torch.save(weights, folder / "pytorch_model.bin", **how)


def change(path, **changes):
    """Other values for some keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
