"""A whole run in the words world. The tiny M0 does not speak its language, so only the mechanics are tested."""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from small_run import files, jsonl, minisr
from tiny import tiny_lm

from minisr import loop
from minisr.report.run_charts import answer_charts
from minisr.runner.config import load_config
from minisr.runner.files import read_json
from minisr.runner.journal import Journal
from minisr.runner.reuse import affected_stages
from minisr.runner.run import Run
from minisr.runner.steps import StoredModel
from minisr.runner.stop import Stop
from minisr.worlds.words import corpus
from minisr.worlds.words.edits import PLAIN
from minisr.worlds.words.oracle import CRITERIA, examine, score
from minisr.worlds.words.requests import find_words, held_out, is_unseen, may_train, parse_request
from minisr.worlds.words.words import UNSEEN_FORMS

# The world's own judge prompt is too long for the tiny M0's context.
CONFIG = """
iterations = 1
device = "cpu"
threads = 1
seed_data = {source = "words", ift = 24, ranked = 6, judge_evaluation = 3, evaluation = 6}
sft = {batch_size = 8, epochs = 1, learning_rate = 3e-3}
prompts = {source = "people", count = 6, max_rouge_l = 0.95}
responses = {candidates = 3, temperature = 1.0, top_p = 1.0, max_new_tokens = 30, rows = 16}
evaluate = {max_new_tokens = 30}
dpo = {batch_size = 4, learning_rate = 3e-4, replay_weight = 0.5}
"""
TEMPLATE = "How good?\n{prompt}\n{response}\nEnd with the line Score: and the total.\n"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    (folder / "judge.txt").write_text(TEMPLATE)
    path = folder / "words.toml"
    judge = f"judge = {{by = \"oracle\", judgements = 1, max_new_tokens = 40, template = '{folder / 'judge.txt'}'}}\n"
    path.write_text(CONFIG + judge)
    return path


@pytest.fixture(scope="module")
def finished(config):
    out = config.parent / "run"
    code, printed, error = minisr("run", config, "--out", out)
    assert code == 0, error
    return out, printed


def test_a_run_goes_from_M0_to_M2(finished):
    out, printed = finished
    metrics = read_json(out / "metrics.json", "metrics")["models"]
    assert set(metrics) == {"SFT", "M1", "M2"} and (out / "M2" / "model.pt").exists()
    assert re.search(r"^M2 +\d+ \[", printed, re.MULTILINE)


def test_the_seed_data_are_M0s_answers(finished):
    out, _ = finished
    ift, ranked = jsonl(out / "seed" / "ift.jsonl"), jsonl(out / "seed" / "ranked.jsonl")
    assert ift and len(ranked) == 6
    for record in ranked:
        assert len(record["responses"]) == corpus.ANSWERS and True in record["edited"]
        assert record["scores"] == [score(record["prompt"], text) for text in record["responses"]]
    # The tiny M0 writes in its own language, so answers that nobody edited are in it.
    natural = [record["response"] for record in ift]
    natural += [text for record in ranked for text, edited in zip(record["responses"], record["edited"]) if not edited]
    assert len(natural) > len(ift) and not set(natural).intersection(PLAIN)
    assert len(jsonl(out / "seed" / "evaluation.jsonl")) == 6
    assert not list((out / "M0").glob("answers.journal*"))


def test_the_oracle_judges_and_measures(finished):
    out, _ = finished
    responses, rewards = jsonl(out / "M1" / "responses.jsonl"), jsonl(out / "M1" / "rewards.jsonl")
    for record, judged in zip(responses, rewards):
        assert judged["rewards"] == [score(record["prompt"], text) if done else None
                                     for text, done in zip(record["responses"], record["finished"])]
    metrics = read_json(out / "metrics.json", "metrics")["models"]["M2"]
    answers = jsonl(out / "M2" / "answers.jsonl")
    points = [examine(parse_request(a["prompt"]), a["greedy"]).points for a in answers]
    assert [tuple(a["greedy_points"]) for a in answers] == points and len(metrics["criteria"]) == len(CRITERIA)
    assert metrics["criteria_greedy"] == [sum(column) / len(points) for column in zip(*points)]
    covered = [all(p[:-1]) for p, a in zip(points, answers) if is_unseen(parse_request(a["prompt"]))]
    assert metrics["words_greedy"]["unseen"]["cover"] == sum(covered) / len(covered)
    assert {"words_right", "form_right", "natural_pairwise", "pairwise"} <= metrics["judge"].keys()


def test_the_prompts_of_the_world_are_of_the_training_side(finished):
    out, _ = finished
    prompts = [record["prompt"] for record in jsonl(out / "M1" / "prompts.jsonl")]
    assert len(prompts) == 6
    assert all(parse_request(prompt) and not held_out(find_words(prompt)) for prompt in prompts)
    assert all(UNSEEN_FORMS.isdisjoint(find_words(prompt)) for prompt in prompts)


def test_prompts_of_the_models_own_are_filtered(config, tmp_path, monkeypatch):
    written = ["Use cup, tea, pour, table in one short sentence.",
               "In one sentence, use the words tent, camel, sit, dune.", "Write about a zebra.", "Write about a horse."]
    counts = Counter(accepted=4)
    monkeypatch.setattr(loop, "new_prompts", lambda *arguments: (list(written), counts))
    run = Run(tmp_path / "run", load_config(config, overrides=("prompts.source=self",)))
    monkeypatch.setattr(Run, "ift", [])
    monkeypatch.setattr(Run, "held_out", set())
    model = StoredModel(run, "M1")
    model.lm = tiny_lm(context=256)
    kept = model.new_prompts()
    assert kept == [prompt for prompt in written if may_train(prompt)] and written[3] in kept
    assert not set(written[1:3]).intersection(kept)
    assert model.counts["prompts"]["accepted"] == len(kept)
    assert model.counts["prompts"]["evaluation words"] == 4 - len(kept)
    model.config = replace(model.config, prompts=replace(model.config.prompts, requests_only=True))
    counts.clear()
    counts["accepted"] = 4
    assert model.new_prompts() == [prompt for prompt in kept if parse_request(prompt)] == kept[:-1]
    assert model.counts["prompts"] == {"accepted": len(kept) - 1, "evaluation words": 4 - len(kept), "no request": 1}


@pytest.mark.slow
def test_two_processes_write_the_same_files(config, finished):
    out = config.parent / "two"
    command = [sys.executable, "-m", "minisr", "run", config, "--out", out, "--processes", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert files(out) == files(finished[0])


def test_a_run_stopped_among_M0s_answers_resumes_to_the_same_files(config, finished, monkeypatch):
    out, stored = config.parent / "stopped", []

    def add(self, value, *key, add=Journal.add):
        add(self, value, *key)
        stored.append(self.path.name)
        Stop.requested = True  # as by a signal

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "add", add)
        patched.setattr(Stop, "requested", False)
        for batches in (1, 2, 3):  # each attempt stores one more
            code, _, _ = minisr("run", config, "--out", out)
            assert code == 130 and stored == ["answers.journal"] * batches
    assert not (out / "seed").exists()
    code, _, error = minisr("run", config, "--out", out)
    assert code == 0, error
    assert files(out) == files(finished[0])


def test_a_run_killed_among_its_seed_files_makes_the_same_ones(config, finished, tmp_path):
    out = shutil.copytree(finished[0], tmp_path / "copy")
    for name in ("ranked.jsonl", "evaluation.jsonl", "eft.jsonl"):
        (out / "seed" / name).unlink()
    code, _, error = minisr("run", config, "--out", out)
    assert code == 0, error
    assert files(out) == files(finished[0])


def test_the_reports_show_what_the_answers_are(finished):
    out, printed = finished
    heading, names = re.search("^(.*all words.*)\n(.*)$", printed, re.MULTILINE).groups()
    assert heading.count("all words") == 2 and "unseen %" in names and "tence %" in names
    forms = read_json(out / "metrics.json", "metrics")["models"]["M1"]["words"]["all"]["forms"]
    charts = {chart.title: chart.arguments
              for chart in answer_charts(out, read_json(out / "metrics.json", "metrics")["models"])}
    reasons, shares, *_ = charts["Form of the answers"]
    assert {reason: share[0] for reason, share in zip(reasons, shares["M1"]) if share[0]} == forms
    assert charts["Failures by criterion"][0] == list(CRITERIA)
    page = (out / "report.html").read_text()
    assert "missed: first word, second word" in page and "(true score 0)" in page


@pytest.mark.parametrize("changes, message", [
    (("seed_data.source=english",), 'judge.by = "oracle" needs seed_data.source = "world" or "words"'),
    (("seed_data.source=english", "judge.by=self", "prompts.source=self", "prompts.requests_only=true"),
     'requests_only = true needs seed_data.source = "world" or "words"'),
    (("seed_data.source=english", "judge.by=word_points"), 'judge.by = "word_points" needs seed_data.source = "words"'),
    (("seed_data.edited=1.5",), "edited must lie between 0 and 1")])
def test_wrong_input_is_refused(config, changes, message, tmp_path):
    options = [option for change in changes for option in ("--set", change)]
    code, _, error = minisr("run", config, "--out", tmp_path / "run", *options)
    assert code == 2 and message in error and not (tmp_path / "run").exists()


@pytest.mark.parametrize("change", ["engine=plain", "dtype=float64", "threads=2", "seed_data.edited=0.5"])
def test_a_variant_that_changes_M0s_answers_reuses_nothing(config, change):
    base, variant = load_config(config), load_config(config, overrides=(change,))
    assert affected_stages(base, variant) is None
    assert affected_stages(base, load_config(config, overrides=("judge.by=random",)))[0] == "rewards"


def test_the_config_that_ships_is_valid():
    config = load_config(Path(__file__).parents[2] / "tiny_configs" / "words.toml")
    assert config.seed_data.source == "words" and config.dtype == "bfloat16"
