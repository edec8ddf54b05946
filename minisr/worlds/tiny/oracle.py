"""The oracle: parses any request and grades any answer with 0 to 5 additive points.

It measures models, and it stands in for the human annotators of the seed data. After M1, no training signal
comes from it, except in the control experiment judge.by = "oracle".
"""

import re
from dataclasses import dataclass

from minisr.worlds.tiny.words import ANSWERS, CLOSINGS, EXTRAS, REQUESTS, SLOT_OF, SLOTS, WORDS

CRITERIA = ("first", "second", "third", "nothing added", "good form")
EXTRA = 3  # the position of a sentence about something that was not requested, after those of the three slots


@dataclass(frozen=True)
class Request:
    """What a prompt asks for: its kind and three words, in the order of SLOTS[kind]."""

    kind: str
    words: tuple[str, str, str]


@dataclass(frozen=True)
class Verdict:
    """The oracle's grade: one bool for each of CRITERIA, and the evidence that a careful reader quotes."""

    points: tuple[bool, ...]
    found: tuple[str, str, str]  # for each slot: the requested word, else the word in its place, else "none"
    added: str  # the first word that was not requested, or "none"
    ending: str  # the last sentence of the answer, or "none"

    @property
    def score(self) -> int:
        return sum(self.points)


def frame_pattern(frame: str) -> str:
    """A sentence frame as a regular expression: {who} -> (?P<who>fox|bear|...)."""
    escaped = re.escape(frame).replace(r"\{", "{").replace(r"\}", "}")
    return re.sub(r"\{(\w+)\}", lambda match: f"(?P<{match[1]}>{'|'.join(WORDS[match[1]])})", escaped)


def sentence_patterns(kind: str) -> list[tuple[int, re.Pattern]]:
    """(position, pattern) of each sentence that an answer of this kind can contain."""
    frames = []
    for position, slot in enumerate(SLOTS[kind]):
        for frame in ANSWERS[kind][position]:
            frames.append((position, frame.format("{" + slot + "}")))
    for slot, frame in EXTRAS.items():
        frames.append((EXTRA, frame.format("{" + slot + "}")))
    return [(position, re.compile(frame_pattern(frame))) for position, frame in frames]


_REQUESTS = [(kind, re.compile(frame_pattern(frame)))
             for kind, frames in REQUESTS.items() for frame in frames]
_SENTENCES = {kind: sentence_patterns(kind) for kind in SLOTS}


def parse_request(prompt: str) -> Request | None:
    """The request in a prompt, or None if this world has no such request."""
    for kind, pattern in _REQUESTS:
        if match := pattern.fullmatch(prompt):
            return Request(kind, tuple(match[slot] for slot in SLOTS[kind]))
    return None


def split_sentences(text: str) -> list[str]:
    """Sentences with their full stop or question mark."""
    return [sentence.strip() for sentence in re.findall(r"[^.?]+[.?]?", text) if sentence.strip()]


def examine(request: Request, response: str) -> Verdict:
    """Grade a response to a request. Every text gets a verdict, also an empty one."""
    sentences = split_sentences(response)
    words = world_words(response)
    extra = [word for word in words if word not in request.words]
    requested = tuple(word in words for word in request.words)
    found = tuple(word if word in words else stand_in(request.kind, slot, sentences)
                  for slot, word in enumerate(request.words))
    ending = sentences[-1] if sentences else "none"
    good_form = has_good_form(request.kind, sentences)
    return Verdict((*requested, not extra, good_form), found, extra[0] if extra else "none", ending)


def score(prompt: str, response: str) -> int | None:
    """The oracle's score of a response, 0 to 5, or None if the prompt is not a request of this world."""
    request = parse_request(prompt)
    return None if request is None else examine(request, response).score


def world_words(text: str) -> list[str]:
    """The words of a text that can fill a slot, in order."""
    return [word for word in re.findall(r"[a-z]+", text.lower()) if word in SLOT_OF]


def has_good_form(kind: str, sentences: list[str]) -> bool:
    """Whether an answer begins with the first slot, keeps the order, and ends with its kind's closing."""
    if not sentences or sentences[-1] != CLOSINGS[kind]:
        return False
    positions = [sentence_position(kind, sentence) for sentence in sentences[:-1]]
    in_order = None not in positions and positions == sorted(set(positions))
    return in_order and positions[:1] == [0]


def sentence_position(kind: str, sentence: str) -> int | None:
    """Where a sentence belongs in an answer: 0, 1, 2 for a slot, EXTRA, or None for an unknown sentence."""
    for position, pattern in _SENTENCES[kind]:
        if pattern.fullmatch(sentence):
            return position
    return None


def stand_in(kind: str, slot: int, sentences: list[str]) -> str:
    """The word in the sentence of a slot, or "none" without such a sentence."""
    for sentence in sentences:
        if sentence_position(kind, sentence) == slot:
            return world_words(sentence)[0]
    return "none"
