"""The table at the end of a run."""

from minisr.evaluate import TIE_RULE

HEADS = ("", "flawless %", "flawless %", "mean", "against the row above", "against SFT", "judge:",
         "five-", "exact", "Spear-", "Ken-", "parse", "length", "pairs", "sec-")
HEADS_2 = ("model", "T=0.7 [95 %]", "greedy", "score", "win/tie/lose % [win]", "win/tie/lose % [win]",
           "pairwise", "best", "match", "man", "dall", "rate", "chars", "", "onds")


def table(metrics: dict) -> str:
    """Rows SFT, M1, M2, ...; the metrics of metrics.json as a person reads them."""
    rows = [HEADS, HEADS_2] + [_row(name, model) for name, model in metrics["models"].items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([*lines[:2], "-" * max(map(len, lines)), *lines[2:]])


def line(metrics: dict) -> str:
    """The newest model in one line, while the run goes on."""
    name, m = list(metrics["models"].items())[-1]
    return (f"{name} done in {m['seconds']:.0f} s: flawless {100 * m['flawless']:.0f} % sampled, "
            f"{100 * m['flawless_greedy']:.0f} % greedy; its judge orders "
            f"{_share(m['judge']['pairwise'])} % of pairs rightly")


def _row(name: str, m: dict) -> tuple[str, ...]:
    low, high = m["flawless_ci95"]
    j = m["judge"]
    return (name, f"{100 * m['flawless']:.0f} [{100 * low:.0f}, {100 * high:.0f}]",
            f"{100 * m['flawless_greedy']:.0f}", f"{m['mean_score']:.2f}",
            _versus(m.get("versus_previous")), _versus(m.get("versus_sft")),
            _share(j["pairwise"]), _share(j["five_best"]), _share(j["exact"]),
            _number(j["spearman"]), _number(j["kendall"]), _share(j["parse_rate"]),
            f"{m['length']:.0f}", str(m["pairs"] or "-"), f"{m['seconds']:.0f}")


def _versus(rates: dict | None) -> str:
    if rates is None:
        return "-"
    win, tie, lose = (round(100 * rates[k]) for k in ("win", "tie", "lose"))
    low, high = rates["win_ci95"]
    return f"{win}/{tie}/{lose} [{100 * low:.0f}, {100 * high:.0f}]"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


LEGEND = f"Judge metrics: {TIE_RULE}."
