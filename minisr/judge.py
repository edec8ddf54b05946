"""{r_i^1 .. r_i^N}: the model judges its own responses (section 2.2, Figure 2).

The judge prompt asks for five additive points, a justification first, then "Score: <total>". It is sampled J times; the
reward is the mean of the scores that could be parsed. Only text that the judge itself generated is parsed, so a
"Score: 5" inside a response is never read as its score. (A response can still try to persuade the judge.)
"""

import re
from dataclasses import dataclass

from minisr.lm import LM
from minisr.sampler import SamplingConfig

MAX_SCORE = 5

# Parsed: "Score: 4", "**Score:** 4/5", "score:4.5". Not parsed, because not a single number out of 5: "4-5", "4 to 5",
# "4/10", "3+1", "4,5".
OPENING = r"""(?: [^\S\n] | [*_`"'“”‘’<\[(] )*"""  # spaces and decoration before a number,
CLOSING = r"""(?: [^\S\n] | [*_`"'“”‘’>\])] )*"""  # and after it
SCORE = re.compile(rf"""
    (?<![a-z0-9]) score [\s*_`"'“”‘’<\[(]* [:：]       # "Score:", also in bold, quotes or brackets,
    [\s*_`"'“”‘’<\[(]* ( [+-]? [0-9]+ (?:\.[0-9]+)? )  # then a number
    (?! [0-9.,]* [0-9] )                               # that does not continue: 4,5 or 1.2.3
    (?! {CLOSING} (?: [-–—−+=×] | to | or ) {OPENING} [0-9] )              # is no range or sum: 4-5, 4 to 5, 3+1
    (?! {CLOSING} (?: / | of | \(?out[ ]of ) {OPENING} (?! 5\b ) [0-9] )   # and is not out of anything but 5
    """, re.IGNORECASE | re.VERBOSE)


@dataclass(frozen=True)
class JudgeConfig(SamplingConfig):
    """How responses are judged. The default temperature and top-p are those of responses, as in section 3.1.3."""

    max_new_tokens: int = 96  # must hold the justification and the score line
    judgements: int = 3  # J, averaged


@dataclass
class Judgement:
    """What the judge wrote about one response, and the score parsed from it (None: unparsed)."""

    text: str
    score: float | None


def parse_score(text: str) -> float | None:
    """The last "Score: x" with 0 <= x <= 5 in a judge's own text, or None. Scores out of range are ignored."""
    scores = [float(number) for number in SCORE.findall(text)]
    valid = [score for score in scores if 0 <= score <= MAX_SCORE]
    return valid[-1] if valid else None


def judge_prompt(template: str, prompt: str, response: str) -> str:
    """Fill {prompt} and {response} in one pass: a field spelled inside a prompt or response stays text.

    A space is inserted into </response> and </prompt> in the response, so that it cannot close the tags that a judge
    template may put around it."""
    response = re.sub(r"</\s*(?=response|prompt)", "< /", response, flags=re.IGNORECASE)
    values = {"{prompt}": prompt, "{response}": response}
    return re.sub(r"\{prompt\}|\{response\}", lambda field: values[field[0]], template)


def judge(lm: LM, template: str, prompts: list[str], responses: list[str], config: JudgeConfig, seed: int
          ) -> list[list[Judgement]]:
    """J judgements of each (prompt, response). One that is cut off, or has no room within max_seq_len, is unparsed."""
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
    """r: the mean of the parsed scores, not rounded. None (not 0) if no score could be parsed."""
    scores = [judgement.score for judgement in judgements if judgement.score is not None]
    return sum(scores) / len(scores) if scores else None


def judge_responses(lm: LM, template: str, y: list[dict], config: JudgeConfig, seed: int) -> list[dict]:
    """Rewards of all candidate responses, one record per prompt: see reward_records."""
    prompts = [record["prompt"] for record in y for _ in record["responses"]]
    responses = [response for record in y for response in record["responses"]]
    return reward_records(y, judge(lm, template, prompts, responses, config, seed))


def reward_records(y: list[dict], judgements: list[list[Judgement]]) -> list[dict]:
    """Group the judgements of all responses by prompt.

    One record per prompt, e.g. {"prompt": "Write ...", "rewards": [4.5, None], "scores": [[4, 5], [3, None]],
    "judgements": [["... Score: 4", ...], ...]}. A cut-off response gets reward None, so it never enters a pair; its
    judgements are recorded all the same."""
    records, remaining = [], iter(judgements)
    for record in y:
        of_prompt = [next(remaining) for _ in record["responses"]]
        rewards = [reward(js) if done else None for js, done in zip(of_prompt, record["finished"])]
        records.append({"prompt": record["prompt"], "rewards": rewards,
                        "scores": [[j.score for j in js] for js in of_prompt],
                        "judgements": [[j.text for j in js] for js in of_prompt]})
    return records
