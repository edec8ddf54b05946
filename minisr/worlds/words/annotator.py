"""How the oracle's verdict reads as a judgement: a justification that adds up the points, then the score line.

    knife: knife, 1. cut: cuts, 2. board: none, 2. soup: soup, 3.
    Text: 1 The cook cuts (verb) the soup 2 meat with a knife. end
    Sentence: fine, 4.
    Score: 4

Small models judge well only what they can copy, and one thing at a time. Each word is quoted as it stands in the
answer. Then the answer is copied with the marks that sentence.py explains; where it breaks a rule, the copy breaks off.
"""

import re

from minisr.worlds.words.oracle import Verdict
from minisr.worlds.words.requests import Request, parse_request
from minisr.worlds.words.sentence import FINE

SENTENCE_LINE = re.compile(r"^Sentence: ([a-z ]+)", re.IGNORECASE | re.MULTILINE)


def justification(request: Request, verdict: Verdict) -> str:
    """The justification without the score line."""
    total, parts = 0, []
    for word, found, point in zip(request.words, verdict.found, verdict.points):
        total += point
        parts.append(f"{word}: {found}, {total}.")
    form = verdict.form
    return f"{' '.join(parts)}\nText: {form.copy}\nSentence: {form.reason}, {total + verdict.points[-1]}."


def judgement(request: Request, verdict: Verdict) -> str:
    return f"{justification(request, verdict)}\nScore: {verdict.score}"


def word_points(prompt: str, text: str) -> int | None:
    """How many requested words a judgement finds; None if the prompt is no request."""
    request = parse_request(prompt)
    return sum(map(bool, read_points(request, text)[:-1])) if request else None


def read_points(request: Request, text: str) -> tuple[bool | None, ...]:
    """The points that a judgement gives by its justification; None where it says nothing."""
    points = []
    for word in request.words:
        match = re.search(rf"(?<![\w-]){re.escape(word)}: ([\w'-]+)", text)
        points.append(match and match[1] != "none")
    forms = SENTENCE_LINE.findall(text)  # the answer that is quoted before may hold one, too
    return (*points, forms[-1].lower() == FINE if forms else None)
