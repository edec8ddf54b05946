"""The oracle: parses any request and grades any answer with 0 to 5 additive points.

Four points for the words, one for the sentence. It measures models, and stands in for the annotators who judge the
answers of the EFT data. After M1 it grades nothing new, except in the control judge.by = "oracle"; DPO replays the EFT
judgements from before M1 (dpo.replay_weight).
"""

import re
from dataclasses import dataclass

from minisr.worlds.words.requests import Request, parse_request
from minisr.worlds.words.sentence import FINE, Form, check_sentence
from minisr.worlds.words.words import inflections

CRITERIA = ("first word", "second word", "third word", "fourth word", "sentence")


@dataclass(frozen=True)
class Verdict:
    """The oracle's grade: one bool for each of CRITERIA, the words as they stand, and the form."""

    points: tuple[bool, ...]
    found: tuple[str, ...]  # for each requested word: as it stands in the answer, or "none"
    form: Form

    @property
    def score(self) -> int:
        return sum(self.points)


def examine(request: Request, response: str) -> Verdict:
    """Grade a response to a request. Every text gets a verdict, even an empty one."""
    words = re.findall("[A-Za-z]+", response)
    found = tuple(find_form(word, words) for word in request.words)
    form = check_sentence(response, request.words)
    return Verdict((*(word != "none" for word in found), form.reason == FINE), found, form)


def find_form(word: str, words: list[str]) -> str:
    """The first of these words that is a form of the word, or "none"."""
    forms = inflections(word)
    return next((other for other in words if other.lower() in forms), "none")


def score(prompt: str, response: str) -> int | None:
    """The oracle's score of a response, 0 to 5, or None if the prompt is not a request of this world."""
    request = parse_request(prompt)
    return None if request is None else examine(request, response).score
