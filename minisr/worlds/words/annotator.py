"""How the oracle's verdict reads as a judgement: a justification that adds up the points, then the score line.

    knife: knife, 1. cut: cuts, 2. board: none, 2. soup: soup, 3. Verb: cuts. End: soup. end. Sentence: fine, 4.
    Score: 4

Small models judge well only what they can copy: each word is quoted as it stands in the answer, and so is the evidence
for the sentence's point.
"""

import re

from minisr.worlds.words.oracle import Verdict
from minisr.worlds.words.requests import Request
from minisr.worlds.words.sentence import FINE

EVIDENCE = ("verb", "end")  # what is quoted of the sentence before it is judged, see Form; () for nothing
HEADINGS = {"verb": "Verb", "end": "End"}
SENTENCE_LINE = re.compile(r"Sentence: ([a-z ]+?)(?: \d+)?[,.]", re.IGNORECASE)


def reason(request: Request, verdict: Verdict) -> str:
    """The justification without the score line."""
    total, parts = 0, []
    for word, found, point in zip(request.words, verdict.found, verdict.points):
        total += point
        parts.append(f"{word}: {found}, {total}.")
    parts += [f"{HEADINGS[name]}: {getattr(verdict.form, name)}." for name in EVIDENCE]
    parts.append(f"Sentence: {verdict.form.reason}, {total + verdict.points[-1]}.")
    return " ".join(parts)


def judgement(request: Request, verdict: Verdict) -> str:
    return f"{reason(request, verdict)}\nScore: {verdict.score}"


def read_points(request: Request, text: str) -> tuple[bool | None, ...]:
    """The points that a judgement gives by its justification; None where it says nothing."""
    points = []
    for word in request.words:
        match = re.search(rf"(?<![\w-]){re.escape(word)}: ([\w'-]+)", text)
        points.append(match and match[1] != "none")
    form = SENTENCE_LINE.search(text)
    return (*points, form and form[1].lower() == FINE)
