import pytest

from minisr.report.experiment_table import COLUMNS, differences_table, results_table, table
from minisr.report.seed_statistics import STUDENT_T, compare_with_base, mean_and_interval
from minisr.runner.experiment import METRICS


def test_the_table_shows_every_metric_of_results_json():
    assert tuple(metric for _, metric, _ in COLUMNS) == METRICS


@pytest.mark.parametrize("count", [*range(2, 33), 100])
def test_the_interval_is_students(count):
    stats = pytest.importorskip("scipy.stats")
    values = [0.1 * i * i - i for i in range(count)]
    mean, half = mean_and_interval(values)
    low, high = stats.t.interval(0.95, count - 1, loc=mean, scale=stats.sem(values))
    assert mean == pytest.approx(sum(values) / count)
    assert half == pytest.approx((high - low) / 2, rel=2e-3)  # the table has two decimals


def test_one_seed_has_no_interval():
    assert mean_and_interval([3.0]) == (3.0, 0.0)
    assert len(STUDENT_T) == 19


def test_the_table_has_a_row_for_each_variant_and_model():
    values = {"flawless %": [0.25, 0.35], "wins M1 %": [None, None], "chars": [120.0, 120.0]}
    metrics = {metric: values.get(name, [0.5, 0.5]) for name, metric, _ in COLUMNS}
    metrics["seed"] = [0, 1]
    head, rule, row, last = results_table({"base": {"M1": metrics}, "random": {"M2": metrics}}).split("\n")
    names = [cell.strip() for cell in head.strip("|").split("|")]
    cells = dict(zip(names, (cell.strip() for cell in row.strip("|").split("|")), strict=True))
    assert (cells["variant"], cells["model"]) == ("base", "M1") and last.startswith("| random | M2 |")
    assert cells["flawless %"] == "30.0 ± 63.5"  # 12.71 standard errors of 5
    assert (cells["wins M1 %"], cells["chars"], cells["score"]) == ("-", "120 ± 0", "0.50 ± 0.00")
    assert rule.count("---|") == len(names)


def test_metrics_of_the_words_world_have_columns_only_where_they_were_measured():
    tiny = {"seed": [0], "flawless": [0.5], "words.all.cover": [None]}
    words = {"seed": [0], "flawless": [0.5], "words.all.cover": [0.25]}
    assert "cover" not in results_table({"base": {"M1": tiny}})
    head, _, *rows = results_table({"base": {"M1": words, "M2": tiny}}).split("\n")
    assert head.endswith(" form % | cover % |") and rows[0].endswith(" | 25.0 |") and rows[1].endswith(" | - |")


def test_the_table_leaves_out_what_a_variant_has_from_the_base():
    rows = [line.split(" | ")[:2] for line in results_table(COMPARED).split("\n")[2:]]
    assert rows == [["| base", "SFT"], ["| base", "M1"], ["| base", "M2"], ["| few", "M2"], ["| few", "M3"]]


def metrics_of(seeds, flawless, wins=None):
    return {"seed": seeds, "flawless": flawless, "versus_m1.win": wins or [None] * len(seeds)}


COMPARED = {"base": {"SFT": metrics_of([0, 1, 2], [0.1] * 3), "M1": metrics_of([0, 1, 2], [0.3, 0.2, 0.4]),
                     "M2": metrics_of([0, 1, 2], [0.5, 0.7, 0.9], [0.25, 0.5, 0.75])},
            "few": {"M1": metrics_of([2, 0], [0.4, 0.3]),  # the base's own
                    "M2": metrics_of([2, 0], [0.8, 0.2], [0.5, 0.5]), "M3": metrics_of([2, 0], [1, 1])}}


def test_models_are_compared_on_the_seeds_that_both_have():
    found = compare_with_base(COMPARED)
    assert list(found) == ["base M2 - M1", "few M2 - base M2"]  # M1 is the same, the base has no M3
    assert found["base M2 - M1"]["flawless"] == pytest.approx([0.2, 0.5, 0.5])
    assert found["base M2 - M1"]["versus_m1.win"] == [None] * 3  # M1 has none against itself
    assert found["few M2 - base M2"]["flawless"] == pytest.approx([-0.1, -0.3])  # seeds 2 and 0
    assert found["few M2 - base M2"]["versus_m1.win"] == pytest.approx([-0.25, 0.25])
    assert compare_with_base({}) == {}


def test_without_a_common_seed_a_model_is_shown_and_not_compared():
    results = {"base": {"M2": metrics_of([0], [0.5])}, "other": {"M2": metrics_of([1], [0.5])}}
    assert "| other | M2 | 50.0 |" in results_table(results)
    assert compare_with_base(results) == {}


def test_the_table_of_differences_has_signs_and_the_interval_of_paired_values():
    head, rule, first, last = differences_table(COMPARED).split("\n")
    assert head.startswith("| difference | flawless % |") and head.count("|") == rule.count("|")
    assert first.startswith("| base M2 - M1 | +40.0 ± 43.0 | - |")  # 4.30 x 17.32 / sqrt 3
    assert last.startswith("| few M2 - base M2 | -20.0 ± 127.1 | ") and "| +0.0 ± 317.6 |" in last


def test_a_difference_is_bold_where_its_interval_does_not_reach_0():
    rows = {"a": {"x": [0.1, 0.2, 0.3]}, "b": {"x": [-0.2, -0.3, -0.25]}, "c": {"x": [0.3]}}
    columns = (("x %", "x", 100),)
    assert table("difference", rows, "+", columns).split("\n") == [
        "| difference | x % |", "|---|---|", "| a | +20.0 ± 24.8 |", "| b | **-25.0 ± 12.4** |",
        "| c | +30.0 |"]
    assert "**" not in table("model", rows, columns=columns)
