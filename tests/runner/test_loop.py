import hashlib
import io
import json
import os
import re
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from math import log
from pathlib import Path
from statistics import mean

import drawing
import pytest
import torch
from small_run import MODELS, files, jsonl, minisr, model_of, prompts_of

from minisr import InputError
from minisr.cli import main
from minisr.judge import judge
from minisr.prompts import normalize
from minisr.report.table import line, table
from minisr.runner import run as run_module
from minisr.runner.checkpoint import SEED_MODEL, load_model
from minisr.runner.config import Config, load_config
from minisr.runner.evaluation import evaluated_models, export_answers, training_summary
from minisr.runner.files import jsonl_bytes, read_json, write_jsonl
from minisr.runner.reuse import copy_unaffected
from minisr.runner.run import WORLD_TEMPLATE, Run
from minisr.runner.steps import StoredModel, keep
from minisr.runner.storage import folder_lock, write_with_checksum
from minisr.sampler import Completion
from minisr.worlds.tiny import oracle
from minisr.worlds.tiny.corpus import held_out

pytestmark = pytest.mark.usefixtures("no_drawing")


@pytest.fixture
def drawn(monkeypatch):
    """The pages of runs have their charts, as that of session_run has."""
    drawing.restore(monkeypatch)


@pytest.mark.parametrize("iterations", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_same_seed_gives_the_same_files_bit_for_bit(iterations, config, finished, drawn, tmp_path):
    minisr("run", config, "--out", tmp_path / "again", "--set", f"iterations={iterations}")
    again, whole = files(tmp_path / "again"), files(finished)
    assert again.keys() >= {"M1/pairs.jsonl", "M2/model.pt", "M2/answers.jsonl"}
    of_the_length = set() if iterations == 2 else {"config.toml", "metrics.json", "report.html", "M2/hashes.json"}
    assert {path for path in again if again[path] != whole[path]} == of_the_length
    assert iterations == 1 or again == whole


def test_another_seed_gives_other_files(config, finished, tmp_path):
    minisr("run", config, "--out", tmp_path / "other", "--set", "seed=1", "--set", "iterations=0")
    other, whole = files(tmp_path / "other"), files(finished)
    chance = {path for path in other if path.endswith((".jsonl", "model.pt")) and not path.startswith("M0")}
    assert chance >= {"seed/ift.jsonl", "seed/evaluation.jsonl", "SFT/model.pt", "M1/answers.jsonl"}
    assert [path for path in chance if other[path] == whole[path]] == []
    assert other["M0/model.pt"] == whole["M0/model.pt"]


def test_another_seed_draws_other_responses_from_the_same_model_and_prompts(copy):
    kept, seeds = jsonl(copy / "M1/responses.jsonl"), {}
    for seed in (0, 1):
        (copy / "M1/responses.jsonl").unlink()
        run = Run(copy, replace(load_config(copy / "config.toml"), seed=seed))
        seeds[seed] = keep(StoredModel(run, "M1").respond, prompts_of(copy / "M1"))
    assert seeds[0] == kept != seeds[1]


@pytest.mark.slow
@pytest.mark.parametrize("renamed", [True, False])
def test_a_run_interrupted_at_every_file_and_resumed_gives_the_same_files(
        renamed, config, finished, drawn, tmp_path, monkeypatch):
    # renamed: interrupted as soon as a file that ends a step exists. Otherwise: interrupted just before any file is
    # renamed, so that its .part remains and its step must be repeated.
    rename, stopped_at = os.replace, []

    def stop(source, target):
        name = target.relative_to(tmp_path).as_posix()
        here = not renamed or target.suffix == ".jsonl" or target.name in ("meta.json", "metrics.json")
        if renamed:
            rename(source, target)
        is_stopping = sys.exc_info()[0] is KeyboardInterrupt  # the time that a step took is then written
        if here and name not in stopped_at and not is_stopping:
            stopped_at.append(name)
            raise KeyboardInterrupt
        if not renamed:
            rename(source, target)

    monkeypatch.setattr("minisr.runner.files.os.replace", stop)
    codes = []
    while not codes or codes[-1] == 130:
        codes.append(minisr("run", config, "--out", tmp_path / "run")[0])
    assert codes == [130] * len(stopped_at) + [0]
    made = {path for path in files(finished) if path.endswith(("meta.json", ".jsonl"))}
    assert {f"run/{path}" for path in made | {"metrics.json"}} <= set(stopped_at)
    assert files(tmp_path / "run") == files(finished)


def test_an_interrupted_run_says_how_to_resume_and_returns_130(config, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr("minisr.loop.SelfRewardingModel.train_sft", interrupt)
    code, _, err = minisr("run", config, "--out", tmp_path / "run")
    assert code == 130 and "to resume, run the same command again" in err and "Traceback" not in err


def test_every_model_names_the_parent_it_was_trained_from(finished):
    meta = {name: read_json(finished / name / "meta.json", "meta") for name in ("M0", *MODELS)}
    assert {name: meta[name]["parent"] for name in MODELS} == {
        "SFT": "M0", "M1": "M0", "M2": "M1", "M3": "M2"}
    for name in MODELS:
        assert meta[name]["parent_hash"] == meta[meta[name]["parent"]]["hash"]
        assert meta[name]["hash"] == hashlib.sha256((finished / name / "model.pt").read_bytes()).hexdigest()
    assert len({meta[name]["hash"] for name in meta}) == 5  # each training changed something


def test_the_m0_of_a_run_is_the_seed_model(finished):
    ours, theirs = load_model(finished / "M0")[0].state_dict(), load_model(SEED_MODEL)[0].state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_more_iterations_continue_a_finished_run_and_change_none_of_its_results(config, copy):
    before = files(copy)
    code, out, _ = minisr("run", config, "--out", copy, "--set", "iterations=3")
    after = files(copy)
    assert code == 0 and re.search(r"^M4 ", out, re.MULTILINE)
    assert read_json(copy / "M4/meta.json", "meta")["parent_hash"] == read_json(
        copy / "M3/meta.json", "meta")["hash"]
    assert {path for path in before if after[path] != before[path]} == {
        "config.toml", "metrics.json", "report.html", "M3/hashes.json"}


@pytest.mark.slow
def test_continuing_to_m4_gives_the_files_of_a_run_to_m4(config, copy, tmp_path):
    minisr("run", config, "--out", copy, "--set", "iterations=3")
    minisr("run", config, "--out", tmp_path / "at once", "--set", "iterations=3")
    assert files(copy) == files(tmp_path / "at once")


@pytest.mark.parametrize("change, difference", [
    ("iterations=1", "iterations: 2 -> 1"), ("judge.by=oracle", "judge.by: 'self' -> 'oracle'"),
    ("dpo.beta=0.2", "dpo.beta: 0.1 -> 0.2")])
def test_another_config_in_a_finished_run_is_refused_with_the_difference(change, difference, config, finished):
    before = files(finished)
    code, _, err = minisr("run", config, "--out", finished, "--set", change)
    assert code == 2 and difference in err
    assert files(finished) == before


@pytest.mark.parametrize("name", ["M1", "M2"])
def test_pairs_are_the_best_and_the_worst_response_by_mean_score(finished, name):
    prompts, y, r, pairs = (jsonl(finished / name / f"{what}.jsonl")
                            for what in ("prompts", "responses", "rewards", "pairs"))
    assert [record["prompt"] for record in prompts] == [record["prompt"] for record in y]
    expected = []
    for yi, ri in zip(y, r, strict=True):
        means = [mean(s for s in scores if s is not None) if done and set(scores) != {None} else None
                 for scores, done in zip(ri["scores"], yi["finished"], strict=True)]
        assert ri["rewards"] == means and ri["prompt"] == yi["prompt"]
        known = [m for m in means if m is not None]
        if len(known) > 1 and min(known) < max(known):
            w, l = means.index(max(known)), means.index(min(known))  # noqa: E741
            expected.append({"prompt": yi["prompt"], "chosen": yi["responses"][w],
                             "rejected": yi["responses"][l],
                             "chosen_reward": means[w], "rejected_reward": means[l]})
            a, b = (ri["scores"][i] for i in (w, l))
            marks = [(p > q) - (p < q) for p in a for q in b if None not in (p, q)]
            expected[-1]["agreement"] = pytest.approx((1 + mean(marks)) / 2)
    assert pairs and pairs == [pair for pair in expected if pair["chosen"] != pair["rejected"]]


@pytest.mark.parametrize("name", ["M2", "M3"])
def test_a_model_begins_as_its_parent_which_is_its_reference(finished, name):
    # The parent's log-probabilities were recorded while it sampled. With another model's, the margin would not be 0.
    first = jsonl(finished / name / "train_log.jsonl")[0]
    assert [first["dpo_loss"], first["margin"]] == pytest.approx([log(2), 0], abs=1e-4)


def test_a_log_probability_is_stored_only_if_training_encodes_the_same_tokens(copy, monkeypatch):
    model = model_of(copy, "M1")
    tokenizer, text = model.lm.tokenizer, "Once there was a fox."
    letters = ["▁", *text.replace(" ", "▁")]
    whole = tokenizer.encode_response(text)
    apart = [tokenizer.vocabulary.pieces.piece_to_id(c) for c in letters]
    assert tokenizer.decode(whole) == tokenizer.decode(apart) == text and apart[0] > 2
    drawn = [Completion(whole, True, -1.5), Completion([*apart, tokenizer.eos_id], True, -2.5),
             Completion(whole[:-1], False)]
    monkeypatch.setattr(model.lm, "sample", lambda *_: [drawn])
    (copy / "M1/responses.jsonl").unlink()
    [record] = keep(model.respond, ["News?"])
    assert (record["responses"], record["logps"]) == ([text] * 3, [-1.5, None, None])


def test_a_response_that_training_could_not_hold_counts_as_cut_off(copy, monkeypatch):
    # The response ended in time, but training encodes the same text in more tokens than max_seq_len leaves.
    model = model_of(copy, "M1")
    tokenizer = model.lm.tokenizer
    room = model.lm.max_seq_len - len(tokenizer.encode_prompt("News?"))
    answers = {text: [5] * length for text, length in (("fits", room), ("one more", room + 1))}
    drawn = [Completion([text], True, -1.5) for text in answers]
    monkeypatch.setattr(model.lm, "sample", lambda *_: [drawn])
    monkeypatch.setattr(tokenizer, "decode_response", lambda ids: ids[0])
    monkeypatch.setattr(tokenizer, "encode_response", answers.get)
    (copy / "M1/responses.jsonl").unlink()
    [record] = keep(model.respond, ["News?"])
    assert (record["responses"], record["finished"]) == (["fits", "one more"], [True, False])


def test_without_any_pair_the_next_model_has_the_same_weights(copy):
    shutil.rmtree(copy / "M2")
    keep(model_of(copy, "M1").train_dpo, [])
    same, other = (load_model(copy / name)[0].state_dict() for name in ("M1", "M2"))
    assert all(torch.equal(same[name], other[name]) for name in same)
    assert jsonl(copy / "M2/train_log.jsonl") == []


def test_a_model_trained_from_another_parent_is_refused_by_name(copy):
    meta = copy / "M2/meta.json"
    meta.write_text(meta.read_text().replace(read_json(copy / "M1/meta.json", "meta")["hash"], "0" * 64))
    code, _, err = minisr("run", copy / "config.toml", "--out", copy)
    assert code == 2 and "M2 was trained from another M1" in err and err.count("\n") == 1


def test_without_prompts_and_clock_times_the_models_can_be_evaluated(copy):
    model = model_of(copy, "M2")
    for path in copy.glob("*/timing.json"):
        path.unlink()
    summary = training_summary(model)
    assert summary["seconds"] == 0 and summary["distinct"] > 0
    (copy / "M1/responses.counts.json").write_text(json.dumps({"finished": 0, "cut": 0, "distinct": 0}))
    assert training_summary(model)["distinct"] == 0


def test_the_judge_prompt_of_an_existing_run_is_not_checked_again(copy):
    kept = "Rate {response} to {prompt} from 0 to 10. An earlier version accepted this."
    write_with_checksum(copy / "judge.txt", f"{kept}\n".encode())
    assert Run(copy, load_config(copy / "config.toml")).judge_template == kept


def test_a_run_uses_the_judge_prompt_that_it_began_with(config, copy, tmp_path):
    kept = copy / "judge.txt"
    assert kept.read_text() == WORLD_TEMPLATE.read_text()
    before = Run(copy, load_config(copy / "config.toml"))
    kept.write_text("{prompt} {response}")  # an edit by hand
    with pytest.raises(InputError, match=r"judge\.txt is not the file that minisr wrote there"):
        Run(copy, load_config(copy / "config.toml"))
    own = tmp_path / "own.txt"
    own.write_text("Score: N. Rate {response} to {prompt}\n")
    changed = load_config(copy / "config.toml", overrides=(f"judge.template={own}",))
    Run.open(tmp_path / "new", changed)
    own.write_text("Another {prompt} {response}")
    assert Run(tmp_path / "new", changed).judge_template == "Score: N. Rate {response} to {prompt}" != \
        before.judge_template


def test_a_second_process_changes_no_config(config, copy):
    stored = (copy / "config.toml").read_bytes()
    with folder_lock(copy), pytest.raises(InputError, match="another minisr process works in"):
        Run.open(copy, load_config(config, overrides=("iterations=7",)))
    assert (copy / "config.toml").read_bytes() == stored


def test_no_training_file_holds_an_evaluation_prompt(finished):
    kept = [normalize(record["prompt"]) for name in ("evaluation", "judge_evaluation")
            for record in jsonl(finished / f"seed/{name}.jsonl")]
    for name in ("seed/ift", "seed/eft", "seed/ranked", "M1/prompts", "M2/prompts"):
        for record in jsonl(finished / f"{name}.jsonl"):
            assert not any(prompt in normalize(record["prompt"]) for prompt in kept)


def test_the_seed_data_trains_on_one_side_of_the_split_and_evaluates_on_the_other(finished):
    for name in ("ift", "ranked", "evaluation", "judge_evaluation"):
        for record in jsonl(finished / f"seed/{name}.jsonl"):
            assert held_out(oracle.parse_request(record["prompt"])) == ("evaluation" in name)


def test_a_new_prompt_that_is_an_evaluation_prompt_is_rejected(copy):
    # A model hardly ever writes one by chance, so two prompts that it does write become evaluation prompts.
    first, second, *_ = (record["prompt"] for record in jsonl(copy / "M1/prompts.jsonl"))
    for name, extra in (("evaluation", {"prompt": first}), ("judge_evaluation", {"prompt": second})):
        path = copy / f"seed/{name}.jsonl"
        write_with_checksum(path, jsonl_bytes([*jsonl(path), extra]))
    (copy / "M1/prompts.jsonl").unlink()
    again = keep(model_of(copy, "M1").new_prompts)
    assert again and not {first, second} & set(again)
    assert read_json(copy / "M1/prompts.counts.json", "counts")["evaluation prompt"] >= 2


def judged_by(finished, config, folder, who):
    """The finished run with another judge. Everything up to M1's responses is the same and is copied."""
    copy_unaffected(finished, folder, load_config(finished / "config.toml", overrides=(f"judge.by={who}",)))
    assert minisr("run", config, "--out", folder, "--set", f"judge.by={who}")[0] == 0
    return folder


def test_the_oracle_as_judge_gives_the_oracles_scores(config, finished, tmp_path):
    run = judged_by(finished, config, tmp_path / "oracle", "oracle")
    for name in ("M1", "M2"):
        y, r = jsonl(run / name / "responses.jsonl"), jsonl(run / name / "rewards.jsonl")
        for yi, ri in zip(y, r, strict=True):
            assert ri["rewards"] == [oracle.score(yi["prompt"], text) if done else None
                                     for text, done in zip(yi["responses"], yi["finished"])]


def test_the_random_judge_gives_every_score(config, finished, tmp_path):
    run = judged_by(finished, config, tmp_path / "random", "random")
    rows = jsonl(run / "M1/rewards.jsonl")
    scores = [s for record in rows for row in record["scores"] for s in row]
    assert set(scores) == {0, 1, 2, 3, 4, 5} and len(scores) == 8 * 4 * 2
    assert rows != jsonl(finished / "M1/rewards.jsonl")
    assert (run / "M1/responses.jsonl").read_bytes() == (finished / "M1/responses.jsonl").read_bytes()
    assert (run / "M2/model.pt").read_bytes() != (finished / "M2/model.pt").read_bytes()


@pytest.mark.parametrize("who, judging", [("self", "M2"), ("M1", "M1")])
def test_the_second_iteration_is_judged_by_the_model_that_the_config_names(
        who, judging, config, finished, tmp_path):
    folder = finished if who == "self" else judged_by(finished, config, tmp_path / "frozen", "M1")
    run = Run(folder, load_config(folder / "config.toml"))
    y, r = jsonl(folder / "M2/responses.jsonl"), jsonl(folder / "M2/rewards.jsonl")
    flat = [(record["prompt"], text) for record in y for text in record["responses"]]

    def texts_of(name):
        judged = judge(run.load_lm(name), run.judge_template, *zip(*flat), run.config.judge, run.seed("M2", "judge"))
        return [[judgement.text for judgement in row] for row in judged]

    kept = [texts for record in r for texts in record["judgements"]]
    assert kept == texts_of(judging)
    del flat[4:]  # the first prompt's responses are enough to see that another model judges otherwise
    assert kept[:4] != texts_of("M1" if judging == "M2" else "M2")


def with_interval(table, *keys):
    return all(table[f"{key}_ci95"][0] <= table[key] <= table[f"{key}_ci95"][1] for key in keys)


def test_every_metric_is_there_with_its_interval(finished):
    models = read_json(finished / "metrics.json", "metrics")["models"]
    assert tuple(models) == MODELS
    for name, m in models.items():
        assert with_interval(m, "flawless", "flawless_greedy", "mean_score")
        assert with_interval(m["judge"], "pairwise")
        assert {"five_best", "exact", "spearman", "kendall", "parse_rate"} <= set(m["judge"])
        assert m["length"] > 0 and m["seconds"] > 0 and m == read_json(
            finished / name / "evaluation.json", "evaluation")
        for versus in ("versus_previous", "versus_sft"):
            assert (versus in m) == (name != "SFT")
            if name != "SFT":
                assert with_interval(m[versus], "win", "tie", "lose")
    pairs = {name: len(jsonl(finished / name / "pairs.jsonl")) for name in ("M1", "M2")}
    assert {name: m["pairs"] for name, m in models.items()} == {
        "SFT": 0, "M1": 0, "M2": pairs["M1"], "M3": pairs["M2"]}


def test_the_readme_names_every_file_of_a_run_and_every_key_of_its_metrics(finished):
    text = (Path(__file__).parents[2] / "minisr/README.md").read_text()
    tables = text[text.index("## The run folder"):text.index("## For other implementations")]
    named = set(re.findall(r"[`/]([\w.]+)`", tables))
    made = {path.name for path in finished.rglob("*") if path.is_file()}
    assert {name for name in made if not name.endswith(".counts.json")} - named == set()
    keys = set()
    for metrics in read_json(finished / "metrics.json", "metrics")["models"].values():
        keys |= {*metrics, *metrics["judge"]}
    assert {key.removesuffix("_ci95") for key in keys} - named == set()


@pytest.mark.slow
def test_the_readmes_example_in_python_works_as_printed(capsys):
    text = (Path(__file__).parents[2] / "minisr/README.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    changes = {"ift=128, ranked=64": "ift=16, ranked=16", "epochs=2": "epochs=1", "count=16": "count=4"}
    for printed, small in changes.items():
        assert printed in code
        code = code.replace(printed, small)
    names = {}
    exec(code, names)
    assert [model.name for model in (names["SFT"], names["M1"], names["M2"])] == ["SFT", "M1", "M2"]
    assert capsys.readouterr().out.startswith(str(names["M1"].counts["pairs"]))


def test_scores_and_wins_are_the_oracles_of_the_answers_on_disk(finished):
    models = read_json(finished / "metrics.json", "metrics")["models"]
    answers = {name: jsonl(finished / name / "answers.jsonl") for name in MODELS}
    score = {name: [oracle.score(a["prompt"], a["sampled"]) for a in rows] for name, rows in answers.items()}
    for before, name in zip(("SFT", *MODELS), MODELS):
        m = models[name]
        assert m["mean_score"] == pytest.approx(mean(score[name]))
        assert m["flawless"] == mean(s == 5 for s in score[name])
        assert m["flawless_greedy"] == mean(
            oracle.score(a["prompt"], a["greedy"]) == 5 for a in answers[name])
        for versus, other in (("versus_previous", before), ("versus_sft", "SFT")) if name != "SFT" else ():
            assert m[versus]["win"] == mean(a > b for a, b in zip(score[name], score[other]))
            assert m[versus]["lose"] == mean(a < b for a, b in zip(score[name], score[other]))


def test_a_run_ends_with_a_table_and_eval_prints_the_same(session_run, copy):
    table = re.findall(r"^(SFT|M\d)  .*$", session_run[1], re.MULTILINE)
    assert tuple(table) == MODELS
    (copy / "metrics.json").unlink()
    code, out, _ = minisr("eval", copy)
    assert code == 0 and out.split("\n\n")[0] in session_run[1]
    assert files(copy) == files(session_run[0])


def test_the_seed_model_is_read_exactly_also_for_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "uses_gpu", lambda config: True)
    run = Run(tmp_path / "run", Config())
    model, _ = run.load_seed_model()
    assert run.device == "cuda" and {p.dtype for p in model.parameters()} == {torch.float32}
    stored, _ = load_model(SEED_MODEL)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), stored.parameters(), strict=True))


def test_a_model_that_no_pair_trained_is_reported_as_the_previous_one(finished):
    metrics = read_json(finished / "metrics.json", "metrics")
    name, last = list(metrics["models"].items())[-1]
    assert "no preference pair" not in line(metrics)
    last["pairs"] = 0  # as with dpo.positives_only, where pairs are selected but not trained on
    assert "no preference pair" not in line(metrics)
    last["selection"]["pairs"] = 0
    assert "no preference pair was found, so its weights equal the previous model's" in line(metrics)
    row = next(row for row in table(metrics).splitlines() if row.startswith(name))
    assert row.split()[-2] == "0"  # pairs, before seconds


def test_show_prints_a_prompts_responses_pair_and_log_probabilities(finished):
    pair = jsonl(finished / "M1/pairs.jsonl")[0]
    y, r = jsonl(finished / "M1/responses.jsonl"), jsonl(finished / "M1/rewards.jsonl")
    number = [record["prompt"] for record in y].index(pair["prompt"])
    code, out, _ = minisr("show", finished, "--model", "M1", "--prompt", number)
    assert code == 0 and f"\nx  {pair['prompt']}\n" in out
    for n, text in enumerate(y[number]["responses"]):
        assert f"y^{n + 1}  {text}\n" in out
        assert r[number]["judgements"][n][0].split("\n")[0] in out
    assert f"y_w  {pair['chosen']}\n" in out and f"y_l  {pair['rejected']}\n" in out
    rows = [[float(v) for v in row] for row in re.findall(r"^M[12] +(\S+) +(\S+) +(\S+)$", out, re.MULTILINE)]
    assert len(rows) == 2 and rows[0] != rows[1]
    assert all(chosen - rejected == pytest.approx(gap, abs=0.02) for chosen, rejected, gap in rows)


def test_show_says_why_there_is_no_pair_and_colors_the_loss_mask_in_a_terminal(copy):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    pair = jsonl(copy / "M1/pairs.jsonl")[0]
    number = [r["prompt"] for r in jsonl(copy / "M1/responses.jsonl")].index(pair["prompt"])
    with redirect_stdout(Terminal()) as out:
        assert main(["show", str(copy), "--model", "M1", "--prompt", str(number)]) == 0
    printed, colored = out.getvalue().split("tokens in the loss (green):")
    grey, green = (re.findall(rf"\033\[{color}m(.*?)\033\[0m", colored, re.DOTALL) for color in (90, 32))
    assert "\033" not in printed and pair["prompt"] in "".join(grey)
    assert pair["chosen"] in "".join(green) and pair["rejected"] in "".join(green)
    write_with_checksum(copy / "M1/pairs.jsonl", b"")
    out = minisr("show", copy, "--model", "M1", "--prompt", number)[1]
    assert "no pair: equal rewards" in out and "y_w" not in out


def test_show_prints_every_models_answers_with_their_points(finished):
    code, out, _ = minisr("show", finished, "--answers", "2")
    assert code == 0 and out.count("x    ") == 2
    for name in MODELS:
        for record in jsonl(finished / name / "answers.jsonl")[:2]:
            said = record["sampled"].replace("\n", "\n     ")
            assert f"{name:4} {said}  ({sum(record['sampled_points'])} points)\n" in out


def test_answers_for_an_external_judge_are_one_file_per_model_in_alpacaevals_format(copy, tmp_path):
    before, asked = files(copy), ["News?", "Write a story about a sad pig at the river."]
    write_jsonl(tmp_path / "asked.jsonl", [{"instruction": prompt} for prompt in asked])
    code, out, _ = minisr("eval", copy, "--export", tmp_path / "a", "--prompts", tmp_path / "asked.jsonl")
    assert code == 0 and "SFT, M1, M2, M3 to 2 prompts" in out and files(copy) == before
    said = {name: read_json(tmp_path / f"a/{name}.json", "answers") for name in MODELS}
    for name, records in said.items():
        assert [record["instruction"] for record in records] == asked
        assert {record["generator"] for record in records} == {f"minisr copy {name}"}
        assert all(record["output"] for record in records)
    assert len({str([record["output"] for record in records]) for records in said.values()}) > 1


def test_the_evaluated_answers_are_exported_and_only_other_prompts_are_answered_anew(copy, tmp_path, monkeypatch):
    assert minisr("eval", copy, "--export", tmp_path / "a")[0] == 0
    for name in MODELS:
        assert read_json(tmp_path / f"a/{name}.json", "answers") == [
            {"instruction": record["prompt"], "output": record["sampled"], "generator": f"minisr copy {name}"}
            for record in jsonl(copy / name / "answers.jsonl")]
    known, asked = jsonl(copy / "M3/answers.jsonl")[4], []

    def sample(lm, prompts, *_):
        asked.append(prompts)
        return [("Hello.", True)]
    monkeypatch.setattr("minisr.runner.evaluation.sample_answers", sample)
    model = model_of(copy, "M3")
    export_answers(model, ["News?", known["prompt"]], tmp_path / "mixed.json")
    outputs = [record["output"] for record in read_json(tmp_path / "mixed.json", "answers")]
    assert (outputs, asked) == (["Hello.", known["sampled"]], [["News?"]])


def test_an_export_without_prompts_or_into_a_file_is_one_line(finished, tmp_path):
    (tmp_path / "none.jsonl").write_text("")
    code, _, err = minisr("eval", finished, "--export", tmp_path / "a", "--prompts", tmp_path / "none.jsonl")
    assert (code, err) == (2, f"minisr: {tmp_path}/none.jsonl has no prompts\n")
    code, _, err = minisr("eval", finished, "--export", tmp_path / "none.jsonl")
    assert (code, err) == (2, f"minisr: {tmp_path}/none.jsonl is a file; choose a folder with --export\n")


def test_a_finished_run_says_so_and_prints_its_table(session_run, config, copy):
    code, out, _ = minisr("run", config, "--out", copy)
    first, rest = out.split("\n", 1)
    assert code == 0 and first == f"{copy} is finished already; checking its files"
    assert "finished already" not in session_run[1] and "done in" in session_run[1] and "done in" not in out
    assert rest.split("\n\n")[0].strip() in session_run[1]


def test_a_model_that_was_moved_away_is_not_finished(copy):
    (copy / "M3/meta.json").rename(copy / "moved.json")
    assert evaluated_models(copy / "metrics.json") == {"SFT", "M1", "M2"}
    code, _, _ = minisr("eval", copy)
    assert code == 0 and list(read_json(copy / "metrics.json", "metrics")["models"]) == ["SFT", "M1", "M2"]


def test_a_path_may_be_a_number(config):
    loaded = load_config(config, overrides=("seed_data.source=2024", "seed_model=1e3", "judge.template=2024-11-26"))
    assert (loaded.seed_data.source, loaded.seed_model, loaded.judge.template) == ("2024", "1e3", "2024-11-26")


def test_a_tilde_is_the_home_folder_in_configs_and_on_the_command_line(copy, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.toml").write_text('seed_model = "~/copy/M0"\nseed_data = {source = "~/data"}\n')
    loaded = load_config(tmp_path / "c.toml", overrides=("judge.template=~/judge.txt", "chat=~/chat.txt"))
    assert (loaded.seed_model, loaded.seed_data.source, loaded.judge.template, loaded.chat) == tuple(
        f"{tmp_path}/{name}" for name in ("copy/M0", "data", "judge.txt", "chat.txt"))
    assert minisr("show", "~/copy", "--answers", "1")[0] == 0
    assert minisr("chat", "~/copy/M1", "--ask", "~", "-n", "1", "--max-new-tokens", "2")[0] == 0
    assert minisr("import", "~/copy/M1", "--out", "~/imported", "--chat", "tiny")[0] == 0
    assert (tmp_path / "imported/meta.json").exists()


def test_a_closed_pipe_is_no_error(finished, monkeypatch):
    def hang_up(*_):
        raise BrokenPipeError
    monkeypatch.setattr("minisr.report.show.show_prompt", hang_up)
    with redirect_stderr(io.StringIO()) as err:
        assert main(["show", str(finished)]) == 0
    assert err.closed  # or Python would complain when it flushes


def test_an_unexpected_disk_error_is_one_line(finished, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device", "some/file")
    monkeypatch.setattr("minisr.report.show.show_prompt", fail)
    code, _, err = minisr("show", finished)
    assert code == 2 and re.fullmatch(
        r"minisr: .*No space left on device: 'some/file'; fix this, then run the same command again\n", err)


def test_a_question_that_is_too_long_does_not_end_the_chat(finished, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Write a story. " * 200 + "\n\nNews?\n"))
    code, out, err = minisr("chat", finished / "M1", "-n", "1")
    assert code == 0 and "803 tokens; the model takes 1 to 255" in err
    assert out.count("judgements parsed; the first:)") == 1


def test_chat_prints_n_answers_with_a_judgement_each_best_first(finished, monkeypatch):
    question = "Write a story about a sad pig at the river."
    code, out, _ = minisr("chat", finished / "M3", "--ask", question, "-n", "5")
    rewards = re.findall(r"^(unparsed| +[0-9.]+)  ", out, re.MULTILINE)[:5]
    numbers = [-1 if reward == "unparsed" else float(reward) for reward in rewards]
    assert code == 0 and len(numbers) == 5 and numbers == sorted(numbers, reverse=True)
    assert len(re.findall(r"^        \| ", out, re.MULTILINE)) >= 5
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{question}\n\n"))
    assert minisr("chat", finished / "M3", "-n", "5")[1] == out  # the question on standard input
