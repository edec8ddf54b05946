"""A run with dtype = "bfloat16" on a CPU, and what it says where the CPU has no instructions for it."""

import json
import math
import platform

import pytest
import torch
from small_run import CONFIG, files, jsonl, minisr, settings
from tiny import ENGINES

from minisr.runner import run

pytestmark = pytest.mark.skipif("fast" not in ENGINES, reason="minisr/fast is not installed")
SHORT = ("dtype=bfloat16", "iterations=1", "seed_data.ift=8", "seed_data.evaluation=2", "seed_data.judge_evaluation=1",
         "prompts.count=4", "judge.judgements=1", "evaluate.max_new_tokens=16")


@pytest.fixture(scope="module")
def runs(no_drawing, tmp_path_factory):
    """(exit code, stderr, folder) of the same run on a CPU with and on one without bfloat16 instructions."""
    root, made = tmp_path_factory.mktemp("bfloat16"), []
    (root / "config.toml").write_text(CONFIG)
    for native in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run, "has_native_bfloat16", lambda native=native: native)
            code, _, err = minisr("run", root / "config.toml", "--out", root / str(native), *settings(*SHORT))
        made.append((code, err, root / str(native)))
    return made


def test_a_run_through_M2_succeeds_and_again_gives_the_same_files(runs):
    assert [code for code, _, _ in runs] == [0, 0]
    once, again = (files(folder) for _, _, folder in runs)
    assert once == again and any(name.startswith("M2/") for name in once)


def test_it_trains(runs):
    folder = runs[0][2]
    log = jsonl(folder / "M2/train_log.jsonl")
    assert log[0]["dpo_loss"] == pytest.approx(math.log(2), abs=1e-6)
    losses = [record["loss"] for record in jsonl(folder / "M1/train_log.jsonl")]
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    assert json.loads((folder / "metrics.json").read_text())["models"].keys() == {"SFT", "M1", "M2"}


def test_one_line_says_that_it_is_slow_on_a_cpu_without_instructions_for_it(runs):
    (_, native, _), (_, without, _) = runs
    assert native == "" and without.count("\n") == 1
    assert without.startswith("minisr: this CPU has no bfloat16 instructions") and "use float32" in without


@pytest.mark.parametrize("dtype, device", [(torch.float32, "cpu"), (torch.float64, "cpu"), (torch.bfloat16, "cuda")])
def test_nothing_is_said_about_other_dtypes_and_devices(dtype, device, monkeypatch, capsys):
    monkeypatch.setattr(run, "has_native_bfloat16", lambda: False)
    run.warn_of_slow_bfloat16(dtype, device)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name, avx512, amx, arm, expected", [
    ("x86_64", False, False, True, False), ("x86_64", True, False, False, True), ("AMD64", False, True, False, True),
    ("aarch64", True, True, False, False), ("arm64", False, False, True, True)])
def test_which_cpus_have_instructions_for_it(name, avx512, amx, arm, expected, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: name)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: arm)
    assert run.has_native_bfloat16() is expected
