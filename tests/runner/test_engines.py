"""Both engines of a run: in float64 they give the same files, and the plain one runs without minisr/fast."""

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from small_run import CONFIG, jsonl, minisr, refused, settings
from tiny import ENGINES, tiny_model, tiny_tokenizer

import minisr as package
from minisr.lm import LM
from minisr.runner.checkpoint import load_model
from minisr.runner.engine import best_lm

SMOKE = Path(__file__).parents[2] / "tiny_configs/smoke.toml"
SAME_FILES = ("seed/eft.jsonl", "SFT/answers.jsonl", "SFT/judge_evaluation.jsonl", "M1/answers.jsonl",
              "M1/judge_evaluation.jsonl", "M1/prompts.jsonl", "M1/prompts.counts.json", "M1/responses.counts.json",
              "M1/rewards.jsonl", "M1/rewards.counts.json", "M1/pairs.jsonl", "M1/pairs.counts.json",
              "M2/answers.jsonl", "M2/judge_evaluation.jsonl")

SHORT = ("dtype=float64", "iterations=1", "seed_data.ift=8", "seed_data.evaluation=2", "seed_data.judge_evaluation=1",
         "prompts.count=4", "judge.judgements=1", "evaluate.max_new_tokens=16")

needs_fast = pytest.mark.skipif("fast" not in ENGINES, reason="minisr/fast is not installed")


def run_process(root, *arguments):
    """(exit code, stdout, stderr) of a minisr command in a process of its own, with the package of this folder."""
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    environment.pop("TQDM_DISABLE", None)
    command = [sys.executable, "-m", "minisr", *map(str, arguments)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def without_fast(tmp_path_factory):
    """A folder with a copy of the package in which minisr/fast cannot be imported.

    Without any minisr.fast, Python might find that of an editable installation."""
    root = tmp_path_factory.mktemp("without_fast")
    shutil.copytree(Path(package.__file__).parent, root / "minisr", ignore=shutil.ignore_patterns("fast"))
    (root / "minisr/fast.py").write_text("raise ImportError")
    (root / "minisr/report/page.py").write_text("def write_page(folder): pass")  # its charts take seconds
    return root


@pytest.fixture(scope="module")
def runs(without_fast, no_drawing, tmp_path_factory):
    """{engine: (output, folder of the run)}: one iteration in float64, the plain one without minisr/fast."""
    folder = tmp_path_factory.mktemp("engines")
    (folder / "config.toml").write_text(CONFIG)
    run = {"plain": partial(run_process, without_fast), "fast": minisr}
    return {engine: (run[engine]("run", folder / "config.toml", "--out", folder / engine,
                                 *settings(f"engine={engine}", *SHORT)), folder / engine) for engine in ENGINES}


def assert_same_results(plain, fast):
    assert len(jsonl(plain / "M1/pairs.jsonl")) >= 2
    for name in SAME_FILES:
        assert (plain / name).read_bytes() == (fast / name).read_bytes(), name
    responses = [[{key: value for key, value in record.items() if key != "logps"}
                  for record in jsonl(folder / "M1/responses.jsonl")] for folder in (plain, fast)]
    assert responses[0] == responses[1] != []
    for name in ("SFT", "M1", "M2"):
        ours, theirs = (load_model(folder / name, dtype=torch.float64)[0].state_dict() for folder in (plain, fast))
        for weight in ours:
            torch.testing.assert_close(ours[weight], theirs[weight], rtol=0, atol=1e-9, msg=f"{name}: {weight}")
        stored = torch.load(fast / name / "model.pt", weights_only=True)["weights"]
        assert {weight.dtype for weight in stored.values()} == {torch.float64}
        for a, b in zip(*(jsonl(folder / name / "train_log.jsonl") for folder in (plain, fast)), strict=True):
            for record in (a, b):
                record.pop("accuracy", None)  # of step 0: whether a difference of 0 is rounded to more than 0
            assert a == pytest.approx(b, rel=1e-7, abs=1e-7)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_ends_well_and_draws_no_progress_bar_where_stderr_is_no_terminal(engine, runs):
    (code, out, errors), folder = runs[engine]
    assert (code, errors) == (0, "")
    assert "M2 done in" in out and (folder / "metrics.json").exists()
    assert "\r" not in out and "it/s" not in out


@needs_fast
def test_in_float64_both_engines_give_the_same_files_and_weights(runs):
    assert_same_results(runs["plain"][1], runs["fast"][1])


@needs_fast
@pytest.mark.slow
def test_the_smoke_config_gives_the_same_on_both_engines(tmp_path):
    for engine in ENGINES:
        changes = settings(f"engine={engine}", "dtype=float64", "threads=1")
        assert minisr("run", SMOKE, "--out", tmp_path / engine, *changes)[0] == 0
    assert_same_results(tmp_path / "plain", tmp_path / "fast")


@needs_fast
def test_only_the_fast_engine_records_log_probabilities(runs):
    logps = {engine: [logp for record in jsonl(folder / "M1/responses.jsonl") for logp in record["logps"]]
             for engine, (_, folder) in runs.items()}
    assert set(logps["plain"]) == {None}
    assert len([logp for logp in logps["fast"] if logp is not None and logp < 0]) > 5


def test_without_minisr_fast_the_fast_engine_is_one_line_that_names_the_plain_one(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "minisr.fast", None)
    assert refused(tmp_path) == (
        'minisr: engine = "fast" needs the folder minisr/fast, which is missing; set engine = "plain"\n')


def test_outside_of_a_run_the_engine_is_the_fast_one_if_it_is_there(monkeypatch):
    assert type(best_lm(tiny_model(), tiny_tokenizer())) is ENGINES.get("fast", LM)
    monkeypatch.setitem(sys.modules, "minisr.fast", None)
    assert type(best_lm(tiny_model(), tiny_tokenizer())) is LM


PLAIN_LACKS = [
    (("sft.gradient_checkpointing=true",), 'gradient_checkpointing needs engine = "fast"'),
    (("dpo.gradient_checkpointing=true",), 'gradient_checkpointing needs engine = "fast"'),
    (("dtype=bfloat16",), 'dtype = "bfloat16" needs engine = "fast"')]


@pytest.mark.parametrize("changes, message", PLAIN_LACKS)
def test_what_the_plain_engine_lacks_is_refused_in_one_line(changes, message, tmp_path):
    assert message in refused(tmp_path, "engine=plain", "seed_model=nowhere", *changes)
    if "fast" in ENGINES:  # which goes on to the next mistake
        assert "nowhere" in refused(tmp_path, "engine=fast", "seed_model=nowhere", *changes)


@needs_fast
@pytest.mark.parametrize("section", ["sft", "dpo"])
def test_muon_with_bfloat16_weights_is_refused_in_one_line(section, tmp_path):
    assert 'optimizer = "muon" needs dtype = "float32"' in refused(
        tmp_path, "dtype=bfloat16", f"{section}.optimizer=muon")
