"""New prompts: what is shown to the model, which of its texts are accepted, which are rejected and why."""

import re
import unicodedata
from collections import Counter
from itertools import combinations
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import ENGINES, chain, tiny_lm, tiny_tokenizer

from minisr.prompts import (
    PromptConfig,
    PromptPool,
    few_shot_prompt,
    first_line,
    lcs_length,
    new_prompts,
    normalize,
    split_words,
)
from minisr.sampler import Completion

SEEDS = ["Write a story about a sad fox at the river.", "Plan a day with the king, a drum and the beach.",
         "Report on the bear that has a coat.", "Send a note to the nurse.", "Tell me a tale of a wolf.",
         "How can we bring a bell to the pond?", "What is new in town today?", "I need news of a ring.",
         "Please write to the baker about bread."]
HELD_OUT = "Please plan a party at the lake with a goat and a lamp."


class ScriptedLM:
    """An LM that writes these texts in turn, then fresh prompts without end. It stores the prompts it was shown."""

    tokenizer = tiny_tokenizer()

    def __init__(self, texts=(), finished=True, max_seq_len=10_000):
        self.texts, self.finished, self.max_seq_len = iter(texts), finished, max_seq_len
        self.shown: list[str] = []

    def sample(self, prompts, n, config, seed, stop_ids):
        completions = []
        for ids in prompts:
            text = next(self.texts, f"a{len(self.shown)} b{len(self.shown)} c{len(self.shown)}")
            self.shown.append(self.tokenizer.decode(ids))
            completions.append([Completion(self.tokenizer.encode(text + "\n"), self.finished)])
        return completions


def make(lm, **config) -> tuple[list[str], Counter]:
    return new_prompts(lm, SEEDS, {HELD_OUT}, PromptConfig(**config), seed=0)


# The filters.

VARIANTS = [lambda x: x, str.upper, lambda x: x.replace(".", "!").replace(",", ""), lambda x: f"  \"{x}\""]


@pytest.mark.parametrize("variant", VARIANTS)
def test_seed_prompts_are_rejected(variant):
    x, counts = make(ScriptedLM([variant(seed) for seed in SEEDS]), count=5, round_size=4, max_attempts_factor=10)
    assert counts["exact match"] == len(SEEDS)
    assert len(x) == 5 and not {*map(normalize, x)} & {*map(normalize, SEEDS)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_evaluation_prompts_are_rejected(variant):
    x, counts = make(ScriptedLM([variant(HELD_OUT)] * 3), count=5, round_size=4, max_attempts_factor=10)
    assert counts["evaluation prompt"] == 3
    assert len(x) == 5 and normalize(HELD_OUT) not in map(normalize, x)


def test_each_rejection_is_counted_by_its_reason():
    fresh = "Knit seven warm mittens before winter."
    lm = ScriptedLM([
        "Sing now.", " ".join(["word"] * 14),  # too short, too long
        "Paint a GRAPH of the rainfall.",  # a keyword, whatever its case
        HELD_OUT, SEEDS[1], fresh, fresh.lower(),
        "Knit seven warm mittens before summer.",  # 2 * 5 / 12 = 0.83 of the one before
    ])
    x, counts = make(lm, count=1000, round_size=8, max_attempts_factor=0.008, max_words=13)
    assert x == [fresh]
    assert counts == {"accepted": 1, "length": 2, "keyword": 1, "evaluation prompt": 1, "exact match": 2,
                      "similar": 1}


def test_a_prompt_that_was_cut_off_is_rejected():
    lm = ScriptedLM(["Knit seven warm mittens before winter."], finished=False)
    assert make(lm, count=1, max_attempts_factor=1) == ([], Counter({"accepted": 0, "cut off": 1}))


def test_a_keyword_is_a_whole_word():
    lm = ScriptedLM(["Write a paragraph about filed profiles."])
    assert make(lm, count=1, max_attempts_factor=1)[1]["accepted"] == 1


def test_without_keywords_none_is_rejected():
    lm = ScriptedLM(["Paint a graph of the rainfall."])
    assert make(lm, count=1, max_attempts_factor=1, keywords=())[1]["accepted"] == 1


@pytest.mark.parametrize("max_rouge_l, accepted", [(0.84, 2), (0.83, 1)])
def test_the_rouge_threshold_decides_what_is_similar(max_rouge_l, accepted):
    lm = ScriptedLM(["Knit seven warm mittens before winter.", "Knit seven warm mittens before summer."])
    assert len(make(lm, count=2, max_attempts_factor=1, max_rouge_l=max_rouge_l)[0]) == accepted


def test_an_accepted_prompt_is_not_accepted_again_in_a_later_round():
    lm = ScriptedLM(["Knit seven warm mittens before winter."] * 6)
    assert make(lm, count=6, round_size=2, max_attempts_factor=1)[1] == {"accepted": 1, "exact match": 5}


# Similarity.


def subsequences(words: list[str]) -> set[tuple]:
    return {chosen for size in range(len(words) + 1) for chosen in combinations(words, size)}


def test_the_longest_common_subsequence_is_that_of_all_common_subsequences():
    rng = Random(2)
    for _ in range(200):
        a, b = (rng.choices("abcde", k=rng.randint(0, 7)) for _ in range(2))
        assert lcs_length(a, b) == max(map(len, subsequences(a) & subsequences(b)))


def test_prompts_are_similar_from_a_rouge_l_f1_of_the_threshold_on():
    rng = Random(3)
    for threshold in (0.0, 0.3, 0.5, 0.7, 1.0, 1.1):
        pool = PromptPool([], set(), PromptConfig(max_rouge_l=threshold))
        for _ in range(60):
            words, other = (rng.choices("abcd", k=rng.randint(1, 7)) for _ in range(2))
            common = max(map(len, subsequences(words) & subsequences(other)))
            f1 = 2 * common / (len(words) + len(other))
            assert pool.is_similar(words, set(words), other) == (f1 >= threshold)
            assert pool.is_similar(other, set(other), words) == (f1 >= threshold)


def test_similarity_is_to_any_seed_or_accepted_prompt():
    pool = PromptPool([f"w{i} x{i} y{i} z{i}" for i in range(150)], set(), PromptConfig())
    for prompt in ("fresh words never seen", *(f"w{i} x{i} y{i} new" for i in range(150)), "fresh words never known"):
        pool.try_add(prompt, finished=True)
    assert pool.accepted == ["fresh words never seen"] and pool.counts == {"accepted": 1, "similar": 151}


def test_the_cost_of_a_comparison_goes_by_the_shorter_text():
    class Word(str):
        """Counts how often a word is looked at."""

        looked_at = 0
        __hash__ = str.__hash__

        def __eq__(self, other):
            Word.looked_at += 1
            return str.__eq__(self, other)

    pool = PromptPool([], set(), PromptConfig())
    long = [Word(f"w{i}") for i in range(1500)]
    assert not pool.is_similar([Word(f"w{i}") for i in range(9)], set(), long) and Word.looked_at == 0
    different = set(long)
    Word.looked_at = 0
    same_length = [Word(f"x{i}") for i in range(1500)]  # without a common word
    assert not pool.is_similar(long, different, same_length)
    assert Word.looked_at < 1500


# Words in other scripts.


@pytest.mark.parametrize("text, words", [
    ("Don't panic, world_1: 3.5!", ["don", "t", "panic", "world_1", "3", "5"]),
    ("写一首关于秋天的诗。", list("写一首关于秋天的诗")),
    ("用Python写2行代码", ["用", "python", "写", "2", "行", "代", "码"]),
    ("東京のラーメン、人々", list("東京のラーメン人々")),
    ("เขียน", list("เขียน")),  # vowels and tone marks count like letters
    ("한국어 시를 써라", ["한국어", "시를", "써라"]),  # Korean has spaces
    ("हिन्दी में कविता लिखो।", ["हिन्दी", "में", "कविता", "लिखो"]),  # vowel signs do not split words
    ("கவிதை எழுது", ["கவிதை", "எழுது"]), ("اُكْتُبْ قصيدة؟", ["اُكْتُبْ", "قصيدة"]),
    ("Cafe\u0301 déjà", ["café", "déjà"]), ("𠀀𠀁", ["𠀀", "𠀁"]), ("。、!? ", []),
    ("ﾗｰﾒﾝとｺﾞﾊﾝ", list("ラーメンとゴハン")), ("３つのＡＩ", ["3", "つ", "の", "ai"]), ("ㄅㄆ", ["ㄅ", "ㄆ"]),
    ("می\u200cخواهم", ["میخواهم"]), ("क्\u200dष", ["क्ष"]), ("كـــتاب", ["كتاب"]), ("soft\xadhyphen", ["softhyphen"]),
    ("\u200fمرحبا\u200e!", ["مرحبا"]), ("❤\ufe0f ☀\ufe0f 1\ufe0f\u20e3", ["1"]), ("👨\u200d👩\u200d👧 we", ["we"]),
    ("it´s", ["it", "s"]), ("Straße", ["strasse"]), ("ΣΊΣΥΦΟΣ", ["σίσυφοσ"]), ("½ x²", ["1⁄2", "x2"])])
def test_words_of_many_scripts(text, words):
    assert split_words(text) == words


@given(st.text(st.characters(max_codepoint=0x2ff, exclude_characters="\xad")))
def test_words_of_texts_without_marks_are_those_of_the_regular_expression(text):
    words = re.findall(r"\w+", text)
    assert split_words(text) == [unicodedata.normalize("NFKC", word).casefold() for word in words]


@pytest.mark.parametrize("text, other", [
    ("Nenne drei STRASSEN in Rom.", "Nenne drei Straßen in Rom"), ("ラーメンを３つ選んで", "ﾗｰﾒﾝを3つ選んで"),
    ("یک شعر می\u200cخواهم", "یک شعر میخواهم"), ("اكتب قصيدة عن البحر", "\u202bاكتب قصـــيدة عن البحر\u202c"),
    ("Viết một bài thơ", unicodedata.normalize("NFD", "Viết một bài thơ")),
    ("시를 써라 제발", unicodedata.normalize("NFD", "시를 써라 제발")),
    ("Draw me a ❤ now", "Draw me a ❤\ufe0f now"),
    ("ΓΡΆΨΕ ΈΝΑΝ ΜΎΘΟ ΓΙΑ ΤΟΝ ΌΡΜΟ ΤΗΣ", "γράψε έναν μύθο για τον όρμο της")])
def test_prompts_that_differ_in_case_width_or_what_is_not_seen_are_the_same(text, other):
    for seed, prompt in ((text, other), (other, text)):
        assert PromptPool([seed], set(), PromptConfig(keywords=())).rejection_reason(prompt, True) == "exact match"
        assert PromptPool([], {seed}, PromptConfig(keywords=())).rejection_reason(prompt, True) == "evaluation prompt"


def test_symbols_without_words_are_no_prompt():
    assert PromptPool([], set(), PromptConfig()).rejection_reason("❤\ufe0f ☀\ufe0f ✌\ufe0f ☎\ufe0f", True) == "length"


@pytest.mark.parametrize("seed, other, near", [
    ("写一首关于秋天的诗", "写一个关于大海的故事", "写一首关于春天的诗"),
    ("เขียนบทกวีเกี่ยวกับทะเล", "บอกข่าววันนี้หน่อย", "เขียนบทกวีเกี่ยวกับทะเลา"),
    ("समुद्र के बारे में एक कविता लिखो", "आज की ताज़ा ख़बर क्या है", "समुद्र के बारे में दो कविता लिखो")])
def test_prompts_in_other_scripts_pass_and_near_copies_of_them_do_not(seed, other, near):
    pool = PromptPool([seed], set(), PromptConfig())
    assert pool.rejection_reason(other, True) is None
    assert pool.rejection_reason(near, True) == "similar"
    assert pool.rejection_reason(f"「{seed}!", True) == "exact match"


def test_a_keyword_in_another_script_is_found():
    pool = PromptPool([], set(), PromptConfig(keywords=("图片", "चित्र", "Graph")))
    for text in ("给我画一张图片好吗", "एक चित्र बनाओ अभी", "用graph画出来"):
        assert pool.rejection_reason(text, True) == "keyword"
    for text in ("给我画一张地图好吗", "एक चित्रा बनाओ अभी", "用graphs画出来"):
        assert pool.rejection_reason(text, True) is None


# When to stop.


def test_it_stops_when_there_are_enough_prompts():
    lm = ScriptedLM()
    x, counts = make(lm, count=5, round_size=3, max_attempts_factor=10)
    assert len(x) == len(set(x)) == counts["accepted"] == counts.total() == 5
    assert len(lm.shown) == 6  # two rounds of three


def test_it_gives_up_when_the_model_never_writes_an_acceptable_prompt():
    lm = ScriptedLM(["No."] * 1000)
    assert make(lm, count=7, round_size=4, max_attempts_factor=3) == ([], Counter(accepted=0, length=21))
    assert len(lm.shown) == 21


def test_it_gives_up_with_a_random_model_too(engine):
    config = PromptConfig(count=4, round_size=5, max_attempts_factor=2, max_new_tokens=6)
    x, counts = new_prompts(tiny_lm(engine, context=512), SEEDS, set(), config, seed=0)
    assert counts.total() == 8 and counts["accepted"] == len(x)


@pytest.mark.parametrize("end", ["newline", "eos", "none"])
def test_a_prompt_ends_with_its_line_or_its_text(engine, end):
    tokenizer, full_stop = tiny_tokenizer(), tiny_tokenizer().encode("9.")[-1]
    pieces = map(tokenizer.vocabulary.pieces.id_to_piece, range(len(tokenizer)))
    words = [i for i, piece in enumerate(pieces) if re.fullmatch("▁[a-z]{3,}", piece)][:3]  # all different
    last = {"newline": tokenizer.encode("\n")[-1], "eos": tokenizer.eos_id, "none": words[-1]}[end]
    model = chain(dict(zip([full_stop, *words], [*words, last])), len(tokenizer), context=512)
    x, counts = new_prompts(ENGINES[engine](model, tokenizer), SEEDS, set(),
                            PromptConfig(count=1, max_attempts_factor=1), seed=0)
    assert (x, counts["cut off"]) == (([], 1) if end == "none" else ([tokenizer.decode(words)], 0))


# What the model is shown.


def test_long_examples_leave_room_for_the_new_prompt():
    tokenizer, long = tiny_tokenizer(), [f"{number} " + "news of the river " * 10 for number in range(9)]
    max_seq_len = 2 * len(tokenizer.encode(long[0])) + 60
    lm = ScriptedLM(["Tell us about the long winter."], max_seq_len=max_seq_len)
    x, _ = new_prompts(lm, long, set(), PromptConfig(count=1, round_size=1), seed=0)
    assert x == ["Tell us about the long winter."] and lm.shown[0].count("river") in (10, 20)
    assert len(tokenizer.encode(lm.shown[0])) + PromptConfig().max_new_tokens < max_seq_len


def test_the_model_is_shown_seeds_first_and_generated_prompts_once_there_are_some():
    generated = ["Knit seven warm mittens before winter.", "Count all stars above our roof tonight."]
    lm = ScriptedLM(generated)
    make(lm, count=4, round_size=2, max_attempts_factor=10)
    listed = [[line.split(". ", 1)[1] for line in text.split("\n")[1:-1]] for text in lm.shown]
    assert all(len(set(shots)) == 8 and set(shots) <= set(SEEDS) for shots in listed[:2])  # the first round
    assert all(set(generated) < set(shots) and len(set(shots) & set(SEEDS)) == 6 for shots in listed[2:4])


class Characters:
    """A tokenizer whose tokens are characters."""

    encode = staticmethod(list)


def show(seeds, generated, rng, max_tokens=10_000):
    return few_shot_prompt(Characters, seeds, generated, PromptConfig(), rng, max_tokens)


@pytest.mark.parametrize("room, shown", [(10_000, 8), (100, 4), (5, 1)])
def test_fewer_examples_are_shown_where_not_all_fit(room, shown):
    text = show(["s" * 10] * 9, ["g" * 10] * 3, Random(0), room)
    lines = text.split("\n")
    assert len(lines) == shown + 2 and lines[-1] == f"{shown + 1}." and (len(text) <= room or shown == 1)
    assert [line.split(". ")[0] for line in lines[1:-1]] == [str(i + 1) for i in range(shown)]


@pytest.mark.parametrize("generated, seeds_shown", [(0, 8), (1, 7), (2, 6), (30, 6)])
def test_eight_examples_are_shown_two_of_them_generated(generated, seeds_shown):
    own = [f"my prompt {i}" for i in range(generated)]
    for seed in range(20):
        header, *lines, last = show(SEEDS, own, Random(seed)).split("\n")
        assert header == "Come up with a series of tasks:" and last == "9."
        assert [line.split(". ")[0] for line in lines] == list("12345678")
        shots = [line.split(". ", 1)[1] for line in lines]
        assert len(set(shots) & set(SEEDS)) == seeds_shown and len(set(shots) & set(own)) == 8 - seeds_shown


def test_generated_prompts_occur_at_any_place_of_the_list():
    places = set()
    for seed in range(60):
        lines = show(SEEDS, ["mine"], Random(seed)).split("\n")[1:-1]
        places |= {i for i, line in enumerate(lines) if line == f"{i + 1}. mine"}
    assert places == set(range(8))


def test_an_example_fills_one_line():
    assert "1. one two three\n2." in show(["one\ntwo \n three"], [], Random(0))


@pytest.mark.parametrize("text, line", [
    (" Write a poem.", "Write a poem."), ("\nWrite a poem.\n", "Write a poem."), ("", ""), (" \n ", ""),
    (" Write a poem.\n10. Write a song.", "Write a poem."),
    ("Write a poem.\n###\nRoses are red.", "Write a poem."),
    ("Write a poem.\r\nAnswer: Roses are red.", "Write a poem."),
])
def test_only_the_first_line_is_taken_from_what_the_model_writes(text, line):
    assert first_line(text) == line
