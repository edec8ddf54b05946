"""The worlds whose answers a program can grade, by the name that seed_data.source gives them.

Each has an oracle, a module with
    CRITERIA                       the names of the five points
    parse_request(prompt)          the request in a prompt, or None if it is no request of this world
    examine(request, response)     a verdict with .points, one bool for each of CRITERIA, and .score, their sum
    score(prompt, response)        that score, or None if the prompt is no request of this world
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import ModuleType

from minisr.worlds.tiny import corpus as tiny_corpus
from minisr.worlds.tiny import oracle as tiny_oracle
from minisr.worlds.words import measures as words_measures
from minisr.worlds.words import oracle as words_oracle
from minisr.worlds.words import requests as words_requests


@dataclass(frozen=True)
class World:
    """Where prompts come from and who grades the answers."""

    name: str  # in messages
    oracle: ModuleType
    requests: Callable[[Random], Iterator[tuple]]  # (request, prompt) for training, without end
    judge_template: Path
    may_train: Callable[[str], bool] = lambda prompt: True  # whether a generated prompt may be trained on
    measure_answers: Callable[[list[dict]], dict] = lambda answers: {}  # further metrics of held-out answers
    measure_judge: Callable[[list[dict]], dict] = lambda judged: {}  # further metrics of judgements


FOLDER = Path(__file__).parent
WORLDS = {
    "world": World("the tiny world", tiny_oracle, tiny_corpus.requests, FOLDER / "tiny" / "judge.txt"),
    "words": World("the words world", words_oracle, words_requests.draw_requests, FOLDER / "words" / "judge.txt",
                   words_requests.may_train, words_measures.measure_answers, words_measures.measure_judge),
}


def world_of_prompt(prompt: str) -> World | None:
    """The world that a prompt is a request of."""
    return next((world for world in WORLDS.values() if world.oracle.parse_request(prompt) is not None), None)


def true_score(prompt: str, response: str) -> int | None:
    """The score of a response by the oracle of the prompt's world; None if it belongs to none."""
    world = world_of_prompt(prompt)
    return world.oracle.score(prompt, response) if world else None
