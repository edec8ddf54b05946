import itertools
import re
from collections import Counter
from random import Random

import pytest

from minisr.judge import parse_score
from minisr.runner.run import WORLD_TEMPLATE, load_template
from minisr.runner.seed_data import balance_scores, eft_by_annotator
from minisr.worlds.tiny import corpus, writers
from minisr.worlds.tiny.oracle import Request, examine, parse_request, score
from minisr.worlds.tiny.words import ANSWERS, CLOSINGS, EXTRAS, REQUESTS, SLOTS, WORDS

STORY = "Write a story about a sad pig at the river."
NEWS = "People are happy since a goat has a lamp. Write the news."
LETTER = "Send a note to the king that its crown is at the castle."

# (request, answer, points for: first, second, third, nothing added, good form), each found by hand.
EXAMPLES = [
    (STORY, "Once there was a pig. It felt sad. It slept by the river. The end.", "11111"),
    (STORY, "Once there was a cow. It felt sad. It slept by the river. The end.", "01101"),  # swapped
    (STORY, "It felt sad. It slept by the river. The end.", "01110"),  # first left out: no beginning
    (STORY, "Once there was a pig. It slept by the river. The end.", "10111"),
    (STORY, "Once there was a pig. It felt sad. The end.", "11011"),
    (STORY, "Once there was a pig. It felt sad. It slept by the river. There was also a hen. The end.",
     "11101"),
    (STORY, "Once there was a pig. It felt sad. It slept by the river.", "11110"),  # no closing
    (STORY, "Once there was a pig. It felt sad. It slept by the river. Have fun.", "11110"),
    (STORY, "Once there was a pig. It slept by the river. It felt sad. The end.", "11110"),  # order
    (STORY, "Once there was a pig. It felt sad. It was always sad. It slept by the river. The end.",
     "11110"),
    (STORY, "Once there was a pig. It felt sad. It slept by the river. There was also a hen. "
            "Later came the zoo. The end.", "11100"),  # two extras
    (STORY, "Once there was a pig. It felt sad. It slept by the river. The end. The end.", "11110"),
    (STORY, "", "00010"),
    (STORY, "Blah blah, 42!", "00010"),
    (STORY, "The pig was sad at the river. The end.", "11110"),  # all there, in no sentence of this world
    (NEWS, "A goat came to town. It had a lamp. Now everyone is happy. More news soon.", "11111"),
    (NEWS, "A goat came to town. It had a lamp. Now everyone is sad. More news soon.", "11001"),
    (LETTER, "Dear king, how are you? I found your crown. Meet me near the castle. Your friend.", "11111"),
    (LETTER, "Dear king, how are you? I found your crown. Meet me near the castle. The end.", "11110"),
    (LETTER, "Dear queen, how are you? I found your crown. Meet me near the castle. The end.", "01100"),
]


@pytest.mark.parametrize("prompt, text, points", EXAMPLES)
def test_the_oracle_gives_the_points_found_by_hand(prompt, text, points):
    verdict = examine(parse_request(prompt), text)
    assert "".join(str(int(point)) for point in verdict.points) == points
    assert score(prompt, text) == points.count("1")


def test_the_verdict_quotes_the_words_in_place_of_the_requested_ones():
    verdict = examine(parse_request(STORY), "Once there was a cow. It felt sad. And I am rude too. Have fun.")
    assert verdict.found == ("cow", "sad", "none")
    assert (verdict.added, verdict.ending) == ("cow", "Have fun.")


def test_a_text_that_is_not_a_request_has_no_score():
    assert parse_request("What is two plus two?") is None and score("What is two plus two?", "4") is None
    assert parse_request(f"{STORY} {STORY}") is None


@pytest.mark.parametrize("kind", SLOTS)
def test_every_phrasing_is_parsed(kind):
    rng = Random(0)
    for frame in REQUESTS[kind]:
        for _ in range(50):
            words = tuple(rng.choice(WORDS[slot]) for slot in SLOTS[kind])
            assert parse_request(frame.format(**dict(zip(SLOTS[kind], words)))) == Request(kind, words)


def test_no_word_is_in_two_lists_or_in_a_frame():
    # Otherwise it would be ambiguous whether an answer contains a word.
    lists = [word for words in WORDS.values() for word in words]
    assert len(lists) == len(set(lists))
    frames = [f for k in SLOTS for f in (*REQUESTS[k], *itertools.chain(*ANSWERS[k]), CLOSINGS[k])]
    said = set(re.findall(r"[a-z]+", re.sub(r"{\w*}", "", " ".join([*frames, *EXTRAS.values()])).lower()))
    assert said & set(lists) == set()


def test_more_than_two_million_requests_can_be_made():
    assert all(len(set(frames)) == len(frames) for frames in REQUESTS.values())
    count = 0
    for kind, slots in SLOTS.items():
        words = 1
        for slot in slots:
            words *= len(WORDS[slot])
        count += words * len(REQUESTS[kind])
    assert count > 2_000_000


def test_a_flawless_answer_earns_five_points():
    rng = Random(0)
    for _ in range(500):
        request, _ = writers.ask(rng)
        assert examine(request, writers.flawless_answer(request, rng)).score == 5


def test_a_judgement_has_the_verdicts_score_and_a_lenient_one_never_less():
    rng, lenient = Random(0), 0
    for _ in range(500):
        request, _ = writers.ask(rng)
        verdict = examine(request, writers.answer(request, rng))
        text = writers.judgement(request, verdict)
        assert parse_score(text) == verdict.score
        assert [word == "yes" for word in re.findall(r", (yes|no): ", text)] == list(verdict.points)
        given = parse_score(writers.lenient_judgement(request, verdict, rng))
        assert given >= verdict.score
        lenient += given > verdict.score
    assert lenient > 200


def test_a_review_is_true_and_contains_no_score():
    request = parse_request(STORY)
    verdict = examine(request, "Once there was a cow. It felt sad. The end.")
    reviews = {writers.review(request, verdict, Random(seed)) for seed in range(50)}
    assert all(parse_score(text) is None for text in reviews)
    assert max(reviews, key=len) == (
        "I looked for pig and found cow, no. I looked for sad and found sad, yes. I looked for river and "
        "found none, no. They added cow, no. It ends with The end, yes.")


def test_the_habits_are_flawed_in_the_mode():
    # Exact imitation must give wrong answers at temperature 0. Flawless answers must be rare enough to
    # leave room for improvement, and frequent enough to be sampled.
    rng, verdicts = Random(0), []
    for _ in range(4000):
        request, _ = writers.ask(rng)
        verdicts.append(examine(request, writers.answer(request, rng)))
    assert sum(not verdict.points[2] for verdict in verdicts) / 4000 > 0.5
    assert sum(verdict.found[2] == "none" for verdict in verdicts) / 4000 > 0.5  # left out, not swapped
    assert 0.15 < sum(verdict.score == 5 for verdict in verdicts) / 4000 < 0.40


def requests_in(text):
    """Every request in a text, after any prefix of its line."""
    for line in text.split("\n"):
        line = re.sub(r"^(Request:|Q:|Asked:|\d+\.) ", "", line)
        if request := parse_request(line):
            yield request


def test_training_text_contains_no_held_out_request():
    rng = Random(0)
    found = [r for _ in range(3000) for r in requests_in(corpus.document(rng))]
    assert len(found) > 3000  # one in each document, more in a list
    assert not any(map(corpus.held_out, found))


def test_seed_data_trains_on_one_side_and_evaluates_on_the_other():
    def sides(records):
        return {corpus.held_out(parse_request(record["prompt"])) for record in records}
    assert sides(corpus.ift_data(Random(0), 500)) == {False}
    assert sides(corpus.ranked_data(Random(0), 500)) == {False}
    assert sides(corpus.ranked_data(Random(0), 100, evaluation=True)) == {True}
    prompts = corpus.evaluation_prompts(Random(0), 300)
    assert sides({"prompt": prompt} for prompt in prompts) == {True} and len(set(prompts)) == 300


def test_a_request_is_held_out_in_all_its_phrasings_or_in_none():
    rng = Random(0)
    for _ in range(500):
        request, _ = writers.ask(rng)
        values = dict(zip(SLOTS[request.kind], request.words))
        phrased = [parse_request(frame.format(**values)) for frame in REQUESTS[request.kind]]
        assert len({corpus.held_out(r) for r in phrased}) == 1


def test_one_in_twenty_requests_is_held_out():
    rng = Random(0)
    share = sum(corpus.held_out(writers.ask(rng)[0]) for _ in range(8000)) / 8000
    assert 0.04 < share < 0.06


def test_the_text_of_a_seed_is_the_same_twice():
    def text(seed):
        rng = Random(seed)
        return [corpus.document(rng) for _ in range(200)]
    assert text(1) == text(1) != text(2)


def test_ranked_answers_have_the_oracles_scores_and_not_all_the_same():
    for record in corpus.ranked_data(Random(0), 200):
        assert record["scores"] == [score(record["prompt"], y) for y in record["responses"]]
        assert len(record["responses"]) == 3 and len(set(record["scores"])) > 1


def test_the_annotators_eft_targets_contain_the_oracles_score():
    ranked, template = corpus.ranked_data(Random(0), 200), load_template(WORLD_TEMPLATE)
    flat = [(r["prompt"], y) for r in ranked for y in r["responses"]]
    for (prompt, text), record in zip(flat, eft_by_annotator(ranked, template), strict=True):
        assert parse_score(record["response"]) == score(prompt, text)
        assert prompt in record["prompt"] and record["prompt"].endswith(f"Answer: {text}")


def test_balancing_leaves_as_many_of_the_most_frequent_score_as_of_the_second():
    scores = [5] * 30 + [3] * 12 + [4] * 7
    Random(0).shuffle(scores)
    records = [{"number": i, "response": f"Score: {s}"} for i, s in enumerate(scores)]
    left = balance_scores(records, seed=1)
    assert Counter(parse_score(r["response"]) for r in left) == {5: 12, 3: 12, 4: 7}
    assert left == [r for r in records if r in left]  # in their order
    assert left == balance_scores(records, seed=1) != balance_scores(records, seed=2)
    assert balance_scores(records[:1], seed=1) == records[:1]
