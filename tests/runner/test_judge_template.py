"""Judge templates from files."""

import re

import pytest
from small_run import minisr

from minisr import InputError
from minisr.runner.run import ENGLISH_TEMPLATE, WORLD_TEMPLATE, load_template


def template_file(folder, text):
    path = folder / "judge.txt"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", [WORLD_TEMPLATE, ENGLISH_TEMPLATE], ids=["world", "english"])
def test_the_templates_that_ship_with_minisr_are_valid(path):
    assert "Score:" in load_template(path)


@pytest.mark.parametrize("text, field, times", [
    ("Only {response}", "{prompt}", 0), ("Only {prompt}", "{response}", 0),
    ("{prompt} {prompt} {response}", "{prompt}", 2), ("{prompt} {response} {response}", "{response}", 2),
])
def test_a_template_must_contain_each_field_once(tmp_path, text, field, times):
    with pytest.raises(InputError, match=rf"judge\.txt.*{re.escape(field)}.*{times} times"):
        load_template(template_file(tmp_path, text))


def test_a_missing_template_is_named(tmp_path):
    with pytest.raises(InputError, match="no-such-file.txt"):
        load_template(tmp_path / "no-such-file.txt")


def test_the_newline_at_the_end_of_the_file_is_not_part_of_the_template(tmp_path):
    path = template_file(tmp_path, "{prompt}\n{response}\nScore: <total>\n")
    assert load_template(path) == "{prompt}\n{response}\nScore: <total>"


RATE = "Rate the response.\n{prompt}\n{response}\n"
REFUSED = {  # what the template asks for, and what the error names
    "MT-Bench": (RATE + "Rate it on a scale of 1 to 10, like this: [[5]]", "line 4.*another scale.*1 to 10"),
    "double brackets": (RATE + "Score: [[1..10]]", r"line 4.*1\.\.10"),
    "a hundred": (RATE + "Give a score between 0 and 100.\nScore: <score>", "line 4.*0 and 100"),
    "out of ten": (RATE + "Score: <points>/10", "line 4.*/10"),
    "percent": (RATE + "Score: <points in %>", "line 4.*%"),
    "score in percent": (RATE + "Give a rating in percent.\nScore: <score>", "line 4.*rating in percent"),
    "up to ten": (RATE + "Add up to 10 points.\nScore: <score>", "line 4.*up to 10"),
    "a dash": (RATE + "Score (0-10):", "0-10"),
    "ten in words": (RATE + "Rate it from one to ten.\nScore: <total>", "line 4.*one to ten"),
    "out of ten in words": (RATE + "Give a score out of ten.\nScore: <total>", "line 4.*out of ten"),
    "a ten-point scale": (RATE + "Use a ten-point scale.\nScore: <total>", "line 4.*ten-point scale"),
    "Likert": (RATE + "Use a 7-point Likert scale.\nScore: <total>", "line 4.*7-point Likert scale"),
    "a tilde": (RATE + "Score from 1~10.\nScore: <total>", "line 4.*1~10"),
    "an interval": (RATE + "The score is in [1, 10].\nScore: <total>", "line 4.*1, 10"),
    "an ampersand": (RATE + "A score between 1 & 10.\nScore: <total>", "line 4.*1 & 10"),
    "maximum": (RATE + "The maximum score is 10.\nScore: <total>", "line 4.*maximum score is 10"),
    "at most": (RATE + "Give at most 10 points.\nScore: <total>", "line 4.*at most 10"),
    "the best": (RATE + "Rate it; 10 is the best.\nScore: <total>", "line 4.*10 is the best"),
    "an example": (RATE + "For example:\nScore: 8\nScore: <total>", "line 5.*Score: 8"),
    "letters": (RATE + "Score: <A-F>", "line 4.*A-F"),
    "German": (RATE + "Score von 0 bis 10.\nScore: <Summe>", "line 4.*0 bis 10"),
    "French": (RATE + "Score: <n> sur 10", "line 4.*sur 10"),
    "Chinese": (RATE + "Score: 1到10分", "line 4.*1到10"),
    "no score": (RATE + "Say what is good and what is bad.", "never asks for a score line"),
    "Prometheus": (RATE + "Feedback: (feedback) [RESULT] (a number from 1 to 5)", "never asks for a score line"),
    "another language": (RATE + "Am Ende: Punktzahl: <Summe>", "never asks for a score line"),
    "a verdict": (RATE + "Answer with good or bad.", "never asks for a score line"),
    "JSON": (RATE + 'Answer with {"reason": "...", "score": <0 to 5>}', "asks for JSON"),
    "JSON of str.format": (RATE + 'Answer with {{"score": <0 to 5>}}', "single braces"),
    "doubled fields": ("{{prompt}} {{response}}\nScore: <total>", "single braces"),
    "Jinja": ("{{ prompt }} {{ response }}\nScore: <total>", "single braces"),
    "code fence": (f"```\n{RATE}Score: <total>\n```", "code fence"),
    "other fields": ("{question} {answer}\nScore: <total>", r"\{prompt\} exactly once, not 0 times"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_asks_for_what_is_not_parsed_is_refused(tmp_path, name):
    text, named = REFUSED[name]
    with pytest.raises(InputError, match=named) as error:
        load_template(template_file(tmp_path, text))
    assert "judge.txt" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", [
    "Score: <total>", "Give points from 0 to 5.\n**Score:** <total>", "Score (0-5): <total>", "the line Score: and it",
    "Justify the score in 100 words.\nScore: <total>/5", "Use braces {like this} }} freely.\nscore: N",
    "Name 1 to 3 faults.\n```\n{code}\n```\nScore: <0-5>",
    "The third point only if points 1 and 2 were given.\nScore: <total>",
    "Add up to 2 points for style.\nScore: <total>", "Award 1-2 points for relevance.\nScore: <total>",
    "Award 5 points if the answer is 100% correct.\nScore: <total>",
    "Points 1, 6 and 7 of the guide count.\nScore: <total>", "The score of 1-12-2024 is no example.\nScore: <total>",
    "Justify the score in 1-10 sentences.\nScore: <total>", "For example:\nScore: 4/5\nNow you.\nScore: <total>",
    "Briefly justify your total score, up to 100 words.\nScore: <total points>"])
def test_a_template_that_asks_for_the_score_line_is_taken_as_it_is(tmp_path, text):
    assert load_template(template_file(tmp_path, RATE + text)) == RATE + text


def test_a_run_with_such_a_template_writes_nothing(tmp_path, config):
    path, out = template_file(tmp_path, REFUSED["MT-Bench"][0]), tmp_path / "run"
    code, _, error = minisr("run", config, "--set", f"judge.template={path}", "--out", out)
    assert code == 2 and "another scale" in error and error.count("\n") == 1 and not out.exists()
