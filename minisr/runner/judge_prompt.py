"""Whether a judge prompt from a file asks for what the score parser reads: a line "Score: <total>", from 0 to 5.

A prompt that asks for something else would run to the end, with judgements that nobody can parse, or with EFT examples
that contradict their own prompt.
"""

import re
from pathlib import Path

from minisr import InputError
from minisr.judge import MAX_SCORE

FIELDS = ("{prompt}", "{response}")
SCORE_LINE = re.compile(r"(?<![\w\"'])score[\s*_`)\](0-9–/-]{0,12}[:：]", re.IGNORECASE)
JSON_SCORE = re.compile(r"""["']score["']\s*:""", re.IGNORECASE)
# A line that speaks of scoring, and a scale in it: "from 0 to 100", "1-10", "[[1..10]]", "out of 10", "points in %".
SCORING = re.compile(r"\b(?:scores?|scoring|scale|points?|rates?|rating|grades?)\b", re.IGNORECASE)
PERCENT = re.compile(SCORING.pattern + r"\W{0,3}(?:(?:in|as)\s+(?:a\s+)?)?(?:%|percent)", re.IGNORECASE)
RANGE = re.compile(r"\b[0-2]\s*(?:-|–|—|\.\.+|…|to|through)\s*(\d+)\b", re.IGNORECASE)
BETWEEN = re.compile(r"\bbetween\s+[0-2]\s+and\s+(\d+)\b", re.IGNORECASE)
OUT_OF = re.compile(r"\b(?:out of|maximum of|up to)\s+(\d+)\b(?!\s+words)|/\s*(\d+)\b", re.IGNORECASE)


def check_judge_prompt(template: str, path: Path) -> None:
    """Raise InputError unless the template has both fields and asks for a score line on the scale that is parsed."""
    where = f"judge prompt {path}"
    if "{{" in template:
        raise InputError(f"{where} contains '{{{{': write {{prompt}} and {{response}} with single braces; all other "
                         "braces stay as they are")
    for field in FIELDS:
        if template.count(field) != 1:
            raise InputError(f"{where} must contain {field} exactly once, not {template.count(field)} times")
    lines = template.strip().splitlines()
    if lines[0].startswith("```") and lines[-1].startswith("```"):
        raise InputError(f"{where} stands in a code fence; remove its first and its last line")
    wanted = f"minisr parses a last line \"Score: <total>\" from 0 to {MAX_SCORE}; ask for that"
    if JSON_SCORE.search(template):
        raise InputError(f"{where} asks for JSON, but {wanted}")
    for number, line in enumerate(template.splitlines(), 1):
        if scale := other_scale(line):
            raise InputError(f"{where}, line {number}, asks for another scale ({scale}), but {wanted}")
    if not SCORE_LINE.search(template):
        raise InputError(f"{where} never asks for a score line, but {wanted}")


def other_scale(line: str) -> str | None:
    """The scale that a line about scoring states, if it goes beyond 5."""
    if not SCORING.search(line):
        return None
    for pattern in (RANGE, BETWEEN, OUT_OF):
        for match in pattern.finditer(line):
            if int(next(filter(None, match.groups()))) > MAX_SCORE:
                return match[0]
    match = PERCENT.search(line)
    return match[0] if match else None
