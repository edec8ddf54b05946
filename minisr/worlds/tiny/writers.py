"""The people of the tiny world: how they ask, answer, review and grade.

Their most likely answer is wrong: more than half of all answers omit the third requested thing. A model
that imitates them exactly therefore gives wrong answers at temperature 0. A flawless answer is rare in the
text; finding it is the task of the loop. People read closely when they write informal reviews, which contain
no score, but grade leniently. A model that is to judge must use the first skill for the second task; EFT
teaches this.
"""

from random import Random

from minisr.worlds.tiny.oracle import Request, Verdict
from minisr.worlds.tiny.words import ANSWERS, CLOSINGS, EXTRAS, REQUESTS, SLOTS, WORDS

OMIT = (0.00, 0.07, 0.55)  # probability that a writer omits the first, second, third thing
SWAP = (0.05, 0.08, 0.08)  # probability that a random word of the slot takes the place of the requested one
ADD = 0.12  # probability of a sentence that was not requested
MISEND = 0.12  # probability of no closing line, or of another kind's
LENIENT = 0.6  # probability that a grader gives a point that was not earned


def ask(rng: Random) -> tuple[Request, str]:
    """A random request, and one of its phrasings."""
    kind = rng.choice(list(SLOTS))
    slots = SLOTS[kind]
    words = tuple(rng.choice(WORDS[slot]) for slot in slots)
    phrasing = rng.choice(REQUESTS[kind])
    return Request(kind, words), phrasing.format(**dict(zip(slots, words)))


def answer(request: Request, rng: Random) -> str:
    """An answer as people write it, with all the habits above."""
    sentences = []
    for i, slot in enumerate(SLOTS[request.kind]):
        draw = rng.random()
        if draw < OMIT[i]:
            continue
        swapped = draw < OMIT[i] + SWAP[i]
        word = rng.choice(WORDS[slot]) if swapped else request.words[i]
        sentences.append(rng.choice(ANSWERS[request.kind][i]).format(word))
    if rng.random() < ADD:
        slot = rng.choice(list(EXTRAS))
        sentences.append(EXTRAS[slot].format(rng.choice(WORDS[slot])))
    if rng.random() >= MISEND:
        sentences.append(CLOSINGS[request.kind])
    elif rng.random() < 0.5:
        sentences.append(rng.choice([line for kind, line in CLOSINGS.items() if kind != request.kind]))
    return " ".join(sentences)


def flawless_answer(request: Request, rng: Random) -> str:
    """An answer that earns five points."""
    sentences = [rng.choice(frames).format(word)
                 for frames, word in zip(ANSWERS[request.kind], request.words)]
    return " ".join([*sentences, CLOSINGS[request.kind]])


def review(request: Request, verdict: Verdict, rng: Random) -> str:
    """An informal review: close reading without a score. Some reviews cover only a part of the answer."""
    yes_no = ["yes" if point else "no" for point in verdict.points]
    notes = [f"I looked for {word} and found {found}, {yes}."
             for word, found, yes in zip(request.words, verdict.found, yes_no)]
    notes += [f"They added {verdict.added}, {yes_no[3]}.",
              f"It ends with {verdict.ending.rstrip('.?')}, {yes_no[4]}."]
    if rng.random() < 0.3:
        start = rng.randrange(5)
        notes = notes[start:start + rng.randint(1, 3)]
    return " ".join(notes)


def judgement(request: Request, verdict: Verdict, given: tuple[bool, ...] | None = None) -> str:
    """A judgement: a justification that adds up the points, then the score line.

    `given` are the points that a grader gives. By default they are the verdict's, as the careful annotator
    gives."""
    given = verdict.points if given is None else given
    return f"{reason(request, verdict, given)}\nScore: {sum(given)}"


def reason(request: Request, verdict: Verdict, given: tuple[bool, ...]) -> str:
    """The justification without the score line."""
    evidence = [f"Asked for {word}, found {found}" for word, found in zip(request.words, verdict.found)]
    evidence += [f"Added {verdict.added}", f"Ending {verdict.ending.rstrip('.?')}"]
    total, sentences = 0, []
    for text, point in zip(evidence, given):
        total += point
        sentences.append(f"{text}, {'yes' if point else 'no'}: {total}.")
    return " ".join(sentences)


def lenient_judgement(request: Request, verdict: Verdict, rng: Random) -> str:
    """A judgement by an ordinary grader of the world, who overlooks many flaws."""
    given = tuple(point or rng.random() < LENIENT for point in verdict.points)
    return judgement(request, verdict, given)
