"""Seed data and evaluation prompts of the words world.

IFT consists of M0's own answers, good or bad, so it does not demonstrate the task. (Only answers that M0 ended by
itself are used: those cut off at the token limit would teach it to stop in the middle of a sentence.)

EFT consists of judgements of M0's answers by the annotator, the oracle. A share of the answers is edited first: see
edits.py. A judgement quotes its answer, so EFT does contain sentences with all four words, most of them edited; a run
with random rewards (judge.by = "random") shows what they teach by themselves. No evaluation prompt has the words of a
training prompt, in any order.
"""

from collections.abc import Iterator
from itertools import islice
from random import Random

from minisr.sampler import SamplingConfig
from minisr.worlds.words.annotator import justification
from minisr.worlds.words.edits import Editor
from minisr.worlds.words.oracle import examine
from minisr.worlds.words.requests import Request, draw_requests, find_words, parse_request, set_hash

ANSWERS = 4  # of M0 to each request of the seed data
SAMPLING = SamplingConfig(temperature=0.9, top_p=0.95, max_new_tokens=50)


def seed_requests(rng: Random, training: int, judge_evaluation: int) -> dict[str, list[str]]:
    """The requested numbers of prompts for M0 to answer: {"training": [...], "judge_evaluation": [...]}."""
    return {"training": prompts(draw_requests(rng), training),
            "judge_evaluation": prompts(draw_requests(rng, evaluation=True), judge_evaluation)}


def prompts(source: Iterator[tuple[Request, str]], count: int) -> list[str]:
    return [prompt for _, prompt in islice(source, count)]


def evaluation_prompts(rng: Random, count: int, judge_prompts: list[str]) -> list[str]:
    """Held-out prompts: one half of words that training uses too, the other of words that it never uses.

    None has the words of a prompt in `judge_prompts`, which measure the judge."""
    taken = {set_hash(find_words(prompt)) for prompt in judge_prompts}
    seen = ((request, prompt) for request, prompt in draw_requests(rng, evaluation=True)
            if set_hash(request.words) not in taken)
    unseen = draw_requests(rng, evaluation=True, unseen=True)
    return prompts(seen, count - count // 2) + prompts(unseen, count // 2)


def ift_data(answered: list[dict], count: int) -> list[dict]:
    """The first finished answer to each prompt. Records: {"prompt", "responses", "finished"}."""
    records = []
    for record in answered[:count]:
        finished = [text for text, done in zip(record["responses"], record["finished"]) if done and text.strip()]
        if finished:
            records.append({"prompt": record["prompt"], "response": finished[0]})
    return records


def judged_data(answered: list[dict], edited_share: float, rng: Random) -> list[dict]:
    """Prompts with answers, about `edited_share` of them edited, and the annotator's score and reason for each."""
    editor, records = Editor([text for record in answered for text in record["responses"]], rng), []
    for record in answered:
        request = parse_request(record["prompt"])
        edited = editor.answers(request, record["responses"], edited_share)
        verdicts = [examine(request, text) for text, _ in edited]
        records.append({"prompt": record["prompt"], "responses": [text for text, _ in edited],
                        "scores": [verdict.score for verdict in verdicts],
                        "reasons": [justification(request, verdict) for verdict in verdicts],
                        "edited": [is_edited for _, is_edited in edited]})
    return records
