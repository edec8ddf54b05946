"""New prompts: what is shown to the model, what is kept of its text, what is rejected and why."""

import re
from collections import Counter
from itertools import combinations
from random import Random
from types import SimpleNamespace

import pytest
from tiny import bigram, tiny_model, tiny_tokenizer

from minisr.prompts import PromptConfig, RougeIndex, few_shot, first_prompt, new_prompts, normal
from minisr.sampler import Sample

SEEDS = ["Write a story about a sad fox at the river.", "Plan a day with the king, a drum and the beach.",
         "Report on the bear that has a coat.", "Send a note to the nurse.", "Tell me a tale of a wolf.",
         "How can we bring a bell to the pond?", "What is new in town today?", "I need news of a ring.",
         "Please write to the baker about bread."]
HELD_OUT = "Please plan a party at the lake with a goat and a lamp."


@pytest.fixture
def model_says(monkeypatch):
    """Make the model say these texts in turn, then nothing but fresh prompts; returns what it was shown."""
    def install(texts: list[str], finished: bool = True) -> list[str]:
        said, shown, tokenizer = iter(texts), [], tiny_tokenizer()

        def sample(model, prompts, n, config, **_):
            shown.extend(tokenizer.decode(ids) for ids in prompts)
            drawn = [next(said, f"a{i} b{i} c{i}") for i in range(len(shown) - len(prompts), len(shown))]
            return [[Sample(tokenizer.encode(text + "\n"), finished)] for text in drawn]
        monkeypatch.setattr("minisr.prompts.sample", sample)
        return shown
    return install


ROOMY = SimpleNamespace(config=SimpleNamespace(max_seq_len=10_000))


def make(**config) -> tuple[list[str], Counter]:
    return new_prompts(ROOMY, tiny_tokenizer(), SEEDS, {HELD_OUT}, PromptConfig(**config), key=0)


VARIANTS = [lambda x: x, str.upper, lambda x: x.replace(".", "!").replace(",", ""), lambda x: f"  \"{x}\""]


@pytest.mark.parametrize("variant", VARIANTS)
def test_seed_prompts_never_come_back(model_says, variant):
    model_says([variant(seed) for seed in SEEDS])
    made, counts = make(count=5, rows=4, attempts=10)
    assert counts["exact match"] == len(SEEDS)
    assert len(made) == 5 and not {normal(x) for x in made} & {normal(x) for x in SEEDS}


@pytest.mark.parametrize("variant", VARIANTS)
def test_evaluation_prompts_never_come_back(model_says, variant):
    model_says([variant(HELD_OUT)] * 3)
    made, counts = make(count=5, rows=4, attempts=10)
    assert counts["evaluation prompt"] == 3
    assert len(made) == 5 and normal(HELD_OUT) not in map(normal, made)


def test_each_rejection_is_counted_by_its_reason(model_says):
    fresh = "Knit seven warm mittens before winter."
    model_says([
        "Sing now.", " ".join(["word"] * 14),  # too short, too long
        "Paint a GRAPH of the rainfall.",  # a keyword, whatever its case
        HELD_OUT, SEEDS[1], fresh, fresh.lower(),
        "Knit seven warm mittens before summer.",  # 2 * 5 / 12 = 0.83 like the one before
    ])
    made, counts = make(count=1000, rows=8, attempts=0.008, max_words=13)
    assert made == [fresh]
    assert counts == {"accepted": 1, "length": 2, "keyword": 1, "evaluation prompt": 1, "exact match": 2,
                      "similar": 1}


def test_a_prompt_that_was_cut_off_is_rejected(model_says):
    model_says(["Knit seven warm mittens before winter."], finished=False)
    assert make(count=1, attempts=1) == ([], Counter(accepted=0, **{"cut off": 1}))


def test_a_keyword_is_a_whole_word(model_says):
    model_says(["Write a paragraph about filed profiles."])
    assert make(count=1, attempts=1)[1]["accepted"] == 1


@pytest.mark.parametrize("rouge, kept", [(0.84, 2), (0.83, 1)])
def test_the_rouge_threshold_decides_what_is_similar(model_says, rouge, kept):
    model_says(["Knit seven warm mittens before winter.", "Knit seven warm mittens before summer."])
    assert len(make(count=2, attempts=1, rouge=rouge)[0]) == kept


def test_an_accepted_prompt_is_not_accepted_again_in_a_later_wave(model_says):
    model_says(["Knit seven warm mittens before winter."] * 6)
    assert make(count=6, rows=2, attempts=1)[1] == {"accepted": 1, "exact match": 5}


def test_it_stops_when_enough_are_made(model_says):
    shown = model_says([])
    made, counts = make(count=5, rows=3, attempts=10)
    assert len(made) == len(set(made)) == counts["accepted"] == counts.total() == 5
    assert len(shown) == 6  # two waves of three


def test_it_gives_up_when_the_model_never_makes_a_prompt(model_says):
    shown = model_says(["No."] * 1000)
    assert make(count=7, rows=4, attempts=3) == ([], Counter(accepted=0, length=21))
    assert len(shown) == 21


@pytest.mark.parametrize("end", ["newline", "eos", "none"])
def test_a_prompt_ends_with_its_line_or_its_text(end):
    tokenizer, full_stop = tiny_tokenizer(), tiny_tokenizer().encode("9.")[-1]
    pieces = map(tokenizer.vocabulary.pieces.id_to_piece, range(len(tokenizer)))
    said = [i for i, piece in enumerate(pieces) if re.fullmatch("▁[a-z]{3,}", piece)][:3]  # words, none twice
    last = {"newline": tokenizer.encode("\n")[-1], "eos": tokenizer.eos_id, "none": said[-1]}[end]
    model = bigram(dict(zip([full_stop, *said], [*said, last])), len(tokenizer), context=512)
    made, counts = new_prompts(model, tokenizer, SEEDS, set(), PromptConfig(count=1, attempts=1), key=0)
    assert (made, counts["cut off"]) == (([], 1) if end == "none" else ([tokenizer.decode(said)], 0))


def test_it_gives_up_with_a_random_model_too():
    config = PromptConfig(count=4, rows=5, attempts=2, max_new_tokens=6)
    made, counts = new_prompts(tiny_model(context=512), tiny_tokenizer(), SEEDS, set(), config, key=0)
    assert counts.total() == 8 and counts["accepted"] == len(made)


@pytest.mark.parametrize("room, shown", [(10_000, 8), (100, 4), (5, 1)])
def test_fewer_examples_are_shown_where_not_all_fit(room, shown):
    rng, own = Random(0), ["o" * 10] * 3
    text = few_shot(["s" * 10] * 9, own, PromptConfig(), rng, lambda text: len(text) <= room)
    lines = text.split("\n")
    assert len(lines) == shown + 2 and lines[-1] == f"{shown + 1}." and (len(text) <= room or shown == 1)
    assert [line.split(". ")[0] for line in lines[1:-1]] == [str(i + 1) for i in range(shown)]


def test_long_examples_leave_room_for_the_prompt_that_is_to_come(model_says):
    shown = model_says(["Tell us about the long winter."])
    tokenizer, long = tiny_tokenizer(), [f"{number} " + "news of the river " * 10 for number in range(9)]
    context = 2 * len(tokenizer.encode(long[0])) + 60
    model = SimpleNamespace(config=SimpleNamespace(max_seq_len=context))
    made, _ = new_prompts(model, tokenizer, long, set(), PromptConfig(count=1, rows=1), key=0)
    assert made == ["Tell us about the long winter."] and shown[0].count("river") in (10, 20)
    assert len(tokenizer.encode(shown[0])) + PromptConfig().max_new_tokens < context


def test_the_model_is_shown_seeds_first_and_its_own_prompts_once_there_are_some(model_says):
    own = ["Knit seven warm mittens before winter.", "Count all stars above our roof tonight."]
    shown = model_says(own)
    make(count=4, rows=2, attempts=10)
    listed = [[line.split(". ", 1)[1] for line in text.split("\n")[1:-1]] for text in shown]
    assert all(len(set(shots)) == 8 and set(shots) <= set(SEEDS) for shots in listed[:2])  # the first wave
    assert all(set(own) < set(shots) and len(set(shots) & set(SEEDS)) == 6 for shots in listed[2:4])


@pytest.mark.parametrize("own, seeds_shown", [(0, 8), (1, 7), (2, 6), (30, 6)])
def test_eight_examples_are_shown_two_of_them_own(own, seeds_shown):
    mine = [f"my prompt {i}" for i in range(own)]
    for seed in range(20):
        header, *lines, last = few_shot(SEEDS, mine, PromptConfig(), Random(seed)).split("\n")
        assert header == "Come up with a series of tasks:" and last == "9."
        assert [line.split(". ")[0] for line in lines] == list("12345678")
        shots = [line.split(". ", 1)[1] for line in lines]
        assert len(set(shots) & set(SEEDS)) == seeds_shown and len(set(shots) & set(mine)) == 8 - seeds_shown


def test_own_prompts_stand_at_any_place_of_the_list():
    places = {few_shot(SEEDS, ["mine"], PromptConfig(), Random(seed)).split("\n")[1:-1].index(f"{i}. mine")
              for seed in range(60) for i in range(1, 9)
              if f"{i}. mine" in few_shot(SEEDS, ["mine"], PromptConfig(), Random(seed))}
    assert places == set(range(8))


def test_a_shown_prompt_fills_one_line():
    assert "1. one two three\n2." in few_shot(["one\ntwo \n three"], [], PromptConfig(), Random(0))


@pytest.mark.parametrize("text, kept", [
    (" Write a poem.", "Write a poem."), ("\nWrite a poem.\n", "Write a poem."), ("", ""), (" \n ", ""),
    (" Write a poem.\n10. Write a song.", "Write a poem."),
    ("Write a poem.\n###\nRoses are red.", "Write a poem."),
    ("Write a poem.\r\nAnswer: Roses are red.", "Write a poem."),
])
def test_only_the_first_prompt_is_kept_of_what_the_model_says(text, kept):
    assert first_prompt(text) == kept


def subsequences(text: list[str]) -> set[tuple]:
    return {chosen for size in range(len(text) + 1) for chosen in combinations(text, size)}


def test_rouge_is_that_of_all_common_subsequences():
    rng = Random(2)
    for _ in range(60):
        texts = [rng.choices("abcd", k=rng.randint(1, 7)) for _ in range(rng.randint(1, 5))]
        text = rng.choices("abcde", k=rng.randint(1, 7))  # e is in no text of the index
        lcs = [max(map(len, subsequences(text) & subsequences(other))) for other in texts]
        by_hand = max(2 * common / (len(text) + len(other)) for common, other in zip(lcs, texts))
        assert RougeIndex(texts).highest(text) == pytest.approx(by_hand, abs=1e-12)


def test_the_rouge_index_grows_with_every_text():
    index, texts = RougeIndex([]), [[f"w{i}"] * (1 + i % 9) + ["end"] for i in range(150)]
    assert index.highest(["w0"]) == 0
    for text in texts:
        assert index.highest(text) < 1
        index.add(text)
    assert all(index.highest(text) == 1 for text in texts) and index.highest([]) == 0
