"""notebooks/collect_words.py: what it reads from runs, and how seeds are put together."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from minisr import InputError
from minisr.runner.config import load_config, to_toml

POINTS = [1, 0, 1, 0, 1]
NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
CONFIG = Path(__file__).parents[1] / "tiny_configs" / "words.toml"


@pytest.fixture
def collect(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(NOTEBOOKS))
    return importlib.import_module("collect_words")


def write_run(folder, cover, models=("M1", "M2"), changes=()):
    """A run of one iteration with metrics and answers of some models."""
    config = load_config(CONFIG, overrides=("iterations=1", *changes))
    metrics = {"seed": 0, "models": {}}
    for model in models:
        metrics["models"][model] = {"flawless": 0.25, "words": {"all": {"cover": cover, "forms": {"fine": 1.0}}}}
        (folder / model).mkdir(parents=True)
        records = [{"prompt": f"p{i}", "greedy": f"{model} says {i} in {folder.name}", "greedy_points": POINTS}
                   for i in range(9)]
        judged = {"prompt": "p", "responses": ["a"], "scores": [3], "judgements": [["Score: 3"]]}
        (folder / model / "judge_evaluation.jsonl").write_text(json.dumps(judged) + "\n")
        (folder / model / "answers.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "config.toml").write_text(to_toml(config))
    (folder / "seed").mkdir()
    eft = [{"prompt": "p", "response": f"Sentence: fine, 5.\nScore: {score}"} for score in (5, 3, 5)]
    ranked = [{"prompt": "p", "scores": [5, 5], "edited": [True, False]},
              {"prompt": "q", "scores": [3, 5], "edited": [True, True]}]
    for name, data in (("eft", eft), ("ranked", ranked)):
        (folder / "seed" / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in data))


def run(collect, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["collect_words.py", *map(str, arguments)])
    collect.main()


def commongen_line(model, cover, examples=False):
    columns = ("form", "both", "single", "pos", "words", "list", "repeats", "ends", "ppl", "median")
    results = [{"model": model, "cover": cover} | dict.fromkeys(columns)]
    document = {"examples": examples, "score_only": ["zephyr-7b-beta"], "results": results}
    return f"a table\n{json.dumps(document)}\n"


def test_seeds_are_collected_one_by_one_and_replaced(collect, monkeypatch, tmp_path):
    out = tmp_path / "words.json"
    for seed, cover in ((1, 0.5), (0, 0.25)):
        write_run(tmp_path / f"first{seed}" / f"base-{seed}", cover)
        run(collect, monkeypatch, tmp_path / f"first{seed}", "--into", out)
    write_run(tmp_path / "second" / "base-1", 0.75)
    write_run(tmp_path / "second" / "random-1", 0.1)
    run(collect, monkeypatch, tmp_path / "second", "--into", out)
    content = json.loads(out.read_text())
    assert content["eft"] == {"seed": [0, 1], "judgements": [3, 3], "five_points": [2, 2],
                              "answers_of_five_points": [3, 3], "of_these_edited": [2, 2]}
    runs = content["runs"]
    assert runs["base"]["M2"]["seed"] == [0, 1] and runs["random"]["M1"]["seed"] == [1]
    assert runs["base"]["M2"]["words.all.cover"] == [0.25, 0.75]
    assert runs["base"]["M2"]["words.all.forms.repeats"] == [0.0, 0.0]
    assert runs["base"]["M1"]["rewards.mean"] == [None, None] and runs["base"]["M1"]["flawless"] == [0.25, 0.25]


def test_a_run_that_is_not_finished_is_named_and_left_out(collect, monkeypatch, tmp_path, capsys):
    write_run(tmp_path / "base-0", 0.5)
    write_run(tmp_path / "base-1", 0.5, models=("M1",))
    run(collect, monkeypatch, tmp_path, "--into", tmp_path / "words.json")
    runs = json.loads((tmp_path / "words.json").read_text())["runs"]
    assert {model: metrics["seed"] for model, metrics in runs["base"].items()} == {"M1": [0], "M2": [0]}
    err = capsys.readouterr().err
    assert err == f"collect_words: {tmp_path / 'base-1'} is not finished (M2 is missing) and left out\n"


def test_seeds_of_a_variant_must_have_the_same_config(collect, monkeypatch, tmp_path):
    write_run(tmp_path / "base-0", 0.5)
    write_run(tmp_path / "base-1", 0.5, changes=("seed=1",))
    write_run(tmp_path / "other-1", 0.5, changes=("seed=1", "dpo.beta=0.3"))
    run(collect, monkeypatch, tmp_path, "--into", tmp_path / "words.json")
    write_run(tmp_path / "later" / "base-2", 0.5, changes=("seed=2", "dpo.beta=0.3"))
    with pytest.raises(InputError, match="base-2 has another config than the other seeds of base .*dpo.beta"):
        run(collect, monkeypatch, tmp_path / "later", "--into", tmp_path / "words.json")


def test_texts_are_those_of_seed_0(collect, monkeypatch, tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / f"base-{seed}", 0.5)
    run(collect, monkeypatch, tmp_path, "--into", tmp_path / "words.json")
    answers = json.loads((tmp_path / "words.json").read_text())["texts"]["answers"]
    assert list(answers) == ["base"] and len(answers["base"]["M2"]) == collect.EXAMPLES
    assert answers["base"]["M2"][1] == {"prompt": "p1", "answer": "M2 says 1 in base-0", "points": POINTS}


def test_commongen_with_and_without_examples(collect, monkeypatch, tmp_path):
    write_run(tmp_path / "runs" / "base-0", 0.5)
    plain, examples, published = (tmp_path / f"{name}.txt" for name in ("plain", "examples", "published"))
    plain.write_text(commongen_line("runs/base-2/M3", 0.6))
    examples.write_text(commongen_line("runs/base-2/M3", 0.7, examples=True))
    published.write_text(commongen_line("zephyr-7b-beta", 0.8))
    run(collect, monkeypatch, tmp_path / "runs", "--into", tmp_path / "words.json", "--commongen", plain, examples,
        published)
    content = json.loads((tmp_path / "words.json").read_text())
    assert content["commongen"]["base"]["M3"]["cover"] == [0.6] and content["commongen"]["base"]["M3"]["seed"] == [2]
    assert content["commongen_examples"]["base"]["M3"]["cover"] == [0.7]
    assert content["commongen"]["published"]["zephyr-7b-beta"]["cover"] == [0.8]


def test_a_folder_that_is_no_run_is_named(collect, monkeypatch, tmp_path):
    write_run(tmp_path / "my-run", 0.5)
    with pytest.raises(InputError, match="my-run is no run of an experiment"):
        run(collect, monkeypatch, tmp_path, "--into", tmp_path / "words.json")


@pytest.mark.parametrize("content", ["", "a table\n", "a table\n[1]\n", '{"examples": false}\n',
                                     '{"examples": false, "results": []}\n'])
def test_a_file_that_commongen_did_not_print_is_named(collect, monkeypatch, tmp_path, content):
    write_run(tmp_path / "runs" / "base-0", 0.5)
    (tmp_path / "wrong.txt").write_text(content)
    with pytest.raises(InputError, match="wrong.txt"):
        run(collect, monkeypatch, tmp_path / "runs", "--into", tmp_path / "words.json", "--commongen",
            tmp_path / "wrong.txt")


def test_a_variant_may_have_a_hyphen(collect, monkeypatch, tmp_path):
    write_run(tmp_path / "no-replay-2", 0.5)
    run(collect, monkeypatch, tmp_path, "--into", tmp_path / "words.json")
    assert json.loads((tmp_path / "words.json").read_text())["runs"]["no-replay"]["M2"]["seed"] == [2]


def test_metrics_of_an_older_version_stay_aligned_with_their_seeds(collect):
    metrics = {"seed": [0], "old": [0.1], "cover": [0.2]}
    collect.set_values(metrics, 2, {"cover": 0.4, "new": 0.5})
    collect.set_values(metrics, 1, {"cover": 0.3, "new": 0.6})
    assert metrics == {"seed": [0, 1, 2], "old": [0.1, None, None], "cover": [0.2, 0.3, 0.4], "new": [None, 0.6, 0.5]}


def test_nothing_stored_is_lost_by_a_wrong_folder(collect, monkeypatch, tmp_path):
    write_run(tmp_path / "runs" / "base-0", 0.5)
    (tmp_path / "empty").mkdir()
    out = tmp_path / "words.json"
    out.write_text('{"texts": {"english": {"M1": []}}}')
    with pytest.raises(InputError, match="empty has no finished run"):
        run(collect, monkeypatch, tmp_path / "empty", "--into", out)
    with pytest.raises(InputError, match="empty has no .json file"):
        run(collect, monkeypatch, tmp_path / "runs", "--into", out, "--english", tmp_path / "empty")
    (tmp_path / "plain.txt").write_text(commongen_line("runs/words/M3", 0.6))
    with pytest.raises(InputError, match="words is no run of an experiment"):
        run(collect, monkeypatch, tmp_path / "runs", "--into", out, "--commongen", tmp_path / "plain.txt")
    assert json.loads(out.read_text()) == {"texts": {"english": {"M1": []}}}
