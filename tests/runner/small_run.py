"""A small run of the whole loop, for several test files. conftest.py has it as fixtures."""

import hashlib
import io
import re
from contextlib import redirect_stderr, redirect_stdout

from minisr.cli import main
from minisr.runner.config import load_config
from minisr.runner.files import read_jsonl
from minisr.runner.run import Run
from minisr.runner.steps import StoredModel

CONFIG = """
iterations = 2
device = "cpu"
threads = 1
seed_data = {ift = 16, ranked = 12, judge_evaluation = 4, evaluation = 8}
sft = {batch_size = 8, epochs = 1, learning_rate = 3e-3}
prompts = {count = 8, max_rouge_l = 0.95}
responses = {candidates = 4, temperature = 1.0, top_p = 1.0}
judge = {judgements = 2}
dpo = {batch_size = 4, learning_rate = 3e-4, replay_weight = 0.5}
"""
MODELS = ("SFT", "M1", "M2", "M3")


def minisr(*arguments):
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return code, out.getvalue(), err.getvalue()


def settings(*changes):
    """Changes to a config as arguments of the command line."""
    return [part for change in changes for part in ("--set", change)]


def write_config(folder, text=CONFIG):
    path = folder / "config.toml"
    path.write_text(text)
    return path


def refused(folder, *changes):
    """The line on stderr with which a run is refused before it writes anything."""
    code, out, err = minisr("run", write_config(folder), "--out", folder / "run", *settings(*changes))
    assert (code, out, err.count("\n")) == (2, "", 1) and not (folder / "run").exists()
    return err


def files(folder):
    """A digest of every file, without clock times."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "timing.json":
            content = re.sub(rb'"seconds": [0-9.e-]+', b"", path.read_bytes())
            found[path.relative_to(folder).as_posix()] = hashlib.sha256(content).hexdigest()
    return found


def jsonl(path):
    return read_jsonl(path, "records")


def prompts_of(folder):
    return [record["prompt"] for record in jsonl(folder / "prompts.jsonl")]


def model_of(run, name):
    """A model of a run on disk."""
    return StoredModel(Run(run, load_config(run / "config.toml")), name)
