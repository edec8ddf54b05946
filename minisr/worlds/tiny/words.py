"""The tiny world's language, read from words.toml.

A request names three things, one for each slot of its kind. An answer consists of one sentence for each slot,
in the same order, and the closing line of its kind. With 4 kinds and about 50 words for each slot, there are half a
million distinct requests, and 5 phrasings of each.
"""

import tomllib
from pathlib import Path

_LANGUAGE = tomllib.loads(Path(__file__).with_name("words.toml").read_text(encoding="utf-8"))
_KINDS = _LANGUAGE["kinds"]

WORDS = {slot: words.split() for slot, words in _LANGUAGE["words"].items()}
SLOT_OF = {word: slot for slot, words in WORDS.items() for word in words}
SLOTS = {name: tuple(kind["slots"]) for name, kind in _KINDS.items()}
REQUESTS = {name: kind["requests"] for name, kind in _KINDS.items()}
ANSWERS = {name: kind["answers"] for name, kind in _KINDS.items()}
CLOSINGS = {name: kind["closing"] for name, kind in _KINDS.items()}
EXTRAS = _LANGUAGE["extras"]
