"""Claims about all inputs, tried on generated ones."""

import dataclasses
import itertools
import math
import re
from collections import Counter
from functools import cache

import numpy as np
import pytest
import torch
from generated import all_sequences, for_all, one_of, texts_with, tuples_of
from hypothesis import assume
from hypothesis import strategies as st
from scipy import stats
from score_by_hand import score_by_hand
from tiny import ENGINES, bigram, byte_level_json, chain, tiny_model, tiny_tokenizer

from minisr.evaluate import bootstrap_ci, correlation, judge_metrics, pair_signs, ranks, win_rates
from minisr.interop.chat_templates import chat_template
from minisr.interop.tokenizer_json import TokenizerJSON
from minisr.judge import Judgement, judge_prompt, parse_score, reward
from minisr.pairs import select_pairs
from minisr.prompts import PromptConfig, PromptPool, lcs_length
from minisr.rng import row_seeds, uniform
from minisr.sampler import Completion, SamplingConfig, sample_top_p
from minisr.tokenizer import Tokenizer
from minisr.train import TrainConfig, make_batches

# The judge's score line

JUDGE_PIECES = ("Score", "score", "\u017fcore", "Score:", "Score: ", "<score>", "</score>", ":", "：", "1", "4", "5",
                "10", "4.5", "-1", ".5", "/", "／", " out of ", "of", "(out of 5)", " points", "five", "\n", " ", "\t",
                ".", ",", "!", "-", " - ", "–", "because", "the ", "final ", "total", "Total: 2", "maximum", "ten",
                "half", "%", "twenty", "\"score\": ", "'Score' :", "max", "\nor 5", "\nRevised score", "scale",
                "out of 10", "<b>", "<br>", "\\boxed{", "•", "⭐", "分", "十", "。", "\u200b", "(", "[", "<", ">", ")",
                "]", "*", "_", "“", "”", "{", "}", "#", "½", "٣", "good", "(0-5)",
                "[1 to 5]", "</b>", "<STRONG>", "$", "$4$", "\\(", "\\]", "(max 5)", "(maximum 5)", "(max. 5")
MARKS = ("Score", "score", "SCORE", "\u017fcore", "scores", "underscore", "_Score", "4score", "éscore", "- Score",
         "The final score", "A score", "Good. Score", "Good Score", "Score (0-5)", "Score (0-10)", "Score/5",
         "**Score**", "<b>Score</b>", "Score (max 5)", "Score (max 10)")
COLONS = (":", "：", "=", "", "::", ": “", "\n:", ":\n\n", "”:[(<", "\u00a0*:\x1c", " -:", ": .", ":**", ":\n- ")
NUMBERS = ("0", "1", "5", "4.5", "5.0", "5.01", "6", "10", "+3", "-1", "-0", "3.", ".5", "4,5", "1,000", "<4>", "<4",
           "007", "4.5.1", "<b>4</b>", "$4$", "$4", "$\\boxed{4}$", "٤", "４", "five", "9" * 400)
TAILS = ("", " ", ".", "**", "/5", " / 5", "/10", "/50", "/5٥", "/5_", " out of 5", " (out of 10)", "of 3", " points",
         " pts/5", "-5", " - 5", "–\t5", "+1", " = 4", " to 4", " or 3", "\n- 2", "\n/10", "\n2. x", " - x", "e5", "½",
         ", 4", "..5", "%", "\u00a0/\u00a010", " Score: 2", ". Score: 2", ", ten", ", often", " (good)",
         " (of ten)", " (often", "(x", " overall", " stars.", "\nTotal: 2", "\nTotals 2", "</score>", "\nA score: 2",
         "\nFor a score: 2", "\n2", "\n2 x", "\n(2).", "\nor 2", "\nout of 7", "\nIt is out of 10", "\nThe scale: ten",
         "\n\"max_score\": 9", "\n_max: 9", "/5/5", " (?)", "分", " ⭐\ufe0f", "<br>", "。 x", "，十", "\u200b/10",
         "$", "<b>/5", "\n<b>Total:</b> 2", "\\)")
SCORE_LINES = one_of(*map("".join, itertools.product(MARKS, COLONS, NUMBERS, TAILS)))
JUDGE_TEXTS = st.lists(SCORE_LINES | texts_with(*JUDGE_PIECES), max_size=3).map("".join) | st.text()


@for_all(text=JUDGE_TEXTS)
def test_the_score_is_the_one_that_a_parser_without_regular_expressions_finds(text):
    assert parse_score(text) == score_by_hand(text)


def test_both_parsers_agree_on_every_spelling_of_a_score_line():
    lines = [*itertools.product(MARKS, COLONS, ("4",)), *itertools.product(("Score: ", "Score:\n"), NUMBERS, TAILS)]
    for line in map("".join, lines):
        assert parse_score(line) == score_by_hand(line), line


@for_all(text=JUDGE_TEXTS)
def test_without_a_mark_there_is_no_score(text):
    assert parse_score(re.sub("[s\u017f]core", "grade", text, flags=re.IGNORECASE)) is None


@for_all(before=JUDGE_TEXTS, line=SCORE_LINES)
def test_digits_before_the_first_mark_do_not_matter(before, line):
    unmarked = re.sub("[s\u017f]core", "grade", before, flags=re.IGNORECASE)
    others = re.sub("[0-9]", lambda digit: str(9 - int(digit[0])), unmarked)
    assert parse_score(f"{unmarked}\n{line}") == parse_score(f"{others}\n{line}")


@for_all(slow=2_000, before=JUDGE_TEXTS, number=st.integers(-100, 1000),
         mark=one_of("", "**", "“", "\n"), tail=one_of("", "/5", ".", " out of 5", " points"))
def test_a_plain_score_line_at_the_end_is_parsed_whatever_precedes_it(before, number, mark, tail):
    score = parse_score(f"{before}\nScore:{mark}{number / 100}{tail}")
    if 0 <= number <= 500:
        assert score == number / 100
    else:  # no score, and at most a further number after the last one
        assert score in (None, score_by_hand(before + "\nScore:x"))


@for_all(slow=2_000, first=JUDGE_TEXTS, second=JUDGE_TEXTS)
def test_of_two_texts_the_last_one_with_a_score_decides(first, second):
    assume(not re.search(r"\d|ten", second, re.IGNORECASE) or parse_score(second) is not None)  # may be another total
    assume(len(re.findall("score", first + second, re.IGNORECASE)) < 2 or "<" not in first + second)
    scores = [parse_score(first), parse_score(second)]
    expected = scores[1] if scores[1] is not None else scores[0]
    assert parse_score(f"{first}\n.\n{second}") == expected


@for_all(slow=2_000, text=texts_with(*(piece for piece in JUDGE_PIECES if piece.isascii())).filter(str.isascii))
def test_upper_and_lower_case_do_not_matter_to_a_score(text):
    assert parse_score(text) == parse_score(text.swapcase()) == parse_score(text.upper())


@for_all(slow=2_000, scores=st.lists(st.none() | st.floats(0, 5), max_size=6))
def test_a_reward_lies_between_the_lowest_and_the_highest_parsed_score(scores):
    given, parsed = reward([Judgement("", s) for s in scores]), [s for s in scores if s is not None]
    assert (given is None) == (not parsed)
    assert not parsed or min(parsed) - 1e-12 <= given <= max(parsed) + 1e-12


# The judge prompt

TAGS = ("</response>", "</ Response", "</\n\u00a0PROMPT>", "</re\u017fponse>", "<response>", "< /response>",
        "</", "<", "/", "response", "</</response>", "{prompt}", "{response}", "{{response}}", "\\1",
        r"\g<0>", "%s", "{}")
FRAMES = texts_with(*(tag for tag in TAGS if "{" not in tag), most=3)


def without_closing_tags(text: str) -> str:
    """A response as the judge sees it, by hand: "</ RESPONSE" becomes "< /RESPONSE"."""
    result = ""
    while text:
        word = text[2:].lstrip().lower().replace("\u017f", "s")
        if text.startswith("</") and word.startswith(("response", "prompt")):
            result, text = result + "< /", text[2:].lstrip()
        result, text = result + text[:1], text[1:]
    return result


@for_all(frames=st.tuples(FRAMES, FRAMES, FRAMES), prompt=texts_with(*TAGS), response=texts_with(*TAGS),
         swap=st.booleans())
def test_the_judge_prompt_is_the_template_with_both_fields_filled_at_once(frames, prompt, response, swap):
    before, between, after = frames
    fields = ["{prompt}", "{response}"]
    values = [prompt, without_closing_tags(response)]
    if swap:
        fields, values = fields[::-1], values[::-1]
    template = before + fields[0] + between + fields[1] + after
    assume(template.count("{prompt}") == template.count("{response}") == 1)
    assert judge_prompt(template, prompt, response) == before + values[0] + between + values[1] + after


@for_all(response=texts_with(*TAGS))
def test_a_response_in_a_judge_prompt_contains_no_closing_tag_and_is_otherwise_unchanged(response):
    filled = judge_prompt("{response}", "", response)
    assert not re.search(r"</\s*(response|prompt)", filled, re.IGNORECASE)
    assert judge_prompt("{response}", "", filled) == filled  # a second time changes nothing
    letters = [re.sub(r"\s", "", text) for text in (response, filled)]
    assert letters[0] == letters[1]
    if not re.search(r"</\s*(response|prompt)", response, re.IGNORECASE):
        assert filled == response


# Text and tokens

SPECIAL = ("<s>", "</s>", "<|user|>", "<|assistant|>", "<unk>", "<0x41>", "<0x0A>", "<|im_start|>",
           "<|im_end|>", "[INST]", " ", "  ", "\n", "\u2581", "\x00", "\u2028", "\ufeff", "e\u0301",
           "🏳️‍🌈", "漢")
VOCABULARIES = ("SentencePiece", "byte-level")


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    if kind == "SentencePiece":
        return tiny_tokenizer()
    content = byte_level_json("<|im_start|>", "<|im_end|>").encode()
    return Tokenizer(TokenizerJSON(content), chat_template("chatml"))


def after_round_trip(kind: str, text: str) -> str:
    """The text itself. Only SentencePiece changes one character: its own sign for a space, U+2581, becomes a space."""
    return text.replace("\u2581", " ") if kind == "SentencePiece" else text


@for_all(kind=one_of(*VOCABULARIES), text=texts_with(*SPECIAL) | st.text())
def test_any_text_comes_back_from_its_ids(kind, text):
    tokenizer = tokenizer_of(kind)
    assert tokenizer.decode(tokenizer.encode(text)) == after_round_trip(kind, text)
    assert tokenizer.decode(tokenizer.encode_response(text)) == after_round_trip(kind, text)


@for_all(kind=one_of(*VOCABULARIES), prompt=texts_with(*SPECIAL), response=texts_with(*SPECIAL))
def test_only_the_template_makes_special_tokens(kind, prompt, response):
    tokenizer = tokenizer_of(kind)
    special = set(tokenizer.vocabulary.specials.values())
    assert special.isdisjoint(tokenizer.encode(prompt))
    ids, mask = tokenizer.encode_chat(prompt, response)
    plain, _ = tokenizer.encode_chat("", "")
    assert [i for i in ids if i in special] == [i for i in plain if i in special]
    assert all(0 <= i < len(tokenizer) for i in ids)
    start = mask.index(True)
    assert mask == [False] * start + [True] * (len(ids) - start)
    assert ids[:start] == tokenizer.encode_prompt(prompt) and ids[start:] == tokenizer.encode_response(response)


@for_all(slow=2_000, kind=one_of(*VOCABULARIES), ids=st.lists(st.integers(0, 600), max_size=12))
def test_any_ids_decode_to_a_text_that_can_be_stored(kind, ids):
    tokenizer = tokenizer_of(kind)
    text = tokenizer.decode(ids)
    assert text.encode().decode() == text  # no half characters
    assert text == tokenizer.decode([i for i in ids if i < len(tokenizer)])  # the embedding may be padded


# Preference pairs

REWARDS = (None, 0.0, 1.0, 10 / 3, 4.5, 5.0)
CANDIDATES = tuples_of(("u", "vv", "w", ""), REWARDS, longest=5)
JUDGED = st.lists(CANDIDATES, max_size=4)


def select(judged: list) -> tuple[list[dict], Counter]:
    """select_pairs of [(text, reward), ...] for each prompt; prompts are called 0, 1, ..."""
    return select_pairs(list(range(len(judged))), [[y for y, _ in row] for row in judged],
                        [[r for _, r in row] for row in judged])


@for_all(judged=JUDGED)
def test_a_pair_is_the_best_of_all_pairs_and_every_prompt_is_counted(judged):
    expected, counts = [], Counter(pairs=0, unread=0, tie=0, identical=0)
    for x, row in enumerate(judged):
        scored = [(r, i, y) for i, (y, r) in enumerate(row) if r is not None]
        better = [(-r, s, i, j, y, z) for (r, i, y), (s, j, z) in itertools.permutations(scored, 2) if r > s]
        if not better:
            counts["tie" if len(scored) > 1 else "unread"] += 1
            continue
        high, low, _, _, chosen, rejected = min(better)
        counts["pairs" if chosen != rejected else "identical"] += 1
        if chosen != rejected:
            expected.append({"prompt": x, "chosen": chosen, "rejected": rejected,
                             "chosen_reward": -high, "rejected_reward": low})
    assert select(judged) == (expected, counts) and counts.total() == len(judged)


@for_all(judged=JUDGED, text=st.text(max_size=3), where=st.integers(0, 5))
def test_a_response_without_a_reward_changes_nothing(judged, text, where):
    assert select([[*row[:where], (text, None), *row[where:]] for row in judged]) == select(judged)


@for_all(slow=2_000, judged=JUDGED, random=st.randoms(use_true_random=False))
def test_the_order_of_prompts_and_of_responses_only_decides_between_equals(judged, random):
    pairs, counts = select(judged)
    order = random.sample(range(len(judged)), len(judged))
    moved, moved_counts = select([judged[i] for i in order])
    assert sorted((order[p["prompt"]], p["chosen"], p["rejected"]) for p in moved) == sorted(
        (p["prompt"], p["chosen"], p["rejected"]) for p in pairs)
    shuffled, shuffled_counts = select([random.sample(row, len(row)) for row in judged])
    assert moved_counts == counts and all(shuffled_counts[c] == counts[c] for c in ("unread", "tie"))
    for p in shuffled:
        rewards = sorted(r for _, r in judged[p["prompt"]] if r is not None)
        assert (p["chosen_reward"], p["rejected_reward"]) == (rewards[-1], rewards[0])
        assert {(p["chosen"], rewards[-1]), (p["rejected"], rewards[0])} <= set(judged[p["prompt"]])
    all_rewards = [[r for _, r in row if r is not None] for row in judged]
    distinct = all(len(set(rewards)) == len(rewards) for rewards in all_rewards)
    assert not distinct or (shuffled, shuffled_counts) == (pairs, counts)


@for_all(slow=2_000, judged=JUDGED)
def test_only_the_order_of_rewards_decides(judged):
    doubled = [[(y, None if r is None else 2 * r + 1) for y, r in row] for row in judged]
    results = select(judged), select(doubled)
    sides = [[(p["prompt"], p["chosen"], p["rejected"]) for p in pairs] for pairs, _ in results]
    assert sides[0] == sides[1] and results[0][1] == results[1][1]


# Metrics

SCALE = (0.0, 1.0, 2.5, 4.0, 5.0)
RANKED = tuples_of((0, 1, 3, 4, 5), SCALE, shortest=2, longest=6)
PARTLY_SCORED = st.lists(tuples_of((1, 3, 5), (None, *SCALE), longest=4), min_size=1, max_size=3)
FINITE = st.floats(-1e6, 1e6, width=32)


@for_all(ranked=RANKED)
def test_ranks_and_correlations_are_scipys_and_0_where_scipy_has_none(ranked):
    human, model = zip(*ranked)
    assert ranks(human).tolist() == stats.rankdata(human).tolist()
    ours = [correlation(ranks(human), ranks(model)), correlation(pair_signs(human), pair_signs(model))]
    theirs = [0.0, 0.0]
    if len(set(human)) > 1 and len(set(model)) > 1:
        theirs = [stats.spearmanr(human, model).statistic, stats.kendalltau(human, model).statistic]
    assert ours == pytest.approx(theirs, abs=1e-12)


@for_all(judged=PARTLY_SCORED)
def test_pairwise_exact_and_five_best_are_what_counting_finds(judged):
    pairwise, exact, best = [], [], []
    for row in judged:
        hits = [a[1] is not None and b[1] is not None and a[1] > b[1]
                for a, b in itertools.permutations(row, 2) if a[0] > b[0]]
        pairwise += hits
        if hits:
            exact.append(all(hits))
            best += [all(h >= other for other, _ in row) for h, m in row if m == 5]
    metrics = judge_metrics([[h for h, _ in row] for row in judged], [[m for _, m in row] for row in judged])
    for name, hits in (("pairwise", pairwise), ("exact", exact), ("five_best", best)):
        assert metrics[name] == (pytest.approx(sum(hits) / len(hits)) if hits else None)
    assert (metrics["pairwise_ci95"] is None) == (not pairwise)
    if pairwise:
        low, high = metrics["pairwise_ci95"]
        assert 0 <= low <= high <= 1
        assert all(abs(metrics[name]) <= 1 + 1e-9 for name in ("spearman", "kendall"))


@for_all(slow=1_000, judged=st.lists(RANKED, min_size=1, max_size=4), random=st.randoms(use_true_random=False))
def test_metrics_do_not_depend_on_the_order_and_change_sign_with_the_judge(judged, random):
    def metrics(rows, judge=lambda human, model: model):
        found = judge_metrics([[h for h, _ in row] for row in rows], [[judge(h, m) for h, m in row] for row in rows])
        return [found[name] for name in ("pairwise", "exact", "spearman", "kendall")]

    plain = metrics(judged)
    shuffled = [random.sample(row, len(row)) for row in random.sample(judged, len(judged))]
    assert metrics(shuffled) == pytest.approx(plain, abs=1e-9)
    if plain[0] is not None:
        assert metrics(judged, lambda human, model: human) == pytest.approx([1] * 4)
        inverted = metrics(judged, lambda human, model: -model)
        assert inverted[2:] == pytest.approx([-plain[2], -plain[3]], abs=1e-9)
        assert inverted[0] + plain[0] <= 1 + 1e-9  # the rest are ties of the model


@for_all(slow=2_000, scores=tuples_of((0, 1, 4.5, 5), (0, 1, 4.5, 5), shortest=1, longest=8))
def test_win_rates_are_what_counting_finds(scores):
    rates = win_rates(*zip(*scores))
    counted = Counter("win" if a > b else "lose" if a < b else "tie" for a, b in scores)
    swapped = win_rates([b for _, b in scores], [a for a, _ in scores])
    assert [swapped[k] for k in ("win", "tie", "lose")] == [rates[k] for k in ("lose", "tie", "win")]
    for name in ("win", "tie", "lose"):
        low, high = rates[f"{name}_ci95"]
        assert rates[name] == pytest.approx(counted[name] / len(scores), abs=1e-12)
        assert 0 <= low <= rates[name] + 1e-12 and rates[name] - 1e-12 <= high <= 1


@for_all(slow=2_000, values=st.lists(FINITE, min_size=1, max_size=5))
def test_an_interval_is_that_of_all_resamples(values):
    # There are at most 5^5, whose quantiles are known; those of 2000 random ones are close to them.
    means = np.sort(np.array(values)[np.array(all_sequences(len(values)))].mean(axis=1))
    low, high = bootstrap_ci(values)
    slack = 1e-9 * (1 + np.abs(values).max())
    for end, share in ((low, 0.025), (high, 0.975)):
        below = np.quantile(means, max(0, share - 0.015), method="lower")
        above = np.quantile(means, min(1, share + 0.015), method="higher")
        assert below - slack <= end <= above + slack
    assert bootstrap_ci([2 * v for v in values]) == [2 * low, 2 * high]


# Drawing tokens

SEEDS = row_seeds(5, 512, 1)[:, 0]
LOGITS = st.lists(one_of(-math.inf, *(i / 4 for i in range(-32, 33)), -math.inf, 0.0), min_size=1,
                  max_size=8).filter(lambda logits: max(logits) > -math.inf)
HOW = one_of(*itertools.product((0.0, 1e-50, 1e-6, 0.01, 0.3, 0.7, 1.0, 2.0, 100.0),  # temperature
                                (0.0, 1e-6, 0.1, 0.5, 0.9, 0.999, 1.0)))  # top-p


def nucleus(logits: list[float], temperature: float, top_p: float) -> tuple[set[int], set[int]]:
    """Tokens that may be drawn, and those that must occur among 512 draws, by sorting in float64.

    Equally probable tokens are in or out together. A token at the very edge may be drawn, but need not."""
    x = np.array(logits)
    if temperature == 0 or top_p == 0:
        best = set(np.flatnonzero(x == x.max()).tolist())
        return best, best if len(best) == 1 else set()
    with np.errstate(under="ignore"):
        p = np.exp((x - x.max()) / max(temperature, 1e-30))
    p /= p.sum()
    before = {value: sum(other for other in sorted(p, reverse=True) if other > value) for value in set(p)}
    may = {i for i, value in enumerate(p) if value > 0 and before[value] < top_p + 1e-6}
    inside = {i for i in may if before[p[i]] < top_p - 1e-6 or before[p[i]] == 0}
    return may, {i for i in inside if p[i] / sum(p[j] for j in may) > 0.05}  # 0.95^512 = 4e-12


@for_all(logits=LOGITS, how=HOW, step=st.integers(0, 300))
def test_draws_cover_the_whole_nucleus_and_nothing_else(logits, how, step):
    drawn = sample_top_p(torch.tensor([logits]).expand(512, -1), *how, SEEDS, step)
    may, must = nucleus(logits, *how)
    assert must <= set(drawn.tolist()) <= may


@for_all(slow=1_000, table=st.lists(LOGITS, min_size=1, max_size=5), how=HOW, step=st.integers(0, 7))
def test_a_row_draws_alone_what_it_draws_among_others(table, how, step):
    logits = torch.full((len(table), 8), -torch.inf)
    for row, values in zip(logits, table):
        row[:len(values)] = torch.tensor(values)
    seeds = SEEDS[:len(table)]
    drawn = sample_top_p(logits, *how, seeds, step)
    alone = [sample_top_p(row[None], *how, seeds[i:i + 1], step) for i, row in enumerate(logits)]
    assert torch.equal(drawn, torch.cat(alone))


# Sampling, on each engine

TOKENS = st.integers(0, 7)
LENGTHS = one_of(1, 1, 2, 3, 4, 99, 99)  # of one token, up to all of max_seq_len but one place
WAYS = one_of(*itertools.product((0.0, 0.7, 1.0), (0.5, 0.9, 1.0), (1, 2, 3, 4, 5)))  # temperature, top-p, n


@st.composite
def requests(draw, max_seq_len: int):
    """Prompts, the number of samples of each, stop tokens, and a config."""
    texts = st.lists(TOKENS, min_size=max_seq_len - 1, max_size=max_seq_len - 1)
    prompts = [text[:length] for text, length in draw(st.lists(st.tuples(texts, LENGTHS), max_size=4))]
    stop = draw(st.integers(1, 255))  # any set of the eight tokens
    temperature, top_p, n = draw(WAYS)
    config = SamplingConfig(temperature, top_p, max_new_tokens=draw(TOKENS) + 1, rows=draw(TOKENS) + 1)
    return prompts, n, tuple(token for token in range(8) if stop >> token & 1), config


@for_all(engine=one_of(*ENGINES), follows=st.lists(TOKENS, min_size=8, max_size=8), request=requests(6))
def test_a_chain_of_tokens_is_followed_to_its_stop_token_or_to_the_end_of_its_room(engine, follows, request):
    prompts, n, stop_ids, config = request
    lm = ENGINES[engine](chain(dict(enumerate(follows)), 8, context=6), tokenizer=None)
    expected = []
    for prompt in prompts:
        ids = [follows[prompt[-1]]]
        while ids[-1] not in stop_ids and len(ids) < min(config.max_new_tokens, 6 - len(prompt)):
            ids.append(follows[ids[-1]])
        expected.append([Completion(ids, ids[-1] in stop_ids)] * n)
    assert lm.sample(prompts, n, config, 1, stop_ids) == expected


@for_all(slow=1_000, engine=one_of(*ENGINES), table=st.lists(st.integers(-8, 8), min_size=8, max_size=8),
         request=requests(9), rows=st.integers(1, 9))
def test_batch_size_and_further_prompts_and_samples_change_nothing(engine, table, request, rows):
    # Without blocks the logits of a token are a row of a table: sums of one term, the same in any batch.
    prompts, n, stop_ids, config = request
    logits = torch.stack([torch.tensor(table).roll(i) for i in range(8)]) / 3
    lm = ENGINES[engine](bigram(logits, context=9), tokenizer=None)
    drawn = lm.sample(prompts, n, config, 2, stop_ids)
    assert drawn == lm.sample(prompts, n, dataclasses.replace(config, rows=rows), 2, stop_ids)
    more = lm.sample([*prompts, [0]], n + 1, config, 2, stop_ids)
    assert drawn == [row[:n] for row in more[:-1]]


@for_all(slow=1_000, engine=one_of(*ENGINES), seed=st.integers(0, 3), header=one_of(0, 3, 17), request=requests(6))
def test_every_token_is_the_one_at_which_the_distribution_passes_its_random_number(engine, seed, header, request):
    # Checked by one pass without cache over each whole text; 1e-4 is room for sums in another order.
    prompts, n, stop_ids, config = request
    config = dataclasses.replace(config, temperature=1.0, top_p=1.0)
    model, prompts = tiny_model(8, header + 6, seed), [([1, 2, 3] * 6 + p)[18 - header:] for p in prompts]
    seeds = row_seeds(3, len(prompts), n)
    for i, row in enumerate(ENGINES[engine](model, tokenizer=None).sample(prompts, n, config, 3, stop_ids)):
        for j, (ids, finished) in enumerate((completion.ids, completion.finished) for completion in row):
            with torch.no_grad():
                logits = model(torch.tensor([prompts[i] + ids]))[0, len(prompts[i]) - 1:-1]
            cdf = logits.double().softmax(-1).cumsum(-1)
            for step, token in enumerate(ids):
                [u] = uniform(seeds[i, j:j + 1], 64 * step)
                assert (cdf[step, token - 1] if token else 0) - 1e-4 <= u <= cdf[step, token] + 1e-4
            cut = len(ids) == min(config.max_new_tokens, header + 6 - len(prompts[i]))
            assert finished == (ids[-1] in stop_ids) and (finished or cut)
            assert not set(ids[:-1]) & set(stop_ids)


# Batches and similarity

@for_all(slow=2_000, lengths=st.lists(st.integers(1, 50), max_size=60), batch_size=st.integers(1, 20),
         epochs=st.integers(1, 3), seed=st.integers(0, 2**63))
def test_every_example_comes_once_an_epoch(lengths, batch_size, epochs, seed):
    config = TrainConfig(batch_size=batch_size, epochs=epochs)
    batches = make_batches(lengths, config, seed)
    per_epoch = math.ceil(len(lengths) / batch_size)
    assert len(batches) == epochs * per_epoch
    for epoch in range(epochs):
        of_epoch = batches[epoch * per_epoch:(epoch + 1) * per_epoch]
        assert sorted(i for batch in of_epoch for i in batch) == list(range(len(lengths)))
        assert sum(len(batch) != batch_size for batch in of_epoch) <= 1 and all(map(len, of_epoch))
    assert make_batches(lengths, config, seed) == batches


WORDS = st.lists(one_of("a", "b", "c", "d"), max_size=7)


@cache
def common(a: tuple, b: tuple) -> int:
    """Length of the longest common subsequence, by its definition."""
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + common(a[1:], b[1:])
    return max(common(a[1:], b), common(a, b[1:]))


@for_all(slow=2_000, a=WORDS, b=WORDS, threshold=one_of(0.0, 0.3, 0.5, 0.7, 1.0))
def test_similarity_is_that_of_the_longest_common_subsequence(a, b, threshold):
    length = common(tuple(a), tuple(b))
    assert lcs_length(a, b) == lcs_length(b, a) == length
    if a or b:
        pool = PromptPool([], set(), PromptConfig(max_rouge_l=threshold))
        assert pool.is_similar(a, set(a), b) == (2 * length / (len(a) + len(b)) >= threshold)


@for_all(slow=2_000, texts=st.lists(WORDS.filter(bool), max_size=5), words=WORDS.filter(bool))
def test_a_prompt_is_rejected_as_similar_if_it_is_to_any_known_one(texts, words):
    config = PromptConfig(max_rouge_l=0.7, min_words=1, keywords=())
    pool = PromptPool([" ".join(text) for text in texts], set(), config)
    f1 = [2 * common(tuple(words), tuple(text)) / (len(words) + len(text)) for text in texts]
    expected = "exact match" if words in texts else "similar" if max(f1, default=0) >= 0.7 else None
    assert pool.rejection_reason(" ".join(words), finished=True) == expected
