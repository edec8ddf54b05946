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


def judge_prompt(template: str, prompt: str, response: str) -> str:
    """Fill {prompt} and {response} in one pass: a field spelled inside a prompt or response stays text.

    A space is inserted into </response> and </prompt> in the response, so that it cannot close the tags that a judge
    template may put around it."""
    values = {"{prompt}": prompt, "{response}": re.sub(r"(?i)</\s*(?=response|prompt)", "< /", response)}
    return re.sub(r"\{prompt\}|\{response\}", lambda field: values[field[0]], template)


def judge(lm: LM, template: str, prompts: list[str], responses: list[str], config: JudgeConfig, seed: int
          ) -> list[list[Judgement]]:
    """J judgements of each (prompt, response). One that is cut off, or has no room within max_seq_len, is unparsed."""
    encoded = [lm.tokenizer.encode_prompt(judge_prompt(template, x, y)) for x, y in zip(prompts, responses)]
    fitting = [i for i, ids in enumerate(encoded) if len(ids) < lm.max_seq_len]
    sampled = lm.sample([encoded[i] for i in fitting], config.judgements, config, seed, lm.tokenizer.stop_ids)
    judgements = [[Judgement("", None)] * config.judgements for _ in encoded]
    for i, completions in zip(fitting, sampled):
        texts = [lm.tokenizer.decode_response(completion.ids) for completion in completions]
        judgements[i] = [Judgement(t, parse_score(t) if c.finished else None) for t, c in zip(texts, completions)]
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
        judged = [next(remaining) for _ in record["responses"]]
        rewards = [reward(js) if done else None for js, done in zip(judged, record["finished"])]
        scores, texts = [[j.score for j in js] for js in judged], [[j.text for j in js] for js in judged]
        records.append({"prompt": record["prompt"], "rewards": rewards, "scores": scores, "judgements": texts})
    return records


# The grammar of a score: what may stand around the number. A number in any other company is unparsed.
#
#   part    what it may be                                                 as in
#   ------  -------------------------------------------------------------  ---------------------------------------------
#   mark    "Score" and a colon at the start of a line, sentence or        Score:   Good. **Score:**   • Final score:
#           clause, after the, my, final, total, overall or nothing, with  Score (0-5):   Score (max 5):   Score/5:
#           the scale or without; or a key or tag of which there is one    "score":   <score>
#   number  digits, or digits.digits, in decoration or not: quotes,        4   4.5   +3   **4**   [4]   <4>   “4”
#           brackets, Markdown, HTML tags such as <b>, LaTeX's $           <b>4</b>   $4$   \(4\)
#   scale   out of 5; or points, stars, overall or in total; or both       4/5   4 (out of 5)   4 points out of 5
#   end     the end of the line, or the next mark; or a comment: text      4   4.   4</score>   "4"}
#           after . , ; ! … – - or "because" or in parentheses, without    4. Well done.   4 - fine   4, "reason": "ok"
#           digits, % and the words in COMMENT                             4 (good)
#   below   a number on a line below its mark stands alone on that line,   Score:\n4
#           and no line that begins with a number follows
#   after   no line further down has a digit (or "ten") and is a number    unparsed: Score: 1\nTotal: 2   Score: 4\n/10
#           alone; or begins with / or to of, or total, sum, overall or    Score: 4\nRevised score: 3   Score: 4\nor 5
#           final, or ... score; or has %, scale, range, max, possible or  "score": 4,\n"max_score": 10
#           out of 10
#
# Unparsed: 4-5   4 to 5   3 and 4   3+1   4,5   1e-1   5%   4/10   4 out of ten   4 (of ten)   4 (of 10)   4?   <5   4½
# Repetitions that could backtrack against each other are possessive (*+), so a hostile text takes linear time.
OPENING = r"""(?:[^\S\n]|[*_`"'“”‘’«\[({#\u200b\u2060\ufeff]|\\boxed(?=\{)|<(?=[^\s<>]{1,20}>))*+"""
CLOSING = r"""(?:[^\S\n]|[*_`"'“”‘’»>\])}\u200b\u2060\ufe0f\ufeff]|</\w+>|<br>)*+"""
KEY = re.compile(r"""(?i)["']score["']\s*+:|<score>""")
MARK = rf"""(?:^|[.!?;:,…)\]>|。！？；：，–—•→]|(?<!\S)-){OPENING}(?:(?:the|my|final|total|overall)[^\S\n]+)*+(?>
    (?<=<)score>|score{CLOSING}(?:[(\[]?(?:[01]\ ?(?:-|–|to)|out\ of|/|max\.?|maximum)\ ?5[)\]]?{CLOSING})?+[:：])"""
UNIT = r"points?|pts|stars?|[⭐分]|overall|in\ total"
SCALE = rf"(?:{CLOSING}(?:{UNIT}|(?:[/／]|\(?out\ of|of){OPENING}(?:5(?:\.0)?|five)(?!\ ?[/／]))(?!\w))*+"
COMMENT = rf"""(?:[.,;!…–—。！；，]|(?<=\s)-(?=\s)|because\b|(?<=\s)\((?!\s*+(?:\?|(?:of|out|von|de|sur|di|su|av)\b)))
    (?:(?!{MARK}|\b(?:out\ of|scale|max|maximum|ten|twenty|hundred|percent|half)\b)[^\d\n%十百])*+"""
SCORE = re.compile(rf"""(?imx){MARK}{OPENING}(?P<below>\n\s*+{OPENING})?+(?P<number>[+-]?[0-9]++(?:\.[0-9]++)?+)
    {SCALE}{CLOSING}(?(below)[.!]?+{CLOSING}$(?!\s*+[-*•(]?\ ?\d)|(?:(?=$|{MARK})|{COMMENT}(?=$|{MARK})))""")
AFTER = re.compile(r"""(?imx)^(?=.*(\d|\bten\b))(.*(%|\b(scale|range|max|possible|out.of\W+(10|ten)))|[^\w\n]*?([/／]|
    \d[\d.]*+[^\w\n]*$|(or|to|(out\ )?of)\ \d|(\w+\ )??(total|sum|overall|final|(?<=\w\ )(score|rating))(\b|_)))""")


def parse_score(text: str) -> float | None:
    """The last score from 0 to 5 that is marked in a judge's own text, or None: see the table above."""
    # Formatting in HTML and LaTeX as in Markdown: <b>4</b> and \(4\) as **4**, $4$ as *4*.
    text = re.sub(r"(?i)</?(?:b|i|u|em|strong|code)>|\\[()[\]]|\$([0-9\\][^\s$]{0,19})\$", r"*\1*", text)
    text = text if len(KEY.findall(text)) <= 1 else KEY.sub("_:", text)  # several: of single criteria
    scores = [match for match in SCORE.finditer(text) if 0 <= float(match["number"]) <= MAX_SCORE]
    return float(scores[-1]["number"]) if scores and not AFTER.search(text, scores[-1].end()) else None
