"""{x_i}: new prompts by few-shot prompting, 6 seed and 2 generated ones (sections 2.3, 3.1.1).

Filters follow Self-Instruct (Wang et al., 2022): too long or short, unsuitable keywords, already
there, too similar by ROUGE-L. Every rejection is counted by its reason.
"""

import re
from collections import Counter
from dataclasses import dataclass
from random import Random

import numpy as np
from tqdm import tqdm

from minisr.rng import key as coordinates
from minisr.runner.resume import UNKEPT
from minisr.sampler import SampleConfig, sample

HEADER = "Come up with a series of tasks:"


@dataclass(frozen=True)
class PromptConfig(SampleConfig):
    """How new prompts are made. The paper's sampling: T = 0.6, p = 0.9."""

    temperature: float = 0.6
    max_new_tokens: int = 40
    count: int = 1500  # new prompts an iteration
    seed_shots: int = 6
    own_shots: int = 2
    attempts: float = 3.0  # give up after count * attempts generations
    rouge: float = 0.7  # reject a prompt this similar to one already there
    min_words: int = 3
    max_words: int = 150
    written_by: str = "self"  # "people": prompts of the tiny world's people instead
    keywords: tuple[str, ...] = ("image", "images", "graph", "graphs", "picture", "pictures",
                                 "file", "files", "draw", "plot", "video", "audio", "music")


def new_prompts(model, tokenizer, seeds: list[str], forbidden: set[str], config: PromptConfig,
                key: int, journal=UNKEPT) -> tuple[list[str], Counter]:
    """Up to config.count new prompts, none of them a seed or forbidden, and counts by reason."""
    pool = Pool(seeds, forbidden, config)
    asked, limit, wave = 0, int(config.count * config.attempts), 0
    room = model.config.max_seq_len - config.max_new_tokens - len(tokenizer.bos_ids)

    def fits(text):
        return len(tokenizer.encode(text)) <= room
    stop = (*tokenizer.newline_ids, *tokenizer.stop_ids)  # a line of the list, one prompt
    with tqdm(total=config.count, desc="prompts", leave=False) as bar:
        while len(pool.accepted) < config.count and asked < limit:
            batch = min(config.rows, limit - asked)
            rng = Random(coordinates(key, wave))
            shots = [few_shot(seeds, pool.accepted, config, rng, fits) for _ in range(batch)]
            ids = [[*tokenizer.bos_ids, *tokenizer.encode(text)] for text in shots]
            for (drawn,) in sample(model, ids, 1, config, key=coordinates(key, wave, "draw"),
                                   stop=stop, title="prompts", journal=journal):
                if len(pool.accepted) < config.count:
                    bar.update(pool.offer(first_prompt(tokenizer.decode(drawn.ids)), drawn.finished))
            asked, wave = asked + batch, wave + 1
    return pool.accepted, pool.counts


def prompts_of_people(source, seeds: list[str], forbidden: set[str], config: PromptConfig
                      ) -> tuple[list[str], Counter]:
    """The same number of prompts from an endless source, through the same filters."""
    pool = Pool(seeds, forbidden, config)
    for _ in range(int(config.count * config.attempts)):
        if len(pool.accepted) < config.count:
            pool.offer(next(source), True)
    return pool.accepted, pool.counts


def few_shot(seeds: list[str], own: list[str], config: PromptConfig, rng: Random, fits=lambda text: True
             ) -> str:
    """A numbered list of example prompts that breaks off where the next one should come; fewer of them
    where not all fit."""
    own_shots = min(config.own_shots, len(own))  # the first wave has only seeds to show
    wanted = config.seed_shots + config.own_shots - own_shots
    shots = rng.sample(own, own_shots) + rng.sample(seeds, min(wanted, len(seeds)))
    rng.shuffle(shots)
    while True:
        lines = [f"{i}. {' '.join(shot.split())}" for i, shot in enumerate(shots, 1)]
        text = "\n".join([HEADER, *lines, f"{len(shots) + 1}."])
        if len(shots) < 2 or fits(text):
            return text
        shots.pop()


def first_prompt(text: str) -> str:
    """One prompt only: models like to go on with more prompts or with an answer (appendix A.5)."""
    lines = text.strip().splitlines()
    return lines[0].strip() if lines else ""


class Pool:
    """The prompts accepted so far, and what a new one must differ from."""

    def __init__(self, seeds: list[str], forbidden: set[str], config: PromptConfig):
        self.config = config
        self.accepted: list[str] = []
        self.counts = Counter(accepted=0)
        self.seen = {normal(p) for p in seeds}
        self.forbidden = {normal(p) for p in forbidden}
        self.similar = RougeIndex(map(words, seeds))
        self.keywords = re.compile(rf"\b(?:{'|'.join(map(re.escape, config.keywords))})\b")

    def offer(self, prompt: str, finished: bool) -> bool:
        """Accept a prompt or count why not."""
        reason = self._objection(prompt, finished)
        self.counts[reason or "accepted"] += 1
        if reason is None:
            self.accepted.append(prompt)
            self.seen.add(normal(prompt))
            self.similar.add(words(prompt))
        return reason is None

    def _objection(self, prompt: str, finished: bool) -> str | None:
        said = words(prompt)
        if not finished:
            return "cut off"
        if not self.config.min_words <= len(said) <= self.config.max_words:
            return "length"
        if self.config.keywords and self.keywords.search(prompt.lower()):
            return "keyword"
        if normal(prompt) in self.forbidden:
            return "evaluation prompt"
        if normal(prompt) in self.seen:
            return "exact match"
        return "similar" if self.similar.highest(said) >= self.config.rouge else None


class RougeIndex:
    """ROUGE-L F1 of one text against all texts added so far, one numpy row operation a word."""

    def __init__(self, texts):
        self.ids: dict[str, int] = {}
        self.table = np.zeros((0, 0), dtype=np.int32)  # (texts, words), 0 = no word
        self.lengths: list[int] = []
        for text in texts:
            self.add(text)

    def add(self, text: list[str]) -> None:
        row = [self.ids.setdefault(word, len(self.ids) + 1) for word in text]
        count = len(self.lengths)
        if count == len(self.table) or len(row) > self.table.shape[1]:
            grown = np.zeros((2 * count + 64, max(len(row), self.table.shape[1])), dtype=np.int32)
            grown[:len(self.table), :self.table.shape[1]] = self.table
            self.table = grown
        self.table[count, :len(row)] = row
        self.lengths.append(len(row))

    def highest(self, text: list[str]) -> float:
        """max over the texts of F1 = 2 LCS / (length + length) (Lin, 2004); 0 if there is none."""
        if not self.lengths or not text:
            return 0.0
        table = self.table[:len(self.lengths)]
        lcs = np.zeros((len(table), table.shape[1] + 1), dtype=np.int32)  # (texts, words + 1)
        for word in text:
            match = table == self.ids.get(word, -1)
            lcs[:, 1:] = np.maximum(lcs[:, 1:], lcs[:, :-1] + match)
            np.maximum.accumulate(lcs, axis=1, out=lcs)  # LCS[i, j] >= LCS[i, j-1]
        return float((2 * lcs[:, -1] / (np.array(self.lengths) + len(text))).max())


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def normal(text: str) -> str:
    """What counts as the same prompt: case, spaces and punctuation aside."""
    return " ".join(words(text))
