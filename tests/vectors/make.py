"""Write the golden vectors, JSON files in this folder.

Nothing here imports minisr: the inputs are made by hand, and the expected values by hand or by textbook formulas in
double precision."""

import json
from itertools import combinations
from math import exp, log, log1p, sqrt
from pathlib import Path
from statistics import mean

FOLDER = Path(__file__).parent


# What a judge wrote, and its score: the rows of the table in minisr/judge.py, then what no row allows.
SCORES = {
    # The plain line, and decoration around it.
    "Score: 4": 4, "score:4": 4, "SCORE: 2": 2, "**Score:** 4": 4, "**Score: 4**": 4, "Score: 4.5": 4.5, "Score: 3.": 3,
    "Score: 0": 0, "Score: 5.0": 5, "Score: +3": 3, "“Score: 3”": 3, "Score: “3”": 3,
    "\"Score\": '3'": 3, "`Score: 1`": 1, "Score: [4]": 4, "Score: <4>": 4, "Score：3": 3, "(Score: 3)": 3,
    # Where a mark may stand, and with which words.
    "Good.\nScore: 2\n": 2, "Good. Score: 2": 2, "Asked for fox, found fox, yes: 1. Ending none, no: 1.\nScore: 1": 1,
    "- Score: 4": 4, "> Score: 4": 4, "### Score: 4": 4, "1. Score: 4": 4, "Final score: 3": 3, "The total score: 3": 3,
    "So it all adds up, score: 3": 3, "<score>4</score>": 4, "Good. <score> 3 </score>": 3,
    "<score>4</score></judgement>": 4, "{\"score\": 4}": 4, "{\"reason\": \"Good.\", \"score\": 4}": 4,
    "{\"score\": \"4\", \"reason\": \"Good.\"}": 4,
    # The scale of 5 and the unit.
    "Score (0-5): 4": 4, "Score (0–5): 4": 4, "Score (1 to 5): 4": 4, "Score [0-5]: 4": 4, "Score (out of 5): 3": 3,
    "Score out of 5: 3": 3, "Score/5: 3": 3, "**Score** (0-5): **4**": 4, "Score: 4/5": 4, "Score: 4 / 5": 4,
    "Score: 4／5": 4, "Score: **4**/5": 4, "Score: 4/5.0": 4, "Score: 3 out of 5": 3, "Score: 3 of 5": 3,
    "Score: 3 (out of 5)": 3, "Score: 3 out of five": 3, "Score: “4” out of “5”": 4, "Score: 4 points": 4,
    "Score: 1 point": 1, "Score: 4 points out of 5": 4, "Score: 4/5 points.": 4, "Score: 4 out of 5 points": 4,
    # A comment.
    "Score: 3 - well done": 3, "Score: 3 – well done": 3, "Score: 3. Well done.": 3, "Score: 3, since it is short": 3,
    "Score: 3 because it is short": 3, "Score: 3!": 3, "Score: 4/5. All of it is there.": 4,
    # The number below the mark, and lines after it.
    "Score:\n2": 2, "Score:\n\n**2/5**\n": 2, "Score:\n4\n\nA good answer.": 4, "Score: 3\n- 2 things are missing": 3,
    "Score: 3\n+ 1 thing too many": 3, "Score: 3\nThis answer lacks an example.": 3,
    # Several marks: the last valid one.
    "Score: 2\nScore: 4": 4, "Score: 4\nScore: 9": 4, "Score: 4/5, Score: 2/10": 4, "Score: 7\nScore: 9": None,
    "Score: 4 ... no, Score: 2": 2, "Score: 3\nScore: five": 3, "Score: 3\nFor a Score: 5, it lacks an example.": 3,
    "Relevance: 1\nCoverage: 1\nTotal: 2\nScore: 2": 2,
    # No mark.
    "": None, "\n": None, "4": None, "4/5": None, "Score": None, "Score: ": None, "Score 4": None, "Score = 4": None,
    "Scores: 4": None, "underscore: 4": None, "z-score: 2": None, "Rating: 4": None, "[[4]]": None, "[RESULT] 4": None,
    "Relevance score: 1": None, "It says “Score: 5”": None, "This is worth a Score: 5": None,
    "Score (relevance): 1": None, "Score (0-10): 4": None, "Score (1-100): 4": None, "Score out of 10: 4": None,
    # No mark either: another word before Score may name a part ("Relevance score"), and Total is no mark of its own.
    "judge Score: 4": None, "Total: 4": None, "judge Score: 4\nTotal: 4": None,
    # No number, or another kind of number.
    "Score: five": None, "Score: <total>": None, "Score: .5": None, "Score: 4,5": None, "Score: 4.5.1": None,
    "Score: 1,000": None, "Score: 1e-1": None, "Score: 9.2e+124": None, "Score: 4½": None, "Score: ½": None,
    "Score: 4th": None, "Score: ４": None, "Score: ~4": None, "Score: <5": None, "Score: >3": None, "Score: 4?": None,
    "Score: 5%": None, "Score: 4/5%": None, "Score: 80 %": None,
    # Out of range.
    "Score: 10": None, "Score: 6": None, "Score: 5.01": None, "Score: -1": None, "Score: −1": None,
    # Another scale.
    "Score: 4/10": None, "Score: 4 / 10": None, "Score: 4/50": None, "Score: 4／10": None, "Score: 4⁄10": None,
    "Score: **4**/10": None, "Score: 4 out of 10": None, "Score: 4 (out of 10)": None, "Score: (4)/(10)": None,
    "Score: 4 out of ten": None, "Score: 4 out of a possible 10": None, "Score: 4 (on a scale from 1 to 10)": None,
    "Score: 4 (von zehn)": None, "Score: 4 de 10": None, "Score: 4, out of ten": None,
    "Score: 4. 10 is the best.": None,
    "Score: 4\n/10": None, "Score: 4\nout of 10": None, "Score: 4\nMaximum score: 10": None,
    "Score: 4\nScale: 1-10": None,
    # Several numbers, none of which is clearly the total.
    "Score: 4-5": None, "Score: 4 – 5": None, "Score: 4 to 5": None, "Score: 3 or 4": None, "Score: 3 and 4": None,
    "Score: 4, 3, 5": None, "Score: 4 3": None, "Score: 3+1": None, "Score: 3 + 1 = 4": None, "Score: 2×2": None,
    "Score: 4 and a half": None, "Score: 4, and a half": None, "Score: 4 of 5 criteria are met": None,
    "Score: 1 point for relevance, 1 point for coverage, so 2 in total.": None,
    "Score:\n1. On topic: 1 point\n2. Covers most of it: 1 point\nTotal: 2 points": None,
    "Score:\n1. On topic\n2. Covers most of it": None, "Score:\n1\n2\n3": None, "Score: 1\nTotal: 2": None,
    "Score: 1 point\nScore: 1 point\nIn total: 2 points": None,
    "Score: 3 (for a Score: 5 an example is missing)": None,
    # A remark in parentheses is a comment, unless it could be a scale.
    "Score: 4 (good)": 4, "Score: 5 (perfect).": 5, "Score: 4 (of ten)": None, "Score: 4 (often right)": 4,
    "Score: 4 overall": 4, "Score: 4 in total.": 4, "Score: 3 stars": 3,
    "Score: 4 (of 3 things, all)": None, "{\"score\": 4, \"max_score\": 10}": None, "Score: 4 (?)": None,
    "Score: 4 (su dieci)": None, "Score: 4 (maximum: seven)": None, "Score: 4, max ten": None, "Score: 5/5/5": None,
    # Marks, signs and tags of other kinds of text.
    "• Score: 4": 4, "→ Score: 4": 4, "Score: 4</b>": 4, "Score: 4<br>": 4,
    "Score: \\boxed{4}": 4, "Score: «4»": 4, "Score: 4⭐": 4, "Score: 4 ⭐": 4, "Score：4分": 4, "Score: 4。": 4,
    "Score：4，因为没有例子": 4, "Score：4，满分十分": None, "\ufeffScore: 4": 4, "Score: \u200b4\u200b": 4,
    "Score: 4\u200b/10": None, "Score: 4\u200b5": None, "Score: $5": None, "```json\n{\"score\": 4}\n```": 4,
    "{'score': 4}": 4, "{\n \"score\": 3,\n \"reason\": \"fine\"\n}": 3,
    # Several keys or tags are the scores of single criteria.
    "[{\"criterion\": \"a\", \"score\": 1}, {\"criterion\": \"b\", \"score\": 0}]": None,
    "{\"relevance\": {\"score\": 1}, \"coverage\": {\"score\": 1}}": None,
    "{\"score\": 4, \"details\": [{\"score\": 1}]}": None, "<score>1</score>\n<score>0</score>": None,
    "{\"a\": {\"score\": 1}, \"b\": {\"score\": 0}}\nScore: 1": 1,
    # Another total or scale on a later line.
    "Score: 4\nRevised score: 3": None, "Score: 4\nFinal rating: 3": None, "Score: 4\nFinal: 3": None,
    "Score: 4\nOverall: 3": None, "Score: 4\nFinal Score = 3": None, "Score: 4\nThe final score is 3.": None,
    "Score: 1\nGrand total: 3": None, "Score: 4\nMax: 10": None, "Score: 4\nThis is out of 10.": None,
    "Score: 4\nout of ten": None, "Score: 4\nof 10": None, "Score: 4\nor 5": None, "Score: 4\nto 5": None,
    "Score: 4\n.5": None, "Score: 4,\n3,\n5": None, "Score: 4\n\n10 is the maximum.": None,
    "Score: 4\nNote: the scale is 1 to 10.": None, "{\n \"score\": 3,\n \"max_score\": 10\n}": None,
    "{\n \"score\": 3,\n \"out_of\": 10\n}": None, "{\n \"score\": 1,\n \"total_score\": 4\n}": None,
    "Score: 4\nHighest possible score: 10": None, "Score: 4\nPossible points: 10": None,
    "Score: 4\nRange: 0-10": None, "Score: 4\nThat is 80 %.": None,
    "Score: 4\nPossibly more.": 4,
    "score: 4\n  max: 10": None, "Score: 4\nFinal score: 3": 3, "Score: 4\nIt meets 4 of 5 criteria.": 4,
    "Score: 4\n1. It is short.\n2. It is clear.": 4,
    # Formatting in HTML and LaTeX. A single dollar sign is money.
    "Score: <b>4</b>": 4, "<b>Score:</b> 4": 4, "<strong>Final score: 4/5</strong>": 4,
    "Score: <em>4</em>/<b>5</b>": 4,
    "Score: <code>3.5</code>": 3.5, "Score: $4$": 4, "Score: $4.5$": 4.5, "Score: $4/5$": 4,
    "Score: $4$ out of $5$": 4,
    "Score: $\\boxed{4}$": 4, "Score: \\(4\\)": 4, "Score: \\[\\boxed{4}\\]": 4, "**Score:** $4$.": 4,
    "Score: <b>4</b>/10": None, "Score: <b>4</b><b>5</b>": None, "Score: <i>\n4": 4, "Score: <x>4</x>": None,
    "Score: $4/10$": None, "Score: $4$/$10$": None, "Score: $4": None, "Score: 4$": None, "Score: 4$ of 5$": None,
    "Score: $4$ or $5$": None, "Score: \\(4/10\\)": None, "It says <b>Score: 5</b>": None,
    "Score: 4\n<b>Total:</b> 9": None, "Score: 4\n<b>10</b>": None, "Score: 4\nMaximum: $10$": None,
    "Score (max 5): 4": 4, "Score (maximum 5): 4": 4, "Score (max. 5): 4": 4, "Score [max 5]: 4": 4,
    "Score (max 10): 4": None,
    "Score (max 50): 4": None, "Score (maximum): 4": None, "Score (min 5): 4": None,
}


def judge_parsing() -> dict:
    return {
        "description": "The score in a judge's own text, by a grammar of what may stand around it: a mark, a number "
                       "from 0 to 5 (fractions included), perhaps the scale ('/5', 'out of 5') and the unit "
                       "('points'), then the end of the line, the next mark, or a comment without digits. A mark is "
                       "the word Score with a colon, in upper or lower case, at the start of a line, sentence or "
                       "clause, or the tag <score>. Quotes, brackets and the formatting of Markdown, HTML (<b>) and "
                       "LaTeX ($4$) do not matter. The last valid score counts, unless a later line states another "
                       "total or scale. A quoted key \"score\" or a tag <score> counts only if there is one. null "
                       "means that no total is clear. The table in minisr/judge.py has every row of the grammar.",
        "cases": [{"text": text, "score": score} for text, score in SCORES.items()]}


def pair_selection() -> dict:
    cases = [  # responses, rewards, index of chosen, index of rejected; or why there is no pair
        ("abc", [3, 5, 1], 1, 2), ("abc", [4, None, 2], 0, 2), ("abcd", [None, 0, 1, None], 2, 1),
        ("abcd", [1, 5, 5, 1], 1, 0), ("ab", [10 / 3, 11 / 3], 1, 0), ("ab", [0, 0.5], 1, 0),
        ("abcd", [11 / 3, 4, 10 / 3, 3], 1, 3),
        ("abc", [3, 3, None], "tie", None), ("ab", [0, 0], "tie", None),
        ("abc", [4, None, None], "unread", None), ("ab", [None, None], "unread", None),
        ("", [], "unread", None),
        ("aa", [5, 1], "identical", None), ("aba", [5, 3, 1], "identical", None),
    ]
    return {
        "description": "Of the responses to each prompt, the one with the highest reward is chosen and the one with "
                       "the lowest is rejected; of several, the first. A reward of null means unparsed: that response "
                       "is neither. A prompt is dropped if fewer than two of its responses have a reward (unread), if "
                       "the highest reward equals the lowest (tie), or if chosen and rejected are the same text "
                       "(identical). chosen and rejected are indices from 0.",
        "cases": [{"responses": list(texts), "rewards": rewards,
                   **({"dropped": a} if b is None else {"chosen": a, "rejected": b})}
                  for texts, rewards, a, b in cases]}


def sequence_logprobs() -> dict:
    table = [[0.0, 1.0, -1.0, 0.5], [2.0, 0.0, 0.25, -3.0], [-0.5, 0.0, 4.0, 1.0], [0.0, 0.0, 0.0, 0.0]]
    rows = [  # ids, whether each is a response token
        ([0, 1, 2, 3, 1], [0, 0, 1, 1, 1]), ([0, 1, 2, 0, 0], [0, 0, 1, 0, 0]),  # the second one has padding
        ([3, 3, 3, 3, 3], [0, 1, 1, 1, 1]), ([2, 2, 2, 2, 0], [0, 0, 0, 1, 1]),
        ([0, 1, 2, 3, 1], [0, 0, 0, 0, 0]),
    ]

    def logprob(before: int, token: int) -> float:
        return table[before][token] - log(sum(exp(x) for x in table[before]))

    return {
        "description": "A model whose logits depend on the last token alone: logits[a][b] is the logit of b after a. "
                       "The log-probability of a response is the sum, over its tokens (mask 1), of the natural "
                       "logarithm of the softmax at the position before. Prompt and padding (mask 0) add nothing.",
        "logits": table,
        "cases": [{"ids": ids, "mask": mask, "logprob": sum(
            logprob(ids[t - 1], ids[t]) for t in range(1, len(ids)) if mask[t])} for ids, mask in rows]}


def dpo_loss() -> dict:
    inputs = [  # beta, policy chosen, policy rejected, reference chosen, reference rejected
        (0.1, -20, -30, -20, -30), (0.1, -10, -30, -20, -30), (0.1, -10, -40, -20, -30),
        (0.1, -30, -20, -20, -30), (0.5, -12.5, -9.25, -14, -8), (0.01, -100, -350, -120, -300),
        (1.0, -3, -4, -50, -2), (0.1, -900, -2, -3, -4),
    ]
    cases = []
    for beta, pc, pr, rc, rr in inputs:
        margin = beta * ((pc - rc) - (pr - rr))
        slope = beta / (1 + exp(margin))
        cases.append({
            "beta": beta, "policy_chosen": pc, "policy_rejected": pr, "reference_chosen": rc,
            "reference_rejected": rr, "loss": max(-margin, 0) + log1p(exp(-abs(margin))),
            "chosen_reward": beta * (pc - rc), "rejected_reward": beta * (pr - rr),
            "gradient": {"policy_chosen": -slope, "policy_rejected": slope,
                         "reference_chosen": slope, "reference_rejected": -slope}})
    return {
        "description": "loss = -log sigmoid(beta ((policy_chosen - reference_chosen) - (policy_rejected - "
                       "reference_rejected))), where the inputs are log-probabilities of whole responses. The rewards "
                       "are beta (policy - reference). gradient holds the derivatives of the loss with respect to the "
                       "four inputs. In training the reference is constant, and only the first two are used.",
        "cases": cases}


def judge_metrics() -> dict:
    cases = [  # the annotator's scores and the judge's rewards of each instruction's responses
        ([[5, 3, 1], [2, 2, 4], [1, 1, 1], [4, 2]], [[5, 4, 4], [None, 5, 3], [5, 5, 0], [3.5, 1.25]]),
        ([[5, 3, 1], [2, 2, 5], [0, 5]], [[5, 3, 1], [2, 2, 5], [0, 5]]),
        ([[5, 3, 1], [2, 4, 4]], [[3, 3, 3], [3, 3, 3]]), ([[1, 1]], [[0, 5]]),
        ([[3, 2, 1], [3, 2, 1]], [[4, None, None], [None, None, None]]),
        ([[0, 1, 2, 3, 3], [4, 1, 1, 0]], [[1, 0, 4.5, 4.5, 3], [5, 5, None, 2]]),
    ]
    return {
        "description": "Agreement of a judge's rewards with an annotator's scores. Instructions whose scores are all "
                       "equal do not count. pairwise: of all pairs of responses that the annotator scored differently, "
                       "the share that the judge orders in the same way; a tie or an unparsed reward (null) is wrong. "
                       "exact: the share of instructions with all such pairs right. five_best: of the responses with "
                       "reward 5, the share with the highest score of their instruction. spearman and kendall (tau-b): "
                       "means over instructions, of the responses with a reward; 0 if either side does not vary. null: "
                       "there is no case.",
        "cases": [{"truth": truth, "given": given, "expected": _agreement(truth, given)}
                  for truth, given in cases]}


def _agreement(truth: list, given: list) -> dict:
    pairs, exact, five_best, spearman, kendall = [], [], [], [], []
    for human, judge in zip(truth, given):
        if len(set(human)) == 1:
            continue
        right = [None not in (judge[i], judge[j]) and (human[i] - human[j]) * (judge[i] - judge[j]) > 0
                 for i, j in combinations(range(len(human)), 2) if human[i] != human[j]]
        pairs += right
        exact.append(all(right))
        five_best += [human[i] == max(human) for i, reward in enumerate(judge) if reward == 5]
        parsed = [i for i, reward in enumerate(judge) if reward is not None]
        h, j = [human[i] for i in parsed], [judge[i] for i in parsed]
        spearman.append(_pearson(_ranks(h), _ranks(j)) if len(set(h)) > 1 and len(set(j)) > 1 else 0)
        kendall.append(_tau_b(h, j) if len(set(h)) > 1 and len(set(j)) > 1 else 0)
    lists = {"pairwise": pairs, "exact": exact, "five_best": five_best, "spearman": spearman,
             "kendall": kendall}
    return {name: mean(map(float, values)) if values else None for name, values in lists.items()}


def _ranks(values: list) -> list:
    """Places in the sorted list, from 1; equal values share the mean of their places."""
    order = sorted(values)
    return [mean(i for i, other in enumerate(order, 1) if other == value) for value in values]


def _pearson(a: list, b: list) -> float:
    a, b = [x - mean(a) for x in a], [x - mean(b) for x in b]
    return sum(x * y for x, y in zip(a, b)) / sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def _tau_b(a: list, b: list) -> float:
    """(concordant - discordant) / sqrt((pairs untied in a) (pairs untied in b))."""
    products = [((a[i] - a[j]), (b[i] - b[j])) for i, j in combinations(range(len(a)), 2)]
    balance = sum(x * y > 0 for x, y in products) - sum(x * y < 0 for x, y in products)
    return balance / sqrt(sum(x != 0 for x, _ in products) * sum(y != 0 for _, y in products))


def text(vectors: dict) -> str:
    """JSON with one case a line, numbers to 12 digits."""
    head = {name: value for name, value in vectors.items() if name != "cases"}
    cases = ",\n".join("    " + json.dumps(_round(case), ensure_ascii=False) for case in vectors["cases"])
    return json.dumps(head, indent=2, ensure_ascii=False)[:-2] + ',\n  "cases": [\n' + cases + "\n  ]\n}\n"


def _round(value):
    if isinstance(value, dict):
        return {name: _round(v) for name, v in value.items()}
    if isinstance(value, list):
        return [_round(v) for v in value]
    return float(f"{value:.12g}") if isinstance(value, float) else value


ALL = (judge_parsing, pair_selection, sequence_logprobs, dpo_loss, judge_metrics)

if __name__ == "__main__":
    for make in ALL:
        (FOLDER / f"{make.__name__}.json").write_text(text(make()), encoding="utf-8")
