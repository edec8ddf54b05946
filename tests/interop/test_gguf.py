import json
import math

import numpy as np
import pytest
import torch
from nasty import NASTY
from test_wrong_input import in_process, one_line, snapshot
from tiny import assert_same_logits, byte_level_json, random_llama, tiny_tokenizer

from minisr import InputError
from minisr.interop import hf
from minisr.interop.chat_templates import chat_template, to_jinja
from minisr.interop.source import load_source, source_digest
from minisr.runner.checkpoint import save_model

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
library = pytest.importorskip("tokenizers")
sentencepiece = pytest.importorskip("sentencepiece")

F32, F16 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16
Q8_0, Q4_1 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_1
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
         "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
         "self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm",
         "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
         "mlp.down_proj": "ffn_down", "model.layers.": "blk."}


def as_meta(weight, heads):
    """Rows of q or k in the order of Meta's RoPE, by the formula of llama.cpp's converter."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def tensors_of(llama):
    """The tensors of a GGUF file, by its names."""
    c, tensors = llama.config, {}
    for name, weight in llama.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        values = weight.float().numpy()
        if "q_proj" in name or "k_proj" in name:
            values = as_meta(values, c.num_attention_heads if "q_proj" in name else c.num_key_value_heads)
        for theirs, short in NAMES.items():
            name = name.replace(theirs, short)
        tensors[name] = np.ascontiguousarray(values)
    return tensors


def about(llama):
    """The keys that describe the shape."""
    c = llama.config
    return {"llama.block_count": c.num_hidden_layers, "llama.context_length": c.max_position_embeddings,
            "llama.embedding_length": c.hidden_size, "llama.feed_forward_length": c.intermediate_size,
            "llama.attention.head_count": c.num_attention_heads,
            "llama.attention.head_count_kv": c.num_key_value_heads,
            "llama.rope.dimension_count": c.head_dim, "llama.vocab_size": c.vocab_size,
            "llama.rope.freq_base": c.rope_parameters["rope_theta"],
            "llama.attention.layer_norm_rms_epsilon": c.rms_norm_eps}


def sentencepiece_keys():
    pieces = tiny_tokenizer().vocabulary.pieces

    def kind(i):
        kinds = ((pieces.is_unknown, UNKNOWN), (pieces.is_control, CONTROL), (pieces.is_byte, BYTE))
        return next((kind for test, kind in kinds if test(i)),
                    USER_DEFINED if pieces.id_to_piece(i) == "\n" else NORMAL)
    ids = range(pieces.vocab_size())
    return {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": [pieces.id_to_piece(i) for i in ids],
            "tokenizer.ggml.scores": [pieces.get_score(i) for i in ids],
            "tokenizer.ggml.token_type": [kind(i) for i in ids], "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0}


CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")


def byte_level_keys(pre="gpt-2", specials=CHATML, more=(), more_merges=()):
    model = json.loads(byte_level_json(*specials))["model"]
    tokens = [*sorted(model["vocab"], key=model["vocab"].get), *more]
    merges = [" ".join(pair) for pair in model["merges"]] + list(more_merges)
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [CONTROL if token in specials else NORMAL for token in tokens],
            "tokenizer.ggml.merges": merges, "tokenizer.ggml.bos_token_id": 0,
            "tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.add_bos_token": False}


def write(path, keys, tensors, kind=F32, architecture="llama", endianess=gguf.GGUFEndian.LITTLE):
    """Write a file: matrices quantized to `kind`, vectors in float32. Keys with value None are left out."""
    writer = gguf.GGUFWriter(path, architecture, endianess=endianess)
    writer.add_key_value("general.name", "x", gguf.GGUFValueType.STRING)
    for name, value in keys.items():
        if isinstance(value, list):
            writer.add_array(name, value)
        elif value is not None:
            kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING"}
            writer.add_key_value(name, value, gguf.GGUFValueType[kinds[type(value)]])
    for name, values in tensors.items():
        if values.ndim == 2 and values.dtype == np.float32:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        elif values is not None:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def whole(path, llama, tokenizer=None, kind=F32, **changes):
    """A file of this model, with other values for some keys."""
    keys = {**about(llama), **(tokenizer or sentencepiece_keys())}
    return write(path, {**keys, **changes}, tensors_of(llama), kind)


VARIANTS = {
    "GQA": {}, "MHA": dict(num_key_value_heads=4), "tied": dict(tie_word_embeddings=True),
    "wide heads": dict(head_dim=16),
    "other constants": dict(rope_parameters={"rope_type": "default", "rope_theta": 300.0}, rms_norm_eps=1e-2),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_file_in_float32_gives_the_logits_of_the_model_that_was_written(variant, tmp_path):
    llama = random_llama(**VARIANTS[variant])
    model, _ = load_source(str(whole(tmp_path / "x.gguf", llama)))
    assert_same_logits(model, llama)


@pytest.mark.parametrize("kind", [F32, F16, Q8_0, Q4_1], ids=lambda kind: kind.name)
@pytest.mark.parametrize("variant", ["GQA", "tied"])
def test_a_quantized_file_gives_the_logits_that_transformers_reads_from_it(variant, kind, tmp_path):
    llama = random_llama(intermediate_size=64, **VARIANTS[variant])
    path = whole(tmp_path / "x.gguf", llama, kind=kind)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name,
                                                              dtype=torch.float32)
    model, _ = load_source(str(path))
    assert_same_logits(model, theirs)
    ids = torch.arange(50)[None]
    error = (llama(ids).logits - model(ids)).abs().max().item()
    assert {F32: 0, F16: 1e-4, Q8_0: 1e-3, Q4_1: 0.1}[kind] <= error + 1e-6  # quantized it is
    assert error < {F32: 1e-5, F16: 0.02, Q8_0: 0.2, Q4_1: 4}[kind]


def test_quantized_weights_are_the_numbers_that_their_blocks_say(tmp_path):
    llama = random_llama(intermediate_size=64)
    down = llama.model.layers[0].mlp.down_proj.weight.detach().numpy()  # its rows stay in order
    blocks = down.reshape(-1, 32)
    scale = (np.abs(blocks).max(-1, keepdims=True) / 127).astype(np.float16).astype(np.float32)
    low, high = blocks.min(-1, keepdims=True), blocks.max(-1, keepdims=True)
    step = ((high - low) / 15).astype(np.float16).astype(np.float32)
    for kind, half in ((Q8_0, scale / 2), (Q4_1, step / 2)):
        model, _ = load_source(str(whole(tmp_path / "x.gguf", llama, kind=kind)))
        read = model.blocks[0].feed_forward.down_proj.weight.detach().numpy().reshape(-1, 32)
        assert (np.abs(read - blocks) <= half * 1.01 + 2e-3 * np.abs(blocks)).all()
        assert len(np.unique(read[0])) <= (256 if kind == Q8_0 else 16)


def test_bfloat16_weights_are_read_without_rounding(tmp_path):
    llama = random_llama()
    model, _ = load_source(str(whole(tmp_path / "x.gguf", llama, kind=gguf.GGMLQuantizationType.BF16)))
    for theirs, ours in ((llama.lm_head, model.head),
                         (llama.model.layers[1].mlp.down_proj, model.blocks[1].feed_forward.down_proj)):
        assert torch.equal(ours.weight, theirs.weight.bfloat16().float())


LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
SCALINGS = {  # keys after "llama.rope.", and whether llama.cpp scales the frequencies by 4 for them
    "type and factor": ({"scaling.type": "linear", "scaling.factor": 4.0}, True),
    "factor alone": ({"scaling.factor": 4.0}, True),
    "older key": ({"scale_linear": 4.0}, True),
    "older key beside type": ({"scale_linear": 4.0, "scaling.type": "linear"}, True),
    "both keys": ({"scale_linear": 2.0, "scaling.factor": 4.0}, True),
    "none beside factor": ({"scaling.type": "none", "scaling.factor": 4.0}, False),
    "none beside older key": ({"scaling.type": "none", "scale_linear": 4.0}, False),
    "factor 0": ({"scaling.type": "linear", "scaling.factor": 0.0}, False),
    "factor 0 before older key": ({"scaling.factor": 0.0, "scale_linear": 4.0}, False),
    "type alone": ({"scaling.type": "linear"}, False),
}


@pytest.mark.parametrize("keys, scaled", SCALINGS.values(), ids=SCALINGS)
def test_linear_scaling_is_read_as_llama_cpp_reads_it(keys, scaled, tmp_path):
    llama = random_llama(**(dict(rope_parameters=LINEAR) if scaled else {}))
    changes = {f"llama.rope.{name}": value for name, value in keys.items()}
    assert_same_logits(load_source(str(whole(tmp_path / "x.gguf", llama, **changes)))[0], llama)


@pytest.mark.parametrize("width, keys", [
    (8, {"rope.dimension_count": None}), (8, {"attention.key_length": 8, "attention.value_length": 8}),
    (16, {"rope.dimension_count": None, "attention.key_length": 16}),
    (16, {"attention.key_length": 16, "attention.value_length": 16})])
def test_the_length_of_a_head_is_read_from_any_of_its_keys(width, keys, tmp_path):
    llama = random_llama(head_dim=width)
    changes = {f"llama.{name}": value for name, value in keys.items()}
    assert_same_logits(load_source(str(whole(tmp_path / "x.gguf", llama, **changes)))[0], llama, length=32)


def test_keys_that_change_no_result_are_accepted(tmp_path):
    changes = {"attention.causal": True, "attention.sliding_window": 512, "expert_count": 0, "expert_used_count": 2,
               "rope.scaling.finetuned": True, "rope.scaling.original_context_length": 128, "logit_scale": 0.0,
               "tensor_data_layout": "Meta AI original pth", "attention.layer_norm_epsilon": 1e-5}
    llama = random_llama()
    path = whole(tmp_path / "x.gguf", llama, **{f"llama.{name}": value for name, value in changes.items()})
    assert_same_logits(load_source(str(path))[0], llama, length=32)


# ---- files under any name, and split files

@pytest.mark.parametrize("name", ["model", "x.GGUF", "weights.bin", "x-00001-of-00002"])
def test_a_file_is_recognized_by_its_first_bytes(name, tmp_path):
    llama = random_llama()
    assert_same_logits(load_source(str(whole(tmp_path / name, llama)))[0], llama, length=16)


def split(folder, llama, parts, name="x-{:05d}-of-{:05d}.gguf", **changes):
    """A model in several files: the metadata in the first, the tensors in all."""
    tensors = list(tensors_of(llama).items())
    size = -(-len(tensors) // parts)
    for i in range(parts):
        keys = {"split.no": i, "split.count": parts, "split.tensors.count": len(tensors)}
        about_model = {**about(llama), **sentencepiece_keys(), **changes} if i == 0 else {}
        write(folder / name.format(i + 1, parts), {**keys, **about_model}, dict(tensors[i * size:(i + 1) * size]))


@pytest.mark.parametrize("parts, number", [(1, 1), (2, 1), (2, 2), (3, 1), (3, 2)])
def test_all_parts_of_a_split_file_are_read_whichever_is_named(parts, number, tmp_path):
    llama = random_llama()
    split(tmp_path, llama, parts)
    assert_same_logits(load_source(f"{tmp_path}/x-{number:05d}-of-{parts:05d}.gguf")[0], llama, length=32)


def test_a_split_file_may_be_in_capitals_and_in_a_package(tmp_path, monkeypatch):
    llama = random_llama()
    (tmp_path / "some_parts").mkdir()
    split(tmp_path / "some_parts", llama, 2, "X-{:05d}-of-{:05d}.GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    assert_same_logits(load_source("package:some_parts")[0], llama, length=16)


def test_the_digest_of_a_split_file_covers_all_parts(tmp_path):
    split(tmp_path, random_llama(), 2)
    first, second = sorted(tmp_path.iterdir())
    digest = source_digest(str(first))
    assert source_digest(str(second)) == digest
    second.write_bytes(second.read_bytes()[:-4] + b"0000")
    assert source_digest(str(first)) != digest


def test_a_missing_part_is_rejected_by_its_name(tmp_path):
    split(tmp_path, random_llama(), 3)
    (tmp_path / "x-00002-of-00003.gguf").unlink()
    for number in (1, 3):
        with pytest.raises(InputError, match="x-00002-of-00003.gguf is missing"):
            load_source(f"{tmp_path}/x-{number:05d}-of-00003.gguf")


def test_a_part_under_another_name_is_rejected(tmp_path):
    split(tmp_path, random_llama(), 2)
    for number in (1, 2):
        (tmp_path / f"x-{number:05d}-of-00002.gguf").rename(tmp_path / f"{number}.gguf")
        refused(tmp_path / f"{number}.gguf", f"part {number} of 2", "-00001-of-00002.gguf")


def test_parts_in_another_order_are_rejected(tmp_path):
    split(tmp_path, random_llama(), 2)
    first, second = sorted(tmp_path.iterdir())
    first.rename(tmp_path / "y")
    second.rename(first)
    (tmp_path / "y").rename(second)
    refused(first, "part 2 of 2")


def test_parts_of_two_models_are_rejected(tmp_path):
    split(tmp_path, random_llama(num_hidden_layers=3), 2)
    (tmp_path / "x-00002-of-00002.gguf").rename(tmp_path / "other")
    split(tmp_path, random_llama(), 2)
    (tmp_path / "other").rename(tmp_path / "x-00002-of-00002.gguf")
    refused(tmp_path / "x-00001-of-00002.gguf", "tensor")


def divisors(factor, low, high, context, theta, width):
    """What llama.cpp's converter writes as rope_freqs.weight for Llama 3's scaling."""
    for i in range(0, width, 2):
        turn = 2 * math.pi * theta ** (i / width)  # tokens that a full turn takes
        smooth = (context / turn - low) / (high - low)
        yield 1 if turn < context / high else factor if turn > context / low else 1 / (
            (1 - smooth) / factor + smooth)


def llama3(factor=8.0, theta=500000.0):
    return random_llama(head_dim=16, rope_parameters={
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_theta": theta})


def with_rope_freqs(path, llama, values):
    tensors = {**tensors_of(llama), "rope_freqs.weight": np.array(values, dtype=np.float32)}
    return write(path, {**about(llama), **sentencepiece_keys()}, tensors)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rope_freqs_are_read_as_llama3s_scaling(factor, tmp_path):
    values = list(divisors(factor, 1.0, 4.0, 8192, 500000.0, 16))
    kinds = {(value == 1) - (value == factor) for value in values}
    assert kinds == {1, 0, -1}  # some frequencies are kept, some slowed, some in between
    llama = llama3(factor)
    model, _ = load_source(str(with_rope_freqs(tmp_path / "x.gguf", llama, values)))
    assert model.config.rope_scaling == (factor, 1.0, 4.0, 8192.0)
    assert_same_logits(model, llama)
    without = load_source(str(whole(tmp_path / "without.gguf", llama)))[0]
    with pytest.raises(AssertionError):
        assert_same_logits(without, llama)


def test_rope_freqs_of_another_kind_are_rejected(tmp_path):
    values = list(divisors(8.0, 1.0, 4.0, 4096, 500000.0, 16))
    refused(with_rope_freqs(tmp_path / "x.gguf", llama3(), values), "rope_freqs")


def test_export_of_a_file_gives_the_same_logits_in_transformers(tmp_path):
    path = whole(tmp_path / "x.gguf", random_llama(intermediate_size=64), kind=Q4_1)
    model, tokenizer = load_source(str(path))
    hf.export(model, tokenizer, tmp_path / "out")
    assert_same_logits(model, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in NASTY:
        assert auto.encode(text, split_special_tokens=True) == [1, *tokenizer.encode(text)], repr(text)


# ---- the tokenizer in the file

@pytest.mark.parametrize("prefix", [None, True, False])
def test_a_sentencepiece_tokenizer_gives_the_ids_of_the_original(prefix, tmp_path):
    path = whole(tmp_path / "x.gguf", random_llama(), **{"tokenizer.ggml.add_space_prefix": prefix})
    tokenizer = load_source(str(path))[1]
    proto = pytest.importorskip("sentencepiece.sentencepiece_model_pb2").ModelProto()
    proto.ParseFromString(tiny_tokenizer().vocabulary.content)
    proto.normalizer_spec.add_dummy_prefix = prefix is not False
    pieces = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    for text in NASTY:
        ids = pieces.encode(text)
        assert tokenizer.encode(text) == ids, repr(text)
        assert tokenizer.decode(ids) == pieces.decode(ids)
    assert tokenizer.vocabulary.specials == {"<s>": 1, "</s>": 2, "<|user|>": 3, "<|assistant|>": 4}
    assert tokenizer.bos_ids == [1] and tokenizer.stop_ids == (2,)
    assert tokenizer.template == chat_template("tiny")


def byte_level(tmp_path, **how):
    keys = byte_level_keys(**how)
    llama = random_llama(vocab_size=len(keys["tokenizer.ggml.tokens"]))
    return whole(tmp_path / "x.gguf", llama, keys)


def reference(steps, specials=CHATML, more=(), more_merges=(), **how):
    """The same vocabulary as byte_level_keys', put together by the tokenizers library."""
    model = json.loads(byte_level_json(*specials))["model"]
    vocab = {**model["vocab"], **{token: len(model["vocab"]) + i for i, token in enumerate(more)}}
    merges = [tuple(pair) for pair in model["merges"]] + [tuple(merge.split(" ")) for merge in more_merges]
    made = library.Tokenizer(library.models.BPE(vocab, merges, **how))
    made.pre_tokenizer = library.pre_tokenizers.Sequence(steps)
    made.decoder = library.decoders.ByteLevel()
    made.add_special_tokens([library.AddedToken(token, special=True) for token in specials])
    made.encode_special_tokens = True
    return made


LETTERS = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = library.pre_tokenizers.Digits(individual_digits=True)
# Merges across the boundaries of each pre-tokenizer, so that a wrong split changes the ids.
MERGES = ["1 2", "12 3", "123 4", "1234 5", "Ġ 1", "! Ċ", "' L", "'L L", "$ a", "Ġ Ġ", ". a"]
TELLTALE = dict(more=[merge.replace(" ", "") for merge in MERGES], more_merges=MERGES)
TEXTS = [*NASTY, "12345 1234 ١٢", "fox!\n\n12", "I'LL they'll 'LL", "$a.a (a) .a", "a   b\n\n\n  c \n"]


@pytest.mark.parametrize("pre, steps", [("gpt-2", [LETTERS]), ("smollm", [DIGITS, LETTERS])])
def test_a_byte_level_tokenizer_gives_the_ids_of_the_original(pre, steps, tmp_path):
    tokenizer = load_source(str(byte_level(tmp_path, pre=pre, **TELLTALE)), chat="chatml")[1]
    made = reference(steps, **TELLTALE)
    for text in TEXTS:
        assert tokenizer.encode(text) == made.encode(text).ids, repr(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    split = tokenizer.encode("12345")
    assert len(split) == {"gpt-2": 1, "smollm": 5}[pre]
    assert tokenizer.vocabulary.specials == {name: i for i, name in enumerate(CHATML)}
    assert tokenizer.bos_ids == []


LLAMA3_SPECIALS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def test_a_llama3_tokenizer_splits_as_transformers_does(tmp_path):
    path = byte_level(tmp_path, pre="llama-bpe", specials=LLAMA3_SPECIALS, **TELLTALE)
    tokenizer = load_source(str(path))[1]
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    for text in TEXTS:
        ids = auto.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert tokenizer.encode(text) == ids, repr(text)
    assert len(tokenizer.encode("12345")) == 3  # 123, 4, 5: at most three digits together
    assert tokenizer.template == chat_template("llama3")


def test_a_llama3_tokenizer_takes_a_whole_word_that_no_merge_makes(tmp_path):
    # "ignore_merges" in Llama 3's own tokenizer.json, and in llama.cpp for this pre-tokenizer.
    whole_word = dict(more=["Ġzyzzyva"])
    path = byte_level(tmp_path, pre="llama-bpe", specials=LLAMA3_SPECIALS, **whole_word)
    tokenizer = load_source(str(path))[1]
    made = reference([LETTERS], LLAMA3_SPECIALS, **whole_word, ignore_merges=True)
    assert len(made.encode(" zyzzyva").ids) == 1
    assert tokenizer.encode("a zyzzyva!") == made.encode("a zyzzyva!").ids


def test_smaug_splits_as_llama3_and_needs_merges(tmp_path):
    whole_word = dict(more=["Ġzyzzyva"])
    tokenizers = [load_source(str(byte_level(tmp_path, pre=pre, specials=LLAMA3_SPECIALS, **whole_word)))[1]
                  for pre in ("llama-bpe", "smaug-bpe")]
    assert [len(tokenizer.encode(" zyzzyva")) == 1 for tokenizer in tokenizers] == [True, False]
    assert tokenizers[0].encode("12345 'LL\n") == tokenizers[1].encode("12345 'LL\n")
    assert tokenizers[1].bos_ids == []


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe"])
def test_a_user_defined_piece_is_not_split(pre, tmp_path):
    # Type 4 in the file: not a special token, but llama.cpp and transformers never split it.
    keys = byte_level_keys(pre=pre, more=["<think>"])
    keys["tokenizer.ggml.token_type"][-1] = USER_DEFINED
    size = len(keys["tokenizer.ggml.tokens"])
    path = whole(tmp_path / "x.gguf", random_llama(vocab_size=size), keys)
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    tokenizer = load_source(str(path), chat="chatml")[1]
    assert auto.encode("a<think>b", add_special_tokens=False).count(size - 1) == 1
    assert tokenizer.encode("a<think>b") == auto.encode("a<think>b", add_special_tokens=False)
    assert tokenizer.decode(tokenizer.encode("a<think>b")) == "a<think>b"


BOS = {  # keys after "tokenizer.ggml.", and the BOS tokens that llama.cpp puts before a text
    "said": ({"add_bos_token": True}, [1]), "unsaid": ({}, [1]), "denied": ({"add_bos_token": False}, []),
    "another token": ({"bos_token_id": 3}, [3]), "no tokens named": ({"bos_token_id": None, "eos_token_id": None}, [1]),
    "another token, denied": ({"bos_token_id": 3, "add_bos_token": False}, []),
    "an end token too": ({"add_eos_token": True}, [1]),
}


@pytest.mark.parametrize("keys, expected", BOS.values(), ids=BOS)
def test_a_sentencepiece_text_begins_with_the_bos_token_of_the_file(keys, expected, tmp_path):
    changes = {f"tokenizer.ggml.{name}": value for name, value in keys.items()}
    model, tokenizer = load_source(str(whole(tmp_path / "x.gguf", random_llama(), **changes)))
    assert tokenizer.bos_ids == expected
    assert tokenizer.vocabulary.specials == {"<s>": 1, "</s>": 2, "<|user|>": 3, "<|assistant|>": 4}
    save_model(tmp_path / "M0", model, tokenizer, {})
    assert load_source(str(tmp_path / "M0"))[1].bos_ids == expected


@pytest.mark.parametrize("pre, said, expected", [
    ("llama-bpe", None, [0]), ("llama-bpe", False, []), ("llama3", None, [0]), ("gpt-2", None, []),
    ("gpt-2", True, [0])])
def test_a_byte_level_text_begins_with_a_bos_token_by_default_as_in_llama_cpp(pre, said, expected, tmp_path):
    keys = {**byte_level_keys(pre=pre), "tokenizer.ggml.add_bos_token": said}
    llama = random_llama(vocab_size=len(keys["tokenizer.ggml.tokens"]))
    assert load_source(str(whole(tmp_path / "x.gguf", llama, keys)), chat="chatml")[1].bos_ids == expected


def test_a_bos_token_is_added_if_the_file_says_so(tmp_path):
    keys = {**byte_level_keys(), "tokenizer.ggml.add_bos_token": True}
    llama = random_llama(vocab_size=len(keys["tokenizer.ggml.tokens"]))
    tokenizer = load_source(str(whole(tmp_path / "x.gguf", llama, keys)), chat="chatml")[1]
    assert tokenizer.bos_ids == [0]
    assert 0 not in tokenizer.encode("fox")
    assert tokenizer.encode_prompt("fox").count(0) == 2  # those of the template


CHATML_JINJA = ("{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}{% for m in messages %}"
                "{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'}}{% endfor %}")


def test_a_template_may_name_the_bos_token_of_a_file_without_its_id(tmp_path):
    jinja = to_jinja(chat_template("tiny")).replace("{{ '<s>", "{{ bos_token + '")
    keys = {**sentencepiece_keys(), "tokenizer.chat_template": jinja, "tokenizer.ggml.bos_token_id": None}
    tokenizer = load_source(str(whole(tmp_path / "x.gguf", random_llama(), keys)))[1]
    assert "bos_token" in jinja and tokenizer.template == chat_template("tiny")


def test_the_files_chat_template_is_recognized_and_another_can_be_named(tmp_path):
    keys = {**byte_level_keys(), "tokenizer.chat_template": CHATML_JINJA}
    llama = random_llama(vocab_size=len(keys["tokenizer.ggml.tokens"]))
    path = whole(tmp_path / "x.gguf", llama, keys)
    expected = "<|im_start|>system\nYou are kind.<|im_end|>\n" + chat_template("chatml")
    assert load_source(str(path))[1].template == expected
    (tmp_path / "mine.txt").write_text("{prompt}<|im_start|>{response}<|endoftext|>")
    assert load_source(str(path), chat=f"{tmp_path}/mine.txt")[1].stop_ids == (2, 1)


def test_a_package_with_a_file_is_a_source(tmp_path, monkeypatch):
    (tmp_path / "some_model").mkdir()
    llama = random_llama()
    whole(tmp_path / "some_model/x.gguf", llama)
    monkeypatch.syspath_prepend(tmp_path)
    assert_same_logits(load_source("package:some_model")[0], llama, length=16)


# ---- rejected files

def refused(path, *named):
    with pytest.raises(InputError) as caught:
        load_source(str(path))
    text = str(caught.value)
    assert "\n" not in text and [words for words in (*named, path.name) if words not in text] == []


KEYS = {  # other values for keys, None for none, and what the message must contain
    "experts": ({"llama.expert_count": 8}, "mixture of experts"),
    "yarn": ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0}, "'yarn'"),
    "longrope": ({"llama.rope.scaling.type": "longrope"}, "'longrope'"),
    "sliding window": ({"llama.attention.sliding_window": 64}, "sliding window (64)"),
    "not causal": ({"llama.attention.causal": False}, "attention.causal"),
    "scaled attention": ({"llama.attention.scale": 0.5}, "llama.attention.scale"),
    "scaled RoPE": ({"llama.rope.scaling.attn_factor": 0.5}, "llama.rope.scaling.attn_factor"),
    "scaled logits": ({"llama.logit_scale": 2.0, "llama.embedding_scale": 3.0},
                      "llama.embedding_scale and llama.logit_scale"),
    "longer values": ({"llama.attention.value_length": 16}, "attention.value_length = 16"),
    "longer keys": ({"llama.attention.key_length": 16}, "attention.key_length = 16"),
    "no theta": ({"llama.rope.freq_base": 0.0}, "rope_theta"),
    "no number as theta": ({"llama.rope.freq_base": math.nan}, "rope_theta"),
    "negative factor": ({"llama.rope.scaling.factor": -4.0}, "rope_scaling"),
    "kind of tokenizer": ({"tokenizer.ggml.model": "bert"}, "'bert'"),
    "no tokenizer": ({"tokenizer.ggml.model": None}, "tokenizer"),
    "no tokens": ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens"),
    "no types": ({"tokenizer.ggml.token_type": None}, "tokenizer.ggml.token_type"),
    "fewer tokens": ({"tokenizer.ggml.tokens": sentencepiece_keys()["tokenizer.ggml.tokens"][:300]},
                     "300 tokens, 500 scores"),
    "fewer types": ({**byte_level_keys(), "tokenizer.ggml.token_type": [1, 1]}, "2 token_type"),
    "no width": ({"llama.embedding_length": None}, "llama.embedding_length"),
    "no layers": ({"llama.block_count": None}, "llama.block_count"),
    "no context": ({"llama.context_length": None}, "llama.context_length"),
    "no epsilon": ({"llama.attention.layer_norm_rms_epsilon": None}, "epsilon"),
    "more layers": ({"llama.block_count": 3}, "blk.2"),
    "another width": ({"llama.embedding_length": 64}, ),
    "another hidden width": ({"llama.feed_forward_length": 64}, ),
    "other heads": ({"llama.attention.head_count": 8}, ),
    "no heads": ({"llama.attention.head_count": 0}, ),
    "heads of each layer": ({"llama.attention.head_count": [4, 4]}, ),
    "hidden widths of each layer": ({"llama.feed_forward_length": [48, 48]}, ),
    "a part of the head rotates": ({"llama.rope.dimension_count": 4, "llama.attention.key_length": 8}, ),
    "text for a number": ({"llama.block_count": "2"}, ),
    "bos beyond the vocabulary": ({**byte_level_keys(), "tokenizer.ggml.bos_token_id": 9999,
                                   "tokenizer.ggml.add_bos_token": True}, "tokenizer"),
    "end of turn beyond the vocabulary": ({"tokenizer.ggml.eot_token_id": 9999}, "token 9999"),
    "unknown pre-tokenizer": (byte_level_keys(pre="qwen2"), "'qwen2'"),
    "broken merges": ({**byte_level_keys(), "tokenizer.ggml.merges": ["nosuch piece"]}, "tokenizer"),
}


@pytest.mark.parametrize("changes, named", [(c, n) for c, *n in KEYS.values()], ids=KEYS)
def test_a_file_that_describes_something_else_is_rejected_in_one_line(changes, named, tmp_path):
    refused(whole(tmp_path / "x.gguf", random_llama(), **changes), *named)


def test_another_architecture_is_rejected_by_its_name(tmp_path):
    keys = {name.replace("llama.", "qwen2."): value for name, value in about(random_llama()).items()}
    refused(write(tmp_path / "x.gguf", keys, {}, architecture="qwen2"), "architecture 'qwen2'")


def refused_tensors(tmp_path, changes, *named):
    llama = random_llama()
    tensors = {name: value for name, value in {**tensors_of(llama), **changes}.items() if value is not None}
    refused(write(tmp_path / "x.gguf", {**about(llama), **sentencepiece_keys()}, tensors), *named)


@pytest.mark.parametrize("name", ["token_embd", "output_norm", "blk.1.attn_q", "blk.0.ffn_norm"])
def test_a_missing_tensor_is_rejected_by_its_name(name, tmp_path):
    refused_tensors(tmp_path, {f"{name}.weight": None}, f"{name}.weight")


def test_an_additional_bias_is_rejected_by_its_name(tmp_path):
    # Llama with attention_bias has the same architecture name; without the bias it would be another model.
    refused_tensors(tmp_path, {"blk.0.attn_q.bias": np.ones(32, np.float32)}, "blk.0.attn_q.bias")


@pytest.mark.parametrize("shape", [(32, 64), (48, 32), (31, 32), (32,)])
def test_a_tensor_of_another_shape_is_rejected(shape, tmp_path):
    refused_tensors(tmp_path, {"blk.0.attn_q.weight": np.ones(shape, np.float32)})


def test_a_tensor_of_a_type_without_dequantization_is_rejected(tmp_path):
    refused_tensors(tmp_path, {"blk.0.ffn_up.weight": np.ones((48, 32), np.float64)}, "F64", "blk.0.ffn_up.weight")


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_weight_with_nan_or_infinity_is_rejected_by_its_name(value, tmp_path):
    weight = np.full((48, 32), 0.1, np.float32)
    weight[5, 7] = value
    refused_tensors(tmp_path, {"blk.0.ffn_up.weight": weight}, "blk.0.ffn_up.weight contains NaN or infinity")


def test_a_quantized_weight_with_a_scale_of_nan_is_rejected(tmp_path):
    path = whole(tmp_path / "x.gguf", random_llama(intermediate_size=64), kind=Q8_0)
    tensor = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == "blk.1.attn_v.weight")
    content = bytearray(path.read_bytes())
    content[tensor.data_offset:tensor.data_offset + 2] = np.float16(math.nan).tobytes()  # the scale of the first block
    path.write_bytes(content)
    refused(path, "blk.1.attn_v.weight contains NaN or infinity")


@pytest.mark.parametrize("kind", [F32, F16, Q8_0], ids=lambda kind: kind.name)
def test_a_big_endian_file_is_rejected(kind, tmp_path):
    llama = random_llama(intermediate_size=64)
    keys = {**about(llama), **sentencepiece_keys()}
    refused(write(tmp_path / "x.gguf", keys, tensors_of(llama), kind, endianess=gguf.GGUFEndian.BIG), "byte order")


def test_a_folder_of_a_gguf_file_is_rejected_with_the_name_of_the_file(tmp_path):
    whole(tmp_path / "x.gguf", random_llama())
    with pytest.raises(InputError, match="name a file in it: .*/x.gguf"):
        load_source(str(tmp_path))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "notes"])
def test_a_file_of_another_format_is_rejected(name, tmp_path):
    (tmp_path / name).write_bytes(b"lmgg" + bytes(100))
    refused(tmp_path / name, "is a file, but not a GGUF file", "name the folder")


def test_a_truncated_file_is_rejected_wherever_it_ends(tmp_path):
    content = whole(tmp_path / "x.gguf", random_llama()).read_bytes()
    for end in (0, 1, 4, 8, 20, 24, 100, 1000, 5000, len(content) // 2, len(content) - 40):
        (tmp_path / "x.gguf").write_bytes(content[:end])
        refused(tmp_path / "x.gguf", "not a complete GGUF file")


def test_a_command_given_a_truncated_file_ends_in_one_line_and_writes_nothing(tmp_path):
    content = whole(tmp_path / "x.gguf", random_llama()).read_bytes()
    (tmp_path / "x.gguf").write_bytes(content[:-1000])
    before = snapshot(tmp_path)
    for command in ("import", "export"):
        result = in_process([command, tmp_path / "x.gguf", "--out", tmp_path / "new"])
        one_line(*result, "x.gguf", "not a complete")
    assert snapshot(tmp_path) == before
