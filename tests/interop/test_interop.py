import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from nasty import NASTY
from test_wrong_input import in_process
from tiny import (
    ENGINES,
    as_bin,
    as_folder,
    assert_same_logits,
    byte_level_json,
    change,
    random_llama,
    tiny_model,
    tiny_tokenizer,
)

from minisr import InputError
from minisr.interop import hf
from minisr.interop.chat_templates import chat_template
from minisr.interop.names import config_from_hf
from minisr.interop.source import load_source, source_digest
from minisr.interop.tokenizer_json import TokenizerJSON
from minisr.model import rope_frequencies
from minisr.runner.checkpoint import load_model, tokenizer_files
from minisr.sampler import SamplingConfig
from minisr.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")
library = pytest.importorskip("tokenizers")
safetensors = pytest.importorskip("safetensors.torch")

LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
# Full turns take 6, 63, 628 and 6283 tokens: unchanged below 128 / 4, slower above 128, interpolated between.
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 128, "rope_theta": 10000.0}
VARIANTS = {
    "GQA": {}, "MHA": dict(num_key_value_heads=4), "tied": dict(tie_word_embeddings=True),
    "wide heads": dict(head_dim=16), "linear": dict(rope_parameters=LINEAR),
    "llama3": dict(rope_parameters=LLAMA3),
    "another theta": dict(rope_parameters={"rope_type": "default", "rope_theta": 300.0}, rms_norm_eps=1e-2),
    "Mistral": dict(kind="Mistral", sliding_window=None),
}


def as_sharded_bin(folder):
    as_bin(folder)
    weights = torch.load(folder / "pytorch_model.bin")
    (folder / "pytorch_model.bin").unlink()
    shards = {"pytorch_model-1.bin": sorted(weights)[::2], "pytorch_model-2.bin": sorted(weights)[1::2]}
    for file, names in shards.items():
        torch.save({name: weights[name] for name in names}, folder / file)
    where = {name: file for file, names in shards.items() for name in names}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_folder_of_transformers_gives_its_logits(variant, tmp_path):
    llama = random_llama(**VARIANTS[variant])
    model, _ = load_source(str(as_folder(llama, tmp_path)))
    assert_same_logits(model, llama)


def test_the_llama3_variant_has_frequencies_of_all_three_kinds():
    model = random_llama(**VARIANTS["llama3"]).model
    plain = torch.tensor([1, 0.1, 0.01, 0.001])
    slowed = (plain / model.rotary_emb.inv_freq).tolist()
    assert slowed[0] == pytest.approx(1) and slowed[2:] == pytest.approx([8, 8]) and 1.1 < slowed[1] < 7.9


@pytest.mark.parametrize("form", [as_bin, lambda folder: as_bin(folder, _use_new_zipfile_serialization=False),
                                  as_sharded_bin], ids=["bin", "bin before zip", "sharded bin"])
@pytest.mark.parametrize("variant", ["GQA", "tied"])
def test_weights_in_an_older_format_are_the_same(form, variant, tmp_path):
    llama = random_llama(**VARIANTS[variant])
    form(as_folder(llama, tmp_path))
    assert not list(tmp_path.glob("*.safetensors"))
    assert_same_logits(load_source(str(tmp_path))[0], llama, length=32)


def loads_what_transformers_loads(folder, expected):
    """Our logits are those of transformers, and transformers read the model that the test means."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert_same_logits(load_source(str(folder))[0], theirs, length=32)
    ids = torch.arange(50)[None]
    assert torch.equal(theirs(ids).logits, expected(ids).logits)


def llamas(**shape):
    """Two models of one shape with other weights: (old, new)."""
    new = random_llama(**shape)
    with torch.no_grad():
        for weight in new.parameters():
            weight.copy_(weight.flip(0))
    return random_llama(**shape), new


LAYOUTS = {}  # functions that save an old and a new model in one folder, so that transformers reads the new one


def layout(save):
    LAYOUTS[save.__name__] = save
    return save


@layout
def a_stale_index_with_its_shards(folder, old, new):
    as_folder(old, folder, max_shard_size="30KB")
    safetensors.save_file(weights_of(new), folder / "model.safetensors", metadata={"format": "pt"})


@layout
def a_stale_index_without_its_shards(folder, old, new):
    as_folder(new, folder)
    index(folder / "model.safetensors.index.json", {"a": "model-1.safetensors"})


@layout
def an_older_bin(folder, old, new):
    as_bin(as_folder(old, folder))
    as_folder(new, folder)


@layout
def a_newer_bin(folder, old, new):
    as_folder(new, folder)
    torch.save(weights_of(old), folder / "pytorch_model.bin")


@layout
def a_bin_beside_shards(folder, old, new):
    as_bin(as_folder(old, folder))
    as_folder(new, folder, max_shard_size="30KB")


@layout
def a_stale_index_of_bins(folder, old, new):
    as_sharded_bin(as_folder(old, folder))
    torch.save(weights_of(new), folder / "pytorch_model.bin")


@layout
def a_variant_and_metas_own_file(folder, old, new):
    as_folder(new, folder)
    for name in ("model.fp16.safetensors", "consolidated.safetensors"):
        safetensors.save_file(weights_of(old), folder / name)


@layout
def a_shard_that_the_index_does_not_name(folder, old, new):
    safetensors.save_file(weights_of(old), as_folder(new, folder) / "model-00002-of-00002.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index(folder / "model.safetensors.index.json", {"a": "model-00001-of-00002.safetensors"})


@layout
def shards_in_a_subfolder_and_their_names_beside_it(folder, old, new):
    as_folder(old, folder)
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / "new").mkdir()
    safetensors.save_file(weights_of(new), folder / "new/part.safetensors", metadata={"format": "pt"})
    index(folder / "model.safetensors.index.json", {"a": "new/part.safetensors"})


@layout
def a_weight_in_another_shard_than_the_index_says(folder, old, new):
    shards = as_folder(new, folder, max_shard_size="30KB") / "model.safetensors.index.json"
    where = json.loads(shards.read_text())["weight_map"]
    index(shards, dict(zip(where, reversed(where.values()))))


@layout
def the_same_weight_in_two_shards(folder, old, new):
    as_folder(new, folder, max_shard_size="30KB")
    shard = next(path for path in folder.glob("model-*") if "model.norm.weight" not in safetensors.load_file(path))
    norm = {"model.norm.weight": weights_of(new)["model.norm.weight"]}
    safetensors.save_file({**safetensors.load_file(shard), **norm}, shard, metadata={"format": "pt"})
    assert sum("model.norm.weight" in safetensors.load_file(path) for path in folder.glob("model-*")) == 2


def weights_of(llama):
    return {name: weight.contiguous() for name, weight in llama.state_dict().items()}


def index(path, weight_map):
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("save", LAYOUTS.values(), ids=LAYOUTS)
def test_of_several_files_of_weights_those_are_read_that_transformers_reads(save, tmp_path):
    old, new = llamas()
    save(tmp_path, old, new)
    loads_what_transformers_loads(tmp_path, expected=new)


def test_the_digest_of_a_folder_is_that_of_the_files_that_are_read(tmp_path):
    old, new = llamas()
    an_older_bin(tmp_path, old, new)
    digest = source_digest(str(tmp_path))
    torch.save(weights_of(new), tmp_path / "pytorch_model.bin")
    assert source_digest(str(tmp_path)) == digest
    safetensors.save_file(weights_of(old), tmp_path / "model.safetensors")
    assert source_digest(str(tmp_path)) != digest


@pytest.mark.parametrize("form", [None, as_bin], ids=["safetensors", "bin"])
def test_a_head_that_differs_from_the_embedding_is_read_although_the_config_ties_them(form, tmp_path):
    llama = random_llama()
    change(as_folder(llama, tmp_path) / "config.json", tie_word_embeddings=True)
    if form:
        form(tmp_path)
    loads_what_transformers_loads(tmp_path, expected=llama)
    model, _ = load_source(str(tmp_path))
    assert not model.config.tie_embeddings
    hf.export(model, tiny_tokenizer(), tmp_path / "exported")
    loads_what_transformers_loads(tmp_path / "exported", expected=llama)


def test_a_head_that_equals_the_embedding_stays_tied(tmp_path):
    llama = random_llama(tie_word_embeddings=True)
    as_folder(llama, tmp_path)
    weights = {name: weight.clone() for name, weight in weights_of(llama).items()}
    weights["lm_head.weight"] = weights["lm_head.weight"].double()  # of another type, with the same values
    safetensors.save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, _ = load_source(str(tmp_path))
    assert model.config.tie_embeddings and model.head.weight is model.embed.weight
    assert_same_logits(model, llama, length=32)


def test_a_tied_weight_may_be_stored_as_the_head_alone(tmp_path):
    llama = random_llama(tie_word_embeddings=True)
    weights = weights_of(llama)
    as_folder(llama, tmp_path)
    del weights["model.embed_tokens.weight"]
    safetensors.save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loads_what_transformers_loads(tmp_path, expected=llama)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="tells what is mapped only on Linux")
def test_a_model_does_not_keep_its_file_in_memory(tmp_path):
    model, _ = load_source(str(as_folder(random_llama(**VARIANTS["GQA"]), tmp_path)))
    assert str(tmp_path / "model.safetensors") not in Path("/proc/self/maps").read_text(), model


@pytest.mark.parametrize("variant", ["GQA", "tied"])
def test_weights_in_shards_are_the_same(variant, tmp_path):
    llama = random_llama(**VARIANTS[variant])
    as_folder(llama, tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_logits(load_source(str(tmp_path))[0], llama, length=32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_config_with_rope_at_the_top_as_in_older_folders_means_the_same(variant, tmp_path):
    llama = random_llama(**VARIANTS[variant])
    config = json.loads((as_folder(llama, tmp_path) / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    config["torch_dtype"] = config.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same_logits(load_source(str(tmp_path))[0], llama)


def test_omitted_config_keys_have_transformers_defaults(tmp_path):
    # As in the first Llama folders.
    llama = random_llama(num_key_value_heads=4)
    config = json.loads((as_folder(llama, tmp_path) / "config.json").read_text())
    for name in ("rope_parameters", "head_dim", "num_key_value_heads", "tie_word_embeddings", "hidden_act"):
        config.pop(name)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same_logits(load_source(str(tmp_path))[0], llama, length=32)


# Changes of a config.json, None for no such key, and the shape of the model beneath it.
SCALED = {"type": "linear", "factor": 4.0}
NO_ORIGINAL = {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"}
CONFIGS = {
    "rope_scaling before rope_parameters": dict(rope_parameters={"rope_theta": 300.0}, rope_scaling=SCALED),
    "an empty rope_scaling": dict(rope_scaling={}, rope_parameters={"rope_theta": 300.0}),
    "theta inside before theta outside": dict(rope_parameters={"rope_theta": 300.0}, rope_theta=5000.0),
    "theta inside rope_scaling": dict(rope_scaling={**SCALED, "rope_theta": 300.0}, rope_theta=5000.0),
    "theta outside alone": dict(rope_parameters={"rope_type": "linear", "factor": 4.0}, rope_theta=300.0),
    "whole theta": dict(rope_parameters=None, rope_theta=500000),
    "rope_type before type": dict(rope_scaling={**SCALED, "rope_type": "default"}),
    "a factor without a type": dict(rope_scaling={"factor": 4.0}),
    "no original context": dict(rope_parameters=NO_ORIGINAL),
    "the original context outside": dict(rope_parameters=LLAMA3, original_max_position_embeddings=32),
    "the whole rotates": dict(rope_parameters={"rope_type": "default", "partial_rotary_factor": 1.0},
                              partial_rotary_factor=0.5),
    "other dtypes": dict(dtype="float16", torch_dtype="bfloat16"),
    "torch_dtype": dict(dtype=None, torch_dtype="float32"), "no dtype": dict(dtype=None),
    "no architectures": dict(architectures=None), "other architectures": dict(architectures=["OtherForCausalLM"]),
    "no biases": dict(attention_bias=None, mlp_bias=None), "no head_dim": dict(head_dim=None),
    "no tie_word_embeddings": dict(tie_word_embeddings=None),
}
MISTRALS = {
    "no kv heads: 8": dict(num_key_value_heads=None), "no window: 4096": dict(sliding_window=None),
    "a window as long as the context": dict(sliding_window=512),
}


def changed_config(folder, changes):
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_a_config_is_read_as_transformers_reads_it(changes, tmp_path):
    changed_config(as_folder(random_llama(), tmp_path), changes)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_same_logits(load_source(str(tmp_path))[0], theirs)


@pytest.mark.parametrize("changes", MISTRALS.values(), ids=MISTRALS)
def test_omitted_keys_of_a_mistral_have_mistrals_defaults(changes, tmp_path):
    llama = random_llama("Mistral", num_attention_heads=16, num_key_value_heads=8, head_dim=4, sliding_window=None)
    changed_config(as_folder(llama, tmp_path), changes)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_same_logits(load_source(str(tmp_path))[0], theirs)


def test_bfloat16_weights_are_read_without_rounding(tmp_path):
    random_llama().bfloat16().save_pretrained(as_folder(random_llama(), tmp_path))
    assert safetensors.load_file(tmp_path / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    llama = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_same_logits(load_source(str(tmp_path))[0], llama)


SHAPES = {
    "GQA": {}, "tied": dict(tie_embeddings=True), "wide heads": dict(head_dim=16),
    "linear": dict(rope_scaling=(4.0,)), "llama3": dict(rope_scaling=(8.0, 1.0, 4.0, 128.0)),
    "other constants": dict(rope_theta=300.0, norm_eps=1e-2),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_an_exported_folder_gives_our_logits_in_transformers(shape, random_decoder, tmp_path):
    model = random_decoder(vocab_size=len(tiny_tokenizer()), std=0.15, max_seq_len=512, **shape)
    model.head.weight.data *= 1.5
    hf.export(model, tiny_tokenizer(), tmp_path)
    llama = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert llama.dtype == torch.float32
    assert_same_logits(model, llama, length=200)


@pytest.mark.parametrize("factor", [1.0, 4.0])
@pytest.mark.parametrize("theta", [300.0, 10000.0, 100000.0, 500000.0, 1000000.0])
@pytest.mark.parametrize("width", [8, 64, 128])
def test_rotary_frequencies_are_those_of_transformers_to_the_last_bit(width, theta, factor):
    # A bit is 6e-8 of the angle: at position 8000, 5e-4 of a radian.
    rope = {"rope_type": "linear", "factor": factor, "rope_theta": theta}
    llama = random_llama(head_dim=width, rope_parameters=rope)
    ours = config_from_hf(llama.config.to_dict(), "config.json")
    assert torch.equal(rope_frequencies(ours, "cpu"), llama.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("engine", ENGINES)
def test_greedy_generation_after_export_gives_our_samplers_ids(engine, random_decoder, tmp_path):
    tokenizer = tiny_tokenizer()
    model = random_decoder(vocab_size=len(tokenizer))
    model.head.weight.data[tokenizer.eos_id] *= 1.5  # else hardly an answer would end
    hf.export(model, tokenizer, tmp_path)
    llama = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert llama.generation_config.to_diff_dict() == transformers.GenerationConfig.from_pretrained(
        tmp_path).to_diff_dict()
    prompts = [tokenizer.encode_prompt(text) for text in NASTY[:16]]
    config = SamplingConfig(temperature=0.0, max_new_tokens=40)
    ours = ENGINES[engine](model, tokenizer).sample(prompts, 1, config, 0, tokenizer.stop_ids)
    assert {one.finished for one, in ours} == {True, False}
    for prompt, (one,) in zip(prompts, ours):
        theirs = llama.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)),
                                do_sample=False, max_new_tokens=40)
        assert theirs[0, len(prompt):].tolist() == one.ids


def test_generation_after_export_stops_at_every_stop_id(tmp_path):
    ends = ["<|im_end|>", "<|endoftext|>"]
    vocabulary = TokenizerJSON(byte_level_json("<|im_start|>", *ends).encode())
    ids = list(map(vocabulary.pieces.token_to_id, ends))
    hf.export(tiny_model(len(vocabulary)), Tokenizer(vocabulary, chat_template("chatml"), ids), tmp_path)
    assert sorted(transformers.GenerationConfig.from_pretrained(tmp_path).eos_token_id) == sorted(ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["GQA", "tied", "llama3", "linear", "wide heads"])
def test_a_round_trip_changes_no_bit(variant, dtype, tmp_path):
    llama = random_llama(**VARIANTS[variant]).to(dtype)
    first = load_source(str(as_folder(llama, tmp_path / "theirs")))
    hf.export(*first, tmp_path / "a")
    again = load_source(str(tmp_path / "a"))
    assert asdict(again[0].config) == asdict(first[0].config)
    ours = first[0].state_dict()
    assert again[0].state_dict().keys() == ours.keys()
    assert all(torch.equal(weight, ours[name]) for name, weight in again[0].state_dict().items())
    assert tokenizer_files(again[1]) == tokenizer_files(first[1])
    hf.export(*again, tmp_path / "b")
    a, b = ({path.name: path.read_bytes() for path in (tmp_path / x).iterdir()} for x in "ab")
    assert a == b and a.keys() >= {"model.safetensors", "config.json", "tokenizer.model", "tokenizer.json",
                                   "tokenizer_config.json", "generation_config.json"}


def test_a_bfloat16_model_is_exported_in_bfloat16(tmp_path):
    model = tiny_model().bfloat16()
    hf.export(model, tiny_tokenizer(), tmp_path)
    llama = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert llama.dtype == torch.bfloat16
    assert torch.equal(llama.model.embed_tokens.weight, model.embed.weight)
    again = load_source(str(tmp_path))[0]
    assert again.embed.weight.dtype == torch.float32
    assert all(torch.equal(weight, model.state_dict()[name].float())
               for name, weight in again.state_dict().items())


# To multiples of 8, 64 and 128, of 512 and 1024 as in Qwen 2 and DeepSeek, of none, and to several times the size.
@pytest.mark.parametrize("rows", [504, 512, 640, 1024, 501, 4096])
def test_an_embedding_padded_beyond_the_vocabulary_is_imported_and_exported(rows, tmp_path):
    llama = random_llama(vocab_size=rows)
    first = load_source(str(as_folder(llama, tmp_path / "theirs")))
    assert_same_logits(first[0], llama, length=32)
    assert len(first[1]) == 500 and first[1].decode([rows - 1, *first[1].encode("fox"), 500]) == "fox"
    hf.export(*first, tmp_path / "a")
    again = load_source(str(tmp_path / "a"))
    # tokenizer.model is read again, not the tokenizer.json derived from it.
    assert tokenizer_files(again[1]) == tokenizer_files(first[1])
    assert_same_logits(again[0], transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a"), length=32)


def with_gap(content: str, name: str, i: int) -> bytes:
    """A tokenizer.json in which a special token has this id, and none has its former one."""
    settings = json.loads(content)
    settings["model"]["vocab"][name] = i
    for token in settings["added_tokens"]:
        if token["content"] == name:
            token["id"] = i
    return json.dumps(settings).encode()


@pytest.mark.parametrize("rows", [411, 412, 416])
def test_a_vocabulary_may_leave_ids_out(rows, tmp_path):
    """400 tokens, the last of them with the id 411."""
    content = with_gap(byte_level_json("<|im_start|>", "<|im_end|>"), "<|im_end|>", 411)
    llama, folder = random_llama(vocab_size=rows), tmp_path / "theirs"
    llama.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(content)
    change(folder / "config.json", eos_token_id=411)
    if rows <= 411:
        with pytest.raises(InputError, match=f"tokenizer.json has 412 pieces, the model only {rows}"):
            load_source(str(folder), chat="chatml")
        return
    model, tokenizer = load_source(str(folder), chat="chatml")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    ids, _ = tokenizer.encode_chat("a fox", "It ran.\n")
    assert ids == theirs("<|im_start|>user\na fox<|im_end|>\n<|im_start|>assistant\nIt ran.\n<|im_end|>").input_ids
    assert tokenizer.eos_id == 411 == ids[-1] and len(tokenizer) == 412 > theirs.vocab_size
    assert tokenizer.decode([405, *tokenizer.encode("fox"), 410]) == "fox" and max(tokenizer.newline_ids) < 411
    with torch.no_grad():
        torch.testing.assert_close(model(torch.tensor([ids])), llama(torch.tensor([ids])).logits, atol=1e-5, rtol=1e-5)
    hf.export(model, tokenizer, tmp_path / "a")
    assert tokenizer_files(load_source(str(tmp_path / "a"))[1]) == tokenizer_files(tokenizer)


def test_decoding_does_not_build_the_vocabulary_for_every_id(monkeypatch):
    vocabulary = TokenizerJSON(byte_level_json("<|im_start|>", "<|im_end|>").encode())
    tokenizer = Tokenizer(vocabulary, chat_template("chatml"))
    ids = tokenizer.encode("a fox")
    monkeypatch.setattr(vocabulary, "pieces", SimpleNamespace(decode=vocabulary.pieces.decode))  # no get_vocab
    assert tokenizer.decode(ids) == "a fox"


CHATML_JINJA = """{% for m in messages %}<|im_start|>{{ m['role'] }}
{{ m['content'] }}<|im_end|>
{% endfor %}"""
TEXT_FILES = ("config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
              "generation_config.json", "chat_template.jinja", "chat.txt")


@pytest.mark.parametrize("encoding, newline", [("utf-8-sig", "\n"), ("utf-8", "\r\n"), ("utf-16", "\r\n")])
@pytest.mark.parametrize("name", TEXT_FILES)
def test_a_text_file_of_a_model_is_read_as_an_editor_leaves_it(name, encoding, newline, tmp_path):
    vocabulary = TokenizerJSON(byte_level_json("<|im_start|>", "<|im_end|>", "<|endoftext|>").encode())
    hf.export(tiny_model(len(vocabulary)), Tokenizer(vocabulary, chat_template("chatml")), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-1.safetensors")
    index(tmp_path / "model.safetensors.index.json", {"a": "model-1.safetensors"})
    (tmp_path / "chat_template.jinja").write_text(CHATML_JINJA)
    if name != "chat.txt":
        (tmp_path / "chat.txt").unlink()
    model, tokenizer = load_source(str(tmp_path))
    text = (tmp_path / name).read_text()
    (tmp_path / name).write_bytes(text.replace("\n", newline).encode(encoding))
    again, its_tokenizer = load_source(str(tmp_path))
    assert again.config == model.config and torch.equal(again.embed.weight, model.embed.weight)
    assert (its_tokenizer.template, its_tokenizer.stop_ids) == (tokenizer.template, tokenizer.stop_ids)
    assert its_tokenizer.encode_prompt("a fox\n") == tokenizer.encode_prompt("a fox\n")


def test_a_text_file_in_another_encoding_is_rejected_by_its_name(tmp_path):
    hf.export(tiny_model(), tiny_tokenizer(), tmp_path)
    for name in ("config.json", "tokenizer_config.json", "chat.txt"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content + b"\xe9")  # an e with an acute accent in Latin-1
        code, out, err = in_process(["import", tmp_path, "--out", tmp_path / "new"])
        assert code == 2 and name in err and "not UTF-8 text" in err and err.count("\n") == 1
        (tmp_path / name).write_bytes(content)


def test_the_import_command_makes_a_model_folder_of_the_same_weights(tmp_path):
    source = as_folder(random_llama(), tmp_path / "theirs")
    code, out, err = in_process(["import", source, "--out", tmp_path / "M0", "--chat", "llama2"])
    assert (code, err) == (0, "") and "[INST]" in out
    (model, tokenizer), (expected, _) = load_model(tmp_path / "M0"), load_source(str(source))
    assert tokenizer.template == chat_template("llama2")
    assert all(torch.equal(weight, expected.state_dict()[name])
               for name, weight in model.state_dict().items())
    code, out, err = in_process(["export", tmp_path / "M0", "--out", tmp_path / "back"])
    assert (code, err) == (0, "")
    assert (tmp_path / "back/chat.txt").read_text() == chat_template("llama2")
    theirs, back = (safetensors.load_file(tmp_path / x / "model.safetensors") for x in ("theirs", "back"))
    assert theirs.keys() == back.keys() and all(torch.equal(theirs[name], back[name]) for name in back)


def test_config_from_hf_reads_what_transformers_itself_writes():
    config = random_llama(rope_parameters=LLAMA3, head_dim=16).config.to_dict()
    ours = config_from_hf(config, "config.json")
    assert (ours.dim, ours.n_heads, ours.n_kv_heads, ours.head_dim, ours.ffn_dim) == (32, 4, 2, 16, 48)
    assert ours.rope_scaling == (8.0, 1.0, 4.0, 128.0) and ours.rope_theta == 10000.0
    assert not ours.tie_embeddings
