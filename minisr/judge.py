"""{r_i^1 .. r_i^N}: the model judges its own responses (section 2.2, Figure 2).

The judge prompt asks for five additive points, a justification first, then "Score: <total>". It is sampled J times; the
reward is the mean of the scores that could be parsed. Only text that the judge itself generated is ever parsed, so no
text inside a response can change the response's own score.
"""

import re
from dataclasses import dataclass

from minisr.lm import LM
from minisr.sampler import SamplingConfig

MAX_SCORE = 5

# "Score: 4", "**Score:** 4/5" and "score:4.5" are parsed. "4-5", "4 to 5", "4/10", "3+1" and "4,5" are not one number
# out of 5, so they are not.
SCORE = re.compile(r"""
    (?<![a-z0-9]) score [\s*_`"'“”‘’<\[(]* [:：]       # "Score:", also in bold, quotes or brackets,
    [\s*_`"'“”‘’<\[(]* ( [+-]? [0-9]+ (?:\.[0-9]+)? )  # then a number
    (?! [0-9.,]* [0-9] )                               # that does not continue: 4,5 or 1.2.3
    (?! {closing} (?: [-–—−+=×] | to | or ) {opening} [0-9] )              # is no range or sum: 4-5, 4 to 5, 3+1
    (?! {closing} (?: / | of | \(?out[ ]of ) {opening} (?! 5\b ) [0-9] )   # and is not out of anything but 5
    """.replace("{closing}", r"""(?: [^\S\n] | [*_`"'“”‘’>\])] )*""")
       .replace("{opening}", r"""(?: [^\S\n] | [*_`"'“”‘’<\[(] )*"""),
    re.IGNORECASE | re.VERBOSE)


@dataclass(frozen=True)
class JudgeConfig(SamplingConfig):
    """How responses are judged. Sampling is the same as for responses (section 3.1.3)."""

    max_new_tokens: int = 96  # must hold the justification and the score line
    judgements: int = 3  # J, averaged


@dataclass
class Judgement:
    """What the judge wrote about one response, and the score parsed from it (None: unparsed)."""

    text: str
    score: float | None


def parse_score(text: str) -> float | None:
    """The last valid "Score: x" with 0 <= x <= 5 in a judge's own text, or None."""
    scores = [float(number) for number in SCORE.findall(text)]
    valid = [score for score in scores if 0 <= score <= MAX_SCORE]
    return valid[-1] if valid else None


def judge_prompt(template: str, prompt: str, response: str) -> str:
    """Fill {prompt} and {response} in one pass: a field spelled inside a prompt or response stays text.

    A closing tag in the response loses its bracket, so that a response cannot end its own frame."""
    response = re.sub(r"</\s*(?=response|prompt)", "< /", response, flags=re.IGNORECASE)
    values = {"{prompt}": prompt, "{response}": response}
    return re.sub(r"\{prompt\}|\{response\}", lambda field: values[field[0]], template)


def judge(lm: LM, template: str, prompts: list[str], responses: list[str], config: JudgeConfig, seed: int
          ) -> list[list[Judgement]]:
    """J judgements of each (prompt, response). One that is cut off, or does not fit max_seq_len, is unparsed."""
    encoded = [lm.tokenizer.encode_prompt(judge_prompt(template, x, y)) for x, y in zip(prompts, responses)]
    fitting = [i for i, ids in enumerate(encoded) if len(ids) < lm.max_seq_len]
    sampled = lm.sample([encoded[i] for i in fitting], config.judgements, config, seed, lm.tokenizer.stop_ids)
    judgements = [[Judgement("", None)] * config.judgements for _ in encoded]
    for i, completions in zip(fitting, sampled):
        texts = [lm.tokenizer.decode(completion.ids) for completion in completions]
        judgements[i] = [Judgement(text, parse_score(text) if completion.finished else None)
                         for text, completion in zip(texts, completions)]
    return judgements


def reward(judgements: list[Judgement]) -> float | None:
    """r: the mean of the parsed scores, not rounded. None if no score could be parsed; never 0 in its place."""
    scores = [judgement.score for judgement in judgements if judgement.score is not None]
    return sum(scores) / len(scores) if scores else None


def judge_responses(lm: LM, template: str, y: list[dict], config: JudgeConfig, seed: int) -> list[dict]:
    """Rewards of all candidate responses: one record a prompt with "rewards", "scores" and "judgements".

    A response that was cut off has no end to learn from and gets no reward."""
    prompts = [record["prompt"] for record in y for _ in record["responses"]]
    responses = [response for record in y for response in record["responses"]]
    return reward_records(y, judge(lm, template, prompts, responses, config, seed))


def reward_records(y: list[dict], judgements: list[list[Judgement]]) -> list[dict]:
    """The judgements of all responses, in their order, grouped by prompt."""
    records, remaining = [], iter(judgements)
    for record in y:
        of_prompt = [next(remaining) for _ in record["responses"]]
        rewards = [reward(js) if done else None for js, done in zip(of_prompt, record["finished"])]
        records.append({"prompt": record["prompt"], "rewards": rewards,
                        "scores": [[j.score for j in js] for js in of_prompt],
                        "judgements": [[j.text for j in js] for js in of_prompt]})
    return records
