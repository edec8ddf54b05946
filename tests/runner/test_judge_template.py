"""Judge templates from files."""

import re

import pytest

from minisr import InputError
from minisr.runner.run import ENGLISH_TEMPLATE, WORLD_TEMPLATE, load_template


@pytest.mark.parametrize("path", [WORLD_TEMPLATE, ENGLISH_TEMPLATE], ids=["world", "english"])
def test_the_templates_that_ship_with_minisr_are_valid(path):
    assert "Score:" in load_template(path)


@pytest.mark.parametrize("text, field, times", [
    ("Only {response}", "{prompt}", 0), ("Only {prompt}", "{response}", 0),
    ("{prompt} {prompt} {response}", "{prompt}", 2), ("{prompt} {response} {response}", "{response}", 2),
])
def test_a_template_must_contain_each_field_once(tmp_path, text, field, times):
    path = tmp_path / "judge.txt"
    path.write_text(text)
    with pytest.raises(InputError, match=rf"judge\.txt.*{re.escape(field)}.*{times} times"):
        load_template(path)


def test_a_missing_template_is_named(tmp_path):
    with pytest.raises(InputError, match="no-such-file.txt"):
        load_template(tmp_path / "no-such-file.txt")


def test_the_newline_at_the_end_of_the_file_is_not_part_of_the_template(tmp_path):
    path = tmp_path / "judge.txt"
    path.write_text("{prompt}\n{response}\n")
    assert load_template(path) == "{prompt}\n{response}"
