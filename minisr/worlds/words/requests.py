"""Requests: one short sentence of daily life with four given words.

The words of a request, not its phrasing, decide whether it belongs to training or to evaluation.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from minisr import InputError
from minisr.worlds.words.words import SCENES, UNSEEN_FORMS, UNSEEN_SCENES, Scene, inflections, lemma

PHRASINGS = (
    "Write one short sentence of daily life that uses all of these words: {words}.",
    "Make a simple sentence with the words {words}.",
    "Put all of these words into one short sentence: {words}.",
    "In one sentence, use the words {words}.",
)  # few and similar, so that a small model that sees them as examples writes requests, too
WORDS_OF_A_REQUEST = 4
EVALUATION_EVERY = 10  # one word set in 10 belongs to evaluation
MAX_MISSES = 20_000  # draws in a row without a new word set
ITEM = r"[\"'“”]?[a-z]{2,}[\"'“”]?"
ENUMERATION = re.compile(rf"(?<![\w'-])(?<!\w, ){ITEM}(?:(?:,? and |, ){ITEM}){{2,}}(?![\w'-])")
NO_ITEMS = frozenset("and or the an a in on of to with it use no none all word words sentence sentences".split())
# Hashes of the word sets of CommonGen-lite (https://github.com/allenai/CommonGen-Eval), the test set on which models
# trained here are measured. The sets themselves are not shipped; with their hashes they can be kept out of training.
EXCLUDED = frozenset(Path(__file__).with_name("excluded_sets.txt").read_text(encoding="utf-8").split())


@dataclass(frozen=True)
class Request:
    """What a prompt asks for: four different words."""

    words: tuple[str, ...]


def find_words(prompt: str) -> tuple[str, ...] | None:
    """The words that a prompt wants in a sentence, however many; None if it asks for anything else.

    Reads every phrasing with any words, and similar ones that a model may write."""
    text = prompt.lower()
    found = ENUMERATION.findall(text) if "sentence" in text else []
    if len(found) != 1:
        return None
    words = tuple(word for word in re.findall("[a-z]+", found[0]) if word != "and")
    distinct = {lemma(word) for word in words}
    return words if len(distinct) == len(words) and not NO_ITEMS & distinct else None


def parse_request(prompt: str) -> Request | None:
    """The request in a prompt, or None if this world has no such request."""
    words = find_words(prompt)
    return Request(words) if words and len(words) == WORDS_OF_A_REQUEST else None


def text_hash(words) -> str:
    return hashlib.sha256(",".join(sorted(words)).encode()).hexdigest()[:10]


def set_hash(words: tuple[str, ...]) -> str:
    """Identifies a set of words, whatever their order; inflected forms count as one word if the vocabulary has it."""
    return text_hash(map(lemma, words))


def excluded(words: tuple[str, ...]) -> bool:
    """Whether this is a set of CommonGen-lite, as it stands or by its lemmas."""
    return not EXCLUDED.isdisjoint((set_hash(words), text_hash(word.lower() for word in words)))


def held_out(words: tuple[str, ...]) -> bool:
    """Whether a set of words belongs to evaluation."""
    return int(set_hash(words), 16) % EVALUATION_EVERY == 0


def is_unseen(request: Request) -> bool:
    """Whether the words belong to those that no training prompt uses."""
    return any(word in UNSEEN_FORMS for word in request.words)


def may_train(prompt: str) -> bool:
    """Whether a prompt may be trained on: no set of evaluation or of CommonGen-lite, and no unseen word."""
    words = find_words(prompt)
    if words is None:
        return not UNSEEN_FORMS.intersection(re.findall("[a-z]+", prompt.lower()))
    return not (held_out(words) or excluded(words) or UNSEEN_FORMS.intersection(words))


def draw_words(scene: Scene, rng: Random) -> tuple[str, ...]:
    """Four words of a scene in random order, one or two of them verbs."""
    n_verbs = rng.choice((1, 2))
    words = rng.sample(scene.nouns, WORDS_OF_A_REQUEST - n_verbs) + rng.sample(scene.verbs, n_verbs)
    rng.shuffle(words)
    return tuple(words)


def share_a_form(words: tuple[str, ...]) -> bool:
    """Whether one word in an answer could count for two of these."""
    forms = [form for word in words for form in inflections(word)]
    return len(set(forms)) < len(forms)


def draw_requests(rng: Random, evaluation: bool = False, unseen: bool = False) -> Iterator[tuple[Request, str]]:
    """(request, prompt) of training, of evaluation, or of evaluation with unseen words.

    No set of words comes twice. Raises InputError when hardly any set is left."""
    scenes, known = UNSEEN_SCENES if unseen else SCENES, set()
    misses = 0
    while misses < MAX_MISSES:
        words = draw_words(rng.choice(scenes), rng)
        key = set_hash(words)
        of_other_side = not unseen and held_out(words) != evaluation
        if key in known or of_other_side or excluded(words) or share_a_form(words):
            misses += 1
            continue
        misses = 0
        known.add(key)
        yield Request(words), rng.choice(PHRASINGS).format(words=", ".join(words))
    keys = "seed_data.evaluation or judge_evaluation" if evaluation else "seed_data.ift and ranked, or prompts.count"
    raise InputError(f"the words world has only {len(known)} word sets of the kind it needs; lower {keys}")
