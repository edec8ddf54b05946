"""The report's HTML: escaped texts, tables, answers, charts with captions, the document."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html import escape

from minisr.report import experiment_table as experiment_tables
from minisr.report.table import COLUMNS as RUN_COLUMNS
from minisr.report.table import NOT_MEASURED, label
from minisr.worlds.catalog import world_of_prompt

MAX_TEXT = 600  # characters of one text that are shown
CSS = """
:root{color-scheme:light dark;--ink:#1d1f23;--soft:#5d636b;--back:#fff;--card:#f4f5f6;--line:#dcdfe3;
--good:#00694d;--bad:#a33c00;--picture:#f4f5f6}
@media(prefers-color-scheme:dark){:root{--ink:#e5e7ea;--soft:#a2a9b2;--back:#15171a;--card:#1f2226;
--line:#363b42;--good:#4fd1a5;--bad:#ff9d66;--picture:#e6e8eb}}
*{box-sizing:border-box}a{color:inherit}
body{margin:0;background:var(--back);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:1100px;margin:0 auto;padding:16px;overflow-wrap:anywhere}
h1{font-size:1.6rem;line-height:1.2;margin:.4rem 0}h2{margin:2.2rem 0 .6rem;font-size:1.25rem}
h3{margin:0 0 .3rem;font-size:1rem}p{margin:.4rem 0}nav a{margin-right:1rem}
code,pre{font:13px/1.45 ui-monospace,monospace}pre,.text{white-space:pre-wrap;margin:.2rem 0}
.soft,figcaption,summary,nav{color:var(--soft);font-size:14px}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:8px}
table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums;overflow-wrap:normal}
th,td{padding:5px 10px;text-align:left;border-bottom:1px solid var(--line)}td{white-space:nowrap}
th{vertical-align:bottom;min-width:4.2em}tr:last-child td{border-bottom:0}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr));gap:14px;
align-items:start}
figure,.prompt{margin:0;padding:10px;border:1px solid var(--line);border-radius:8px;background:var(--card)}
figure{background:var(--picture);color:#1d1f23}figcaption{color:#4a4f56}
svg{display:block;width:100%;height:auto;max-width:460px;margin:0 auto}
svg *{stroke-linejoin:round;font-family:system-ui,sans-serif!important}
.prompt{margin:0 0 12px}.answer{display:grid;grid-template-columns:2.6rem minmax(0,1fr);gap:0 10px;
padding:6px 0;border-top:1px solid var(--line)}.answer p{margin:0}
.good,.bad{font-weight:600;color:var(--good)}.bad{color:var(--bad)}
"""


@dataclass(frozen=True)
class Chart:
    """A chart with its title and caption. draw(title, *arguments) returns its SVG."""

    draw: Callable[..., str]
    title: str
    caption: str
    arguments: tuple


def text(value) -> str:
    """Any value as HTML text: escaped, control characters replaced, cut to MAX_TEXT characters."""
    shown = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", str(value))
    hidden = len(shown) - MAX_TEXT
    more = f" … ({hidden:,} more characters)" if hidden > 0 else ""
    return escape(shown[:MAX_TEXT] + more)


def document(title: str, parts: list[str]) -> str:
    """The whole file, with links to its sections."""
    content = "\n".join(parts)
    headings = re.findall("<h2>(.*?)</h2>", content)
    for i, heading in enumerate(headings):
        content = content.replace(f"<h2>{heading}", f'<h2 id="s{i}">{heading}', 1)
    links = "".join(f'<a href="#s{i}">{heading}</a> ' for i, heading in enumerate(headings))
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<style>{CSS}</style></head>\n<body><main><h1>{text(title)}</h1><nav>{links}</nav>\n{content}\n"
            "</main></body></html>\n")


def section(heading: str, charts: Iterable[Chart]) -> list[str]:
    """Charts under a heading, or nothing if there is no chart."""
    figures = [_figure(chart) for chart in charts]
    if not figures:
        return []
    return [f'<h2>{heading}</h2><div class="figures">{"".join(figures)}</div>']


def _figure(chart: Chart) -> str:
    svg = chart.draw(chart.title, *chart.arguments)
    return (f"<figure><h3>{text(chart.title)}</h3>{svg}"
            f"<figcaption>{text(chart.caption)}</figcaption></figure>")


def run_table(metrics: dict) -> str:
    """The table that ends a run, without the seconds: they differ between two runs of one seed."""
    headings, columns = ["model"], [list(metrics)]
    for column in RUN_COLUMNS:
        cells = [column.cell(m) for m in metrics.values()]
        if column.metric != "seconds" and set(cells) != {NOT_MEASURED}:
            headings.append(column.heading)
            columns.append(cells)
    return _table(headings, zip(*columns))


def experiment_table(results: dict) -> str:
    """The table of an experiment's results."""
    return _from_markdown(experiment_tables.results_table(results))


def experiment_differences(results: dict) -> str:
    """The table of an experiment's paired differences."""
    return _from_markdown(experiment_tables.differences_table(results))


def _from_markdown(markdown: str) -> str:
    """A Markdown table as HTML. The first cells name a row; a variant's name may itself hold a bar."""
    lines = [line.strip("| ") for line in markdown.split("\n")]
    head, _, *rows = [line.rsplit(" | ", lines[0].count(" | ")) for line in lines]
    return _table(head, rows)


def _table(headings: list[str], rows: Iterable) -> str:
    lines = ["".join(f"<th>{text(heading)}</th>" for heading in headings)]
    for row in rows:
        lines.append("".join(f"<td>{_bold(text(cell))}</td>" for cell in row))
    content = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table>{content}</table></div>'


def _bold(cell: str) -> str:
    """Markdown's bold as HTML's."""
    return f"<b>{cell[2:-2]}</b>" if re.fullmatch(r"\*\*.+\*\*", cell) else cell


def prompt(content: str, answers: Iterable[str]) -> str:
    """A prompt with its answers, which are HTML."""
    return f'<div class="prompt"><h3 class="text" dir="auto">{text(content)}</h3>{"".join(answers)}</div>'


def answer(name: str, response: str, details: str) -> str:
    """A response under its name, followed by details; name and details are HTML."""
    return (f'<div class="answer"><b>{name}</b><div><p class="text" dir="auto">{text(response)}</p>'
            f'<div class="soft">{details}</div></div></div>')


def points(record: dict) -> str:
    """The oracle's points for a sampled answer, and the criteria that it misses."""
    if "sampled_points" not in record:
        return ""
    given = record["sampled_points"]
    criteria = world_of_prompt(record["prompt"]).oracle.CRITERIA
    missed = ", ".join(name for name, point in zip(criteria, given) if not point)
    total = f"{sum(given)} of {len(given)} points"
    if missed:
        return f'<span class="bad">{total}</span>; missed: {missed}'
    return f'<span class="good">{total}</span>'


def pair_part(part: str) -> str:
    """"chosen" or "rejected" in its colour."""
    return f'<span class="{"good" if part == "chosen" else "bad"}">{part}</span> '


def judged(true_score: int | None, reward: float | None, scores: list[float | None],
           judgements: list[str]) -> str:
    """A response's reward, the scores behind it, its true score, and the first judgement that has a score."""
    details = "no reward"
    if reward is not None:
        printed = [label("unread") if score is None else f"{score:g}" for score in scores]
        details = f"reward {reward:.2f}; scores: {', '.join(printed)}"
    if true_score is not None:
        details += f" (true score {true_score})"
    parsed = [judgement for judgement, score in zip(judgements, scores) if score is not None]
    shown = (parsed or judgements)[0]
    if shown:
        details += f'<details><summary>a judgement</summary><pre dir="auto">{text(shown)}</pre></details>'
    return details
