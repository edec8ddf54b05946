"""A damaged file of a finished run is repaired, or rejected by its name. It never leads to a wrong result."""

import io
import json
import shutil
from contextlib import redirect_stderr, redirect_stdout
from random import Random

import drawing
import kills
import pytest
from small_run import settings

from minisr.cli import main


def truncated(content, rng):
    return content[:rng.randrange(1, len(content))]


def flipped(content, rng):
    damaged = bytearray(content)
    damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def empty(content, rng):
    return b""


def zeros(content, rng):
    start = rng.randrange(len(content))
    return content[:start] + bytes(min(512, len(content) - start)) + content[start + 512:]


def doubled(content, rng):
    return content + content


def without_its_first_line(content, rng):
    return content.partition(b"\n")[2]


def with_a_line_changed(content, rng):
    return content.replace(b"e", b"o", 1)


def of_another_kind(content, rng):
    return b'{"version": 9, "models": []}\n'


def a_list(content, rng):
    return b"[]\n"


def no_utf8(content, rng):
    return content[:len(content) // 2] + b"\xff\xfe" + content[len(content) // 2:]


def removed(content, rng):
    return None


DAMAGES = [truncated, flipped, empty, zeros, doubled, without_its_first_line, with_a_line_changed,
           of_another_kind, a_list, no_utf8, removed]
# A shorter run than that of kills.py, with the same files.
SHORT = ("seed_data.ift=16", "seed_data.ranked=12", "seed_data.judge_evaluation=2", "seed_data.evaluation=6",
         "prompts.count=12", "prompts.round_size=8", "judge.judgements=1", "evaluate.max_new_tokens=24")
# Files that decide no result.
INFORMATION = ("timing.json", "train_log.jsonl", "report.html", "evaluation.json", "metrics.json", ".lock")
# Files that charts are made of: the page of a run in which one of them is damaged has its charts.
CHARTED = ("answers.jsonl", "judge_evaluation.jsonl", "counts.json", "train_log.jsonl", "metrics.json")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damage")
    (folder / "config.toml").write_text(kills.CONFIG)
    assert resume(folder)[0] == 0
    return folder


def resume(folder, draw=False):
    err = io.StringIO()
    with redirect_stdout(io.StringIO()), redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        if not draw:
            drawing.replace_by_titles(patch)
        code = main(["run", str(folder / "config.toml"), "--out", str(folder / "run"), *settings(*SHORT)])
    return code, err.getvalue().split("\n")[-2:][0]


def check(damage, name, finished, tmp_path):
    """Damage one file of a copy and resume: the file must be repaired, or rejected by its name."""
    copy = tmp_path / f"{damage.__name__}-{name.replace('/', '-')}"
    shutil.copytree(finished, copy)
    path = copy / "run" / name
    content = path.read_bytes()
    damaged = damage(content, Random(f"{damage.__name__} {name}")) if content else b"x"
    if damaged is None:
        path.unlink()
    else:
        path.write_bytes(damaged)
    code, message = resume(copy, draw=name.endswith(CHARTED))
    expected, found = (kills.files(folder / "run") for folder in (finished, copy))
    shutil.rmtree(copy)
    if code == 0:
        wrong = [line for line in kills.differences(found, expected)
                 if not line.split()[0].endswith((*INFORMATION, "hashes.json")) and not line.startswith(name)]
        return wrong and f"{damage.__name__} {name}: {wrong}"
    parent, _, base = name.rpartition("/")
    named = base in message or parent and parent in message or base == "config.toml" and "another config" in message
    return None if code == 2 and named else f"{damage.__name__} {name}: code {code}: {message}"


def test_each_file_with_one_damage(finished, tmp_path):
    names = sorted(kills.files(finished / "run"))
    faults = [check(DAMAGES[number % len(DAMAGES)], name, finished, tmp_path)
              for number, name in enumerate(names) if number % 4 == 0]
    assert list(filter(None, faults)) == []


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_third_of_the_files_with_each_damage(damage, finished, tmp_path):
    # Each damage has its own third of the files, so that all ten damages together cover every kind of file.
    names = sorted(kills.files(finished / "run"))[DAMAGES.index(damage) % 3::3]
    assert len(names) > 15
    assert list(filter(None, (check(damage, name, finished, tmp_path) for name in names))) == []


def test_metrics_are_computed_again_from_the_files(finished):
    path = finished / "run/metrics.json"
    before = json.loads(path.read_text())
    path.write_text(path.read_text().replace('"flawless": ', '"flawless": 9'))
    assert resume(finished)[0] == 0
    assert json.loads(path.read_text()) == before
