"""What counts as a sentence: rules that a program can check, and a reason if a text breaks one.

REASONS names the rules; the first broken one is the reason. The rules tell sentences of daily life from the cheap ways
to place given words in a text: lists, loops, fragments, talk about the words. They are no grammar: "The frisbee is a
catch and the dog is a throw." passes.
"""

import re
from collections import Counter
from dataclasses import dataclass

from minisr.worlds.words.words import ALL_NOUNS, ALL_VERBS, GRAMMAR, inflections, plural, verb_forms

FINE, NONE = "fine", "none"
REASONS = ("too long", "more than one", "no end", "too short", "about words", "repeats", "a list", "symbols",
           "no verb")
SHORTEST, LONGEST = 6, 25  # words
GROUP = 5  # words between two numbers of a quoted sentence, from which its length can be read; divides LONGEST

DETERMINERS, PRONOUNS, AUXILIARIES, PREPOSITIONS, CONJUNCTIONS = (
    GRAMMAR[name] for name in ("determiners", "pronouns", "auxiliaries", "prepositions", "conjunctions"))
FUNCTION_WORDS = DETERMINERS | PRONOUNS | AUXILIARIES | PREPOSITIONS | CONJUNCTIONS | GRAMMAR["others"]
FUNCTION_SHARE = 0.2  # of the words of a sentence, at least
BEFORE_BASE_FORM = PRONOUNS | CONJUNCTIONS | GRAMMAR["before_base_form"]
MAY_REPEAT = frozenset("a an the and to of in on is was his her".split())

FINITE = frozenset(form for verb in ALL_VERBS for name in ("third", "past") for form in verb_forms(verb)[name])
NOUN_FORMS = frozenset(form for noun in ALL_NOUNS for form in (noun, plural(noun)))

WORD = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*")
ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|St|a\.m|p\.m|e\.g|i\.e|etc)\.(?=\s+\S)")
# Where a sentence ends: a line break, a stop before a space, a quoted stop before a capital, or a stop at the end.
END = re.compile(r"\s*\n\s*|[.!?]+(?=\s|$)|[.!?]+[\"')]+(?=\s+[\"'A-Z0-9]|$)")
# "dog/catch", "dog: a catch", "dog-catch-frisbee", but not "day-to-day".
SYMBOL = re.compile(r"[^\w\s.,!?'\"’“”‘—–;-]|\w+-(?!(?:to|of|by|in|on|the|a|and)-)\w+-\w+|[.]{2}|_")
QUOTED_WORD = re.compile(r"[\"“][\w-]+[.,]?[\"”]")
ARTICLE = "(?:a|an|the|some|his|her|my|our|their|your|its|one|two)"
ITEM = rf"(?:{ARTICLE} (?:[a-z'-]+ )?)?[a-z'-]+"
JOINED = rf"(?:(?: ?[,;—–] ?(?:and |or )?| (?:and|or) ){ITEM})"
LIST = re.compile(rf"\b{ITEM}(?:{JOINED}{{2,}}(?=\s*[,;.!?—–])|{JOINED}{{3,}}(?![\w'-]))")
BROKEN = re.compile(rf"\b(?:a|an|the|my|his|its|our|their|your) (?:a|an|the|and|or|of|is|was)\b|\b{ARTICLE}[,;]")
RUN = 4  # requested words side by side
QUOTE = 4  # words of a list that are quoted


@dataclass(frozen=True)
class Form:
    """Whether a text is a sentence, and what a careful reader quotes as evidence. "none": there is nothing to quote."""

    broken: tuple[str, ...]  # the broken ones of REASONS, in their order
    text: str  # the first sentence, its words numbered in groups, and what follows: see quote_sentence
    about: str  # what shows that the text is about words: "sentence"
    repeated: str  # the word that occurs too often, or in a phrase that occurs twice
    listed: str  # how a list begins: "a dog, a catch"
    symbols: str  # the first word with a symbol that sentences do not have: "dog/catch"
    verb: str  # the first finite verb

    @property
    def reason(self) -> str:
        """FINE, or the first broken rule."""
        return self.broken[0] if self.broken else FINE


def check_sentence(text: str, requested: tuple[str, ...] = ()) -> Form:
    """Whether a text is one sentence. `requested`: the words that a request asks for."""
    text = plain_quotes(text.strip())
    words = WORD.findall(text)
    lower = [word.lower() for word in words]
    first, rest = split_first_sentence(text)
    evidence = {
        "text": quote_sentence(first, rest), "about": about_words(text, lower),
        "repeated": repeated_word(lower) or NONE, "listed": list_start(text, lower, requested),
        "symbols": word_with_symbol(text), "verb": finite_verb(words)}
    is_broken = {
        "too long": len(first) > LONGEST, "more than one": rest not in ("end", NONE), "no end": lacks_end(text, lower),
        "too short": len(first) < SHORTEST, "about words": evidence["about"] != NONE,
        "repeats": evidence["repeated"] != NONE, "a list": evidence["listed"] != NONE,
        "symbols": evidence["symbols"] != NONE, "no verb": evidence["verb"] == NONE}
    return Form(tuple(name for name in REASONS if is_broken[name]), **evidence)


def plain_quotes(text: str) -> str:
    return text.translate(str.maketrans("’‘“”", "''\"\""))


def lacks_end(text: str, words: list[str]) -> bool:
    """Whether a text stops without . ! or ?, or after a word like "the". The words are in lower case."""
    bare = text.strip("\"'() ")
    return bare[-1:] not in (".", "!", "?") or bare.endswith("..") or bool(words) and words[-1] in GRAMMAR["not_last"]


def ends(text: str) -> list[re.Match]:
    """The ends of sentences in a text."""
    return list(END.finditer(ABBREVIATION.sub(lambda match: match[0][:-1] + "_", text)))


def split_first_sentence(text: str) -> tuple[list[str], str]:
    """The words of the first sentence as they stand in a text, and what follows them: "end", "then He", or "none" if no
    sentence ends."""
    found = ends(text)
    if not found:
        return text.split(), NONE
    first, rest = text[:found[0].end()].split(), text[found[0].end():].split()
    return first, f"then {rest[0]}" if rest else "end"


def quote_sentence(words: list[str], rest: str) -> str:
    """A sentence with a number before every GROUP words, and what follows it: "1 He cuts the soup meat 2 up. end".
    A sentence that is too long breaks off at the number after its first LONGEST words."""
    quoted = []
    for i, word in enumerate(words):
        if i % GROUP == 0:
            quoted.append(str(i // GROUP + 1))
        if i == LONGEST:
            return " ".join(quoted)
        quoted.append(word)
    return " ".join([*quoted, rest])


def about_words(text: str, words: list[str]) -> str:
    """What shows that a text speaks about words and sentences, or quotes single words; or "none"."""
    meta = [word for word in words if word in ("word", "words", "sentence", "sentences")]
    found = QUOTED_WORD.search(text) or re.match(r"(?:Here is|Here's|Sure|Answer)\b", text)
    return meta[0] if meta else found[0] if found else NONE


def repeated_word(words: list[str]) -> str:
    """A word that occurs too often, or in a phrase of three words that occurs twice; "" if there is none."""
    counts = Counter(words)
    for i, word in enumerate(words):
        if counts[word] > (5 if word in MAY_REPEAT else 2):
            return word
        if words[i + 1:i + 2] == [word] and word not in ("that", "had", "her"):
            return word
        phrase = words[i:i + 3]
        content = [other for other in phrase if other not in FUNCTION_WORDS]
        if len(content) > 1 and phrase in [words[j:j + 3] for j in range(i + 1, len(words) - 2)]:
            return content[0]
    return ""


def list_start(text: str, words: list[str], requested: tuple[str, ...]) -> str:
    """How a text begins to enumerate bare items, has few function words, or has requested words side by side: the
    first of these in up to QUOTE words; or "none"."""
    text = text.strip("\"'() ")
    for pattern in (LIST, BROKEN):
        if found := pattern.search(text.lower()):
            return " ".join(text[found.start():].split()[:QUOTE]).rstrip(",;.!?—– ")
    if sum(word in FUNCTION_WORDS for word in words) < FUNCTION_SHARE * len(words):
        return "few small words"
    forms = frozenset(form for word in requested for form in inflections(word))
    rows = (words[i:i + RUN] for i in range(len(words) - RUN + 1))
    return next((" ".join(row) for row in rows if forms.issuperset(row)), NONE)


def word_with_symbol(text: str) -> str:
    """The first word with a symbol that no sentence of daily life needs, such as / or :, or "none"."""
    found = SYMBOL.search(text)
    if found is None:
        return NONE
    start = text.rfind(" ", 0, found.start()) + 1
    return text[start:].split()[0]


def finite_verb(words: list[str]) -> str:
    """The first word that is a finite verb by its form and by the word before it, or "none".

    "walks" and "walked" are, "walking" is not, and "walk" is one after "they" or "to", not after "the"."""
    for i, word in enumerate(words):
        if is_finite(word.lower(), words[i - 1].lower() if i else ""):
            return word
    return "none"


def is_finite(word: str, previous: str) -> bool:
    if word in AUXILIARIES:
        return True
    if previous in DETERMINERS - PRONOUNS or previous in PREPOSITIONS - {"to"} or word in FUNCTION_WORDS:
        return False
    if word in FINITE:
        return previous not in CONJUNCTIONS or word not in NOUN_FORMS
    if word in ALL_VERBS:
        after_plural = previous.endswith("s") and previous not in FUNCTION_WORDS
        return previous == "" or previous in BEFORE_BASE_FORM or after_plural
    if word in NOUN_FORMS:
        return False
    if word.endswith("ed") and len(word) > 4:
        return True
    return word.endswith("s") and not word.endswith(("ss", "us", "'s")) and previous not in FUNCTION_WORDS | {""}
