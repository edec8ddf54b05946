"""What counts as a sentence: rules that a program can check, and the first one that a text breaks.

REASONS names the rules. They tell sentences of daily life from the cheap ways to place given words in a text: lists,
loops, fragments, talk about the words. They are no grammar: "The frisbee likes a catch and the dog was in it." passes.

A text is read word by word and copied, and the copy breaks off at the first word that breaks a rule. Marks in the copy
show what the rules count, so that each decision needs only the last few words:

    1 2 3      a number before every five words
    dog =2     the word occurs for the second time; so does "is a =2"
    a cat, +2  two separators in a row, with a bare item between them
    is (verb)  the first finite verb
    end        the text ends with this sentence
"""

import re
from collections import Counter
from dataclasses import dataclass

from minisr.worlds.words.words import ALL_NOUNS, ALL_VERBS, GRAMMAR, inflections, plural, verb_forms

FINE, NONE = "fine", "none"
REASONS = ("too long", "more than one", "no end", "too short", "about words", "repeats", "a list", "symbols",
           "no verb")
SHORTEST, LONGEST = 6, 25  # words
GROUP = 5  # words between two numbers of a copy, from which its length can be read; divides LONGEST
MAX_OCCURRENCES = 2  # of a word, except for those of MAY_REPEAT
MAX_DEFINITIONS = 1  # "is a" in a sentence
LIST_SEPARATORS = 3  # in a row, with bare items between them, that make a list
CONTENT_RUN = 5  # words in a row without a function word that make a list
REQUESTED_RUN = 4  # the same for requested words

DETERMINERS, PRONOUNS, AUXILIARIES, PREPOSITIONS, CONJUNCTIONS = (
    GRAMMAR[name] for name in ("determiners", "pronouns", "auxiliaries", "prepositions", "conjunctions"))
FUNCTION_WORDS = DETERMINERS | PRONOUNS | AUXILIARIES | PREPOSITIONS | CONJUNCTIONS | GRAMMAR["others"]
BEFORE_BASE_FORM = PRONOUNS | CONJUNCTIONS | GRAMMAR["before_base_form"]
MAY_REPEAT = frozenset("a an the and or to of in on is was his her".split())

FINITE = frozenset(form for verb in ALL_VERBS for name in ("third", "past") for form in verb_forms(verb)[name])
NOUN_FORMS = frozenset(form for noun in ALL_NOUNS for form in (noun, plural(noun)))

WORD = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*")
ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|St|a\.m|p\.m|e\.g|i\.e|etc)\.(?=\s+\S)")
# Where a sentence ends: a line break, a stop before a space, a quoted stop before a capital, or a stop at the end.
END = re.compile(r"\s*\n\s*|[.!?]+(?=\s|$)|[.!?]+[\"')]+(?=\s+[\"'A-Z0-9]|$)")
# "dog/catch", "dog:", "dog-catch-frisbee", but not "day-to-day".
SYMBOL = re.compile(r"[^\w\s.,!?'\"—–;-]|\w+-(?!(?:to|of|by|in|on|the|a|and)-)\w+-\w+|[.]{2}|_")
QUOTED_WORD = re.compile(r"\"[\w-]+[.,]?\"")
ABOUT = frozenset("word words sentence sentences".split())
OPENINGS = (["here's"], ["sure"], ["answer"], ["here", "is"])
ARTICLES = frozenset("a an the some his her my our their your its one two".split())
BEFORE_NOUN = ARTICLES - {"some", "her", "one", "two"}  # a noun must follow
BE = frozenset("is are was were".split())
NO_NOUNS = frozenset("a an the and or of is was".split())


@dataclass(frozen=True)
class Form:
    """Whether a text is a sentence."""

    reason: str  # FINE, or the first broken rule
    copy: str  # the text up to there, with marks


def check_sentence(text: str, requested: tuple[str, ...] = ()) -> Form:
    """Whether a text is one sentence. `requested`: the words that a request asks for."""
    text = plain_quotes(text.strip())
    reader = Reader(requested)
    first, rest = split_first_sentence(text)
    for token in first:
        if reason := reader.read(token):
            break
    else:
        reason = reader.finish(text, rest)
    return Form(reason or FINE, " ".join(reader.copy))


class Reader:
    """Reads a sentence token by token; a token is what stands between two spaces."""

    def __init__(self, requested: tuple[str, ...]):
        self.requested = frozenset(form for word in requested for form in inflections(word))
        self.copy = []  # tokens, and marks
        self.length = 0  # tokens
        self.words = []  # in lower case
        self.counts = Counter()  # of words
        self.definitions = 0  # "is a"
        self.has_verb = False
        self.separators = 0  # in a row
        self.item = []  # words since the last separator

    def read(self, token: str) -> str | None:
        """Read one more token. Returns the rule that it breaks, if any."""
        if self.length % GROUP == 0:
            self.copy.append(str(self.length // GROUP + 1))
        if self.length == LONGEST:
            return "too long"
        self.length += 1
        self.copy.append(token)
        if SYMBOL.search(token):
            return "symbols"
        if QUOTED_WORD.search(token):
            return "about words"
        for word in WORD.findall(token):
            if reason := self.read_word(word.lower()):
                return reason
        return self.read_separator(token)

    def read_word(self, word: str) -> str | None:
        previous = self.words[-1] if self.words else ""
        was_repeated = previous not in FUNCTION_WORDS and self.counts[previous] > 1
        self.words.append(word)
        self.counts[word] += 1
        self.item.append(word)
        if word in ABOUT or self.words in OPENINGS:
            return "about words"
        if self.mark_repetition(word, previous, was_repeated):
            return "repeats"
        if previous in BEFORE_NOUN and word in NO_NOUNS or self.is_row():
            return "a list"
        if not self.has_verb and is_finite(word, previous):
            self.has_verb = True
            self.copy.append("(verb)")
        return None

    def mark_repetition(self, word: str, previous: str, was_repeated: bool) -> bool:
        """Mark a word that occurs again. Returns whether it breaks the rule: it occurs too often, follows a repeated
        content word (`was_repeated`), or says a second time what something is."""
        if word == previous and word not in ("that", "had", "her"):
            return True
        if word not in MAY_REPEAT and self.counts[word] > 1:
            self.copy.append(f"={self.counts[word]}")
            too_often = self.counts[word] > MAX_OCCURRENCES
            return too_often or was_repeated and word not in FUNCTION_WORDS
        if previous in BE and word in ("a", "an", "the"):
            self.definitions += 1
            if self.definitions > MAX_DEFINITIONS:
                self.copy.append(f"={self.definitions}")
                return True
        return False

    def is_row(self) -> bool:
        """Whether the last words stand side by side without function words."""
        row, requested = self.words[-CONTENT_RUN:], self.words[-REQUESTED_RUN:]
        return (len(row) == CONTENT_RUN and FUNCTION_WORDS.isdisjoint(row)
                or len(requested) == REQUESTED_RUN and self.requested.issuperset(requested))

    def read_separator(self, token: str) -> str | None:
        """Count consecutive separators: a comma, a semicolon, a dash, "and" or "or". ", and" counts once."""
        if token.lower() in ("and", "or"):
            self.item.pop()
            if not self.item and self.separators:
                return None
        elif token.strip("\"'()")[-1:] not in (",", ";", "—", "–", "-"):
            return None
        elif self.words and self.words[-1] in BEFORE_NOUN:
            return "a list"
        self.separators = self.separators + 1 if self.is_bare_item() else 1
        self.item = []
        if self.separators > 1:
            self.copy.append(f"+{self.separators}")
        return "a list" if self.separators == LIST_SEPARATORS else None

    def is_bare_item(self) -> bool:
        """Whether one word, or an article and one or two words, stand between the last two separators."""
        most = 3 if self.item[:1] and self.item[0] in ARTICLES else 1
        return 0 < len(self.item) <= most

    def finish(self, text: str, rest: str) -> str | None:
        """The rule that the text breaks by its end, if any. `rest`: what follows the sentence."""
        self.copy.append(rest)
        if rest not in ("end", NONE):
            return "more than one"
        if lacks_end(text, self.words):
            return "no end"
        if self.separators == LIST_SEPARATORS - 1 and self.is_bare_item():
            return "a list"
        if self.length < SHORTEST:
            return "too short"
        return None if self.has_verb else "no verb"


def plain_quotes(text: str) -> str:
    return text.translate(str.maketrans("’‘“”", "''\"\""))


def lacks_end(text: str, words: list[str]) -> bool:
    """Whether a text stops without . ! or ?, or after a word like "the". The words are in lower case."""
    has_stop = text.strip("\"'() ")[-1:] in (".", "!", "?")
    return not has_stop or bool(words) and words[-1] in GRAMMAR["not_last"]


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


def is_finite(word: str, previous: str) -> bool:
    """Whether a word is a finite verb by its form and by the word before it.

    "walks" and "walked" are, "walking" is not, and "walk" is one after "they" or "to", not after "the"."""
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
