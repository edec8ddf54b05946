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
# A line that speaks of scoring, and a scale in it: "from 0 to 100", "1-10", "[[1..10]]", "out of ten", "points in %".
SCORING = re.compile(r"(?<![a-z])(?:scores?|scoring|scale|points?|rates?|rating|grades?)(?![a-z])", re.IGNORECASE)
PERCENT = re.compile(SCORING.pattern + r"\W{0,3}(?:(?:in|as)\s+(?:a\s+)?)?(?:%|percent)", re.IGNORECASE)
WORDS = {"six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10, "twenty": 20, "hundred": 100}
NUMBER = rf"(?:an?\s+)?(\d+(?![\da-z]|[.-]\d)|(?:{'|'.join(WORDS)})\b)"
SOMETHING_ELSE = r"(?!\s+(?:words?|sentences?|lines?|tokens?|characters?|paragraphs?|examples?)\b)"
JOINTS = r"-|–|—|~|\.\.+|…|to|through|bis|à|a|hasta|до|到|至"
SCALES = [re.compile(pattern + SOMETHING_ELSE, re.IGNORECASE) for pattern in (
    rf"(?<![\w.])(?:[0-2]|zero|one)\s*(?:{JOINTS})\s*{NUMBER}",
    rf"(?:\bbetween\s+(?:[0-2]|zero|one)\s*(?:and|&)|[\[(]\s*[0-2]\s*,)\s*{NUMBER}",
    rf"(?:\b(?:out of|at most|up to|sur|von|max(?:imum)?(?:\s+score)?(?:\s+(?:is|of))?|scale of)\s+|/\s*){NUMBER}",
    rf"\b{NUMBER}(?:[\s-]+points?\b.{{0,15}}\bscale|\s+(?:is|being)\s+(?:the\s+)?(?:best|highest|maximum|perfect))",
    rf"\bscore[\s*_`)]*[:：][\s*_`\[(<]*{NUMBER}")]
LETTERS = re.compile(r"score[\s*_`)]*[:：][\s*_`\[(<]*A\s*(?:-|–|/|,|to|or)\s*[B-F]\b", re.IGNORECASE)


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
    for pattern in SCALES:
        for match in pattern.finditer(line):
            number = match[1].lower()
            if (WORDS.get(number) or int(number)) > MAX_SCORE:
                return match[0]
    match = PERCENT.search(line) or LETTERS.search(line)
    return match[0] if match else None
