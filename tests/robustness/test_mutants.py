"""mutants.py fits the code. Running all of it takes too long for a test."""

import sys
from collections import Counter

import mutants
import pytest


def test_every_mutant_finds_what_it_replaces_exactly_once():
    stale = {str(mutant): times for mutant in mutants.MUTANTS
             if (times := (mutants.ROOT / f"minisr/{mutant.module}.py").read_text().count(mutant.old)) != 1}
    assert stale == {} and len(mutants.MUTANTS) > 100
    assert max(Counter(map(str, mutants.MUTANTS)).values()) == 1


@pytest.mark.slow
def test_the_script_tells_killed_mutants_from_survivors(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mutants.py", "--only", "pairs.py"])
    assert mutants.main() == 0
    count = sum("pairs.py" in str(mutant) for mutant in mutants.MUTANTS)
    assert count > 2 and f"{count} mutants: {count} killed, 0 not" in capsys.readouterr().out
    unchanged = [mutant._replace(new=mutant.old) for mutant in mutants.MUTANTS if "pairs.py" in str(mutant)][:1]
    monkeypatch.setattr(mutants, "MUTANTS", unchanged)
    assert mutants.main() == 1 and "SURVIVED" in capsys.readouterr().out
