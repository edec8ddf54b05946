"""The table at the end of a run, and what became of each iteration's prompts."""

from minisr.evaluate import TIE_RULE


def _interval(m: dict, name: str) -> str:
    low, high = m[f"{name}_ci95"]
    return f"{100 * m[name]:.0f} [{100 * low:.0f}, {100 * high:.0f}]"


def _versus(rates: dict) -> str:
    win, tie, lose = (round(100 * rates[k]) for k in ("win", "tie", "lose"))
    low, high = rates["win_ci95"]
    return f"{win}/{tie}/{lose} [{100 * low:.0f}, {100 * high:.0f}]"


# Two lines of heading, and the text of a model's figure; a column of which no model has a figure is left out.
COLUMNS = (
    ("", "model", lambda name, m: name),
    ("flawless %", "T=0.7 [95 %]", lambda name, m: _interval(m, "flawless")),
    ("flawless %", "greedy", lambda name, m: f"{100 * m['flawless_greedy']:.0f}"),
    ("mean", "score", lambda name, m: f"{m['mean_score']:.2f}"),
    ("against the row above", "win/tie/lose % [win]", lambda name, m: _versus(m["versus_previous"])),
    ("against SFT", "win/tie/lose % [win]", lambda name, m: _versus(m["versus_sft"])),
    ("judge:", "pairwise", lambda name, m: f"{100 * m['judge']['pairwise']:.1f}"),
    ("five-", "best", lambda name, m: f"{100 * m['judge']['five_best']:.1f}"),
    ("exact", "match", lambda name, m: f"{100 * m['judge']['exact']:.1f}"),
    ("Spear-", "man", lambda name, m: f"{m['judge']['spearman']:.2f}"),
    ("Ken-", "dall", lambda name, m: f"{m['judge']['kendall']:.2f}"),
    ("parse", "rate", lambda name, m: f"{100 * m['judge']['parse_rate']:.1f}"),
    ("length", "chars", lambda name, m: f"{m['length']:.0f}"),
    ("pairs", "", lambda name, m: str(m["pairs"]) if "selection" in m else "-"),
    ("sec-", "onds", lambda name, m: f"{m['seconds']:.0f}"),
)


def table(metrics: dict) -> str:
    """Rows SFT, M1, M2, ...; the metrics of metrics.json as a person reads them."""
    models = metrics["models"].items()
    columns = [[*heads, *(_cell(text, name, m) for name, m in models)] for *heads, text in COLUMNS]
    columns = [column for column in columns if set(column[2:]) != {"-"} or column[0] == "pairs"]
    widths = [max(map(len, column)) for column in columns]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
             for row in zip(*columns)]
    return "\n".join([*lines[:2], "-" * max(map(len, lines)), *lines[2:], *_makings(metrics)])


def _cell(text, name: str, m: dict) -> str:
    try:
        return text(name, m)
    except (KeyError, TypeError):  # not measured, or not a number
        return "-"


def _makings(metrics: dict):
    """For each trained iteration: what became of its prompts, and which scores were given."""
    for name, m in metrics["models"].items():
        if "selection" in m:
            counts = {what: count for what, count in m["selection"].items() if count}
            yield (f"{name} was made from {sum(counts.values())} prompts: "
                   + ", ".join(f"{count} {what}" for what, count in counts.items())
                   + "; scores given: " + ", ".join(f"{s}: {n}" for s, n in m["scores"].items()))


def line(metrics: dict) -> str:
    """The newest model in one line, while the run goes on."""
    name, m = list(metrics["models"].items())[-1]
    answers = ""
    if "flawless" in m:
        answers = (f" flawless {100 * m['flawless']:.0f} % sampled, {100 * m['flawless_greedy']:.0f} % "
                   "greedy;")
    pairwise = m["judge"]["pairwise"]
    if "selection" in m and not m["pairs"]:
        answers += " not a single pair was to learn from, it is the model before again;"
    return (f"{name} done in {m['seconds']:.0f} s:{answers} {100 * m['judge']['parse_rate']:.0f} % of its "
            f"judgements can be read, {'-' if pairwise is None else f'{100 * pairwise:.1f}'} % of pairs are "
            "ordered rightly")


LEGEND = f"Judge metrics: {TIE_RULE}."
