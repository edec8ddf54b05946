"""The table at the end of a run, from metrics written by hand."""

from minisr.report.table import label, line, table


def metrics(**changes):
    """The metrics of M2, with changes."""
    versus = {"win": 0.5, "tie": 0.25, "lose": 0.25, "win_ci95": [0.4, 0.6]}
    judge = {"pairwise": 0.853, "five_best": 0.9, "exact": 0.7, "spearman": 0.75, "kendall": 0.7,
             "parse_rate": 0.99}
    m = {"flawless": 0.74, "flawless_ci95": [0.71, 0.78], "flawless_greedy": 0.99, "mean_score": 4.7,
         "versus_previous": versus, "versus_sft": versus, "judge": judge, "length": 74.2, "seconds": 63.4,
         "pairs": 3, "selection": {"pairs": 3, "unread": 2, "tie": 1, "identical": 0},
         "scores": {"0": 1, "5": 17, "unread": 2}}
    return m | changes


def rows(models):
    return [text.split() for text in table({"models": models}).split("\n")]


def test_every_cell_shows_its_metric_in_its_column():
    first, second, rule, row, _ = table({"models": {"M2": metrics()}}).split("\n")
    assert "T=0.7 [95 %]" in second and set(rule) == {"-"} and len(rule) == max(len(first), len(second))
    cells = ["M2", "74 [71, 78]", "99", "4.70", "50/25/25 [40, 60]", "50/25/25 [40, 60]", "85.3", "90.0",
             "70.0", "0.75", "0.70", "99.0", "74", "3", "63"]
    assert [cell.strip() for cell in row.split("  ") if cell] == cells


def test_what_was_not_measured_is_a_dash_and_a_column_of_dashes_is_left_out():
    bare = {"judge": {"pairwise": None, "parse_rate": 0.5}, "length": 60.0, "seconds": 7.0, "pairs": 0}
    *_, sft, m2, _ = rows({"SFT": bare, "M2": metrics()})
    assert sft == ["SFT", *["-"] * 10, "50.0", "60", "-", "7"]
    assert m2[0] == "M2" and "-" not in m2
    assert rows({"SFT": bare})[-1] == ["SFT", "50.0", "60", "-", "7"]  # the column of pairs always stays


def test_the_outcome_of_the_prompts_follows_and_says_unparsed():
    lines = table({"models": {"M2": metrics()}}).split("\n")
    assert lines[-1] == ("Prompts for M2: 6 (3 pairs, 2 unparsed, 1 tie); "
                         "scores given: 0: 1, 5: 17, unparsed: 2")
    assert label("unread") == "unparsed" and label("tie") == "tie"


def test_a_line_describes_the_newest_model():
    models = {"SFT": {}, "M2": metrics()}
    assert line({"models": models}) == ("M2 done in 63 s: flawless 74 % sampled, 99 % greedy; 99 % of its "
                                        "judgements parsed, 85.3 % of pairs ordered correctly")
    models["M2"] = {"judge": {"pairwise": None, "parse_rate": 0.5}, "seconds": 7.0, "pairs": 0}
    assert line({"models": models}) == ("M2 done in 7 s: 50 % of its judgements parsed, - % of pairs ordered "
                                        "correctly")
