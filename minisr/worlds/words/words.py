"""The vocabulary, read from words.toml: scenes of daily life, and every inflected form of every word."""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

_VOCABULARY = tomllib.loads(Path(__file__).with_name("words.toml").read_text(encoding="utf-8"))
_PLURALS, _IRREGULAR = _VOCABULARY["plurals"], _VOCABULARY["irregular"]
_DOUBLED, _ING = _VOCABULARY["spelling"]["doubled"].split(), _VOCABULARY["spelling"]["ing"]
ENDS_IN_ES = re.compile(r"(?:s|x|z|ch|sh)$")
ENDS_IN_Y = re.compile(r"[^aeiou]y$")
DOUBLES = re.compile(r"^(?:[^aeiou]|qu)*[aeiou][bdfgklmnprtz]$|^.*[^aeiouy][aeiou]g$")  # stop: stopped

GRAMMAR = {name: frozenset(words.split()) for name, words in _VOCABULARY["grammar"].items()}  # small words


@dataclass(frozen=True)
class Scene:
    """Words that occur together in daily life."""

    nouns: tuple[str, ...]
    verbs: tuple[str, ...]


def read_scenes(name: str) -> tuple[Scene, ...]:
    return tuple(Scene(tuple(scene["nouns"].split()), tuple(scene["verbs"].split()))
                 for scene in _VOCABULARY[name].values())


def words_of(scenes: tuple[Scene, ...], kind: str) -> frozenset[str]:
    """All "nouns" or all "verbs" of these scenes."""
    return frozenset(word for scene in scenes for word in getattr(scene, kind))


def plural(noun: str) -> str:
    return _PLURALS.get(noun) or third_person(noun)


def third_person(verb: str) -> str:
    """The form with -s; also the regular plural of a noun."""
    if verb in ("be", "have"):
        return {"be": "is", "have": "has"}[verb]
    if ENDS_IN_Y.search(verb):
        return f"{verb[:-1]}ies"
    return f"{verb}es" if ENDS_IN_ES.search(verb) or verb in ("go", "do", "echo") else f"{verb}s"


def stem(verb: str) -> str:
    """What -ed and -ing are added to: stopp, bak, carr(y)."""
    if verb.endswith("e") and not verb.endswith(("ee", "oe", "ye")):
        return verb[:-1]
    doubles = DOUBLES.search(verb) or verb in _DOUBLED
    return verb + verb[-1] if doubles else verb


def verb_forms(verb: str) -> dict[str, tuple[str, ...]]:
    """The forms of a verb; some have two spellings, the usual one first."""
    if ENDS_IN_Y.search(verb):
        past = f"{verb[:-1]}ied"
    else:
        past = f"{verb}d" if verb.endswith("e") else f"{stem(verb)}ed"
    pasts, participles = _IRREGULAR[verb].split() if verb in _IRREGULAR else (past, past)
    progressive = f"{verb}ing" if verb.endswith("y") else f"{stem(verb)}ing"
    return {"base": (verb,), "third": (third_person(verb),), "past": tuple(pasts.split("/")),
            "participle": tuple(participles.split("/")), "ing": (_ING.get(verb, progressive),)}


def noun_forms(noun: str) -> dict[str, tuple[str, ...]]:
    return {"singular": (noun,), "plural": (plural(noun),)}


def inflections(word: str) -> frozenset[str]:
    """Every form of a word, as a noun and as a verb. Works for words outside of the vocabulary too."""
    forms = [*noun_forms(word).values(), *verb_forms(word).values()]
    return frozenset(form for spellings in forms for form in spellings)


SCENES, UNSEEN_SCENES = read_scenes("scenes"), read_scenes("unseen_scenes")
NOUNS, VERBS = words_of(SCENES, "nouns"), words_of(SCENES, "verbs")  # those of training
UNSEEN = words_of(UNSEEN_SCENES, "nouns") | words_of(UNSEEN_SCENES, "verbs")
UNSEEN_FORMS = frozenset(form for word in UNSEEN for form in inflections(word))
ALL_NOUNS = NOUNS | words_of(UNSEEN_SCENES, "nouns")
ALL_VERBS = VERBS | words_of(UNSEEN_SCENES, "verbs") | set(_VOCABULARY["other"]["verbs"].split())
LEMMA_OF = {form: word for word in sorted(NOUNS | VERBS | UNSEEN, reverse=True) for form in inflections(word)} | {
    word: word for word in NOUNS | VERBS | UNSEEN}


def lemma(word: str) -> str:
    """The word of the vocabulary that this is a form of, or the word itself."""
    return LEMMA_OF.get(word.lower(), word.lower())
