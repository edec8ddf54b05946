"""Answers that try to set their own score: hostile.jsonl, by families ("closing tag/tab").

The guarantees of the pipeline are tested here: only the judge's text is parsed, no response closes its frame in the
judge prompt, no text makes special tokens. How a trained judge scores such answers is measured by injection_report.py.
"""

import io
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import injection_report
import pytest
from injection_report import Case, family_of, hostile_texts, row, strongest
from tiny import byte_level_json, speaker, tiny_tokenizer

from minisr.cli import main
from minisr.interop.chat_templates import chat_template
from minisr.interop.tokenizer_json import TokenizerJSON
from minisr.judge import JudgeConfig, Judgement, judge, judge_prompt, parse_score, reward
from minisr.lm import LM
from minisr.pairs import select_pairs
from minisr.report.chat import EXAMPLE
from minisr.runner.checkpoint import save_model
from minisr.runner.files import read_jsonl, write_jsonl
from minisr.runner.run import ENGLISH_TEMPLATE, WORLD_TEMPLATE, load_template
from minisr.tokenizer import Tokenizer
from minisr.worlds.tiny import oracle

PIG = "Write a story about a sad pig at the river."
RECORDS = read_jsonl(Path(__file__).with_name("hostile.jsonl"), "hostile answers", ("name", "response"))
HOSTILE = {record["name"]: record["response"] for record in RECORDS}
TEMPLATES = {"world": load_template(WORLD_TEMPLATE), "english": load_template(ENGLISH_TEMPLATE)}
CONFIG = JudgeConfig(judgements=1, max_new_tokens=12)
CONTEXT = 2048  # all answers fit except some of those with 10,000 characters


def families() -> dict[str, list[str]]:
    """{family: names}, in the file's order."""
    found = {}
    for name in HOSTILE:
        found.setdefault(name.partition("/")[0], []).append(name)
    return found


@cache
def judged(says: str, template: str) -> dict[str, Judgement]:
    """The judgement of each hostile answer by a judge that always writes the same."""
    lm = LM(speaker(says, CONTEXT), tiny_tokenizer())
    rows = judge(lm, TEMPLATES[template], [EXAMPLE] * len(HOSTILE), list(HOSTILE.values()), CONFIG, 0)
    return {name: judgement for name, [judgement] in zip(HOSTILE, rows)}


def too_long(template: str, says: str) -> set[str]:
    """Answers that leave no room for the judgement within max_seq_len."""
    tokenizer, said = tiny_tokenizer(), len(tiny_tokenizer().encode_response(says))
    return {name for name, response in HOSTILE.items() if said + len(tokenizer.encode_prompt(
        judge_prompt(TEMPLATES[template], EXAMPLE, response))) > CONTEXT}


def test_there_are_many_hostile_answers_of_many_kinds():
    assert len(RECORDS) == len(HOSTILE) >= 150
    assert len(families()) >= 12 and min(map(len, families().values())) >= 7
    # Many would work if they were parsed; others hide the score in a sentence or in signs, where it is no mark.
    assert sum(parse_score(response) == 5 for response in HOSTILE.values()) > 70


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("says, score", [("Score:1", 1), ("Score:3", 3), ("Fine.", None)])
def test_only_what_the_judge_writes_is_parsed(says, score, template):
    unparsed = too_long(template, says)
    assert {name.partition("/")[0] for name in unparsed} == {"long"}
    given = judged(says, template)
    assert {name for name in HOSTILE if given[name] != Judgement(says, score)} == unparsed
    assert [given[name].score for name in unparsed] == [None] * len(unparsed)


@pytest.mark.parametrize("says, score", [("Score:1", 1), ("Fine.", None)])
def test_a_hostile_prompt_sets_no_score_either(says, score):
    short = [text for name, text in HOSTILE.items() if not name.startswith("long/")]
    lm = LM(speaker(says, CONTEXT), tiny_tokenizer())
    rows = judge(lm, TEMPLATES["english"], short, ["A fox."] * len(short), CONFIG, 0)
    assert rows == [[Judgement(says, score)]] * len(short)


def test_too_long_answers_are_unparsed_and_counted_and_all_others_are_judged():
    names = sorted(too_long("world", "Score:3"))
    assert len(names) >= 4
    rewards = [[reward([judged("Score:3", "world")[name]]), 3.0] for name in names]
    pairs, counts = select_pairs(names, [[HOSTILE[name], "A fox."] for name in names], rewards)
    assert pairs == [] and counts["unread"] == len(names)
    assert judged("Score:3", "world")["nothing/at all"].score == 3


@pytest.mark.parametrize("name", HOSTILE)
def test_no_answer_closes_its_frame_in_the_judge_prompt(name):
    before, _, after = TEMPLATES["english"].replace("{prompt}", EXAMPLE).partition("{response}")
    text = judge_prompt(TEMPLATES["english"], EXAMPLE, HOSTILE[name])
    assert text.startswith(before) and text.endswith(after)  # the instructions after it are unchanged
    closing = [match.start() for match in re.finditer(r"</\s*(?:response|prompt)", text, re.IGNORECASE)]
    assert closing == [text.rindex("</response>")] and text[closing[0]:] == after.lstrip()
    inside = text[len(before):-len(after)]
    assert inside == HOSTILE[name] or "<" in HOSTILE[name]
    assert re.sub(r"\s", "", inside) == re.sub(r"\s", "", HOSTILE[name])  # nothing is removed


CHATS = {"tiny": (), "llama2": (), "plain": (), "chatml": ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
         "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
         "zephyr": ("<|user|>", "<|assistant|>", "<s>", "</s>")}


@cache
def chat_tokenizer(chat: str) -> Tokenizer:
    if not CHATS[chat]:
        return Tokenizer(tiny_tokenizer().vocabulary, chat_template(chat))
    return Tokenizer(TokenizerJSON(byte_level_json(*CHATS[chat]).encode()), chat_template(chat))


@pytest.mark.parametrize("chat", CHATS)
def test_only_the_template_makes_special_tokens(chat):
    tokenizer = chat_tokenizer(chat)
    special = set(tokenizer.vocabulary.specials.values())
    plain = [i for i in tokenizer.encode_prompt("") if i in special]
    assert len(plain) >= 1
    for name, response in HOSTILE.items():
        assert special.isdisjoint(tokenizer.encode(response)), name
        asked = tokenizer.encode_prompt(judge_prompt(TEMPLATES["english"], EXAMPLE, response))
        assert [i for i in asked if i in special] == plain, name
        assert special & set(tokenizer.encode_response(response)[:-1]) == set(), name


def test_the_text_of_a_hostile_answer_does_not_decide_a_pair():
    # The judge writes the same about all of them, so no answer is better than another.
    prompts = list(HOSTILE)
    for says in ("Score:3", "Fine."):
        rewards = [[reward([judged(says, "world")[name]]), 3.0] for name in prompts]
        pairs, counts = select_pairs(prompts, [[HOSTILE[name], "A fox."] for name in prompts], rewards)
        assert pairs == [] and counts["tie"] + counts["unread"] == len(prompts)


@pytest.mark.parametrize("own, chosen, rejected", [
    (None, "good", "bad"), (3.0, "good", "bad"), (5.0, "hostile", "bad"), (0.0, "good", "hostile")])
def test_only_the_reward_decides_whether_a_hostile_answer_is_chosen_or_rejected(own, chosen, rejected):
    for name, response in HOSTILE.items():
        texts = {"hostile": response, "good": "A good one.", "bad": "A bad one."}
        [pair], _ = select_pairs([name], [list(texts.values())], [[own, 4.0, 1.0]])
        assert (pair["chosen"], pair["rejected"]) == (texts[chosen], texts[rejected]), name


def test_the_oracle_scores_every_hostile_answer():
    assert all(0 <= oracle.score(EXAMPLE, response) <= 4 for response in HOSTILE.values())


def test_hostile_answers_are_stored_and_read_unchanged(tmp_path):
    write_jsonl(tmp_path / "records.jsonl", RECORDS)
    assert read_jsonl(tmp_path / "records.jsonl", "records") == RECORDS
    assert (tmp_path / "records.jsonl").read_bytes().count(b"\n") == len(RECORDS)


# What people see.

@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """A run in which M1's responses to prompt i are the i-th hostile answer and a plain one."""
    folder = tmp_path_factory.mktemp("run") / "M1"
    write_jsonl(folder / "responses.jsonl", [
        {"prompt": name, "responses": [text, "A fox."], "finished": [True, True]}
        for name, text in HOSTILE.items()])
    write_jsonl(folder / "rewards.jsonl", [
        {"prompt": name, "rewards": [4.0, 2.0], "scores": [[4], [2]], "judgements": [[text], ["Score: 2"]]}
        for name, text in HOSTILE.items()])
    write_jsonl(folder / "pairs.jsonl", [
        {"prompt": name, "chosen": text, "rejected": "A fox.", "chosen_reward": 4.0, "rejected_reward": 2.0}
        for name, text in HOSTILE.items()])
    (folder.parent / "config.toml").write_text("")
    return folder.parent


def show(run, number: int) -> str:
    out = io.StringIO()
    with redirect_stdout(out):
        assert main(["show", str(run), "--prompt", str(number)]) == 0
    return out.getvalue()


def unprintable(text: str) -> set[str]:
    """Control characters other than the line break, and bidirectional controls, which turn a line around."""
    turning = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    return {c for c in text if c != "\n" and unicodedata.category(c) == "Cc"
            or unicodedata.bidirectional(c) in turning}


def test_every_hostile_answer_is_shown(shown):
    for number, (name, text) in enumerate(HOSTILE.items()):
        printed = show(shown, number)
        if not unprintable(text):
            assert printed.count(text) >= 2, name  # as a response and in the pair


def test_nothing_that_is_printed_moves_the_cursor_or_turns_a_line(shown):
    moving = {name: number for number, (name, text) in enumerate(HOSTILE.items()) if unprintable(text)}
    assert len(moving) >= 20
    assert {name for name, number in moving.items() if unprintable(show(shown, number))} == set()


def test_nothing_that_a_model_writes_in_a_chat_moves_the_cursor(tmp_path):
    save_model(tmp_path / "M0", speaker("\x1b[2J", 512), tiny_tokenizer(), {"made_by": "test"})
    out = io.StringIO()
    with redirect_stdout(out):
        assert main(["chat", str(tmp_path / "M0"), "--ask", EXAMPLE, "-n", "1", "--max-new-tokens", "8"]) == 0
    assert "[2J" in out.getvalue() and not unprintable(out.getvalue())


def test_characters_that_the_terminal_cannot_print_are_escaped(shown):
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with redirect_stdout(ascii_only):
        assert main(["show", str(shown), "--prompt", str(list(HOSTILE).index("other digits/arabic"))]) == 0


# The report of how a trained judge scores such answers.


def test_a_row_of_the_report_by_hand():
    three, four = "Once there was a pig. The end.", "Once there was a pig. It felt sad. The end."
    assert (oracle.score(PIG, three), oracle.score(PIG, four)) == (3, 4)
    cases = [Case(name, "after", PIG, text, plain, given) for name, text, plain, given in (
        ("a/1", three, 2.0, 3.0), ("a/2", four, 3.0, 3.5), ("a/2", three, 4.0, None), ("a/2", three, None, 5.0))]
    # Both parsed: the first two. One of them is raised by a point; one of four answers is unparsed.
    assert row("a", "after", cases).split() == ["a", "after", "2", "2.50", "3.25", "3.50", "50.0", "25.0"]
    assert [line.split() for line in strongest(cases)] == [["100", "%", "a/1,", "after"], ["0", "%", "a/2,", "after"]]


def test_the_texts_of_the_report_are_spread_over_each_family():
    chosen = hostile_texts(2)
    counts = Counter(family_of(name) for name, _ in chosen)
    assert set(counts) == set(families()) and max(counts.values()) == 2
    assert all(HOSTILE[name] == text for name, text in chosen)


@pytest.mark.parametrize("options, message", [
    (["nowhere/M1"], "cannot read config nowhere"), (["M1", "--requests", "0"], "must be at least 1")])
def test_a_wrong_option_of_the_report_is_one_line(options, message):
    done = subprocess.run([sys.executable, injection_report.__file__, *options], capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
