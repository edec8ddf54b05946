"""The people of the tiny world: how they ask, answer, review and grade.

Their habits are flawed *in the mode*: more than half of all answers leave out the third thing
asked for, so that imitating them, however exactly, gives wrong answers at temperature 0. What
is rare in the text, a flawless answer, is what the loop has to find. Readers look closely in
informal reviews, which bear no score; those who grade with points are lenient. A model that
is to judge must bring the first skill to the second task: this is what EFT teaches.
"""

from random import Random

from minisr.worlds.tiny.oracle import Request, Verdict
from minisr.worlds.tiny.words import ANSWERS, CLOSINGS, EXTRAS, REQUESTS, SLOTS, WORDS

OMIT = (0.00, 0.07, 0.55)  # chance that a writer leaves out the first, second, third thing
SWAP = (0.05, 0.08, 0.08)  # chance that another word of the same sort stands in its place
ADD = 0.12  # chance of something that nobody asked for
MISEND = 0.12  # chance of no closing line, or of another kind's
LENIENT = 0.6  # chance that a grader gives a point that is not deserved


def ask(rng: Random) -> tuple[Request, str]:
    """A random request, and one of its phrasings."""
    kind = rng.choice(list(SLOTS))
    slots = SLOTS[kind]
    words = tuple(rng.choice(WORDS[slot]) for slot in slots)
    return Request(kind, words), rng.choice(REQUESTS[kind]).format(**dict(zip(slots, words)))


def answer(request: Request, rng: Random) -> str:
    """An answer as people write it, with all the habits above."""
    sentences = []
    for i, slot in enumerate(SLOTS[request.kind]):
        luck = rng.random()
        if luck < OMIT[i]:
            continue
        swapped = luck < OMIT[i] + SWAP[i]
        word = rng.choice(WORDS[slot]) if swapped else request.words[i]
        sentences.append(rng.choice(ANSWERS[request.kind][i]).format(word))
    if rng.random() < ADD:
        slot = rng.choice(list(EXTRAS))
        sentences.append(EXTRAS[slot].format(rng.choice(WORDS[slot])))
    if rng.random() >= MISEND:
        sentences.append(CLOSINGS[request.kind])
    elif rng.random() < 0.5:
        sentences.append(rng.choice([c for k, c in CLOSINGS.items() if k != request.kind]))
    return " ".join(sentences)


def flawless_answer(request: Request, rng: Random) -> str:
    """An answer that earns five points."""
    sentences = [rng.choice(frames).format(word)
                 for frames, word in zip(ANSWERS[request.kind], request.words)]
    return " ".join([*sentences, CLOSINGS[request.kind]])


def review(request: Request, verdict: Verdict, rng: Random) -> str:
    """An informal review: close reading, no score. Some readers look at a part only."""
    said = ["yes" if point else "no" for point in verdict.points]
    notes = [f"I looked for {word} and found {found}, {yes}."
             for word, found, yes in zip(request.words, verdict.found, said)]
    notes += [f"They added {verdict.added}, {said[3]}.",
              f"It ends with {verdict.ending.rstrip('.?')}, {said[4]}."]
    if rng.random() < 0.3:
        start = rng.randrange(5)
        notes = notes[start:start + rng.randint(1, 3)]
    return " ".join(notes)


def judgement(request: Request, verdict: Verdict, given: tuple[bool, ...] | None = None) -> str:
    """The judge's answer: a justification that adds up the points, then the score line.

    `given` are the points a grader gives; the careful annotator gives those of the verdict."""
    given = verdict.points if given is None else given
    return f"{reason(request, verdict, given)}\nScore: {sum(given)}"


def reason(request: Request, verdict: Verdict, given: tuple[bool, ...]) -> str:
    """The justification alone."""
    evidence = [f"Asked for {word}, found {found}" for word, found in zip(request.words, verdict.found)]
    evidence += [f"Added {verdict.added}", f"Ending {verdict.ending.rstrip('.?')}"]
    lines = [f"{what}, {'yes' if given[i] else 'no'}: {sum(given[:i + 1])}."
             for i, what in enumerate(evidence)]
    return " ".join(lines)


def lenient_judgement(request: Request, verdict: Verdict, rng: Random) -> str:
    """A judgement by one of the world's ordinary graders, who let many a flaw pass."""
    given = tuple(point or rng.random() < LENIENT for point in verdict.points)
    return judgement(request, verdict, given)
