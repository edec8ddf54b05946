"""What the benchmarks compute from their measurements, by hand, and what they refuse."""

import importlib
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minisr import InputError
from minisr.runner.config import Config, DPOConfig, LoRAConfig
from minisr.runner.files import write_json
from minisr.train import learning_rate

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """Imports a benchmark as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_the_exponent_of_growth_is_that_of_the_last_doubling(script, capsys):
    result = script("growth").summarize("N", "tiny", {1: [1.0, 9.0, 2.0], 4: [3.0], 8: [6.0, 12.0, 24.0]})
    assert result["seconds_median"] == [2.0, 3.0, 12.0]
    assert result["grows"] == math.log2(12 / 3)  # the work doubles once
    assert capsys.readouterr().out.split()[-1] == "2.00"


def test_the_seconds_of_every_number_of_processes_come_from_its_speeds(script, monkeypatch):
    def finished(command, **options):
        n = int(command[command.index("--processes") + 1])
        # 1,000 tokens in 1 and 2 seconds, and in 0.5 and 0.8 seconds by n processes; an even number of turns
        entry = {"work": "dpo", "runs": [2000.0, 1250.0], "seconds_min": 0.5, "seconds_median": 0.65, "ours": 1625.0,
                 "their_runs": [1000.0, 500.0]}
        return SimpleNamespace(returncode=0, stdout=f"a table\n{json.dumps({'n': n, 'results': [entry]})}\n")

    monkeypatch.setattr(subprocess, "run", finished)
    [result] = script("growth").measure_processes("tiny", [2, 4], 2)
    assert result["work"] == "dpo over processes" and result["sizes"] == [1, 2, 4]
    assert result["runs"] == [pytest.approx([1, 2, 1, 2]), pytest.approx([0.5, 0.8]), pytest.approx([0.5, 0.8])]


def test_the_ratio_of_peers_is_that_of_their_median_speeds(script):
    sides = [{"tokens": [100] * 3, "seconds": seconds, "peak_mb": [1.0, 3.0, 2.0], "libraries_mb": [0.5]}
             for seconds in ([1.0, 2.0, 4.0], [10.0, 8.0, 5.0])]
    result = script("peers").compare("judging", "J = 3", "tiny", "transformers", *sides, note=1)
    assert (result["ours"], result["theirs"], result["ratio"]) == (50.0, 12.5, 4.0)
    assert (result["peak_mb"], result["their_seconds_max"], result["note"]) == (3.0, 10.0, 1)


@pytest.mark.parametrize("row, cut", [([5, 2, 7], [5, 2]), ([5, 7], [5, 7]), ([2], [2]), ([5, 3, 2], [5, 3])])
def test_a_row_of_generate_ends_with_its_first_stop_token(script, row, cut):
    assert script("sides")._cut_at_stop(row, [2, 3]) == cut


@pytest.mark.parametrize("changes, message", [
    ({"optimizer": "muon"}, "dpo.optimizer=adamw"), ({"dropout": 0.1}, "dpo.dropout=0"),
    ({"weight_decay": 0.1}, "dpo.weight_decay=0"), ({"micro_batch": 12}, "does not divide"),
    ({"micro_batch": 64}, "does not divide"), ({"reference": "M1"}, "dpo.reference=previous"),
    ({"consistency": True}, "plain DPO"), ({"positives_only": True}, "plain DPO")])
def test_an_iteration_that_trl_would_train_otherwise_is_refused(script, changes, message):
    plain = Config(dpo=DPOConfig(batch_size=32, micro_batch=8))
    script("iteration").check_config(plain)
    with pytest.raises(InputError, match=message):
        script("iteration").check_config(replace(plain, dpo=replace(plain.dpo, **changes)))
    with pytest.raises(InputError, match="lora.rank=0"):
        script("iteration").check_config(replace(plain, lora=LoRAConfig(rank=4)))


def test_transformers_learning_rates_are_those_of_the_config_but_one_step_later_in_the_warm_up():
    transformers = pytest.importorskip("transformers")
    config, steps, warmup = DPOConfig(learning_rate=3e-4, min_learning_rate=3e-5, warmup_fraction=0.1), 40, 4
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    scheduler = transformers.get_scheduler(
        "cosine_with_min_lr", optimizer, warmup, steps,
        scheduler_specific_kwargs={"min_lr": config.min_learning_rate})
    for step in range(steps):
        same = step if step >= warmup else step - 1
        expected = learning_rate(same, steps, config) if step else 0
        assert scheduler.get_last_lr()[0] == pytest.approx(expected, rel=1e-12), step
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("command, message", [
    (["gpu", "--model", "nowhere", "--device", "cpu"], "there is no model nowhere"), (["gpu", "--speed"], "--speed"),
    (["growth", "--processes", "1"], "--processes must be at least 2"), (["growth", "--out", "x.txt"], ".png"),
    (["communication", "--repeats", "0"], "--repeats must be at least 1"), (["peers", "--threads", "0"], "--threads"),
    (["iteration", "nowhere"], "cannot read config nowhere"), (["iteration"], "run"),
    (["commongen", "--sets", "x", "M", "--limit", "0"], "--limit must be at least 1")])
def test_wrong_input_is_one_line_and_code_2(script, command, message, monkeypatch, capsys):
    module = script(command[0])
    monkeypatch.setattr(sys, "argv", [f"{command[0]}.py", *command[1:]])
    with pytest.raises(SystemExit) as end:
        script("sides").in_one_line(module.main)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and message in error


def test_a_gpu_that_is_not_there_is_one_line(script, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit) as end:
        script("gpu").main()
    assert end.value.code == 2 and "sees no GPU; --device cpu --quick" in capsys.readouterr().err


def test_an_iteration_uses_the_runs_copy_of_its_judge_prompt(script, tmp_path):
    source = tmp_path / "run"
    for name in ("seed", "M1"):
        (source / name).mkdir(parents=True)
        write_json(source / name / "timing.json", {})
    (source / "judge.txt").write_text("{prompt} {response}")

    def stop(run, name):
        raise InterruptedError(run.judge_template)

    config = Config(judge=replace(Config().judge, template=str(tmp_path / "moved.txt")))
    with pytest.raises(InterruptedError, match="{prompt} {response}"):
        script("iteration").iterate(source, tmp_path / "work", config, stop)
