"""The tiny world's language, read from words.toml.

A request names three things, one for each slot of its kind; an answer is one sentence for each
slot, in that order, and its kind's closing line. 4 kinds with 5 phrasings each and about 50 words
a slot make 2.5 million distinct requests.
"""

import tomllib
from pathlib import Path

_LANGUAGE = tomllib.loads(Path(__file__).with_name("words.toml").read_text(encoding="utf-8"))
_KINDS = _LANGUAGE["kinds"]

WORDS = {slot: words.split() for slot, words in _LANGUAGE["words"].items()}
SLOT_OF = {word: slot for slot, words in WORDS.items() for word in words}
SLOTS = {kind: tuple(k["slots"]) for kind, k in _KINDS.items()}
REQUESTS = {kind: k["requests"] for kind, k in _KINDS.items()}
ANSWERS = {kind: k["answers"] for kind, k in _KINDS.items()}
CLOSINGS = {kind: k["closing"] for kind, k in _KINDS.items()}
EXTRAS = _LANGUAGE["extras"]
