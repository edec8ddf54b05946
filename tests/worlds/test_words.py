"""The words world: vocabulary, requests, what counts as a sentence, the oracle, seed data."""

import hashlib
import re
from collections import Counter
from random import Random

import pytest
from generated import for_all, one_of
from hypothesis import strategies as st

from minisr import InputError
from minisr.judge import parse_score
from minisr.runner.config import SeedConfig
from minisr.runner.run import load_template
from minisr.runner.seed_data import build_seed_data, eft_by_annotator
from minisr.worlds.catalog import WORLDS, true_score, world_of_prompt
from minisr.worlds.words import annotator, corpus, edits, measures, requests
from minisr.worlds.words.annotator import judgement, read_points
from minisr.worlds.words.edits import FORM_SHARES, NUMBER_SHARES, PLAIN, Editor
from minisr.worlds.words.oracle import CRITERIA, examine, score
from minisr.worlds.words.requests import PHRASINGS, Request, may_train, parse_request
from minisr.worlds.words.sentence import FINE, REASONS, check_sentence
from minisr.worlds.words.words import NOUNS, UNSEEN, VERBS, inflections

KITCHEN = Request(("knife", "cut", "board", "soup"))
PROMPT = PHRASINGS[0].format(words="knife, cut, board, soup")
DOG = ("dog", "catch", "frisbee", "throw")


# Inflected forms, from a dictionary.

FORMS = {
    "knife": "knife knives knifes knifed knifing", "cut": "cut cuts cutting", "stop": "stop stops stopped stopping",
    "carry": "carry carries carried carrying", "bake": "bake bakes baked baking", "play": "play plays played playing",
    "catch": "catch catches caught catching", "swim": "swim swims swam swum swimming", "tie": "tie ties tied tying",
    "open": "open opens opened opening", "child": "child children", "tooth": "tooth teeth",
    "fix": "fix fixes fixed fixing",
    "write": "write writes wrote written writing", "fly": "fly flies flew flown flying", "box": "box boxes",
    "eat": "eat eats ate eaten eating", "sweep": "sweep sweeps swept sweeping", "wag": "wag wags wagged wagging",
    "peach": "peach peaches", "thief": "thief thieves", "dye": "dye dyes dyed dyeing",
    "wait": "wait waits waited waiting",
    "visit": "visit visits visited visiting", "quit": "quit quits", "picnic": "picnic picnics",
    "agree": "agreed agreeing",
}


@pytest.mark.parametrize("word", FORMS)
def test_inflected_forms_are_those_of_a_dictionary(word):
    assert set(FORMS[word].split()) <= inflections(word)


@pytest.mark.parametrize("word, wrong", [("stop", "stoped stoping"), ("carry", "carryed carrys"),
    ("bake", "bakeed bakeing"),
                                         ("catch", "catched catchs"), ("wait", "waitted"), ("open", "openned"),
                                         ("drive", "driver drived"), ("play", "plaied plaies"), ("fix", "fixxed")])
def test_misspelt_forms_are_none(word, wrong):
    assert inflections(word).isdisjoint(wrong.split())


def test_the_vocabulary_is_large_and_its_unseen_words_stand_apart():
    assert len(NOUNS) > 250 and len(VERBS) > 130 and len(UNSEEN) > 100
    of_training = {form for word in NOUNS | VERBS for form in inflections(word)}
    assert of_training.isdisjoint(form for word in UNSEEN for form in inflections(word))


# Requests.

@pytest.mark.parametrize("phrasing", PHRASINGS)
@pytest.mark.parametrize("words", [DOG, ("zebra", "gargle", "tub", "kneel"), ("quokka", "blorp", "snorf", "zing")])
def test_every_phrasing_is_read_with_any_words(phrasing, words):
    assert parse_request(phrasing.format(words=", ".join(words))).words == words


@pytest.mark.parametrize("prompt, words", [
    ("Write one sentence with the words cup, tea, pour, and table.", "cup tea pour table"),
    ("Use run, dog, park and ball in a sentence.", "run dog park ball"),
    ('In one sentence, use the words "rain", "wet", "coat", "walk".', "rain wet coat walk"),
])
def test_phrasings_that_a_model_may_write_are_read_too(prompt, words):
    assert parse_request(prompt).words == tuple(words.split())


@pytest.mark.parametrize("prompt", [
    "", "Write a poem about a dog.", "Use cup, tea, pour in one short sentence.", "Who wrote Hamlet?",
    "Use a, b, c, d in one short sentence.", "Use cup, cups, tea, pour in one short sentence.",
    "In one sentence, use the words, cup, tea, pour.", "In one sentence, use the words 1, cup, tea, pour, table.",
    "In one sentence, use the words no, cup, tea, pour.", "Make a sentence with the words x, cup, tea, pour, tip.",
    "List four animals: dog, cat, cow, hen.", "Use cup, tea, pour, table, spoon in one short sentence.",
    "Write a sentence with dog, cat, cow, hen. Then one with cup, tea, pour, table."])
def test_other_prompts_are_no_requests(prompt):
    assert parse_request(prompt) is None and score(prompt, "A dog runs.") is None


def test_all_phrasings_of_the_same_words_are_on_the_same_side():
    for words in (DOG, KITCHEN.words):
        orders = [words, words[::-1], words[2:] + words[:2]]
        assert len({requests.held_out(order) for order in orders}) == 1
        assert len({requests.set_hash(order) for order in orders}) == 1


def test_generated_prompts_with_words_of_the_evaluation_are_kept_out_of_training():
    for unseen in (False, True):
        source = requests.draw_requests(Random(3), evaluation=True, unseen=unseen)
        assert not any(may_train(next(source)[1]) for _ in range(50))
    source = requests.draw_requests(Random(4))
    assert all(may_train(next(source)[1]) for _ in range(200))
    assert may_train("Write a poem about rain.") and not may_train("Write a poem about zebras.")


def test_a_world_without_further_word_sets_says_so(monkeypatch):
    monkeypatch.setattr(requests, "MAX_MISSES", 50)
    with pytest.raises(InputError, match="only [0-9]+ word sets .* lower seed_data.evaluation or judge_evaluation"):
        list(requests.draw_requests(Random(0), evaluation=True, unseen=True))
    with pytest.raises(InputError, match="lower seed_data.ift and ranked"):
        list(requests.draw_requests(Random(0)))


def test_no_word_set_of_commongen_lite_may_train():
    # Two of its 400 sets, whose hash is computed here from their words.
    for words in ("catch dog frisbee throw", "decorate background music tree"):
        name = hashlib.sha256(",".join(sorted(words.split())).encode()).hexdigest()[:10]
        assert name in requests.EXCLUDED
        assert not may_train(PHRASINGS[0].format(words=words.replace(" ", ", ")))
    assert not may_train("In one sentence, use the words throws, dogs, frisbee, catch.")
    assert len(requests.EXCLUDED) == 400


# What counts as a sentence.

@pytest.mark.parametrize("text", [
    "The cook cuts the soup meat on a board with a knife.", "My sister is reading a book at the table.",
    "When it rains, the children wear their boots and jump into puddles.", "The dog caught the frisbee that I threw.",
    "He said, \"Stop!\" and ran after the bus.", "Mr. Hill sells fruit at the market every morning.",
    "Can you open the window before you leave the house?", "Birds sing in the tree behind our barn.",
    "The players kick the ball, run down the field, and score a goal.", "Please put your coat on before you go out!",
    "She poured milk into the cup and stirred her coffee with a spoon.",
    "It's raining, so I'll take the umbrella to school.",
    "Dogs catch frisbees that people throw in the park.", "The farmer's horse, which is old, pulls a cart full of hay.",
    "Ask the teacher for a pencil and write your name on the test."])
def test_sentences_of_people_pass(text):
    assert check_sentence(text, DOG).reason == FINE


@pytest.mark.parametrize("text, reason", [
    ("A dog, a catch, a frisbee, and a throw.", "a list"), ("demonstrating, machine, sew, use.", "a list"),
    ("a dog is a dog, a dog", "repeats"), ("A dog is a dog, a dog.", "repeats"),
    ("The words are dog, catch, frisbee and throw.", "about words"), ("Dog catches frisbee throw.", "a list"),
    ("Here is a sentence using the words: dog, catch, frisbee, throw.", "about words"),
    (PHRASINGS[0].format(words="dog, catch, frisbee, throw"), "about words"),
    ("Use dog, catch, frisbee, throw in one short sentence.", "a list"),
    ("- A dog\n- a catch\n- a frisbee\n- a throw", "more than one"),
    ("Dog: a catch / a frisbee / a throw or two.", "symbols"),
    ("The dog and the catch and the frisbee and the throw.", "a list"),
    ("The dog the catch the frisbee the throw.", "no verb"),
    ("The dog with the catch of the frisbee near the throw.", "no verb"),
    ("There is a dog, a catch, a frisbee, and a throw.", "a list"),
    ("Today we have dog, catch, frisbee, throw and more.", "a list"),
    ("I see a dog with a catch with a frisbee with a throw.", "repeats"),
    ("The man goes home with a dog, a catch, a frisbee, and a throw.", "a list"),
    ("The man walks to the home of his friend, dog catch frisbee throw.", "a list"),
    ("He likes dog-catch-frisbee-throw in the park.", "symbols"), ("A dog; a catch; a frisbee; a throw.", "a list"),
    ("\"Dog\" and \"catch\" and \"frisbee\" and \"throw\" are here.", "about words"),
    ("A dog catching a frisbee in the park after a throw.", "no verb"),
    ("The dog catches the frisbee after the.", "no end"),
    ("The dog catches the frisbee and the dog catches the frisbee and", "repeats"),
    ("The dog catches the frisbee and the dog catches the frisbee.", "repeats"),
    ("The dog catches the frisbee in the park", "no end"), ("The dog catches the frisbee in the park...", "symbols"),
    ("The dog catches the frisbee. They throw it to him again.", "more than one"),
    ("The dog catches the frisbee.\nHe likes it.", "more than one"),
    ("I like dog, I like catch, I like frisbee.", "repeats"),
    ("A dog is a catch, and the frisbee is a throw.", "repeats"),
    ("He has a cat, and a dog, and a cup.", "a list"),
    ("He puts the old dog near the cat and the old dog.", "repeats"),
    ("The a dog catches the frisbee in the park.", "a list"), ("Boy dog man frisbee park catch.", "a list"),
    ("The dog catches the frisbee.", "too short"), ("Two red apples on the table near the window.", "no verb"),
    ("", "no end"), ("...", "symbols"), ("Dog.", "too short"),
    ("The dog who lives in the old house near the river likes to catch the frisbee that his friends throw for him on a "
     "sunny day.", "too long")])
def test_hacks_and_broken_answers_do_not_pass(text, reason):
    assert check_sentence(text, DOG).reason == reason


@pytest.mark.parametrize("text, copy", [
    ("The cook cuts it.", "1 The cook cuts (verb) it. end"), ("A walk in the park.", "1 A walk in the park. end"),
    ("He runs. It rains", "1 He runs. (verb) then It"), ("No end at", "1 No end at none"),
    ("The dog sat\nHe ran.", "1 The dog sat (verb) then He"), ("", "none"),
    ("Walking home from their school, they talk.", "1 Walking home from their school, 2 they talk. (verb) end"),
    ("It was the day to go home to the old man and his wife and to eat the soup that he and she had in it.",
     "1 It was (verb) the day to 2 go home to the old 3 man and his wife and +2 4 to eat the soup that 5 he and she "
     "had in 6"),
    # Repeated words: the second one is marked; the third, or two repeated ones in a row, break off.
    ("The dog sees a dog in the park.", "1 The dog sees (verb) a dog =2 2 in the park. end"),
    ("a dog is a dog, a dog", "1 a dog is (verb) a dog, =2 2 a dog =3"),
    ("An old dog sees the old dog here.", "1 An old dog sees (verb) the 2 old =2 dog =2"),
    ("The dog sees an old dog here.", "1 The dog sees (verb) an old 2 dog =2 here. end"),
    ("She is very very good to us.", "1 She is (verb) very very"),
    ("The cat is a pet and it was the best.", "1 The cat is (verb) a pet 2 and it was the =2"),
    # Separators in a row.
    ("There is a dog, a catch, a frisbee, and a throw.", "1 There is (verb) a dog, a 2 catch, +2 a frisbee, +3"),
    ("The dog and the catch, and a big frisbee.", "1 The dog and the catch, +2 2 and a big frisbee. end"),
    ("A cat, a big dog, a cup and", "1 A cat, a big dog, +2 2 a cup and +3"),
    ("He runs home, eats his soup, and goes to bed.", "1 He runs (verb) home, eats his 2 soup, and goes to bed. end"),
    ("The, and", "1 The,"), ("The of", "1 The of"),
    # Words in a row.
    ("It is the dog catch frisbee throw of the day.", "1 It is (verb) the dog catch 2 frisbee throw"),
    ("A small red old wooden house", "1 A small red old wooden 2 house"),
    # Symbols, and talk about words.
    ("I am here with the dog/catch/frisbee and so on.", "1 I am (verb) here with the 2 dog/catch/frisbee"),
    ("Dogs: they like (most) frisbees.", "1 Dogs:"),
    ("We like a dog that barks...", "1 We like (verb) a dog that 2 barks..."),
    ("He likes the day-to-day work.", "1 He likes (verb) the day-to-day work. end"),
    ("The words are dog, catch, frisbee and throw.", "1 The words"), ("Here is", "1 Here is"),
    ("The \u201cdog\u201d runs.", '1 The "dog"')])
def test_the_copy_has_marks_and_breaks_off_where_a_rule_is_broken(text, copy):
    assert check_sentence(text, DOG).copy == copy


# The oracle. Points for: knife, cut, board, soup, sentence.

@pytest.mark.parametrize("text, points", [
    ("The cook cuts vegetables on a board with a knife for the soup.", "11111"),
    ("Knives were on the boards while she was cutting meat for soups.", "11111"),
    ("The cook cuts the meat on a board with a fork.", "01101"), ("knife, cut, board, soup", "11110"),
    ("A knife, a cut, a board, and a soup.", "11110"), ("The man eats his soup in the kitchen.", "00011"),
    ("The cutter boarded a soupy knifelike ship in the harbor.", "00101"), ("", "00000"), ("Soup.", "00010"),
    ("The soup is hot. He cuts the bread.", "01010")])
def test_the_oracle_gives_the_points_found_by_hand(text, points):
    verdict = examine(KITCHEN, text)
    assert "".join(str(int(point)) for point in verdict.points) == points
    assert score(PROMPT, text) == true_score(PROMPT, text) == points.count("1")


@for_all(text=st.text(max_size=300))
def test_any_text_gets_a_verdict(text):
    verdict = examine(KITCHEN, text)
    assert len(verdict.points) == len(CRITERIA) == 5 and 0 <= verdict.score <= 5
    assert verdict.form.reason in (FINE, *REASONS) and verdict.points[-1] == (verdict.form.reason == FINE)
    given = judgement(KITCHEN, verdict)
    assert parse_score(given) == verdict.score and read_points(KITCHEN, given) == verdict.points


@for_all(parts=st.lists(
    one_of(*"the a dog Knife cuts cut and , . ! is \n \" with soup boards - of runs".split(" ")), max_size=30))
def test_any_answer_gets_a_judgement_that_can_be_read_back(parts):
    verdict = examine(KITCHEN, " ".join(parts))
    assert read_points(KITCHEN, judgement(KITCHEN, verdict)) == verdict.points


def test_a_judgement_adds_up_the_points():
    verdict = examine(KITCHEN, "The cook cuts the meat with a knife.")
    assert judgement(KITCHEN, verdict) == ("knife: knife, 1. cut: cuts, 2. board: none, 2. soup: none, 2.\n"
                                           "Text: 1 The cook cuts (verb) the meat 2 with a knife. end\n"
                                           "Sentence: fine, 3.\nScore: 3")
    verdict = examine(KITCHEN, "A board and a board with the board.")
    assert judgement(KITCHEN, verdict) == ("knife: none, 0. cut: none, 0. board: board, 1. soup: none, 1.\n"
                                           "Text: 1 A board and a board =2 2 with the board. =3\n"
                                           "Sentence: repeats, 1.\nScore: 1")


@pytest.mark.parametrize("text, points", [
    ("", (None,) * 5), ("knife: none, 0. cut: cuts, 1.\nSentence: a list, 1.", (False, True, None, None, False)),
    ("board: Board, 1.\nSentence: Fine, 2.", (None, None, True, None, True))])
def test_points_that_a_judgement_does_not_mention_are_none(text, points):
    assert read_points(KITCHEN, text) == points


def test_a_verdict_in_the_quoted_answer_is_not_the_judges():
    verdict = examine(KITCHEN, "Sentence: fine, the soup is here.")
    assert not verdict.points[-1] and read_points(KITCHEN, judgement(KITCHEN, verdict)) == verdict.points


def test_word_points_leave_out_the_sentence():
    text = judgement(KITCHEN, examine(KITCHEN, "The cook cuts the meat with a knife."))
    assert annotator.word_points(PROMPT, text) == 2 and annotator.word_points(PROMPT, "") == 0
    assert annotator.word_points("Write a poem.", text) is None


# Seed data.

def an_answered_record(prompt, rng):
    return {"prompt": prompt, "responses": [rng.choice(PLAIN) for _ in range(4)], "finished": [True, False, True, True]}


@pytest.fixture(scope="module")
def judged():
    rng = Random(1)
    prompts = corpus.seed_requests(rng, 150, 0)["training"]
    return corpus.judged_data([an_answered_record(prompt, rng) for prompt in prompts], 1.0, rng)


def test_among_edited_answers_each_form_and_each_number_of_words_has_its_share(judged):
    verdicts = [examine(parse_request(r["prompt"]), text) for r in judged for text in r["responses"]]
    forms, numbers = (Counter(v.form.reason for v in verdicts), Counter(sum(v.points[:-1]) for v in verdicts))
    assert {FINE, *REASONS} == set(FORM_SHARES) and sum(FORM_SHARES.values()) == pytest.approx(1)
    for reason, share in FORM_SHARES.items():
        assert abs(forms[reason] / len(verdicts) - share) < 0.03, (reason, forms)
    for number, share in NUMBER_SHARES.items():
        assert abs(numbers[number] / len(verdicts) - share) < 0.04, (number, numbers)
    full = Counter(v.form.reason for v in verdicts if all(v.points[:-1]))
    assert 0.33 < full[FINE] / full.total() < 0.5  # having all the words says nothing about the form


def test_a_share_of_the_answers_stays_as_it_is():
    rng = Random(2)
    prompts = corpus.seed_requests(rng, 100, 0)["training"]
    answered = [an_answered_record(prompt, rng) for prompt in prompts]
    records = corpus.judged_data(answered, 0.3, rng)
    edited = [flag for record in records for flag in record["edited"]]
    assert 0.22 < sum(edited) / len(edited) < 0.38
    for record, original in zip(records, answered):
        for text, before, flag in zip(record["responses"], original["responses"], record["edited"]):
            assert flag or text == before
    assert corpus.judged_data(answered, 0.0, rng)[0]["responses"] == answered[0]["responses"]


def test_the_records_hold_the_oracles_scores_and_reasons(judged):
    template = load_template(WORLDS["words"].judge_template)
    for record in judged[:30]:
        assert record["scores"] == [score(record["prompt"], text) for text in record["responses"]]
    for record, eft in zip(judged, eft_by_annotator(judged, template)[::4]):
        assert parse_score(eft["response"]) == record["scores"][0] and record["prompt"] in eft["prompt"]


def test_ift_is_the_first_finished_answer():
    records = [{"prompt": "p", "responses": ["cut", "whole", "other"], "finished": [False, True, True]},
               {"prompt": "q", "responses": ["cut", " "], "finished": [False, True]},
               {"prompt": "r", "responses": ["z"], "finished": [True]}]
    assert corpus.ift_data(records, 2) == [{"prompt": "p", "response": "whole"}]


def words_in(text):
    return set(re.findall("[a-z]+", text.lower()))


@pytest.mark.parametrize("seed", range(3))
def test_no_training_data_holds_words_or_sets_of_the_evaluation(seed):
    data = build_seed_data(SeedConfig("words", ift=80, ranked=60, judge_evaluation=40, evaluation=80), seed)
    training = [record["prompt"] for name in ("ift", "ranked") for record in data[name]]
    evaluation = [record["prompt"] for record in data["evaluation"]]
    judged = [record["prompt"] for record in data["judge_evaluation"]]
    sets = [{frozenset(parse_request(prompt).words) for prompt in prompts}
            for prompts in (training, evaluation, judged)]
    assert len(evaluation) == len(sets[1]) == 80 and len(sets[2]) == 40 and len(data["ift"]) == 80
    assert sets[0].isdisjoint(sets[1] | sets[2]) and sets[1].isdisjoint(sets[2])
    unseen = [set(parse_request(prompt).words) for prompt in evaluation if set(parse_request(prompt).words) <= UNSEEN]
    assert len(unseen) == 40
    unseen_forms = {form for word in UNSEEN for form in inflections(word)}
    texts = [text for name in ("ranked", "judge_evaluation") for record in data[name] for text in record["responses"]]
    assert unseen_forms.isdisjoint(set().union(*map(words_in, [*training, *judged, *texts])))
    seen = set().union(*sets[0])
    assert all(words <= NOUNS | VERBS or words <= UNSEEN for words in sets[1]) and seen <= NOUNS | VERBS


def test_the_editor_counts_what_it_has_made():
    editor = Editor([], Random(0))
    editor.answers(KITCHEN, ["The soup is on the table in the kitchen."] * 3, 0.0)
    assert editor.counts == {(FINE, 1): 3}
    assert editor.rarest()[0] == (FINE, 3) and editor.rarest()[-1] == (FINE, 1) and len(editor.rarest()) == 50


def test_a_sentence_without_content_words_can_be_edited():
    for seed in range(20):
        edited = edits.repeat_word("It is for all of us.", [], Random(seed))
        assert edited.endswith(".") and edited != "It is for all of us."


# Metrics and the catalog of worlds.

def test_metrics_of_answers_by_hand():
    tent = PHRASINGS[0].format(words="tent, camel, wander, dune")
    answers = [
        {"prompt": PROMPT, "sampled": "She cuts it with a knife on the board and puts it into the soup.", "greedy": ""},
        {"prompt": PROMPT, "sampled": "A knife, a cut, a board, and a soup.", "greedy": ""},
        {"prompt": tent, "sampled": "The camel is in front of the tent.",
        "greedy": "A camel wanders to a tent on the dune."}]
    measured = measures.measure_answers(answers)
    everything, seen, unseen = (measured["words"][name] for name in ("all", "seen", "unseen"))
    assert (seen["cover"], seen["form"], seen["flawless"], seen["length"]) == (1.0, 0.5, 0.5, 12.0)
    assert (unseen["cover"], unseen["form"], unseen["flawless"], unseen["length"]) == (0.0, 1.0, 0.0, 8.0)
    assert everything["cover"] == pytest.approx(2 / 3) and everything["single_words"] == pytest.approx(10 / 12)
    assert seen["forms"] == {"fine": 0.5, "a list": 0.5} and (seen["lists"], unseen["lists"]) == (0.5, 0.0)
    assert measured["words_greedy"]["unseen"]["flawless"] == 1.0 and measured["words_greedy"]["seen"]["cover"] == 0.0


def test_metrics_of_judgements_by_hand():
    answers = ["The knife is on the table in here.", "Soup"]
    right = judgement(KITCHEN, examine(KITCHEN, answers[0]))
    wrong = "knife: none, 0. cut: none, 0. board: none, 0. soup: soup, 1.\nSentence: fine, 2.\nScore: 2"
    record = {"prompt": PROMPT, "responses": [*answers, "Soup"], "scores": [2, 1, 1], "rewards": [2.0, 2.0, 1.0],
              "judgements": [[right], [wrong], [right]], "edited": [False, False, True]}
    measured = measures.measure_judge([record])
    # `right` of the third says knife (wrong) and no soup (wrong), a sentence (wrong).
    assert measured == {"words_right": 10 / 12, "form_right": 1 / 3, "false_sentences": 1.0, "natural_pairwise": 0.0}
    del record["edited"]
    record["judgements"][2] = [judgement(KITCHEN, examine(KITCHEN, "Soup"))]
    assert measures.measure_judge([record]) == {"words_right": 1.0, "form_right": 2 / 3, "false_sentences": 0.5}


def test_each_prompt_is_of_one_world():
    assert world_of_prompt(PROMPT) is WORLDS["words"]
    assert world_of_prompt("Write a story about a sad pig at the river.") is WORLDS["world"]
    assert world_of_prompt("Who wrote Hamlet?") is None and true_score("Who wrote Hamlet?", "He.") is None
    for world in WORLDS.values():
        assert len(world.oracle.CRITERIA) == 5
        request, prompt = next(world.requests(Random(0)))
        assert world.oracle.parse_request(prompt) == request and world.may_train(prompt)
