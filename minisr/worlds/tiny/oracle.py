"""The oracle: reads any request and any text, and gives the text 0 to 5 additive points.

It measures, and it stands in for the human annotators of the seed data. After M1 no training
signal comes from it (but in the control that says so, `judge.by = "oracle"`).
"""

import re
from dataclasses import dataclass

from minisr.worlds.tiny.words import ANSWERS, CLOSINGS, EXTRAS, REQUESTS, SLOT_OF, SLOTS, WORDS

CRITERIA = ("first", "second", "third", "nothing added", "good form")


@dataclass(frozen=True)
class Request:
    """What a prompt asks for: its kind and three words, in the order of SLOTS[kind]."""

    kind: str
    words: tuple[str, str, str]


@dataclass(frozen=True)
class Verdict:
    """The oracle's finding: one bool for each of CRITERIA, and the evidence a careful reader quotes."""

    points: tuple[bool, ...]
    found: tuple[str, str, str]  # for each slot the asked-for word, else what stands in its place
    added: str  # the first word that nobody asked for, or "none"
    ending: str  # the answer's last sentence

    @property
    def score(self) -> int:
        return sum(self.points)


def _pattern(frame: str) -> str:
    """A sentence frame as a regular expression: {who} -> (?P<who>fox|bear|...)."""
    escaped = re.escape(frame).replace(r"\{", "{").replace(r"\}", "}")
    return re.sub(r"\{(\w+)\}", lambda m: f"(?P<{m[1]}>{'|'.join(WORDS[m[1]])})", escaped)


def _sentences_of(kind: str) -> list[tuple[int, re.Pattern]]:
    """Each sentence that may stand in an answer of this kind, with its place (3 = an extra)."""
    frames = [(i, f.format("{" + slot + "}")) for i, slot in enumerate(SLOTS[kind])
              for f in ANSWERS[kind][i]]
    frames += [(3, f.format("{" + slot + "}")) for slot, f in EXTRAS.items()]
    return [(place, re.compile(_pattern(frame))) for place, frame in frames]


_REQUESTS = [(kind, re.compile(_pattern(f))) for kind, fs in REQUESTS.items() for f in fs]
_SENTENCES = {kind: _sentences_of(kind) for kind in SLOTS}


def parse_request(prompt: str) -> Request | None:
    """The request that a prompt makes, or None if this world does not know such a request."""
    for kind, pattern in _REQUESTS:
        if match := pattern.fullmatch(prompt):
            return Request(kind, tuple(match[slot] for slot in SLOTS[kind]))
    return None


def split_sentences(text: str) -> list[str]:
    """Sentences with their full stop or question mark; "how are you?" belongs to its greeting."""
    return [s.strip() for s in re.findall(r"[^.?]+[.?]?", text) if s.strip()]


def examine(request: Request, response: str) -> Verdict:
    """Score a response to a request; every text gets a verdict, the empty one too."""
    sentences = split_sentences(response)
    said = re.findall(r"[a-z]+", response.lower())
    content = [w for w in said if w in SLOT_OF]
    extra = [w for w in content if w not in request.words]
    places = [_place(request.kind, s) for s in sentences[:-1]]
    ending = sentences[-1] if sentences else "none"
    good_form = (ending == CLOSINGS[request.kind] and None not in places
                 and places == sorted(places) and len(set(places)) == len(places)
                 and places[:1] == [0])
    asked = tuple(w in content for w in request.words)
    found = tuple(_stand_in(request.kind, i, w, sentences, content)
                  for i, w in enumerate(request.words))
    return Verdict((*asked, not extra, good_form), found, extra[0] if extra else "none", ending)


def score(prompt: str, response: str) -> int | None:
    """Oracle score 0-5 of a response, or None if the prompt is no request of this world."""
    request = parse_request(prompt)
    return None if request is None else examine(request, response).score


def _place(kind: str, sentence: str) -> int | None:
    """Which place in the answer a sentence is made for: 0, 1, 2 = a slot, 3 = an extra, None = no place."""
    return next((i for i, pattern in _SENTENCES[kind] if pattern.fullmatch(sentence)), None)


def _stand_in(kind, i, word, sentences, content) -> str:
    """The evidence for slot i: the word itself, else the word in its sentence, else "none"."""
    if word in content:
        return word
    for sentence in sentences:
        if _place(kind, sentence) == i:
            return next(w for w in re.findall(r"[a-z]+", sentence.lower()) if w in SLOT_OF)
    return "none"
