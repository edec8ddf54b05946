"""Claims about all inputs: each is tried on a hundred generated ones, with -m slow on thousands more."""

import dataclasses
import itertools
import math
import re
import string
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from tiny import bigram, byte_level_json, tiny_model, tiny_tokenizer

from minisr import InputError
from minisr.evaluate import correlation, interval, judge_metrics, order_signs, ranks, win_rates
from minisr.interop.chat_templates import chat_template
from minisr.interop.tokenizer_json import TokenizerJSON
from minisr.judge import Judgement, judge_prompt, parse_score, reward
from minisr.pairs import select_pairs
from minisr.prompts import RougeIndex
from minisr.rng import first_numbers, row_key, uniform
from minisr.runner.config import CHOICES, LIMITS, Config, PretrainConfig, load_config, to_toml
from minisr.runner.files import read_json, read_jsonl, write_jsonl
from minisr.sampler import Sample, SampleConfig, draw, sample
from minisr.sft import schedule
from minisr.tokenizer import Tokenizer

QUICK = 100


def holds(slow: int = 10_000, **inputs):
    """Make a claim about generated inputs a test, quick by default and long with -m slow.

    The inputs are the same ones on each run: a suite that fails by chance would teach people to look away."""
    def wrap(claim):
        def test(cases):
            how = settings(max_examples=cases, derandomize=True, database=None, deadline=None)
            how(given(**inputs)(claim))()
        return pytest.mark.parametrize("cases", [QUICK, pytest.param(slow, marks=pytest.mark.slow)])(test)
    return wrap


def among(*values) -> st.SearchStrategy:
    return st.sampled_from(values)


def tuples_of(*choices, longest: int, shortest: int = 0) -> st.SearchStrategy:
    """Lists of tuples with one of each choice: fewer decisions for hypothesis than tuples of strategies."""
    return st.lists(among(*itertools.product(*choices)), min_size=shortest, max_size=longest)


def mixed(*pieces: str, most: int = 8) -> st.SearchStrategy:
    """Texts in which these pieces stand among arbitrary others."""
    return st.lists(among(*pieces) | st.characters(codec="utf-8"), max_size=most).map("".join)


# The judge's score line

# What re.IGNORECASE takes for one of a-z, 0-9.
ALNUM = set(string.ascii_letters + string.digits + "\u017f\u212a\u0130\u0131")
DECORATION = "*_`\"'“”‘’<[("
JUDGE_PIECES = ("Score", "score", "SCORE", "\u017fcore", "underscore", ":", "：", " ", "\n", "\t", "*", "_",
                "“", "(", "-", "–", "+", "=", "×", "to", "OR", "of", "out of", "/", "5", "4", "10", ".", ",",
                "٤", "４")
NAMES = ("Score", "score", "SCORE", "\u017fcore", "scores", "underscore", "_Score", "4score", "éscore")
COLONS = (":", "：", "=", "", "::", "** : “", "\n:\n\n", "”:[(<", "\u00a0*\t:\x1c", " -:", ": .", ":**")
NUMBERS = ("0", "1", "5", "4.5", "5.0", "5.01", "6", "10", "+3", "-1", "-0", "3.", ".5", "4,5", "1,000",
           "007", "4.5.1", "٤", "４", "five", "9" * 400)
TAILS = ("", " ", ".", "**", "/5", " / 5", "/10", "/50", "/5٥", "/5_", " out of 5", " (out of 10)", "of 3",
         "-5", " - 5", "–\t5", "+1", " = 4", "×2", " to 4", " TO 4", " or 3", "\n- 2", "\n/10", " - x", "e5",
         "½", ", 4", "..5", "\u00a0/\u00a010", " Score: 2", "٣")
SCORE_LINES = among(*map("".join, itertools.product(NAMES, COLONS, NUMBERS, TAILS)))
JUDGE_TEXTS = st.lists(SCORE_LINES | mixed(*JUDGE_PIECES), max_size=3).map("".join) | st.text()


def span(text: str, start: int, belongs) -> int:
    """Where the run of characters that belong ends."""
    while start < len(text) and belongs(text[start]):
        start += 1
    return start


def score_at(text: str, i: int) -> float | None:
    """The number of the score line that begins at i: the grammar of judge.py without regular expressions."""
    def decorated(start):
        return span(text, start, lambda c: c.isspace() or c in DECORATION)

    if text[i:i + 5].lower().replace("\u017f", "s") != "score" or i and text[i - 1] in ALNUM:
        return None
    i = decorated(i + 5)
    if text[i:i + 1] not in (":", "："):
        return None
    i = decorated(i + 1)
    first = i + (text[i:i + 1] in ("+", "-"))
    end = span(text, first, string.digits.__contains__)
    if end == first:
        return None
    fraction = span(text, end + 1, string.digits.__contains__)
    if text[end:end + 1] == "." and fraction > end + 1:
        end = fraction
    return None if goes_on(text, end) else float(text[i:end])


def goes_on(text: str, end: int) -> bool:
    """Whether a number that ends here is part of another one, a range, a sum or a share of not 5."""
    def digit_after(start):
        start = span(text, start, lambda c: c.isspace() and c != "\n")
        return start if text[start:start + 1] in set(string.digits) else None

    longer = text[end:span(text, end, (string.digits + ".,").__contains__)]
    if any(c in string.digits for c in longer):
        return True
    begin = span(text, end, lambda c: c.isspace() and c != "\n")
    rest = text[begin:begin + 7].lower()
    for sign in (*"-–—−+=×", "to", "or"):
        if rest.startswith(sign) and digit_after(begin + len(sign)) is not None:
            return True
    for sign in ("/", "of", "out of", "(out of"):
        digit = digit_after(begin + len(sign)) if rest.startswith(sign) else None
        if digit is not None and (text[digit] != "5" or re.match(r"\w", text[digit + 1:])):
            return True
    return False


def read_score(text: str) -> float | None:
    """The last number from 0 to 5."""
    found = [number for i in range(len(text)) if (number := score_at(text, i)) is not None]
    return next((number for number in reversed(found) if 0 <= number <= 5), None)


@holds(text=JUDGE_TEXTS)
def test_the_score_is_what_a_reader_without_regular_expressions_finds(text):
    assert parse_score(text) == read_score(text)


def test_so_it_is_in_every_spelling_of_a_score_line():
    lines = [*itertools.product(NAMES, COLONS, ("4",)), *itertools.product(("Score: ",), NUMBERS, TAILS)]
    for line in map("".join, lines):
        assert parse_score(line) == read_score(line), line


@holds(slow=2_000, before=JUDGE_TEXTS, number=st.integers(-100, 1000),
       mark=among("", "**", "“", "\n"), tail=among("", "/5", ".", " out of 5", " - fine", ", 2nd try"))
def test_a_plain_score_line_at_the_end_is_read_whatever_stands_before(before, number, mark, tail):
    line = f"Score:{mark}{number / 100}{tail}"
    given = parse_score(f"{before}\n{line}")
    assert given == (number / 100 if 0 <= number <= 500 else parse_score(before + "\n"))


@holds(slow=2_000, first=JUDGE_TEXTS, second=JUDGE_TEXTS)
def test_of_two_texts_the_last_that_has_a_score_decides(first, second):
    scores = [parse_score(first), parse_score(second)]
    expected = scores[1] if scores[1] is not None else scores[0]
    assert parse_score(f"{first}\n.\n{second}") == expected


@holds(slow=2_000, text=mixed(*(piece for piece in JUDGE_PIECES if piece.isascii())).filter(str.isascii))
def test_case_plays_no_part_in_a_score(text):
    assert parse_score(text) == parse_score(text.swapcase()) == parse_score(text.upper())


@holds(slow=2_000, scores=st.lists(st.none() | st.floats(0, 5), max_size=6))
def test_a_reward_lies_among_the_scores_that_were_read(scores):
    given, read = reward([Judgement("", s) for s in scores]), [s for s in scores if s is not None]
    assert (given is None) == (not read)
    assert not read or min(read) - 1e-12 <= given <= max(read) + 1e-12


# The judge prompt

TAGS = ("</response>", "</ Response", "</\n\u00a0PROMPT>", "</re\u017fponse>", "<response>", "< /response>",
        "</", "<", "/", "response", "</</response>", "{prompt}", "{response}", "{{response}}", "\\1",
        r"\g<0>", "%s", "{}")
FRAMES = mixed(*(tag for tag in TAGS if "{" not in tag), most=3)


def without_closing_tags(text: str) -> str:
    """A response as the judge sees it, by hand: "</ RESPONSE" has become "< /RESPONSE"."""
    seen = ""
    while text:
        word = text[2:].lstrip().lower().replace("\u017f", "s")
        if text.startswith("</") and word.startswith(("response", "prompt")):
            seen, text = seen + "< /", text[2:].lstrip()
        seen, text = seen + text[:1], text[1:]
    return seen


@holds(frames=st.tuples(FRAMES, FRAMES, FRAMES), prompt=mixed(*TAGS), response=mixed(*TAGS),
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


@holds(response=mixed(*TAGS))
def test_a_response_holds_no_closing_tag_and_is_otherwise_itself(response):
    seen = judge_prompt("{response}", "", response)
    assert not re.search(r"</\s*(response|prompt)", seen, re.IGNORECASE)
    assert judge_prompt("{response}", "", seen) == seen  # nothing more to do
    letters = [re.sub(r"\s", "", text) for text in (response, seen)]
    assert letters[0] == letters[1]
    if not re.search(r"</\s*(response|prompt)", response, re.IGNORECASE):
        assert seen == response


# Text and tokens

SPELLED = ("<s>", "</s>", "<|user|>", "<|assistant|>", "<unk>", "<0x41>", "<0x0A>", "<|im_start|>",
           "<|im_end|>", "[INST]", " ", "  ", "\n", "\u2581", "\x00", "\u2028", "\ufeff", "e\u0301",
           "🏳️‍🌈", "漢")
VOCABULARIES = ("SentencePiece", "byte-level")


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    if kind == "SentencePiece":
        return tiny_tokenizer()
    content = byte_level_json("<|im_start|>", "<|im_end|>").encode()
    return Tokenizer(TokenizerJSON(content), chat_template("chatml"))


def kept(kind: str, text: str) -> str:
    """What a round trip makes of a text: the same text.

    SentencePiece, trained with normalization_rule_name="identity" and remove_extra_whitespaces=False, changes
    nothing but its own sign for a space, U+2581, which becomes one."""
    return text.replace("\u2581", " ") if kind == "SentencePiece" else text


@holds(kind=among(*VOCABULARIES), text=mixed(*SPELLED) | st.text())
def test_any_text_comes_back_from_its_ids(kind, text):
    tokenizer = tokenizer_of(kind)
    assert tokenizer.decode(tokenizer.encode(text)) == kept(kind, text)
    assert tokenizer.decode(tokenizer.encode_response(text)) == kept(kind, text)


@holds(kind=among(*VOCABULARIES), prompt=mixed(*SPELLED), response=mixed(*SPELLED))
def test_only_the_template_makes_special_tokens(kind, prompt, response):
    tokenizer = tokenizer_of(kind)
    special = set(tokenizer.vocabulary.specials.values())
    assert special.isdisjoint(tokenizer.encode(prompt))
    ids, mask = tokenizer.encode_chat(prompt, response)
    plain, _ = tokenizer.encode_chat("", "")
    assert [i for i in ids if i in special] == [i for i in plain if i in special]
    assert all(0 <= i < len(tokenizer) for i in ids)
    asked = mask.index(True)
    assert mask == [False] * asked + [True] * (len(ids) - asked)
    assert ids[:asked] == tokenizer.encode_prompt(prompt)


@holds(slow=2_000, kind=among(*VOCABULARIES), ids=st.lists(st.integers(0, 600), max_size=12))
def test_any_ids_are_a_text(kind, ids):
    tokenizer = tokenizer_of(kind)
    text = tokenizer.decode(ids)
    assert text.encode().decode() == text  # no half characters: what is sampled can be written down
    assert text == tokenizer.decode([i for i in ids if i < len(tokenizer)])  # the embedding may be padded


@pytest.mark.parametrize("kind", VOCABULARIES)
def test_half_a_character_is_encoded_or_refused_clearly(kind):
    try:
        tokenizer_of(kind).encode("a\ud800b")
    except InputError:
        pass


# Records

RECORD_TEXTS = mixed("\u2028", "\u2029", "\x85", "\r", "\n", "\x00", "\x1e", '"', "\\", "\\n", "\ufeff",
                     most=4)
PLAIN = among(None, True, False, 0, 1, 1.0, -0.0, 2**70, 1e-300) | st.floats(allow_nan=False) | RECORD_TEXTS
NAMED = among("a", "prompt", "", "\u2028", "\x85\r\n", '"\\', "\ud7ff\ue000\x00", "漢")
NESTED = PLAIN | st.lists(PLAIN, max_size=2) | st.dictionaries(NAMED, PLAIN, max_size=1)
RECORDS = st.dictionaries(NAMED, NESTED, max_size=2)
FRAGMENTS = among(b'{"a": 1}', b'{"a": "b"}', b"{}", b"{", b"}", b"[", b"]", b'"', b"\n", b"\r\n", b"\r",
                  b"\\ud800", b"\\u00", b"\xef\xbb\xbf", b"\xff", b"\xed\xa0\x80", b"NaN", b"1e999", b"\x00",
                  b"null", b"-", b"\xe2\x80\xa8", b'{"a": "\xe2\x80\xa8"}')


@cache
def scratch() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()


def scratch_file() -> Path:
    return Path(scratch().name) / "records.jsonl"


@holds(records=st.lists(RECORDS, max_size=2))
def test_records_come_back_as_they_were_written(records):
    write_jsonl(scratch_file(), records)
    again = read_jsonl(scratch_file(), "records")
    assert again == records and repr(again) == repr(records)  # 1 is not 1.0, nor True


@holds(content=st.binary(max_size=40) | st.lists(FRAGMENTS, max_size=8).map(b"".join))
def test_a_file_of_any_bytes_holds_records_or_is_refused_by_its_name(content):
    scratch_file().write_bytes(content)
    for names in ((), ("a",)):
        try:
            records = read_jsonl(scratch_file(), "records", names)
        except InputError as error:
            assert str(scratch_file()) in str(error) and "\n" not in str(error)
        else:
            assert all(isinstance(record[name], str) for record in records for name in names)
            assert all(isinstance(record, dict) for record in records)


@pytest.mark.parametrize("read, content", [(read_jsonl, "[" * 100_000), (read_jsonl, "1" * 5000),
                                           (read_json, "1" * 5000)])
def test_json_that_python_cannot_hold_is_refused_too(read, content):
    scratch_file().write_text(content)
    with pytest.raises(InputError):
        read(scratch_file(), "records")


def test_half_a_character_is_written_or_refused_clearly():
    scratch_file().write_text('{"prompt": "\\ud800"}\n')
    records = read_jsonl(scratch_file(), "records", ("prompt",))
    try:
        write_jsonl(scratch_file(), records)
        assert read_jsonl(scratch_file(), "records") == records
    except InputError:
        pass


# Preference pairs

REWARDS = (None, 0.0, 1.0, 10 / 3, 4.5, 5.0)
CANDIDATES = tuples_of(("u", "vv", "w", ""), REWARDS, longest=5)
JUDGED = st.lists(CANDIDATES, max_size=4)


def select(judged: list) -> tuple[list[dict], Counter]:
    """select_pairs of [(text, reward), ...] for each prompt; prompts are called 0, 1, ..."""
    return select_pairs(list(range(len(judged))), [[y for y, _ in row] for row in judged],
                        [[r for _, r in row] for row in judged])


@holds(judged=JUDGED)
def test_a_pair_is_the_best_of_all_pairs_and_every_prompt_is_counted(judged):
    expected, counts = [], Counter(pairs=0, unread=0, tie=0, identical=0)
    for x, row in enumerate(judged):
        read = [(r, i, y) for i, (y, r) in enumerate(row) if r is not None]
        better = [(-r, s, i, j, y, z) for (r, i, y), (s, j, z) in itertools.permutations(read, 2) if r > s]
        if not better:
            counts["tie" if len(read) > 1 else "unread"] += 1
            continue
        high, low, _, _, chosen, rejected = min(better)
        counts["pairs" if chosen != rejected else "identical"] += 1
        if chosen != rejected:
            expected.append({"prompt": x, "chosen": chosen, "rejected": rejected,
                             "chosen_reward": -high, "rejected_reward": low})
    assert select(judged) == (expected, counts) and counts.total() == len(judged)


@holds(judged=JUDGED, text=st.text(max_size=3), where=st.integers(0, 5))
def test_a_response_that_was_not_read_changes_nothing(judged, text, where):
    assert select([[*row[:where], (text, None), *row[where:]] for row in judged]) == select(judged)


@holds(slow=2_000, judged=JUDGED, random=st.randoms(use_true_random=False))
def test_the_order_of_prompts_and_of_responses_decides_nothing_but_between_equals(judged, random):
    pairs, counts = select(judged)
    order = random.sample(range(len(judged)), len(judged))
    moved, moved_counts = select([judged[i] for i in order])
    assert sorted((order[p["prompt"]], p["chosen"], p["rejected"]) for p in moved) == sorted(
        (p["prompt"], p["chosen"], p["rejected"]) for p in pairs)
    mixed_up, mixed_counts = select([random.sample(row, len(row)) for row in judged])
    assert moved_counts == counts and all(mixed_counts[c] == counts[c] for c in ("unread", "tie"))
    for p in mixed_up:
        read = sorted(r for _, r in judged[p["prompt"]] if r is not None)
        assert (p["chosen_reward"], p["rejected_reward"]) == (read[-1], read[0])
        assert {(p["chosen"], read[-1]), (p["rejected"], read[0])} <= set(judged[p["prompt"]])
    distinct = all(len(set(read)) == len(read) for row in judged
                   for read in [[r for _, r in row if r is not None]])
    assert not distinct or (mixed_up, mixed_counts) == (pairs, counts)


@holds(slow=2_000, judged=JUDGED)
def test_only_the_order_of_rewards_decides(judged):
    doubled = [[(y, None if r is None else 2 * r + 1) for y, r in row] for row in judged]
    results = select(judged), select(doubled)
    sides = [[(p["prompt"], p["chosen"], p["rejected"]) for p in pairs] for pairs, _ in results]
    assert sides[0] == sides[1] and results[0][1] == results[1][1]


# Figures

SCALE = (0.0, 1.0, 2.5, 4.0, 5.0)
RANKED = tuples_of((0, 1, 3, 4, 5), SCALE, shortest=2, longest=6)
MAYBE_READ = st.lists(tuples_of((1, 3, 5), (None, *SCALE), longest=4), min_size=1, max_size=3)
FINITE = st.floats(-1e6, 1e6, width=32)
RESAMPLED = {n: np.array(list(itertools.product(range(n), repeat=n))) for n in range(1, 6)}  # all, by size


@holds(ranked=RANKED)
def test_ranks_and_correlations_are_scipys_and_0_where_scipy_has_none(ranked):
    human, model = zip(*ranked)
    assert ranks(human).tolist() == stats.rankdata(human).tolist()
    ours = [correlation(ranks(human), ranks(model)), correlation(order_signs(human), order_signs(model))]
    theirs = [0.0, 0.0]
    if len(set(human)) > 1 and len(set(model)) > 1:
        theirs = [stats.spearmanr(human, model).statistic, stats.kendalltau(human, model).statistic]
    assert ours == pytest.approx(theirs, abs=1e-12)


@holds(judged=MAYBE_READ)
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


@holds(slow=1_000, judged=st.lists(RANKED, min_size=1, max_size=4), random=st.randoms(use_true_random=False))
def test_figures_know_no_order_of_responses_and_turn_with_the_judge(judged, random):
    def figures(rows, given=lambda h, m: m):
        found = judge_metrics([[h for h, _ in row] for row in rows], [[given(h, m) for h, m in row]
                                                                     for row in rows])
        return [found[name] for name in ("pairwise", "exact", "spearman", "kendall")]

    plain = figures(judged)
    shuffled = [random.sample(row, len(row)) for row in random.sample(judged, len(judged))]
    assert figures(shuffled) == pytest.approx(plain, abs=1e-9)
    if plain[0] is not None:
        assert figures(judged, lambda h, m: h) == pytest.approx([1] * 4)
        turned = figures(judged, lambda h, m: -m)
        assert turned[2:] == pytest.approx([-plain[2], -plain[3]], abs=1e-9)
        assert turned[0] + plain[0] <= 1 + 1e-9  # what is left are ties of the model's


@holds(slow=2_000, scores=tuples_of((0, 1, 4.5, 5), (0, 1, 4.5, 5), shortest=1, longest=8))
def test_win_rates_are_what_counting_finds(scores):
    rates = win_rates(*zip(*scores))
    counted = Counter("win" if a > b else "lose" if a < b else "tie" for a, b in scores)
    swapped = win_rates([b for _, b in scores], [a for a, _ in scores])
    assert [swapped[k] for k in ("win", "tie", "lose")] == [rates[k] for k in ("lose", "tie", "win")]
    for name in ("win", "tie", "lose"):
        low, high = rates[f"{name}_ci95"]
        assert rates[name] == pytest.approx(counted[name] / len(scores), abs=1e-12)
        assert 0 <= low <= rates[name] + 1e-12 and rates[name] - 1e-12 <= high <= 1


@holds(slow=2_000, values=st.lists(FINITE, min_size=1, max_size=5))
def test_an_interval_is_that_of_all_resamples(values):
    # There are at most 5^5: their quantiles are known, those of 2000 at random lie near.
    means = np.sort(np.array(values)[RESAMPLED[len(values)]].mean(axis=1))
    low, high = interval(values)
    slack = 1e-9 * (1 + np.abs(values).max())
    for end, share in ((low, 0.025), (high, 0.975)):
        below = np.quantile(means, max(0, share - 0.015), method="lower")
        above = np.quantile(means, min(1, share + 0.015), method="higher")
        assert below - slack <= end <= above + slack
    assert interval([2 * v for v in values]) == [2 * low, 2 * high]


# Drawing tokens

ROWS = torch.tensor([row_key(5, i, 0) for i in range(512)])
LOGITS = st.lists(among(-math.inf, *(i / 4 for i in range(-32, 33)), -math.inf, 0.0), min_size=1,
                  max_size=8).filter(lambda logits: max(logits) > -math.inf)
HOW = among(*itertools.product((0.0, 1e-50, 1e-6, 0.01, 0.3, 0.7, 1.0, 2.0, 100.0),  # temperature
                              (0.0, 1e-6, 0.1, 0.5, 0.9, 0.999, 1.0)))  # top-p


def nucleus(logits: list[float], temperature: float, top_p: float) -> tuple[set[int], set[int]]:
    """Tokens that may be drawn and those that must come up in 512 draws, found by sorting in float64.

    Equally probable tokens are in or out together. A token at the very edge may, but need not."""
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


@holds(logits=LOGITS, how=HOW, step=st.integers(0, 300))
def test_draws_are_the_whole_nucleus_and_nothing_but_the_nucleus(logits, how, step):
    drawn = draw(torch.tensor([logits]).expand(512, -1), *how, ROWS, step)
    may, must = nucleus(logits, *how)
    assert must <= set(drawn.tolist()) <= may


@holds(slow=1_000, table=st.lists(LOGITS, min_size=1, max_size=5), how=HOW, step=st.integers(0, 7))
def test_a_row_draws_alone_what_it_draws_among_others(table, how, step):
    logits = torch.full((len(table), 8), -torch.inf)
    for row, values in zip(logits, table):
        row[:len(values)] = torch.tensor(values)
    keys = ROWS[:len(table)]
    drawn = draw(logits, *how, keys, step)
    alone = [draw(row[None], *how, keys[i:i + 1], step) for i, row in enumerate(logits)]
    assert torch.equal(drawn, torch.cat(alone))
    numbers = first_numbers(keys, 8)
    assert torch.equal(numbers[step], uniform(keys, 64 * step))
    assert torch.equal(drawn, draw(logits, *how, keys, step, numbers[step]))


TOKENS = st.integers(0, 7)
LENGTHS = among(1, 1, 2, 3, 4, 99, 99)  # of one token, up to all of the context but one place
WAYS = among(*itertools.product((0.0, 0.7, 1.0), (0.5, 0.9, 1.0), (1, 2, 3, 4, 5)))  # temperature, top-p, n


@st.composite
def questions(draw, context: int):
    """Prompts, how many samples of each, what stops them and how they are drawn."""
    texts = st.lists(TOKENS, min_size=context - 1, max_size=context - 1)
    prompts = [text[:length] for text, length in draw(st.lists(st.tuples(texts, LENGTHS), max_size=4))]
    stop = draw(st.integers(1, 255))  # any set of the eight tokens
    temperature, top_p, n = draw(WAYS)
    config = SampleConfig(temperature, top_p, max_new_tokens=draw(TOKENS) + 1, rows=draw(TOKENS) + 1)
    return prompts, n, tuple(token for token in range(8) if stop >> token & 1), config


@holds(follows=st.lists(TOKENS, min_size=8, max_size=8), asked=questions(6))
def test_a_chain_of_tokens_is_followed_to_its_stop_or_to_the_end_of_the_room(follows, asked):
    prompts, n, stop, config = asked
    model = bigram(dict(enumerate(follows)), 8, context=6)
    expected = []
    for prompt in prompts:
        ids = [follows[prompt[-1]]]
        while ids[-1] not in stop and len(ids) < min(config.max_new_tokens, 6 - len(prompt)):
            ids.append(follows[ids[-1]])
        expected.append([Sample(ids, ids[-1] in stop)] * n)
    assert sample(model, prompts, n, config, key=1, stop=stop) == expected


@holds(slow=1_000, table=st.lists(st.integers(-8, 8), min_size=8, max_size=8), asked=questions(9),
       rows=st.integers(1, 9))
def test_how_many_rows_are_drawn_together_and_how_many_follow_changes_nothing(table, asked, rows):
    # Without blocks the logits of a token are a row of a table: sums of one term, the same in any batch.
    prompts, n, stop, config = asked
    model = bigram({}, 8, context=9)
    with torch.no_grad():
        model.head.weight.copy_(torch.stack([torch.tensor(table).roll(i) for i in range(8)]) / 8)
    drawn = sample(model, prompts, n, config, key=2, stop=stop)
    assert drawn == sample(model, prompts, n, dataclasses.replace(config, rows=rows), key=2, stop=stop)
    more = sample(model, [*prompts, [0]], n + 1, config, key=2, stop=stop)
    assert drawn == [row[:n] for row in more[:-1]]


@holds(slow=1_000, seed=st.integers(0, 3), header=among(0, 3, 17), asked=questions(6))
def test_with_attention_and_cache_every_token_is_the_one_that_its_number_asks_for(seed, header, asked):
    # Checked by one pass without cache over each whole text; 1e-4 is room for sums in another order.
    prompts, n, stop, config = asked
    config = dataclasses.replace(config, temperature=1.0, top_p=1.0)
    model, prompts = tiny_model(8, header + 6, seed), [[1, 2, 3] * 6 + p for p in prompts]
    prompts = [p[18 - header:] for p in prompts]
    for i, row in enumerate(sample(model, prompts, n, config, key=3, stop=stop)):
        for j, drawn in enumerate(row):
            with torch.no_grad():
                logits = model(torch.tensor([prompts[i] + drawn.ids]))[0, len(prompts[i]) - 1:-1]
            above = logits.double().softmax(-1).cumsum(-1)
            for step, token in enumerate(drawn.ids):
                u = uniform(torch.tensor([row_key(3, i, j)]), 64 * step).item()
                assert (above[step, token - 1] if token else 0) - 1e-4 <= u <= above[step, token] + 1e-4
            cut = len(drawn.ids) == min(config.max_new_tokens, header + 6 - len(prompts[i]))
            assert drawn.finished == (drawn.ids[-1] in stop) and (drawn.finished or cut)
            assert not set(drawn.ids[:-1]) & set(stop)


# Settings, batches, similarity

SETTING_TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=12)


def settings_of(kind, name: str = "") -> st.SearchStrategy:
    """Any value that a key of this type and name may have."""
    if dataclasses.is_dataclass(kind):
        return st.builds(kind, **{key: settings_of(hint, key) for key, hint in get_type_hints(kind).items()})
    if name in CHOICES:
        return st.sampled_from(CHOICES[name])
    if get_origin(kind) is tuple:
        return st.lists(settings_of(get_args(kind)[0]), max_size=3).map(tuple)
    low, high = LIMITS.get(name, (1, math.inf))
    return {bool: st.booleans(), str: SETTING_TEXTS, float: st.floats(low, high),
            int: st.integers(math.ceil(low), None if high == math.inf else math.floor(high))}[kind]


@holds(slow=500, config=settings_of(Config))
def test_a_config_comes_back_from_its_file(config):
    scratch_file().write_bytes(to_toml(config).encode())
    assert load_config(scratch_file()) == config
    assert to_toml(load_config(scratch_file())) == to_toml(config)


@holds(slow=500, train=settings_of(get_type_hints(PretrainConfig)["train"]), seed=st.integers(0, 2**31))
def test_a_pretraining_config_comes_back_from_its_file(train, seed):
    config = PretrainConfig(seed=seed, train=train)
    scratch_file().write_bytes(to_toml(config).encode())
    assert load_config(scratch_file(), PretrainConfig) == config


@pytest.mark.parametrize("character", ["\n", "\r", "\x00", "\x1b", "\x7f"])
def test_a_control_character_in_a_setting_comes_back_too(character):
    config = Config(seed_model=f"a{character}b")
    scratch_file().write_bytes(to_toml(config).encode())
    assert load_config(scratch_file()) == config


@holds(slow=2_000, lengths=st.lists(st.integers(1, 50), max_size=60), batch_size=st.integers(1, 20),
       epochs=st.integers(1, 3), key=st.integers(0, 2**63))
def test_every_example_comes_once_an_epoch(lengths, batch_size, epochs, key):
    batches = schedule(lengths, batch_size, epochs, key)
    each = math.ceil(len(lengths) / batch_size)
    assert len(batches) == epochs * each
    for epoch in range(epochs):
        own = batches[epoch * each:(epoch + 1) * each]
        assert sorted(i for batch in own for i in batch) == list(range(len(lengths)))
        assert sum(len(batch) != batch_size for batch in own) <= 1 and all(map(len, own))
    assert schedule(lengths, batch_size, epochs, key) == batches


SENTENCES = st.lists(among("a", "b", "c", "d"), max_size=7)


@cache
def common(a: tuple, b: tuple) -> int:
    """Length of the longest common subsequence, by its definition."""
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + common(a[1:], b[1:])
    return max(common(a[1:], b), common(a, b[1:]))


@holds(slow=2_000, texts=st.lists(SENTENCES, max_size=5), before=among(0, 0, 61), at_once=st.integers(0, 70),
       asked=SENTENCES)
def test_the_index_finds_the_text_with_the_longest_common_subsequence(texts, before, at_once, asked):
    texts = [["d"] * (i % 3) for i in range(before)] + texts  # the index grows at 64
    index = RougeIndex(texts[:at_once])
    for text in texts[at_once:]:
        index.highest(asked)  # asking changes nothing
        index.add(text)
    f1 = [2 * common(tuple(asked), tuple(t)) / (len(asked) + len(t)) for t in texts if asked]
    assert index.highest(asked) == pytest.approx(max(f1, default=0.0), abs=1e-12)
