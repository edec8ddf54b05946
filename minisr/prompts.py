"""{x_i}: the model writes new prompts by few-shot prompting, from 6 seed and 2 generated ones (sections 2.2, 3.1.3).

The filters are modeled on Self-Instruct (Wang et al., 2022): length, unsuitable keywords, exact matches, and ROUGE-L
similarity to any known prompt. Every rejection is counted by its reason.
"""

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from random import Random

from tqdm import tqdm

from minisr.lm import LM
from minisr.rng import derive_seed
from minisr.sampler import SamplingConfig

# Characters of scripts without spaces between words: Thai, Lao, Burmese, Khmer, Japanese, Chinese.
UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u312f\u3400-\u9fff\U00020000-\U0003ffff]")
# Characters that do not distinguish words: soft hyphen, tatweel, joiners, direction marks, variation selectors, keycap.
IGNORED = "[\xad\u061c\u0640\u200b-\u200f\u202a-\u202e\u2060-\u206f\u20e3\ufe00-\ufe0f\ufeff\U000e0000-\U000e0fff]"


@dataclass(frozen=True)
class PromptConfig(SamplingConfig):
    """How new prompts are generated and filtered. Sampling is the paper's: T = 0.6, p = 0.9."""

    temperature: float = 0.6
    max_new_tokens: int = 40
    count: int = 1500  # new prompts an iteration
    round_size: int = 512  # candidates of a round; prompts accepted in it may be examples in the next
    seed_shots: int = 6
    generated_shots: int = 2
    max_attempts_factor: float = 3.0  # give up after count * max_attempts_factor generations
    max_rouge_l: float = 0.7  # reject a prompt with at least this ROUGE-L F1 to a known one
    min_words: int = 3
    max_words: int = 150
    keywords: tuple[str, ...] = ("image", "images", "graph", "graphs", "picture", "pictures",
                                 "file", "files", "draw", "plot", "video", "audio", "music")


def new_prompts(lm: LM, seed_prompts: list[str], held_out: set[str], config: PromptConfig, seed: int
                ) -> tuple[list[str], Counter]:
    """Up to config.count new prompts, and how many candidates were accepted or rejected, by reason.

    The seed prompts are shown as examples. Neither they nor a held-out prompt is ever returned. In each round,
    config.round_size candidates are sampled as plain text: the chat template would ask for an answer, not a prompt."""
    pool = PromptPool(seed_prompts, held_out, config)
    stop_ids = (*lm.tokenizer.newline_ids, *lm.tokenizer.stop_ids)  # one line of the list is one prompt
    max_tokens = lm.max_seq_len - config.max_new_tokens - len(lm.tokenizer.bos_ids)
    attempts = int(config.count * config.max_attempts_factor)
    for round_, start in enumerate(tqdm(range(0, attempts, config.round_size), "prompts", leave=False, disable=None)):
        rng, encoded = Random(derive_seed(seed, round_)), []
        for _ in range(min(config.round_size, attempts - start)):
            text = few_shot_prompt(lm.tokenizer, seed_prompts, pool.accepted, config, rng, max_tokens)
            encoded.append([*lm.tokenizer.bos_ids, *lm.tokenizer.encode(text)])
        for [completion] in lm.sample(encoded, 1, config, derive_seed(seed, round_, "draw"), stop_ids):
            pool.try_add(first_line(lm.tokenizer.decode(completion.ids)), completion.finished)
            if len(pool.accepted) == config.count:
                return pool.accepted, pool.counts
    return pool.accepted, pool.counts


def few_shot_prompt(tokenizer, seed_prompts: list[str], generated: list[str], config: PromptConfig, rng: Random,
                    max_tokens: int) -> str:
    """A numbered list of example prompts that ends where the model writes the next one.

    In the first round there are only seed prompts to show. The last examples are left out while the text exceeds
    max_tokens, but one always stays."""
    n_generated = min(config.generated_shots, len(generated))
    n_seeds = min(config.seed_shots + config.generated_shots - n_generated, len(seed_prompts))
    shots = rng.sample(generated, n_generated) + rng.sample(seed_prompts, n_seeds)
    rng.shuffle(shots)
    while True:
        lines = [f"{i}. {' '.join(shot.split())}" for i, shot in enumerate(shots, 1)]
        text = "\n".join(["Come up with a series of tasks:", *lines, f"{len(shots) + 1}."])
        if len(shots) < 2 or len(tokenizer.encode(text)) <= max_tokens:
            return text
        shots.pop()


def first_line(text: str) -> str:
    """The first line: models tend to continue with more prompts or with an answer (appendix A.5)."""
    return next(iter(text.strip().splitlines()), "").strip()


class PromptPool:
    """The prompts accepted so far, and the filters that a new one must pass."""

    def __init__(self, seed_prompts: list[str], held_out: set[str], config: PromptConfig):
        self.config, self.accepted, self.counts = config, [], Counter(accepted=0)
        self.known = {normalize(prompt): split_words(prompt) for prompt in seed_prompts}
        self.held_out_texts = {normalize(prompt) for prompt in held_out}

    def try_add(self, prompt: str, finished: bool) -> None:
        """Add a prompt if it passes all filters; count the outcome."""
        reason = self.rejection_reason(prompt, finished)
        self.counts[reason or "accepted"] += 1
        if reason is None:
            self.accepted.append(prompt)
            self.known[normalize(prompt)] = split_words(prompt)

    def rejection_reason(self, prompt: str, finished: bool) -> str | None:
        """The first filter that the prompt fails, or None."""
        words, text = split_words(prompt), normalize(prompt)
        if not finished:
            return "cut off"
        if not self.config.min_words <= len(words) <= self.config.max_words:
            return "length"
        if any(f" {normalize(keyword)} " in f" {text} " for keyword in self.config.keywords):
            return "keyword"
        if text in self.held_out_texts:
            return "evaluation prompt"
        if text in self.known:
            return "exact match"
        unique = set(words)
        if any(self.is_similar(words, unique, other) for other in self.known.values()):
            return "similar"
        return None

    def is_similar(self, words: list[str], unique: set[str], other: list[str]) -> bool:
        """Whether ROUGE-L F1 = 2 LCS / (sum of both lengths) (Lin, 2004) is at least max_rouge_l.

        unique: the set of `words`."""
        total, threshold = len(words) + len(other), self.config.max_rouge_l
        # Two upper bounds of the LCS save most of the time.
        return (2 * min(len(words), len(other)) / total >= threshold
                and 2 * sum(map(unique.__contains__, other)) / total >= threshold
                and 2 * lcs_length(words, other) / total >= threshold)


def lcs_length(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence, by dynamic programming over rows of the table."""
    previous = [0] * (len(b) + 1)
    for word in a:
        row = [0]
        for j, other in enumerate(b):
            row.append(previous[j] + 1 if word == other else max(previous[j + 1], row[j]))
        previous = row
    return previous[-1]


def split_words(text: str) -> list[str]:
    """Words: runs of letters, digits, underscores and combining marks. A character of UNSPACED is a word by itself.

    Words are compared by NFKC and casefold, without IGNORED characters."""
    text = re.sub(IGNORED, "", text)
    text = "".join(c if c.isalnum() or c == "_" or unicodedata.category(c)[0] == "M" else " " for c in text)
    return UNSPACED.sub(r" \g<0> ", unicodedata.normalize("NFKC", text).casefold()).split()


def normalize(text: str) -> str:
    """Canonical form: prompts that differ only in case, spaces and punctuation are the same."""
    return " ".join(split_words(text))
