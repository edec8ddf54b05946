"""{r_i^1 .. r_i^N}: the model judges its own responses (paper, section 2.2 and figure 2).

The judge prompt asks for five additive points, a justification first, then "Score: <total>".
It is sampled J times; the reward is the mean of the scores that can be read. Only what the
judge itself generated is ever parsed: no text inside a response can change its own score.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from minisr import InputError
from minisr.runner.files import read_text
from minisr.runner.resume import UNKEPT
from minisr.sampler import SampleConfig, sample

MAX_SCORE = 5
FIELDS = ("{prompt}", "{response}")

# "Score: 4", "**Score:** 4/5", “score:4.5” are read; 4-5, 4 to 5, 4/10, 3+1 and 4,5 are no one number.
_DECORATION = r"[\s*_`\"'“”‘’<\[(]*"
_CLOSES, _OPENS = r"(?:[^\S\n]|[*_`\"'“”‘’>\])])*", r"(?:[^\S\n]|[*_`\"'“”‘’<\[(])*"
_SCORE = re.compile(
    rf"(?<![a-z0-9])score{_DECORATION}[:：]{_DECORATION}([+-]?[0-9]+(?:\.[0-9]+)?)(?![0-9.,]*[0-9])"
    rf"(?!{_CLOSES}(?:[-–—−+=×]|to|or){_OPENS}[0-9])(?!{_CLOSES}(?:/|of|\(?out of){_OPENS}(?!5\b)[0-9])",
    re.IGNORECASE)


@dataclass(frozen=True)
class JudgeConfig(SampleConfig):
    """How responses are judged. Sampling as for responses (paper, section 3.1.3)."""

    max_new_tokens: int = 96  # must hold the justification and the score line
    judgements: int = 3  # J, averaged
    by: str = "self"  # M_t; "M1": frozen; "oracle", "random": controls
    template: str = ""  # a text file with {prompt} and {response}; "": the world's, or the one in English


@dataclass
class Judgement:
    """What the judge wrote about one response, and the score read from it (None: unread)."""

    text: str
    score: float | None


def parse_score(text: str) -> float | None:
    """The score that a judge's own text gives: its last valid "Score: x" with 0 <= x <= 5, or None."""
    scores = [float(number) for number in _SCORE.findall(text)]
    return next((s for s in reversed(scores) if 0 <= s <= MAX_SCORE), None)


def load_template(path: Path) -> str:
    """A judge prompt from a text file, checked for its two fields."""
    template = read_text(path, "judge prompt").rstrip("\n")
    for field in FIELDS:
        if template.count(field) != 1:
            raise InputError(f"judge prompt {path} must name {field} exactly once, "
                             f"it does {template.count(field)} times")
    return template


def judge_prompt(template: str, prompt: str, response: str) -> str:
    """Fill the template in one pass: fields spelled inside a prompt or response stay text.

    A closing tag in the response loses its bracket, so that a response cannot end its own frame."""
    response = re.sub(r"</\s*(?=response|prompt)", "< /", response, flags=re.IGNORECASE)
    values = {"{prompt}": prompt, "{response}": response}
    return re.sub(r"\{prompt\}|\{response\}", lambda field: values[field[0]], template)


def judge(model, tokenizer, template: str, prompts: list[str], responses: list[str],
          config: JudgeConfig, key: int, journal=UNKEPT) -> list[list[Judgement]]:
    """J judgements of each (prompt, response). Cut off or too long for the context: unread."""
    asked = [tokenizer.encode_prompt(judge_prompt(template, x, y)) for x, y in zip(prompts, responses)]
    fits = [i for i, ids in enumerate(asked) if len(ids) < model.config.max_seq_len]
    drawn = sample(model, [asked[i] for i in fits], config.judgements, config,
                   key=key, stop=tokenizer.stop_ids, title="judge", journal=journal)
    unread = [Judgement("", None)] * config.judgements
    judged = [unread] * len(asked)
    for i, samples in zip(fits, drawn):
        texts = [tokenizer.decode(s.ids) for s in samples]
        judged[i] = [Judgement(text, parse_score(text) if s.finished else None)
                     for text, s in zip(texts, samples)]
    return judged


def reward(judgements: list[Judgement]) -> float | None:
    """r = the mean of the scores that were read, not rounded; None if none was."""
    scores = [j.score for j in judgements if j.score is not None]
    return sum(scores) / len(scores) if scores else None
