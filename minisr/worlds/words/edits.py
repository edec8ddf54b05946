"""Cheap edits of answers: they repair a sentence, break a rule of sentence.py, or change which words are there.

M0's own answers hardly show every verdict, and a judge trained on them alone sees too few sentences that are fine and
too few flaws of each kind. `Editor.answers` edits a share of the answers to bring each verdict close to its share in
FORM_SHARES and NUMBER_SHARES. Edited answers occur in judge examples only: in the judge prompt, and as a marked copy in
the judgement. No request is answered with one in training.
"""

import re
from collections import Counter
from random import Random

from minisr.worlds.words.oracle import examine
from minisr.worlds.words.requests import Request
from minisr.worlds.words.sentence import FINE, FUNCTION_WORDS, LONGEST, WORD, ends
from minisr.worlds.words.words import NOUNS, VERBS, inflections, noun_forms, verb_forms

# Shares of the answers by form. A flaw that may stand anywhere in an answer is hard to find and has more examples.
FORM_SHARES = {FINE: 0.40, "a list": 0.14, "repeats": 0.12, "no verb": 0.08, "about words": 0.06, "symbols": 0.06,
               "too long": 0.04, "more than one": 0.04, "no end": 0.03, "too short": 0.03}
# Shares by the number of requested words. The best of several answers has many of them, so these must be judged well.
NUMBER_SHARES = {0: 0.1, 1: 0.1, 2: 0.2, 3: 0.3, 4: 0.3}
TRIES = 8
# Sentences to edit until M0 has written some.
PLAIN = ("The old man looks at the house near the road.", "She puts it on the table before she goes to work.",
         "We saw a small child with her father in the street.", "They keep all of it in a box under the bed.",
         "He was tired after a long day and went to bed.", "My neighbor comes to see us every day after lunch.")


def articles(text: str) -> str:
    """Correct "a" and "an": "a apple" becomes "an apple"."""
    text = re.sub(r"\b([Aa])n?(?= [aeio])", r"\1n", text)
    return re.sub(r"\b([Aa])n(?= [^aeiouAEIOU\W])", r"\1", text)


def capitalize(text: str) -> str:
    return text[:1].upper() + text[1:]


def without_stop(text: str) -> str:
    """The text without the stop, quotation marks and spaces at its end."""
    return text.rstrip(".!?\"' ")


def first_sentence(text: str) -> str:
    """The first sentence, with a stop."""
    found = ends(text)
    return text[:found[0].start()].strip() + (found[0][0].strip() or ".") if found else text.strip() + "."


FORM_OF = {token: (word, name) for word in sorted(NOUNS | VERBS, reverse=True)
           for name, spellings in (noun_forms(word) if word in NOUNS else verb_forms(word)).items()
           for token in spellings}
NOUN_LIST, VERB_LIST = sorted(NOUNS), sorted(VERBS - NOUNS)


def inflected(word: str, name: str) -> str | None:
    """The form with this name, such as "cuts" for ("cut", "third"); None if the word has no such form."""
    forms = noun_forms(word) if word in NOUNS else verb_forms(word)
    return forms[name][0] if name in forms else None


def replace_token(text: str, token: str, other: str) -> str:
    """Replace all occurrences of a token, and keep its case."""
    cased = capitalize(other) if token[0].isupper() else other
    return articles(re.sub(rf"(?<![A-Za-z]){re.escape(token)}(?![A-Za-z])", cased, text))


def drop_word(text: str, word: str, request: Request, rng: Random) -> str:
    """Replace every form of a requested word by the same form of another word."""
    taken = {form for other in request.words for form in inflections(other)}
    for token in sorted({token for token in re.findall("[A-Za-z]+", text) if token.lower() in inflections(word)}):
        _, name = FORM_OF.get(token.lower(), ("", "singular"))
        kind = NOUN_LIST if name in ("singular", "plural") else VERB_LIST
        others = [inflected(other, name) for other in rng.sample(kind, 12) if inflections(other).isdisjoint(taken)]
        text = replace_token(text, token, others[0])
    return text


def add_word(text: str, word: str, request: Request, rng: Random) -> str:
    """Put a requested word in place of another word of the same kind, or in a phrase at the end."""
    taken = {form for other in request.words for form in inflections(other)}
    tokens = [token for token in re.findall("[A-Za-z]+", text)
              if token.lower() in FORM_OF and token.lower() not in taken]
    rng.shuffle(tokens)
    for token in tokens:
        form = inflected(word, FORM_OF[token.lower()][1])
        if form and rng.random() < 0.7:
            return replace_token(text, token, form)
    if word in NOUNS:
        phrase = rng.choice(("near the {}", "with a {}", "by the {}", "next to the {}", "for the {}")).format(word)
    else:
        form = rng.choice(("base", "ing"))
        phrase = {"base": "to {}", "ing": "while {}"}[form].format(inflected(word, form))
    body, stop = without_stop(text), text[len(without_stop(text)):]
    return articles(f"{body} {phrase}{stop or '.'}")


def set_number(text: str, number: int, request: Request, rng: Random) -> str:
    """Add or drop requested words until `number` of them occur, in at most TRIES steps."""
    for _ in range(TRIES):
        found = examine(request, text).found
        missing = [word for word, form in zip(request.words, found) if form == "none"]
        present = [word for word in request.words if word not in missing]
        if len(present) == number:
            break
        if len(present) < number:
            text = add_word(text, rng.choice(missing), request, rng)
        else:
            text = drop_word(text, rng.choice(present), request, rng)
    return text


# One function for each reason: a fine sentence -> a text that breaks this rule.


def no_end(text: str, words: list[str], rng: Random) -> str:
    body = without_stop(text)
    tail = rng.choice(("", "", " and", " and the", " with a", ",", " the", " and the.", " with a."))
    if rng.random() < 0.4:
        tokens = body.split()
        body = " ".join(tokens[:rng.randint(min(6, len(tokens)), len(tokens))])
    return body + tail


def more_than_one(text: str, words: list[str], rng: Random) -> str:
    other = rng.choice(PLAIN + ("It is a nice day.", "He likes it.", "They are happy.", "What a day!", "It was fun."))
    parts = [text, other]
    if rng.random() < 0.3:
        parts.reverse()
    return rng.choice((" ", " ", "\n")).join(parts)


def too_short(text: str, words: list[str], rng: Random) -> str:
    tokens = WORD.findall(text)[:rng.randint(2, 5)]
    if words and rng.random() < 0.6:
        tokens = rng.choice((["The", *words[:2]], ["I", "like", "the", *words[:1]], [capitalize(w) for w in words[:1]]
                             + words[1:3]))
    return capitalize(" ".join(tokens)) + "."


def too_long(text: str, words: list[str], rng: Random) -> str:
    body = without_stop(text)
    while len(WORD.findall(body)) <= LONGEST:
        other = rng.choice(PLAIN).rstrip(".")
        body += rng.choice((", and ", " while ", " because ", ", but ")) + other[:1].lower() + other[1:]
    return body + "."


def about_words(text: str, words: list[str], rng: Random) -> str:
    listed = ", ".join(words or [rng.choice(NOUN_LIST)])
    return rng.choice((
        f"The words are {listed}, and they are all in here.", f"Here is a sentence with the words {listed}.",
        f"This is a sentence that uses {listed} in one line.", f"Use the words {listed} in one short sentence.",
        f"I can use the words {listed} in a sentence.", f"The sentence is about {listed} and more of it.",
        f'The "{words[0] if words else "day"}" is here, and it is good for all of us.'))


def repeats(text: str, words: list[str], rng: Random) -> str:
    return rng.choice((repeat_phrase, repeat_word, add_loop, add_definition))(text, words, rng)


def repeat_phrase(text: str, words: list[str], rng: Random) -> str:
    """Three to six words of the text come again at its end."""
    tokens = without_stop(text).split()
    start = rng.randrange(max(len(tokens) - 2, 1))
    joint = rng.choice(("and", "with", "of", "near", "is", "for", "as", "to see"))
    return f"{' '.join(tokens)} {joint} {' '.join(tokens[start:start + rng.randint(3, 6)])}."


def repeat_word(text: str, words: list[str], rng: Random) -> str:
    """One word takes the place of others, or a word comes twice in a row."""
    tokens = without_stop(text).split()
    places = [i for i, token in enumerate(tokens) if token.lower().strip(",") not in FUNCTION_WORDS]
    places = places or [len(tokens) - 1]
    word = rng.choice(words or ["dog"])
    if rng.random() < 0.3:
        i = rng.choice(places)
        return " ".join([*tokens[:i], tokens[i], *tokens[i:]]) + "."
    for i in rng.sample(places, min(len(places), rng.randint(2, 3))):
        tokens[i] = word
    return articles(capitalize(" ".join(tokens)) + rng.choice((".", f" and the {word}.", f" with a {word}.")))


def add_loop(text: str, words: list[str], rng: Random) -> str:
    """The text ends in a loop: "a dog is a dog and a dog"."""
    body = without_stop(text)
    word = rng.choice(words or ["dog"])
    tail = rng.choice((f" and the {word} and the {word} with the {word}", f", a {word} is a {word} and a {word}",
                       f" with the {word} {word}", f" and {word} to {word} to {word}"))
    tokens = body.split()
    return articles(" ".join(tokens[:rng.randint(4, 12)]) + tail + ".")


def add_definition(text: str, words: list[str], rng: Random) -> str:
    """Two clauses say what something is: "A dog is a catch, and the frisbee is a throw"."""
    items = [*words, *rng.sample(NOUN_LIST, 4)]
    article, be = rng.choice(("a", "the", "a")), rng.choice(("is", "is", "was"))
    joint = rng.choice((", and", ",", " and", ", while"))
    a, b, c, d = (f"{article} {item}" for item in items[:4])
    if rng.random() < 0.4:
        body = without_stop(text)
        return articles(f"{body}{joint} {a} {be} {b}.")
    return capitalize(articles(f"{a} {be} {b}{joint} {c} {be} {d}."))


def a_list(text: str, words: list[str], rng: Random) -> str:
    body = without_stop(text)
    items = enumerate_words(words, rng)
    nouns = [token for token in body.split() if token.lower() in FORM_OF and FORM_OF[token.lower()][0] in NOUNS]
    if nouns and rng.random() < 0.4:
        return list_for_noun(body, rng.choice(nouns), items)
    return list_in_frame(body, items, rng)


def list_for_noun(body: str, noun: str, items: str) -> str:
    """The items take the place of a noun and its article."""
    noun_phrase = rf"(?:\b(?:an?|the|his|her|my|our|their) )?\b{noun}\b"
    return capitalize(articles(re.sub(noun_phrase, items, body, count=1) + "."))


def list_in_frame(body: str, items: str, rng: Random) -> str:
    """The items alone, with a few words before or after them, or at the end of the text."""
    start = rng.choice(("", "", "There is ", "He has ", "I see ", "My day is a mix of ", "She takes ", "It is all "))
    end = rng.choice((" are all part of it", " are here", " make a good day", " are a few of the things", " for you"))
    return capitalize(articles(rng.choice((
        f"{start}{items}.", f"{items}{end}.", f"{body} with {items}.", f"{' '.join(body.split()[:6])}, {items}.",
        f"{body}, {items}.", f"{' '.join(re.findall('[a-z]+', items))} {rng.choice(NOUN_LIST)}."))))


def enumerate_words(words: list[str], rng: Random) -> str:
    """Three to five items: "a dog, a catch, and a throw"."""
    items = [*words, *rng.sample(NOUN_LIST, 3)][:max(len(words), rng.randint(3, 5))]
    rng.shuffle(items)
    article = rng.choice(("a ", "the ", "a ", "", "", "some "))
    items = [article + item for item in items]
    comma, last = rng.choice(((", ", ", and "), (", ", " and "), (", ", ", "), (" and ", " and "), (", ", ", or ")))
    return comma.join(items[:-1]) + last + items[-1]


def no_verb(text: str, words: list[str], rng: Random) -> str:
    nouns = [word for word in words if word in NOUNS]
    gerunds = [inflected(word, "ing") for word in words if word not in NOUNS] or ["waiting"]
    while len(nouns) < 4:
        nouns.append(rng.choice(NOUN_LIST))
    a, b, c, d = nouns[:4]
    kind = rng.choice(("small", "happy", "simple", "fun and creative", "beautiful", "red and white", "great", "tiny"))
    phrase = rng.choice((
        f"a {a} {' and '.join(gerunds)} with the {b} near the {c} and the {d}.",
        f"the {a} with a {b} in the {c} of the {d} for {' and '.join(gerunds)}.",
        f"{' and '.join(gerunds)} the {a} with a {b} by the {c} of the {d}.",
        f"the {a} and the {b} in front of the {c}, {' and '.join(gerunds)} for a {d}.",
        f"a {kind} {a} with a {b} and a {c} in a {d}.", f"a {kind} way of {' and '.join(gerunds)} the {a} of a {b}.",
        f"a {kind} {a}, with its {b} on a {c}, {' and '.join(gerunds)} in the {d}!",
        f"a {kind} mix of {a} and {b} for {' and '.join(gerunds)}, like the {c}."))
    return capitalize(articles(phrase))


def symbols(text: str, words: list[str], rng: Random) -> str:
    words = [*words, rng.choice(NOUN_LIST), rng.choice(VERB_LIST)][:4]
    rng.shuffle(words)
    if rng.random() < 0.3:
        return capitalize(f"{words[0]}: {text[:1].lower()}{text[1:]}")
    tokens = text.split()
    i = rng.randrange(len(tokens))
    other = rng.choice((
        "/".join(words[:2]), f"({words[0]})", f"{tokens[i]}/{words[0]}", f"{tokens[i]}...", f"{words[0]}:",
        "-".join(words[:3]), f"{words[0]} & {words[1]}", f"{words[0]}_{words[1]}", f"*{words[0]}*"))
    return " ".join([*tokens[:i], other, *tokens[i + 1:]])


FLAWS = {"too long": too_long, "more than one": more_than_one, "no end": no_end, "too short": too_short,
         "about words": about_words, "repeats": repeats, "a list": a_list, "symbols": symbols, "no verb": no_verb}


class Editor:
    """Edits answers so that each form and each number of words has its share."""

    def __init__(self, sentences: list[str], rng: Random):
        """sentences: answers of M0, of which the fine first sentences serve as material."""
        self.rng = rng
        firsts = [first_sentence(text) for text in sentences]
        self.material = [text for text in firsts if examine(Request(()), text).form.reason == FINE] or list(PLAIN)
        self.counts = Counter()  # (form, number of words) of all answers so far

    def answers(self, request: Request, answers: list[str], edited_share: float) -> list[tuple[str, bool]]:
        """(answer, whether it was edited) of each answer; about `edited_share` of them are edited."""
        result = []
        for answer in answers:
            is_edited = self.rng.random() < edited_share
            text = self.edit(request, answer) if is_edited else answer
            self.counts[form_and_number(request, text)] += 1
            result.append((text, is_edited))
        return result

    def edit(self, request: Request, answer: str) -> str:
        """An answer with the form and the number of words that are rarest so far, as far as the edits succeed."""
        for form, number in self.rarest():
            for _ in range(TRIES):
                text = self.attempt(request, answer, form, number)
                if form_and_number(request, text) == (form, number):
                    return text
        return answer

    def rarest(self) -> list[tuple[str, int]]:
        """Every (form, number), by how far it is below its share."""
        total = self.counts.total() + 1
        shares = {(form, number): FORM_SHARES[form] * NUMBER_SHARES[number]
                  for form in FORM_SHARES for number in NUMBER_SHARES}
        return sorted(shares, key=lambda kind: self.counts[kind] - shares[kind] * total)

    def attempt(self, request: Request, answer: str, form: str, number: int) -> str:
        """An edit that may succeed."""
        base = first_sentence(answer)
        if examine(request, base).form.reason != FINE or self.rng.random() < 0.2:
            base = self.rng.choice(self.material)
        base = set_number(base, number, request, self.rng)
        if form == FINE:
            return base
        words = [word for word, found in zip(request.words, examine(request, base).found) if found != "none"]
        self.rng.shuffle(words)
        return FLAWS[form](base, words, self.rng)


def form_and_number(request: Request, text: str) -> tuple[str, int]:
    verdict = examine(request, text)
    return verdict.form.reason, sum(verdict.points[:-1])
