"""Pretraining a seed model: its data, its result, and resuming."""

import io
import json

import pytest
import torch
from small_run import settings

from minisr import train
from minisr.cli import main
from minisr.interop.shape import MODEL_KEYS_RENAMED
from minisr.runner.checkpoint import digest, load_model
from minisr.runner.config import PretrainConfig, load_config
from minisr.runner.pretrain import make_documents
from minisr.runner.stop import Stop

CONFIG = """threads = 1
tokens = 4_000
tokenizer_documents = 80
train = {batch_size = 8, learning_rate = 2e-2, save_every = 5}

[model]
vocab_size = 420
dim = 16
n_layers = 1
n_heads = 2
n_kv_heads = 1
ffn_dim = 24
max_seq_len = 64
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "pretrain.toml").write_text(CONFIG)
    return tmp_path / "pretrain.toml"


def pretrain(config, out, *changes):
    return main(["pretrain", str(config), "--out", str(out), *settings(*changes)])


def test_the_text_is_whole_documents_with_an_end_token_up_to_the_number_of_tokens(tokenizer, config):
    config = load_config(config, PretrainConfig, ("seed=3",))
    documents = make_documents(tokenizer, config)
    lengths = [len(ids) for ids, _ in documents]
    assert sum(lengths[:-1]) < 4_000 <= sum(lengths) and max(lengths) == 64
    for ids, mask in documents:
        assert mask == [True] * len(ids) and ids[0] == tokenizer.bos_ids[0]
        assert tokenizer.eos_id not in ids[:-1] and (ids[-1] == tokenizer.eos_id or len(ids) == 64)
    assert documents == make_documents(tokenizer, config)


def test_the_seed_decides_the_dropout(config, tmp_path):
    torch.manual_seed(1)
    assert pretrain(config, tmp_path / "first", "train.dropout=0.2") == 0
    torch.manual_seed(2)
    assert pretrain(config, tmp_path / "second", "train.dropout=0.2") == 0
    assert (tmp_path / "first/model.pt").read_bytes() == (tmp_path / "second/model.pt").read_bytes()
    assert pretrain(config, tmp_path / "without") == 0
    assert (tmp_path / "without/model.pt").read_bytes() != (tmp_path / "first/model.pt").read_bytes()


def test_resumed_pretraining_gives_the_same_model_and_it_has_learned(
        config, tmp_path, monkeypatch, capsys):
    assert pretrain(config, tmp_path / "whole") == 0
    model, tokenizer = load_model(tmp_path / "whole")
    assert model.config.dim == 16 and len(tokenizer) == 420
    log = [json.loads(line) for line in (tmp_path / "whole/train_log.jsonl").read_text().splitlines()]
    assert log[0]["loss"] == pytest.approx(6.04, abs=0.1)  # log 420, a uniform distribution
    assert log[-1]["loss"] < 5.5

    def stop_at_7(optimizer, rate, max_grad_norm, step=train.optimizer_step):
        Stop.requested = rate == log[6]["learning_rate"]
        return step(optimizer, rate, max_grad_norm)
    with monkeypatch.context() as patch:
        patch.setattr(train, "optimizer_step", stop_at_7)
        patch.setattr(Stop, "requested", False)  # and so it is again afterwards
        assert pretrain(config, tmp_path / "stopped") == 130
    assert (tmp_path / "stopped/training-7.pt").exists()
    assert pretrain(config, tmp_path / "stopped") == 0
    for name in ("model.pt", "tokenizer.model", "train_log.jsonl"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list((tmp_path / "stopped").glob("training*"))
    capsys.readouterr()
    assert pretrain(config, tmp_path / "stopped", "seed=1") == 2  # a model is not overwritten
    assert "already holds a model" in capsys.readouterr().err
    assert (tmp_path / "stopped/model.pt").read_bytes() == (tmp_path / "whole/model.pt").read_bytes()


def test_an_impossible_shape_is_reported_in_one_line(config, tmp_path, capsys):
    assert pretrain(config, tmp_path / "M0", "model.n_heads=3") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "[model]: dim must be an even multiple of n_heads" in err
    assert not (tmp_path / "M0").exists()


@pytest.mark.parametrize("old, new", MODEL_KEYS_RENAMED.items())
def test_an_old_key_is_rejected_in_one_line_with_its_new_name(old, new, config, tmp_path, capsys):
    assert pretrain(config, tmp_path / "M0", f"model.{old}=3") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"[model]: {old!r} is now called {new!r}" in err
    assert not (tmp_path / "M0").exists()


def test_an_old_key_is_unknown_in_a_section_that_has_no_such_setting(config, tmp_path, capsys):
    assert pretrain(config, tmp_path / "M0", "train.hidden=3") == 2
    assert "[train]: unknown key 'hidden'; known: learning_rate" in capsys.readouterr().err


def test_a_model_file_with_the_old_names_of_the_keys_is_read(config, tmp_path, capsys):
    assert pretrain(config, tmp_path / "M0") == 0
    assert capsys.readouterr().err == ""  # no progress bar where stderr is not a terminal
    expected, _ = load_model(tmp_path / "M0")
    stored = torch.load(tmp_path / "M0/model.pt")
    old_names = {new: old for old, new in MODEL_KEYS_RENAMED.items()}
    stored["config"] = {old_names.get(name, name): value for name, value in stored["config"].items()}
    assert {"width", "layers", "hidden", "tied"} < set(stored["config"])
    stored["config"]["dropout"] = 0.0  # the first versions had it
    content = io.BytesIO()
    torch.save(stored, content)
    (tmp_path / "M0/model.pt").write_bytes(content.getvalue())
    meta = json.loads((tmp_path / "M0/meta.json").read_text()) | {"hash": digest(content.getvalue())}
    (tmp_path / "M0/meta.json").write_text(json.dumps(meta))
    model, _ = load_model(tmp_path / "M0")
    assert model.config == expected.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters()))


def test_a_learning_rate_that_would_rise_is_refused(tmp_path, capsys):
    (tmp_path / "pretrain.toml").write_text("train = {min_learning_rate = 0.1}\n")
    assert main(["pretrain", str(tmp_path / "pretrain.toml"), "--out", str(tmp_path / "M0")]) == 2
    error = capsys.readouterr().err
    assert "train.min_learning_rate = 0.1 is larger than train.learning_rate" in error and error.count("\n") == 1
    assert not (tmp_path / "M0").exists()


def test_the_plain_engine_has_no_gradient_checkpointing(tmp_path, capsys):
    (tmp_path / "pretrain.toml").write_text('engine = "plain"\ntrain = {gradient_checkpointing = true}\n')
    assert main(["pretrain", str(tmp_path / "pretrain.toml"), "--out", str(tmp_path / "M0")]) == 2
    assert capsys.readouterr().err == 'minisr: train.gradient_checkpointing needs engine = "fast"\n'


def test_a_runs_folder_is_no_place_for_a_model(tmp_path, capsys):
    (tmp_path / "config.toml").write_text("")
    (tmp_path / "pretrain.toml").write_text("")
    assert main(["pretrain", str(tmp_path / "pretrain.toml"), "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"minisr: {tmp_path} holds a run; choose another folder with --out\n"
