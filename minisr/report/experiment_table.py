"""The Markdown tables that `minisr experiment` prints: results, and differences on the same seed."""

from minisr.report.seed_statistics import compare_with_base, is_copy_of_base, mean_and_interval

NOT_MEASURED = "-"

# Heading, metric and factor of each column.
COLUMNS = (
    ("flawless %", "flawless", 100), ("greedy %", "flawless_greedy", 100), ("score", "mean_score", 1),
    ("wins M1 %", "versus_m1.win", 100), ("loses %", "versus_m1.lose", 100),
    ("pairwise %", "judge.pairwise", 100), ("5-best %", "judge.five_best", 100),
    ("exact %", "judge.exact", 100), ("Spearman", "judge.spearman", 1), ("Kendall", "judge.kendall", 1),
    ("parsed %", "judge.parse_rate", 100), ("chars", "length", 1), ("pairs", "pairs", 1),
    ("right %", "pairs_right", 100), ("own pairwise %", "rewards.pairwise", 100),
    ("distinct %", "distinct", 100), ("form %", "criteria.4", 100),
    ("cover %", "words.all.cover", 100), ("unseen: cover %", "words.unseen.cover", 100),
    ("unseen: flawless %", "words.unseen.flawless", 100), ("list %", "words.all.lists", 100),
    ("words", "words.all.length", 1), ("words judged %", "judge.words_right", 100),
    ("form judged %", "judge.form_right", 100))
OPTIONAL = {"judge.words_right", "judge.form_right", "rewards.pairwise"} | {  # left out where nothing was measured
    metric for _, metric, _ in COLUMNS if metric.startswith("words.")}


def results_table(results: dict) -> str:
    """Every model's mean over seeds, plus or minus the 95 % interval.

    Models that a variant copied from the base are left out."""
    rows = {}
    for variant, models in results.items():
        for model, metrics in models.items():
            if not is_copy_of_base(results, variant, model):
                rows[f"{variant} | {model}"] = metrics
    return table("variant | model", rows)


def differences_table(results: dict) -> str:
    """The mean of each paired difference over seeds, plus or minus the 95 % interval."""
    return table("difference", compare_with_base(results), sign="+")


def table(head: str, rows: dict, sign: str = "", columns: tuple = COLUMNS) -> str:
    """rows, {name: {metric: [value of each seed]}}, as a Markdown table.

    With sign "+" the values are differences: those whose 95 % interval excludes 0 are bold."""
    measured = [metric for metrics in rows.values() for metric, values in metrics.items() if None not in values]
    columns = [column for column in columns if column[1] not in OPTIONAL or column[1] in measured]
    headings = " | ".join([head, *(heading for heading, _, _ in columns)])
    column_count = headings.count(" | ") + 1
    lines = [f"| {headings} |", "|" + "---|" * column_count]
    for name, metrics in rows.items():
        cells = [_cell(metrics.get(metric), factor, sign) for _, metric, factor in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: list | None, factor: float, sign: str) -> str:
    """"mean ± half-width of the interval", the value of a single seed, or "-" if a seed has no value."""
    if not values or None in values:
        return NOT_MEASURED
    mean, half_width = mean_and_interval([factor * value for value in values])
    digits = _digits(mean, factor)
    text = f"{mean:{sign}.{digits}f}"
    if len(values) > 1:  # one seed has no interval
        text += f" ± {half_width:.{digits}f}"
    excludes_zero = len(values) > 1 and abs(mean) > half_width
    return f"**{text}**" if sign and excludes_zero else text


def _digits(mean: float, factor: float) -> int:
    """Decimals of a cell: two for a small number, one for a percentage, none for a large value of either."""
    if factor == 1:
        return 2 if abs(mean) < 10 else 0
    return 1 if abs(mean) < 100 else 0
