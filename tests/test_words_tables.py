"""notebooks/words_tables.py: cells by hand, and the tables in notebooks/README.md."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from scipy import stats

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
BOTH = "words_greedy.all.flawless"


@pytest.fixture
def tables(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(NOTEBOOKS))
    return importlib.import_module("words_tables")


def test_the_readmes_tables_are_those_of_words_json(tables, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["words_tables.py"])
    tables.main()
    readme = (NOTEBOOKS / "README.md").read_text(encoding="utf-8")
    printed = capsys.readouterr().out.strip().split("\n\n")
    assert len(printed) == 3 and [table for table in printed if f"\n\n{table}\n\n" not in readme] == []


def test_a_difference_is_taken_between_runs_of_the_same_seed(tables):
    base = {"seed": [0, 1, 2], BOTH: [0.5, 0.2, 0.4]}
    assert tables.difference_cell({"seed": [2], BOTH: [0.1]}, base, BOTH) == "-30.0"
    differences = [-5.0, 10.0]  # of seeds 1 and 2
    interval = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    cell = tables.difference_cell({"seed": [1, 2], BOTH: [0.15, 0.5]}, base, BOTH)
    mean, half_width = map(float, cell.split(" ± "))
    assert mean == 2.5 and half_width == pytest.approx((interval.high - interval.low) / 2, rel=1e-3)
    assert tables.difference_cell({"seed": [0, 1], BOTH: [0.4, 0.1]}, base, BOTH) == "**-10.0 ± 0.0**"


def test_a_model_has_the_pairwise_accuracy_that_is_stored_with_its_successors_pairs(tables):
    models = {name: {BOTH: [0.1, 0.3], "pairs": [7, 9], "pairs_right": [0.5, 0.75], "rewards.pairwise": [value] * 2}
              for name, value in (("SFT", None), ("M1", None), ("M2", 0.9), ("M3", 0.8))}
    rows = {row[""]: row for row in tables.own_prompts(models)}
    assert {name: row["own pairwise"] for name, row in rows.items()} == {
        "SFT": "", "M1": "90.0, 90.0", "M2": "80.0, 80.0", "M3": ""}
    assert "pairs" not in rows["M1"] and rows["M2"]["pairs"] == "7, 9" and rows["M2"]["pairs right"] == "50.0, 75.0"
    assert rows["M3"]["both"] == "10.0, 30.0" and rows["M3"]["both, mean"].startswith("20.0 ± ")
    assert rows["M3"]["lists"] == ""  # not measured


def test_a_missing_file_is_one_line():
    done = subprocess.run([sys.executable, NOTEBOOKS / "words_tables.py", "nowhere"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        2, "words_tables: cannot read results nowhere: No such file or directory\n")


def test_a_table_has_the_columns_that_any_row_has(tables):
    assert tables.table([{"": "M2", "both": "1.0"}, {"": "M3", "lists": "2.0"}]) == (
        "|  | both | lists |\n|---|---|---|\n| M2 | 1.0 |  |\n| M3 |  | 2.0 |")
