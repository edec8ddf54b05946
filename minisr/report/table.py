"""The table that `minisr run` and `minisr eval` print: one row per model, read from metrics.json."""

from collections.abc import Callable
from dataclasses import dataclass

from minisr.runner.experiment import lookup

NOT_MEASURED = "-"
TIE_RULE = ("pairs that the annotator scored equally are left out; a pair that the model scores equally, or with an "
            "unparsed judgement, counts as wrong; Spearman and Kendall (tau-b) are means over instructions, without "
            "unparsed responses, and 0 where all scores are the same")
LEGEND = f"Judge metrics: {TIE_RULE}."


def label(name: str) -> str:
    """The printed form of a name in a counts file: "unread" is printed as "unparsed"."""
    return "unparsed" if name == "unread" else name


# Each formatter turns one metric of a model into the text of a cell.

def percent(metrics: dict, metric: str) -> str:
    return f"{100 * lookup(metrics, metric):.0f}"


def percent_with_decimal(metrics: dict, metric: str) -> str:
    return f"{100 * lookup(metrics, metric):.1f}"


def percent_with_interval(metrics: dict, metric: str) -> str:
    low, high = lookup(metrics, f"{metric}_ci95")
    return f"{percent(metrics, metric)} [{100 * low:.0f}, {100 * high:.0f}]"


def two_decimals(metrics: dict, metric: str) -> str:
    return f"{lookup(metrics, metric):.2f}"


def whole_number(metrics: dict, metric: str) -> str:
    return f"{lookup(metrics, metric):.0f}"


def win_tie_lose(metrics: dict, metric: str) -> str:
    rates = lookup(metrics, metric)
    win, tie, lose = (round(100 * rates[name]) for name in ("win", "tie", "lose"))
    low, high = rates["win_ci95"]
    return f"{win}/{tie}/{lose} [{100 * low:.0f}, {100 * high:.0f}]"


def pair_count(metrics: dict, metric: str) -> str:
    """The number of pairs that trained a model; SFT and M1 are not trained on pairs."""
    return str(lookup(metrics, metric)) if "selection" in metrics else NOT_MEASURED


@dataclass(frozen=True)
class Column:
    """One metric: its heading in the terminal (two lines) and on the HTML page, and its formatter."""

    first_line: str
    second_line: str
    heading: str
    metric: str
    format: Callable[[dict, str], str]

    def cell(self, metrics: dict) -> str:
        """The text of this column for one model."""
        if lookup(metrics, self.metric) is None:
            return NOT_MEASURED
        return self.format(metrics, self.metric)


COLUMNS = (
    Column("flawless %", "T=0.7 [95 %]", "flawless % T=0.7 [95 %]", "flawless", percent_with_interval),
    Column("flawless %", "greedy", "flawless % greedy", "flawless_greedy", percent),
    Column("mean", "score", "mean score", "mean_score", two_decimals),
    Column("all words", "seen %", "all words, seen %", "words.seen.cover", percent),
    Column("all words", "unseen %", "all words, unseen %", "words.unseen.cover", percent),
    Column("sen-", "tence %", "sentence %", "words.all.form", percent),
    Column("against the row above", "win/tie/lose % [win]", "against the row above win/tie/lose % [win]",
           "versus_previous", win_tie_lose),
    Column("against SFT", "win/tie/lose % [win]", "against SFT win/tie/lose % [win]",
           "versus_sft", win_tie_lose),
    Column("judge:", "pairwise", "judge: pairwise", "judge.pairwise", percent_with_decimal),
    Column("five-", "best", "five-best", "judge.five_best", percent_with_decimal),
    Column("exact", "match", "exact match", "judge.exact", percent_with_decimal),
    Column("Spear-", "man", "Spearman", "judge.spearman", two_decimals),
    Column("Ken-", "dall", "Kendall", "judge.kendall", two_decimals),
    Column("parse", "rate", "parse rate", "judge.parse_rate", percent_with_decimal),
    Column("length", "chars", "length chars", "length", whole_number),
    Column("pairs", "", "pairs", "pairs", pair_count),
    Column("sec-", "onds", "seconds", "seconds", whole_number),
)


def table(metrics: dict) -> str:
    """The content of metrics.json as text: rows SFT, M1, M2, ..., then one line per DPO iteration.

    A column that no model has a value for is left out."""
    models = metrics["models"]
    columns = [["", "model", *models]]
    for column in COLUMNS:
        cells = [column.cell(m) for m in models.values()]
        if column.metric == "pairs" or set(cells) != {NOT_MEASURED}:
            columns.append([column.first_line, column.second_line, *cells])
    lines = _aligned(columns)
    rule = "-" * max(len(text) for text in lines)
    return "\n".join([*lines[:2], rule, *lines[2:], *_training_lines(models)])


def _aligned(columns: list[list[str]]) -> list[str]:
    """The columns side by side, each padded to its widest cell."""
    padded = []
    for cells in columns:
        width = max(len(cell) for cell in cells)
        padded.append([cell.ljust(width) for cell in cells])
    return ["  ".join(row).rstrip() for row in zip(*padded)]


def _training_lines(models: dict) -> list[str]:
    """For each model trained with DPO: the outcome of its prompts, and the scores that were given."""
    lines = []
    for name, m in models.items():
        if "selection" in m:
            counts = {outcome: count for outcome, count in m["selection"].items() if count}
            outcomes = ", ".join(f"{count} {label(outcome)}" for outcome, count in counts.items())
            scores = ", ".join(f"{label(score)}: {count}" for score, count in m["scores"].items())
            lines.append(f"Prompts for {name}: {sum(counts.values())} ({outcomes}); scores given: {scores}")
    return lines


def line(metrics: dict) -> str:
    """One line about the newest model, printed while the run continues."""
    name, m = list(metrics["models"].items())[-1]
    parts = []
    if "flawless" in m:
        parts.append(f"flawless {percent(m, 'flawless')} % sampled, {percent(m, 'flawless_greedy')} % greedy")
    if m.get("selection", {}).get("pairs") == 0:
        parts.append("no preference pair was found, so its weights equal the previous model's")
    if lookup(m, "judge.parse_rate") is not None:
        parts.append(f"{percent(m, 'judge.parse_rate')} % of its judgements parsed, {_ordered(m)} % of pairs "
                     "ordered correctly")
    return f"{name} done in {m['seconds']:.0f} s{': ' if parts else ''}{'; '.join(parts)}"


def _ordered(m: dict) -> str:
    """The judge's pairwise accuracy in percent."""
    if lookup(m, "judge.pairwise") is None:
        return NOT_MEASURED
    return percent_with_decimal(m, "judge.pairwise")
