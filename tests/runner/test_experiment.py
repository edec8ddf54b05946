import io
import json
import re
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats

from minisr import InputError
from minisr.cli import main
from minisr.report.experiment_table import differences_table, results_table
from minisr.runner.config import load_config, to_toml
from minisr.runner.experiment import _run_process, collect, experiment, lookup
from minisr.runner.experiment_plan import overrides, read_plan
from minisr.runner.files import read_json, write_json
from minisr.runner.reuse import copy_unaffected
from minisr.runner.stop import Stop

PLANS = Path(__file__).parents[2] / "tiny_configs" / "experiments"
BASE = """iterations = 1
device = "cpu"
seed_data = {ift = 8, ranked = 8, judge_evaluation = 2, evaluation = 4}
sft = {batch_size = 8, epochs = 1}
prompts = {count = 3, max_rouge_l = 1.0}
judge = {judgements = 1}
dpo = {batch_size = 4}
"""


@pytest.fixture
def plan(tmp_path):
    (tmp_path / "base.toml").write_text(BASE)

    def write(text):
        (tmp_path / "plan.toml").write_text(text)
        return tmp_path / "plan.toml"
    return write


def test_overrides_flatten_sections_for_set(plan):
    table = {"seed": 3, "judge": {"by": "random"}, "dpo": {"replay_weight": 0.0, "beta": 0.2}}
    flat = overrides(table)
    assert flat == ["seed=3", "judge.by=random", "dpo.replay_weight=0.0", "dpo.beta=0.2"]
    config = load_config(plan("").with_name("base.toml"), overrides=tuple(flat))
    assert (config.seed, config.judge.by, config.dpo.replay_weight, config.dpo.beta) == (3, "random", 0.0, 0.2)


@pytest.mark.parametrize("value", ["true", "2024", "1e3", "'a'", '"a" "b"', '"a"', "[1]", " a ", "a # b", "1 # b",
                                   "a\nb", "C:\\x", ""])
def test_a_text_in_a_variant_stays_this_text(value, plan):
    [change] = overrides({"judge": {"command": value}})
    assert load_config(plan("").with_name("base.toml"), overrides=(change,)).judge.command == value


def test_a_list_in_a_variant_stays_this_list(plan):
    changes = overrides({"prompts": {"keywords": ["it's", 'a "b"', "a\nb"]}})
    config = load_config(plan("").with_name("base.toml"), overrides=tuple(changes))
    assert config.prompts.keywords == ("it's", 'a "b"', "a\nb")


def test_a_plan_has_the_base_and_its_variants_with_their_seeds(plan):
    read = read_plan(plan('base = "base.toml"\nseeds = [0, 1, 2]\nvariant_seeds = [0, 1]\n'
                          'common.threads = 1\n[variants.random]\njudge.by = "random"\n'))
    assert read.variants == {"base": (), "random": ("judge.by=random",)}
    assert read.seeds == {"base": [0, 1, 2], "random": [0, 1]}
    assert read.common == ("threads=1",)
    every = read_plan(plan('base = "base.toml"\nseeds = [4, 5]\n[variants.a]\nthreads = 1\n'))
    assert every.seeds["a"] == [4, 5]
    own = read_plan(plan('base = "base.toml"\nseeds = [4, 5]\n[variants.base]\niterations = 3\n'
                         '[variants.a]\nseeds = [5]\ndpo.positives_only = true\n'))
    assert own.seeds == {"base": [4, 5], "a": [5]}
    assert own.variants == {"base": ("iterations=3",), "a": ("dpo.positives_only=true",)}


@pytest.mark.parametrize("text, named", [
    ("seeds = [0]", "must have base and seeds"),
    ('base = "base.toml"', "must have base and seeds"),
    ('base = "base.toml"\nseeds = [0]\nvariant = 1', "must have base and seeds"),
    ('base = "no.toml"\nseeds = [0]', "no.toml"),
    ("base = ", "not valid TOML"),
    ('base = "base.toml"\nseeds = [0]\n[variants.a]\njudge.be = "random"', "unknown key 'be'"),
    ('base = "base.toml"\nseeds = [0]\n[variants.a]\njudge.by = "nobody"', "nobody"),
    ('base = "base.toml"\nseeds = [0]\ncommon.thread = 1', "unknown key 'thread'"),
    ('base = "base.toml"\nseeds = 3', "seeds"),
    ('base = "base.toml"\nseeds = [0]\nvariant_seeds = [1]\n[variants.a]\nthreads = 1', "variant_seeds"),
    ('base = "base.toml"\nseeds = [0]\n[variants.a]\nseeds = [1]', "seeds of a variant"),
    ('base = "base.toml"\nseeds = [0]\n[variants.a]\nseeds = 0', "seeds of a variant"),
    ('base = "base.toml"\nseeds = ["a"]', "seeds must be a list"),
    ('base = "base.toml"\nseeds = [[0]]', "seeds must be a list"),
    ('base = "base.toml"\nseeds = [0, 1, 0]', "seeds must be a list of different numbers"),
    ('base = "base.toml"\nseeds = [0, -1]', "seeds must be a list of different numbers from 0 on"),
    ('base = "base.toml"\nseeds = [0, 1]\n[variants.a]\nseeds = [1, 1]', "seeds of a variant"),
    ('base = "base.toml"\nseeds = [0]\nvariants = 3', "each variant a section"),
    ('base = "base.toml"\nseeds = [0]\n[variants.a]\njudge.by = "command"', "plan.toml, a: judge.by = \"command\" and"),
    ('base = "base.toml"\nseeds = [0]\n[variants.a]\njudge.by = "command"\njudge.command = "no-such-program x"',
     "no-such-program"),
    ('base = "base.toml"\nseeds = [0]\n[variants.a]\nlora.rank = 4\nengine = "plain"', "lora.rank needs engine"),
    ('base = "base.toml"\nseeds = [0]\n[variants.a]\ndtype = "bfloat16"\nengine = "plain"', "bfloat16"),
    ('base = "base.toml"\nseeds = [0]\nvariants.a = 3', "each variant a section"),
    ('base = "base.toml"\nseeds = [0]\n[variants.a]\nseed = 1', "the key seed would give all runs of a variant"),
    ('base = "base.toml"\nseeds = [0]\ncommon.seed = 1', "the key seed would give all runs of a variant"),
])
def test_a_wrong_plan_is_an_error_before_anything_runs(text, named, plan):
    with pytest.raises(InputError) as error:
        read_plan(plan(text))
    assert named in str(error.value)


@pytest.mark.parametrize("path", sorted(PLANS.glob("*.toml")), ids=lambda path: path.stem)
def test_the_included_plans_can_be_read(path):
    read = read_plan(path)
    assert set(read.seeds) == set(read.variants) > {"base"}
    assert all(set(seeds) <= set(read.seeds["base"]) for seeds in read.seeds.values())


MADE = ["seed/ift.jsonl", "M0/meta.json", "SFT/meta.json", "seed/eft.jsonl", "M1/meta.json",
        "SFT/judge_evaluation.jsonl", "M1/judge_evaluation.jsonl", "M1/prompts.jsonl", "M1/responses.jsonl",
        "M1/rewards.jsonl", "M1/rewards.counts.json", "M1/pairs.jsonl", "M2/meta.json", "M2/responses.jsonl",
        "M2/rewards.jsonl", "M2/pairs.jsonl", "M3/meta.json"]


def upto(name):
    """config.toml and what a run makes before this file."""
    return {"config.toml", *MADE[:MADE.index(name)]}


def base_run(folder, config, changes=()):
    about_the_run = ("metrics.json", "head_to_head.json", "head_to_head.jsonl", "head_to_head.journal.1",
                     "config_changes.jsonl", "report.html")
    for name in (*MADE, *about_the_run):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "config.toml").write_text(to_toml(load_config(config, overrides=tuple(changes))))


@pytest.mark.parametrize("changes, copied", [
    (("judge.by=random",), upto("M1/rewards.jsonl")),
    (("dpo.replay_weight=0.5",), upto("M2/meta.json")),
    (("judge.by=M1",), upto("M2/rewards.jsonl")),
    (("dpo.replay_weight=0.5", "judge.by=M1"), upto("M2/meta.json")),
    (("judge.by=oracle", "dpo.beta=0.5"), upto("M1/rewards.jsonl")),
    (("pairs.length_control=0.2",), upto("M1/pairs.jsonl")),
    (("responses.candidates=8",), upto("M1/responses.jsonl")),
    (("prompts.source=people",), upto("M1/prompts.jsonl")),
    (("judge.judgements=8",), upto("SFT/judge_evaluation.jsonl")),
    (("judge.by=command", "judge.command=python"), upto("SFT/judge_evaluation.jsonl")),
    (("judge.timeout=9", "dpo.beta=0.5"), upto("M2/meta.json")),
    (("seed_data.reasons=false",), upto("seed/eft.jsonl")),
    (("judge.template=x.txt",), set()),  # judged records may then be too long
    (("iterations=8",), upto("M3/meta.json") | {"M3/meta.json"}),
    (("iterations=8", "dpo.beta=0.5"), upto("M2/meta.json")),
    (("sft.epochs=3",), upto("SFT/meta.json")), (("engine=plain",), upto("SFT/meta.json")),
    (("dtype=float64", "threads=3", "dpo.beta=0.5"), upto("SFT/meta.json")),
    (("device=auto",), set()), (("dpo.beta=0.5", "seed=3"), set()), (("judge.top_p=0.5",), set())])
def test_a_variant_copies_from_the_base_what_its_changes_do_not_affect(changes, copied, plan, tmp_path):
    toml = plan("").with_name("base.toml")
    base_run(tmp_path / "base-0", toml)
    copy_unaffected(tmp_path / "base-0", tmp_path / "a-0", load_config(toml, overrides=changes))
    found = {path.relative_to(tmp_path / "a-0").as_posix()
             for path in (tmp_path / "a-0").rglob("*") if path.is_file()}
    assert found == copied
    if copied:  # otherwise the run would refuse this folder
        assert load_config(tmp_path / "a-0/config.toml") == load_config(toml, overrides=changes)
    assert not list(tmp_path.glob("*.part"))


def test_the_seconds_of_steps_that_a_variant_makes_again_are_not_copied(plan, tmp_path):
    toml = plan("").with_name("base.toml")
    base_run(tmp_path / "base-0", toml)
    write_json(tmp_path / "base-0/M1/timing.json", {"training": 9.5, "responses": 2.0, "rewards": 3.0, "pairs": 0.5})
    copy_unaffected(tmp_path / "base-0", tmp_path / "a-0", load_config(toml, overrides=("judge.by=random",)))
    assert read_json(tmp_path / "a-0/M1/timing.json", "timing") == {"training": 9.5, "responses": 2.0}


@pytest.mark.parametrize("change", ["judge.template=x.txt", "seed_data.reasons=false", "seed_data.eft_by=none"])
def test_a_change_of_the_judgements_copies_nothing_where_records_of_a_file_may_then_be_too_long(change, plan, tmp_path):
    toml, source = plan("").with_name("base.toml"), "seed_data.source=english"
    base_run(tmp_path / "base-0", toml, [source])
    config = load_config(toml, overrides=(source, "dpo.replay_weight=0", change))
    copy_unaffected(tmp_path / "base-0", tmp_path / "a-0", config)
    assert not (tmp_path / "a-0").exists()


def test_more_judgements_change_eft_data_written_by_the_baseline(plan, tmp_path):
    toml, by = plan("").with_name("base.toml"), "seed_data.eft_by=baseline"
    base_run(tmp_path / "base-0", toml, [by])
    config = load_config(toml, overrides=(by, "judge.judgements=8"))
    copy_unaffected(tmp_path / "base-0", tmp_path / "a-0", config)
    assert not (tmp_path / "a-0/seed/eft.jsonl").exists() and not (tmp_path / "a-0/M1").exists()


class Commands(dict):
    fails = "b-1"


@pytest.fixture
def started(plan, monkeypatch):
    """The settings of each process that an experiment would start, by its run's name; one fails."""
    commands = Commands()

    def popen(command, **_):
        base, folder = command[command.index("run") + 1], Path(command[command.index("--out") + 1])
        commands[folder.name] = command[command.index("--set") + 1::2]
        if folder.name.startswith("base"):
            base_run(folder, base, commands[folder.name])
        seed = int(folder.name[-1])
        metrics = {"flawless": seed, "judge": {"exact": 0.5}}
        code = int(folder.name == commands.fails)
        models = ("SFT", "M1") if code else ("SFT", "M1", "M2")
        write_json(folder / "metrics.json", {"seed": seed, "models": dict.fromkeys(models, metrics)})
        return SimpleNamespace(returncode=code, poll=lambda: code)
    monkeypatch.setattr("minisr.runner.experiment.subprocess", SimpleNamespace(Popen=popen))
    return commands


PLAN = """base = "base.toml"
seeds = [0, 1]
common.threads = 1
[variants]
a = {judge.by = "random"}
b = {dpo.beta = 0.5}
"""


def test_an_experiment_runs_the_base_before_its_variants_and_gathers_by_seed(started, plan, tmp_path):
    results = experiment(plan(PLAN), tmp_path / "out", 1, ["a"])
    assert list(started) == ["base-0", "base-1", "a-0", "a-1"]
    assert started["a-1"] == ["seed=1", "threads=1", "judge.by=random"]
    assert started["base-0"] == ["seed=0", "threads=1"]
    assert list(results) == ["base", "a"] and list(results["a"]) == ["SFT", "M1", "M2"]
    metrics = results["a"]["M2"]
    assert (metrics["seed"], metrics["flawless"], metrics["judge.exact"]) == ([0, 1], [0, 1], [0.5, 0.5])
    assert metrics["versus_m1.win"] == [None, None]  # not measured
    assert (tmp_path / "out/a-0/M1/responses.jsonl").exists()  # the base's
    assert read_json(tmp_path / "out/results.json", "results") == results


@pytest.mark.parametrize("terminal", [False, True])
def test_the_progress_bar_appears_only_on_a_terminal(terminal, started, plan, tmp_path, monkeypatch):
    err = io.StringIO()
    err.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", err)
    experiment(plan(PLAN), tmp_path / "out", 1, ["a"])
    assert ("2/2" in err.getvalue()) == terminal == bool(err.getvalue())


def test_a_run_that_fails_and_an_unknown_variant_are_named(started, plan, tmp_path):
    message = r"1 of 4 runs failed, the others are finished; see the reason in .*b-1\.log"
    with pytest.raises(InputError, match=message):
        experiment(plan(PLAN), tmp_path / "out", 1)
    assert list(started)[-2:] == ["b-0", "b-1"] and list(started)[:2] == ["base-0", "base-1"]
    assert list(read_json(tmp_path / "out/results.json", "results")) == ["base", "a"]  # not half of b
    with pytest.raises(InputError, match="has no variant c; it has base, a, b"):
        experiment(plan(PLAN), tmp_path / "out", 1, ["a", "c"])


def test_runs_of_another_config_are_left_out_and_named(started, plan, tmp_path, capsys):
    path = plan(PLAN.replace("judge.by = \"random\"", "judge.by = \"random\", iterations = 2"))
    assert list(experiment(path, tmp_path / "out", 1, ["a"])) == ["base"]  # M3 is missing
    results = experiment(plan(PLAN), tmp_path / "out", 1, ["base"])
    assert list(results) == ["base", "a"]  # more iterations change no other model
    assert capsys.readouterr().err == ""
    results = experiment(plan(PLAN.replace("random", "oracle")), tmp_path / "out", 1, ["base"])
    assert list(results) == ["base"]
    message = capsys.readouterr().err
    assert "results.json leaves out a: " in message and "judge.by: 'random' -> 'oracle'" in message


def test_no_variant_runs_if_the_base_failed(started, plan, tmp_path):
    text = PLAN.replace("seeds = [0, 1]", "seeds = [0, 1]\nvariant_seeds = [0]")
    (tmp_path / "out").mkdir()
    started.fails = "base-1"
    with pytest.raises(InputError, match=r"1 of 2 runs failed.*base-1\.log"):
        experiment(plan(text), tmp_path / "out", 2)
    assert sorted(started) == ["base-0", "base-1"]


def test_a_missing_judge_prompt_is_an_error_before_anything_runs(plan):
    with pytest.raises(InputError, match="nowhere.txt"):
        read_plan(plan('base = "base.toml"\nseeds = [0]\n[variants.a]\njudge.template = "nowhere.txt"'))


def test_what_only_a_variant_that_does_not_run_needs_may_be_missing(started, plan, tmp_path):
    path = plan(PLAN + 'c = {judge.by = "command", judge.command = "no-such-program"}\n'
                'd = {judge.template = "nowhere.txt"}\n')
    assert list(experiment(path, tmp_path / "out", 1, ["a"])) == ["base", "a"]
    for only, missing in ((["a", "c"], "no-such-program"), (["d"], "nowhere.txt")):
        with pytest.raises(InputError, match=missing):
            experiment(path, tmp_path / "out", 1, only)
    with pytest.raises(InputError, match="unknown key 'be'"):
        experiment(plan(PLAN + 'c = {judge.be = "random"}\n'), tmp_path / "out", 1, ["a"])


def test_a_signal_reaches_the_runs_once_and_no_other_run_begins(plan, tmp_path, monkeypatch):
    asked, begun = [], []

    def popen(command, **_):
        begun.append(command)
        monkeypatch.setattr(Stop, "requested", True)  # while it runs
        return SimpleNamespace(poll=lambda: 0 if asked else None, terminate=lambda: asked.append(1), kill=lambda: None,
                               wait=lambda: None)
    monkeypatch.setattr("minisr.runner.experiment.subprocess", SimpleNamespace(Popen=popen))
    with pytest.raises(KeyboardInterrupt):
        experiment(plan(PLAN), tmp_path / "out", 1)
    assert len(begun) == len(asked) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_second_signal_kills_the_runs(tmp_path, monkeypatch):
    log = tmp_path / "run.log"
    code = ("import signal, time; signal.signal(signal.SIGTERM, lambda *_: print('asked', flush=True))\n"
            "print('ready', flush=True); time.sleep(60); time.sleep(60)")

    def send_signals():
        for name, printed in (("requested", "ready\n"), ("at_once", "ready\nasked\n")):
            while not log.exists() or log.read_text() != printed:
                time.sleep(0.05)
            monkeypatch.setattr(Stop, name, True)
    sender = Thread(target=send_signals, daemon=True)
    sender.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        _run_process([sys.executable, "-c", code], log)
    assert time.monotonic() - began < 30
    sender.join(1)
    assert not sender.is_alive()


@pytest.mark.slow
def test_an_experiment_runs_its_variants_from_the_base_and_prints_a_table(plan, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(sys.modules["minisr"].__file__).parent.parent))
    path = plan('base = "base.toml"\nseeds = [0]\ncommon.threads = 1\n'
                '[variants.random]\njudge.by = "random"\n')
    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(io.StringIO()):
        assert main(["experiment", str(path), "--out", str(tmp_path / "out")]) == 0
    rows = [line.split("|")[1:3] for line in out.getvalue().split("\n")[2:6]]
    assert rows == [[" base ", f" {model} "] for model in ("SFT", "M1", "M2")] + [[" random ", " M2 "]]
    assert "| random M2 - base M2 |" in out.getvalue()
    base, random = (tmp_path / "out" / f"{name}-0" for name in ("base", "random"))
    assert (base / "M1/responses.jsonl").read_bytes() == (random / "M1/responses.jsonl").read_bytes()
    assert (base / "M1/rewards.jsonl").read_bytes() != (random / "M1/rewards.jsonl").read_bytes()
    results = read_json(tmp_path / "out/results.json", "results")
    assert results == json.loads(json.dumps({"base": collect([base], "M2"), "random": collect([random], "M2")}))


def test_collect_reads_metrics_inside_sections_and_lists(tmp_path):
    for seed, criteria in enumerate(([1.0, 1.0, 0.5, 1.0, 0.75], None)):
        model = {"flawless": 0.5, "judge": {"pairwise": 0.8, "exact": None}, "criteria": criteria}
        (tmp_path / str(seed)).mkdir()
        metrics = json.dumps({"seed": seed, "models": {"M1": model}})
        (tmp_path / str(seed) / "metrics.json").write_text(metrics)
    found = collect([tmp_path / "0", tmp_path / "1"], "M1")["M1"]
    wanted = {"seed": [0, 1], "flawless": [0.5, 0.5], "judge.pairwise": [0.8, 0.8],
              "judge.exact": [None, None], "criteria.4": [0.75, None], "versus_m1.win": [None, None]}
    assert {metric: found[metric] for metric in wanted} == wanted
    assert lookup({"criteria": [0.5, 0.25]}, "criteria.1") == 0.25
    assert lookup({}, "judge.exact") is lookup({"judge": None}, "judge.exact") is None


def test_collect_leaves_out_the_models_that_only_a_continued_run_has(tmp_path):
    for seed, models in enumerate((["SFT", "M1", "M2"], ["SFT", "M1"])):
        (tmp_path / str(seed)).mkdir()
        metrics = json.dumps({"seed": seed, "models": {name: {"flawless": 0.5} for name in models}})
        (tmp_path / str(seed) / "metrics.json").write_text(metrics)
    found = collect([tmp_path / "0", tmp_path / "1"], "M1")
    assert {name: values["flawless"] for name, values in found.items()} == {"SFT": [0.5, 0.5], "M1": [0.5, 0.5]}


def table_rows(markdown_text: str) -> list[list[str]]:
    lines = [line for line in markdown_text.split("\n") if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def base_table(rows: list[list[str]]) -> dict[str, dict[str, str]]:
    """{model: {column: value}} of the table of base, whose first cell is "base"."""
    first = next(i for i, row in enumerate(rows) if row[:2] == ["base", "flawless %"])
    names = [name.removeprefix("judge: ") for name in rows[first][1:]]
    return {row[0]: dict(zip(names, row[1:])) for row in rows[first + 1:first + 6]}


@pytest.mark.parametrize("readme", ["README.md", "notebooks/README.md"])
def test_the_base_table_of_each_readme_agrees_with_results_json(readme):
    root = Path(__file__).parents[2]
    results = json.loads((root / "notebooks/results.json").read_text(encoding="utf-8"))
    header, *rows = table_rows(results_table({"base": results["base"]}))
    expected = {row[1]: dict(zip(header[2:], row[2:])) for row in rows[:5]}
    found = base_table(table_rows((root / readme).read_text(encoding="utf-8")))
    assert found.keys() == expected.keys() == {"SFT", "M1", "M2", "M3", "M4"}
    for model, row in found.items():
        for name, value in row.items():
            assert value in ("-", expected[model][name]), (model, name)


ROOT = Path(__file__).parents[2]
COLUMNS = {"flawless": "flawless %", "pairwise": "pairwise %", "correct pairs": "right %", "pairs": "pairs",
           "characters": "chars", "form": "form %"}  # what the README's cells call the columns of a results table


def question_rows(results: dict) -> list[tuple[str, list[str]]]:
    """(variant, cells) of each row of the README's table of questions, whose first cell ends with the variant."""
    rows = table_rows((ROOT / "notebooks/README.md").read_text(encoding="utf-8"))
    first, last = (next(i for i, row in enumerate(rows) if row[0].startswith(head)) for head in ("question", "(l)"))
    named = [[name for name in re.findall(r"\((\w+)\)", row[0]) if name in results] for row in rows[first + 1:last + 1]]
    return [((names or ["base"])[-1], row) for names, row in zip(named, rows[first + 1:last + 1])]


def test_the_differences_in_the_readme_are_those_of_results_json():
    results = json.loads((ROOT / "notebooks/results.json").read_text(encoding="utf-8"))
    header, *printed = table_rows(differences_table(results))
    expected = {row[0]: dict(zip(header[1:], row[1:])) for row in printed}
    checked = 0
    for variant, row in question_rows(results)[:-1]:  # the last row's are between models of one variant
        metric, models = "flawless", ""
        for found in re.findall(r"correct pairs|[a-z]+|M\d - M\d|M\d|[*]*[-+][\d.]+ ± [\d.]+[*]*", row[3]):
            if found in COLUMNS:
                metric = found
            elif found.startswith("M"):
                models = found if " - " in found else f"{found} - base {found}"
            elif "±" in found:
                assert expected[f"{variant} {models}"][COLUMNS[metric]] == found, (variant, models, metric)
                checked += 1
    assert checked > 55


def test_the_results_in_the_readme_are_those_of_results_json():
    results = json.loads((ROOT / "notebooks/results.json").read_text(encoding="utf-8"))
    printed = table_rows(results_table(results))
    checked = 0
    for variant, row in question_rows(results):
        for model, found in re.findall(r"(M\d)?(?: judges)? ?(\d[\d.]* ± [\d.]+)", row[2]):
            cells = [cell for name, other, *values in printed if name == variant and model in ("", other)
                     for cell in values]
            assert found in cells, (variant, model, found)
            checked += 1
    assert checked > 35


def test_the_findings_in_the_readme_are_those_of_the_stored_results():
    results = json.loads((ROOT / "notebooks/results.json").read_text(encoding="utf-8"))
    words = json.loads((ROOT / "notebooks/words.json").read_text(encoding="utf-8"))
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())

    def mean(variant, model, metric, seeds=range(8)):
        metrics = results[variant][model]
        return float(np.mean([value for seed, value in zip(metrics["seed"], metrics[metric]) if seed in seeds]))

    def lost(variant, model, metric):
        seeds = results[variant][model]["seed"]
        return 100 * (mean("base", model, metric, seeds) - mean(variant, model, metric, seeds))

    gains = [100 * (b - a) for a, b in zip(*(results["base"][name]["judge.pairwise"] for name in ("M1", "M3")))]
    half_width = np.std(gains, ddof=1) / len(gains) ** 0.5 * scipy.stats.t.ppf(0.975, len(gains) - 1)
    M1, M3, M5 = (100 * np.mean(words["commongen"]["base"][name]["both"]) for name in ("M1", "M3", "M5"))
    for finding in (
            f"from {100 * mean('base', 'M1', 'flawless_greedy'):.0f} % to "
            f"{100 * mean('base', 'M3', 'flawless_greedy'):.0f} %",
            f"({100 * mean('random', 'M3', 'flawless'):.1f} % against {100 * mean('base', 'M1', 'flawless'):.1f} %)",
            f"M1 loses {lost('no_eft', 'M1', 'judge.pairwise'):.1f} points of pairwise accuracy and M3 "
            f"{lost('no_eft', 'M3', 'flawless'):.1f} points",
            f"(M3 - M1 {np.mean(gains):+.1f} ± {half_width:.1f} points;",
            f"without replay M3 loses {lost('no_replay', 'M3', 'judge.pairwise'):.1f} points",
            f"without it M3 loses {lost('no_nll', 'M3', 'flawless'):.1f} points, and only "
            f"{100 * mean('no_nll', 'M3', 'criteria.4'):.0f} %",
            f"{100 * round(mean('eight_iterations', 'M2', 'pairs') / 100):,} pairs for M2, "
            f"{10 * round(mean('eight_iterations', 'M9', 'pairs') / 10)} for M9",
            f"M1 does so for {M1:.0f} %", f"M3 for {M3:.0f} %, M5 for {M5:.0f} %"):
        assert finding in text
