"""Measures of a one-sentence answer: the words it uses, and whether it is a list, repeats itself, or ends.

Parts of speech come from HanTa and lemmas from lemminflect, the extra "commongen".
"""

import re
from typing import NamedTuple

from minisr.runner.files import import_extra

TOKEN = re.compile(r"'\w+|\w+|[^\w\s]")
LONGEST_TOKEN = 40  # characters; the tagger needs seconds for a word of a thousand
WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
# Categories by the beginning of a tag of the British National Corpus, which HanTa uses; modals (VM0) are none of them.
CATEGORIES = {"NN": "NOUN", "NP": "NOUN", "VV": "VERB", "VB": "VERB", "VD": "VERB", "VH": "VERB", "AJ": "ADJ",
              "AV": "ADV"}
SINGULAR = ("NN0", "NN1")
ARTICLES = ("a", "an", "the")
LIST_ITEM = re.compile(r"\s*(?:[-*•]|\d+[.)])\s")  # at the beginning of a line
SEPARATOR = re.compile(r"[,;\n]|\b(?:and|or)\b")
END = re.compile(r"""[.!?]["'”’)]*\s*$""")


class Concept(NamedTuple):
    """A word that a sentence should use."""

    word: str  # its lemma
    category: str  # NOUN or VERB


class Lemmatizer:
    """The words of a text as lemmas with their parts of speech."""

    def __init__(self):
        """Raises InputError if a package of the extra is missing."""
        self.inflections = import_extra("lemminflect", "commongen")
        self.tagger = import_extra("HanTa.HanoverTagger", "commongen").HanoverTagger("morphmodel_en.pgz")

    def readings(self, text: str) -> set[tuple[str, str | None]]:
        """(lemma, category) of each word: "The dog catches it." has ("dog", "NOUN"), ("catch", "VERB") and others.

        A lemma depends on the part of speech, as in the published evaluation: "saw" is "see" as a verb and "saw" as a
        noun. A word may have several."""
        found = set()
        tokens = [token[:LONGEST_TOKEN] for token in TOKEN.findall(text)]
        for token, _, tag in self.tagger.tag_sent(tokens):
            token, category = token.lower(), CATEGORIES.get(tag[:2])
            lemmas = self.inflections.getLemma(token, upos=category) if category else ()
            found |= {(lemma, category) for lemma in lemmas}
            if not category or tag in SINGULAR:
                found.add((token, category))  # lemminflect takes "harmonica" for a plural
            if category == "ADJ" and token.endswith(("ing", "ed")):
                # A participle before a noun, "a running dog", is an adjective to the tagger and a verb to spaCy.
                verbs = self.inflections.getAllLemmas(token, upos="VERB").get("VERB", ())
                found |= {(verb, "VERB") for verb in verbs}
        return found


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return [word.lower() for word in WORD.findall(text)]


def is_list(text: str) -> bool:
    """Whether an answer enumerates words in place of a sentence: "A dog, a ball, and a throw."

    True if a line begins with a bullet or a number, or if there are at least three parts, separated by commas, "and",
    "or" or line breaks, and none has more than two words besides articles. "He took tea, milk and bread." is not a
    list here; the stricter check_sentence rejects it."""
    if any(LIST_ITEM.match(line) for line in text.strip().split("\n")):
        return True
    parts = [[word for word in words(part) if word not in ARTICLES] for part in SEPARATOR.split(text.lower())]
    sizes = [len(part) for part in parts if part]
    return len(sizes) >= 3 and max(sizes) <= 2


def repeats(text: str) -> bool:
    """Whether an answer repeats itself: three words in a row that come twice, or two in a row that come three times."""
    sequence = words(text)

    def most_frequent(n: int) -> int:
        runs = [tuple(sequence[i:i + n]) for i in range(len(sequence) - n + 1)]
        return max(map(runs.count, runs), default=0)

    return most_frequent(3) >= 2 or most_frequent(2) >= 3


def ends(text: str) -> bool:
    """Whether a text ends with a full stop, a question mark or an exclamation mark, perhaps within quotation marks."""
    return bool(END.search(text))
