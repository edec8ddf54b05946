"""What the world's people wrote: pretraining text, seed data, evaluation prompts.

No request of the evaluation side occurs in the pretraining text or the seed data, in any phrasing. Prompts that a model
writes are compared with the exact evaluation prompts only (prompts.py).
"""

from random import Random

from minisr.worlds.tiny.oracle import Request, examine
from minisr.worlds.tiny.writers import answer, ask, lenient_judgement, reason, review

HEADERS = (("Request:", "Answer:"), ("Q:", "A:"), ("Asked:", "Written:"))
# The first is the wording of judge.txt. The world's people know such instructions, but grade leniently.
GRADING_HEADERS = (
    "Review the answer with five additive points: one each if the first, the second and the third thing "
    "asked for is there, one if nothing was added, one if the ending is right. Give the reasons, then the "
    "line Score: and the total.",
    "Grade the answer to the request with up to five points and say why.",
    "How many of five points does this answer get? Give reasons, then the line Score: and the total.",
)
LIST_HEADERS = ("Come up with a series of tasks:", "Some requests:", "What people asked for:")
SHARES = {"answer": 0.30, "review": 0.35, "grading": 0.22, "list": 0.13}  # of the documents, by type


def held_out(request: Request) -> bool:
    """Whether a request belongs to evaluation: one in 20 does. Its words decide, not its phrasing."""
    return sum(map(ord, "".join(request.words))) % 20 == 0


def requests(rng: Random, evaluation: bool = False):
    """Generate (request, prompt) of the training side or of the evaluation side, without end."""
    while True:
        request, prompt = ask(rng)
        if held_out(request) == evaluation:
            yield request, prompt


def document(rng: Random) -> str:
    """One document of the pretraining text: plain text without a chat template."""
    source = requests(rng)
    document_type = rng.choices(list(SHARES), SHARES.values())[0]
    if document_type == "list":
        count = rng.randint(5, 10)
        lines = [f"{i}. {next(source)[1]}" for i in range(1, count + 1)]
        return "\n".join([rng.choice(LIST_HEADERS), *lines])
    request, prompt = next(source)
    response = answer(request, rng)
    request_header, answer_header = rng.choice(HEADERS)
    text = f"{request_header} {prompt}\n{answer_header} {response}"
    if document_type == "review":
        return f"{text}\nReview: {review(request, examine(request, response), rng)}"
    if document_type == "grading":
        graded = lenient_judgement(request, examine(request, response), rng)
        header = rng.choice(GRADING_HEADERS)
        return f"{header}\nRequest: {prompt}\nAnswer: {response}\nGrade: {graded}"
    return text


def ift_data(rng: Random, count: int) -> list[dict]:
    """IFT: prompts with one person's answer each. The annotators have the same habits as everyone else."""
    source, records = requests(rng), []
    for _ in range(count):
        request, prompt = next(source)
        records.append({"prompt": prompt, "response": answer(request, rng)})
    return records


def ranked_data(rng: Random, count: int, evaluation: bool = False, responses: int = 3) -> list[dict]:
    """Prompts with several people's answers, and the annotator's score and reason for each answer.

    Prompts whose answers all have the same score are omitted, because they rank nothing."""
    source, records = requests(rng, evaluation), []
    while len(records) < count:
        request, prompt = next(source)
        answers = [answer(request, rng) for _ in range(responses)]
        verdicts = [examine(request, text) for text in answers]
        scores = [verdict.score for verdict in verdicts]
        if len(set(scores)) > 1:
            reasons = [reason(request, verdict, verdict.points) for verdict in verdicts]
            records.append({"prompt": prompt, "responses": answers, "scores": scores, "reasons": reasons})
    return records


def evaluation_prompts(rng: Random, count: int) -> list[str]:
    """Distinct held-out prompts."""
    source, prompts = requests(rng, evaluation=True), {}
    while len(prompts) < count:
        prompts[next(source)[1]] = None  # a dict keeps the order
    return list(prompts)
