"""The report's HTML: texts escaped and cut, tables, answers, cards with pictures, the document."""

import re
from html import escape

from minisr.report.table import COLUMNS as RUN_COLUMNS
from minisr.runner.experiment import COLUMNS, compared_markdown, markdown
from minisr.worlds.tiny import oracle

LONGEST = 600  # characters of one text
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


def text(value) -> str:
    """Anything as a piece of HTML: control characters replaced, cut to LONGEST characters, escaped."""
    shown = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", str(value))
    more = f" … ({len(shown) - LONGEST:,} more characters)" if len(shown) > LONGEST else ""
    return escape(shown[:LONGEST] + more)


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


def section(heading: str, cards) -> list[str]:
    """Cards, (picture, title, caption, numbers...) each, under a heading; nothing if there is no card."""
    made = [f"<figure><h3>{text(title)}</h3>{picture(title, *numbers)}<figcaption>{text(caption)}"
            "</figcaption></figure>" for picture, title, caption, *numbers in cards]
    return [f'<h2>{heading}</h2><div class="figures">{"".join(made)}</div>'] if made else []


def run_table(metrics: dict) -> str:
    """The table that ends a run, without the clock's column."""
    def cell(show, name, m):
        try:
            return show(name, m)
        except (KeyError, TypeError):  # not measured, or not a number
            return "-"
    columns = [(" ".join(heads).replace("five- ", "five-").replace("- ", ""),
                [cell(show, name, m) for name, m in metrics.items()])
               for *heads, show in RUN_COLUMNS if heads != ["sec-", "onds"]]
    columns = [(head, cells) for head, cells in columns if set(cells) != {"-"}]
    return _table([head for head, _ in columns], zip(*(cells for _, cells in columns)))


def experiment_table(results: dict) -> str:
    """The table that ends an experiment."""
    return _from_markdown(markdown(results))


def compared_table(results: dict) -> str:
    """The table of paired differences."""
    return _from_markdown(compared_markdown(results))


def _from_markdown(lines: str) -> str:
    head, _, *rows = [line.strip("| ").rsplit(" | ", len(COLUMNS) + (" | model | " in lines))
                      for line in lines.split("\n")]  # a variant's name may hold a bar
    return _table(head, rows)


def _table(head: list, rows) -> str:
    lines = ["".join(f"<th>{text(cell)}</th>" for cell in head),
             *("".join(f"<td>{_bold(text(cell))}</td>" for cell in row) for row in rows)]
    return '<div class="scroll"><table>' + "".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>"


def _bold(cell: str) -> str:
    """Markdown's bold as HTML's."""
    return f"<b>{cell[2:-2]}</b>" if re.fullmatch(r"\*\*.+\*\*", cell) else cell


def prompt(asked: str, answers) -> str:
    """A prompt with its answers."""
    return f'<div class="prompt"><h3 class="text" dir="auto">{text(asked)}</h3>{"".join(answers)}</div>'


def answer(label: str, response: str, told: str) -> str:
    """One answer under a label, and what is told of it; label and told are HTML."""
    return (f'<div class="answer"><b>{label}</b><div><p class="text" dir="auto">{text(response)}</p>'
            f'<div class="soft">{told}</div></div></div>')


def points(record: dict) -> str:
    """The oracle's points for a sampled answer, and which are missing."""
    if "sampled_points" not in record:
        return ""
    given = record["sampled_points"]
    missed = ", ".join(name for name, point in zip(oracle.CRITERIA, given) if not point)
    return (f'<span class="{"bad" if missed else "good"}">{sum(given)} of {len(given)} points</span>'
            + (missed and f"; missed: {missed}"))


def judged(true: int | None, reward: float | None, scores: list[float | None], words: list[str]) -> str:
    """A response's reward and the scores behind it, what is true, and its first readable judgement."""
    told = "no reward" if reward is None else \
        f"reward {reward:.2f}, the mean of " + ", ".join("unread" if s is None else f"{s:g}" for s in scores)
    told += "" if true is None else f" (true score {true})"
    shown = next((word for word, score in zip(words, scores) if score is not None), words[0])
    return told + (shown and f'<details><summary>a judgement</summary><pre dir="auto">{text(shown)}</pre>'
                   "</details>")
