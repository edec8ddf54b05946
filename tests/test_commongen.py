"""benchmarks/commongen.py, on a file of sets of the test's own making."""

import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from minisr import InputError
from minisr.interop import hf
from minisr.lm import LM
from minisr.runner.checkpoint import save_model

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SETS = [{"concepts": ["dog_N", "catch_V", "ball_N"],
         "outputs": {"good": "The dogs caught a ball in the old garden.", "hack": "Dog, catch, ball.", "loop": None}},
        {"concept_set": ["saw_N", "cut_V", "board_N", "hand_N"],  # the field's name in CommonGen-lite
         "outputs": {"good": "He cut the board with a saw in his hand.", "hack": "A saw, a cut, a board, and a hand.",
                     "loop": "a hand of a hand of a hand of"}}]


@pytest.fixture
def commongen(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("commongen")


@pytest.fixture
def sentences(commongen):
    return importlib.import_module("sentences")


@pytest.fixture(scope="session")
def lemmatizer():
    pytest.importorskip("HanTa")
    pytest.importorskip("lemminflect")
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("sentences").Lemmatizer()
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def sets_file(tmp_path):
    path = tmp_path / "sets.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in SETS))
    return path


@pytest.fixture
def model_folder(tmp_path, decoder, tokenizer):
    save_model(tmp_path / "M2", decoder, tokenizer, {"made_by": "test"})
    return tmp_path / "M2"


@pytest.fixture
def run(commongen, monkeypatch, capsys):
    """run(arguments) is the JSON document of the script."""
    def run_with(*arguments):
        monkeypatch.setattr(sys, "argv", ["commongen.py", *map(str, arguments), "--threads", "1"])
        commongen.main()
        lines = capsys.readouterr().out.splitlines()
        document = json.loads(lines[-1])
        assert [line.split()[0] for line in lines[1:-1]] == [result["model"] for result in document["results"]]
        return document

    monkeypatch.setattr(commongen, "machine", lambda *arguments: {})  # no time for it
    return run_with


# Words and parts of speech.


@pytest.mark.parametrize("text, expected, unexpected", [
    ("The dog catches a frisbee.", {("dog", "NOUN"), ("catch", "VERB"), ("frisbee", "NOUN")}, {("catch", "NOUN")}),
    ("A good catch!", {("catch", "NOUN")}, {("catch", "VERB")}),
    ("He caught it.", {("catch", "VERB")}, {("caught", "VERB")}),
    ("He saw his children.", {("see", "VERB"), ("child", "NOUN")}, {("saw", "NOUN"), ("children", "NOUN")}),
    ("They cut it with a saw.", {("cut", "VERB"), ("saw", "NOUN")}, {("see", "VERB"), ("cut", "NOUN")}),
    ("She chased the running dog.", {("run", "VERB"), ("chase", "VERB")}, set()),
    ("He wears sunglasses.", {("sunglass", "NOUN"), ("wear", "VERB")}, set()),
    ("A skateboarder plays the harmonica.", {("harmonica", "NOUN")}, {("skateboard", "NOUN")})])
def test_readings_are_lemmas_with_their_part_of_speech(lemmatizer, text, expected, unexpected):
    readings = lemmatizer.readings(text)
    assert expected <= readings and not unexpected & readings


@pytest.mark.parametrize("text", ["", "'", "🙂 漢字", "½ 1,000 -- ?", "\ud800 x", "dog " * 300])
def test_every_text_has_readings(lemmatizer, text):
    assert isinstance(lemmatizer.readings(text), set)


def test_an_endless_word_is_cut(lemmatizer):
    readings = lemmatizer.readings("abcdefghij" * 150)  # the tagger would take ten seconds for all of it
    assert readings and all(len(lemma) <= 40 for lemma, _ in readings)


# Lists, repetitions, ends.


@pytest.mark.parametrize("text, is_list", [
    ("A dog, a ball, and a throw.", True), ("demonstrating, machine, sew, use.", True), ("dog\ncatch\nball", True),
    ("1. The dog catches a ball.", True), ("- The dog catches a ball.", True), ("Dog and catch and a ball", True),
    ("He took bread, cheese, and plums.", False), ("The dog ran, and the cat slept.", False), ("", False),
    ("A dog, a ball, the throw of it.", False), ("The old dog, the ball, and a frisbee.", True),
    ("When it rains, we stay in, and read.", False), ("2 dogs catch a ball.", False), ("Dog, cat.", False)])
def test_lists(sentences, text, is_list):
    assert sentences.is_list(text) == is_list


@pytest.mark.parametrize("text, repeats", [
    ("A dog is a dog, a dog.", True), ("The man saw the man and the man.", True), ("go home now, Go home now!", True),
    ("The dog saw the cat and the bird.", False), ("It is the dog that saw the dog.", False), ("", False)])
def test_repetitions(sentences, text, repeats):
    assert sentences.repeats(text) == repeats


@pytest.mark.parametrize("text, ends", [
    ("It rains.", True), ('He said: "It rains."', True), ("Does it rain?  \n", True), ("It rains", False),
    ("It rains,", False), ("", False), ("It. Rains", False)])
def test_ends(sentences, text, ends):
    assert sentences.ends(text) == ends


# Prompts.


def test_the_examples_in_the_prompt_use_their_words(commongen, lemmatizer):
    blocks = commongen.PROMPT_WITH_EXAMPLES.split("\n\n")[1:-1]
    assert len(blocks) == 2
    for block in blocks:
        asked, sentence = (line.partition(": ")[2] for line in block.split("\n"))
        concepts = {(word, category.strip("()").upper()) for word, category in map(str.split, asked.split(", "))}
        assert len(concepts) == 4 and concepts <= lemmatizer.readings(sentence)
        assert commongen.is_sentence(commongen.Answer(sentence), [commongen.Concept(*c) for c in concepts])


def test_a_prompt_holds_the_words(commongen):
    concepts = [commongen.Concept("dog", "NOUN"), commongen.Concept("catch", "VERB")]
    assert commongen.make_prompt(concepts, examples=False).endswith(" dog, catch.")
    assert commongen.make_prompt(concepts, examples=True).endswith("Words: dog (noun), catch (verb)\nSentence:")


# Measures.


def test_measures_are_those_by_hand(run, sets_file, lemmatizer):
    document = run("--sets", sets_file, "--score-only", "good", "hack", "loop")
    good, hack, loop = document["results"]
    assert {k: good[k] for k in ("sets", "cover", "both", "form", "single", "pos", "list", "repeats", "ends")} == {
        "sets": 2, "cover": 1, "both": 1, "form": 1, "single": 1, "pos": 1, "list": 0, "repeats": 0, "ends": 1}
    assert good["words"] == (9 + 10) / 2 and good["cover_ci95"] == [1, 1]
    # All words and no sentence.
    assert (hack["cover"], hack["form"], hack["both"], hack["list"], hack["ends"]) == (1, 0, 0, 1, 1)
    assert hack["pos"] < 1  # "a cut" is no verb
    # One of the seven words; the other answer is empty.
    assert (loop["cover"], loop["both"], loop["repeats"], loop["ends"]) == (0, 0, 0.5, 0)
    assert loop["single"] == pytest.approx(1 / 7) and loop["words"] == 9 / 2
    assert good["ppl"] is None and document["examples"] is False


def test_an_answer_that_is_cut_off_does_not_end(commongen, lemmatizer):
    sets = [commongen.WordSet([commongen.Concept("dog", "NOUN")], {})]
    text = "The dog sleeps in the warm garden."
    whole, cut = (commongen.measure(sets, [commongen.Answer(text, finished)], lemmatizer) for finished in (True, False))
    assert (whole["ends"], whole["form"], whole["both"]) == (1, 1, 1)
    assert (cut["ends"], cut["form"], cut["both"]) == (0, 0, 0) and cut["cover"] == 1


def test_perplexity_is_that_by_hand(commongen, decoder, tokenizer):
    lm = LM(decoder, tokenizer)
    prompts = [f"Write a story {'again ' * n}." for n in range(10)]  # more than a batch
    answers = [commongen.Answer("") if n == 3 else commongen.Answer("Once there was a fox. " * (1 + n % 3))
               for n in range(10)]
    losses, own = [], []
    for prompt, answer in zip(prompts, answers):
        start, ids = tokenizer.encode_prompt(prompt), tokenizer.encode_response(answer.text)[:-1]
        p = torch.softmax(decoder(torch.tensor([start + ids]))[0].detach().double(), dim=-1)  # (T, V)
        found = [-math.log(p[len(start) + i - 1, token]) for i, token in enumerate(ids)]
        losses += found
        own += [math.exp(sum(found) / len(found))] if found else []
    measured = commongen.perplexity(lm, prompts, answers)
    assert len(own) == 9
    assert measured["ppl"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert measured["median"] == pytest.approx(sorted(own)[4], rel=1e-4)


def test_perplexity_of_a_model_that_guesses_is_its_vocabulary(commongen, random_decoder, tokenizer):
    model = random_decoder(vocab_size=len(tokenizer))
    model.head.weight.data.zero_()
    lm, empty = LM(model, tokenizer), commongen.Answer("")
    measured = commongen.perplexity(lm, ["Hello", "Hello"], [commongen.Answer("a fox"), empty])
    assert measured["ppl"] == measured["median"] == pytest.approx(len(tokenizer))
    assert commongen.perplexity(lm, ["Hello"], [empty]) == {"ppl": None, "median": None}


# Models.


def test_answers_of_a_model_are_greedy_and_stored(run, commongen, sets_file, model_folder, tmp_path, decoder, tokenizer,
                                                  lemmatizer, monkeypatch):
    out = tmp_path / "answers"
    arguments = (model_folder, "--sets", sets_file, "--out", out, "--max-new-tokens", "8", "--perplexity-under",
                 model_folder, "--score-only", "good")
    document = run(*arguments)
    assert [result["model"] for result in document["results"]] == ["good", str(model_folder)]
    assert all(result["ppl"] > 1 for result in document["results"])
    (stored,) = out.iterdir()
    records = [json.loads(line) for line in stored.read_text().splitlines()]
    assert [record["prompt"] for record in records] == [
        "Write one short sentence of daily life that uses all of these words: dog, catch, ball.",
        "Write one short sentence of daily life that uses all of these words: saw, cut, board, hand."]
    for record in records:  # greedy, one token after the other, without a cache
        ids = tokenizer.encode_prompt(record["prompt"])
        start = len(ids)
        while len(ids) < start + 8 and ids[-1] not in tokenizer.stop_ids:
            ids.append(int(decoder(torch.tensor([ids]))[0, -1].argmax()))
        assert record["response"] == tokenizer.decode_response(ids[start:])

    # A rerun only scores: it reads what is stored, and never loads the model.
    records[0]["response"], records[0]["finished"] = "The dogs caught a ball in the old garden.", True
    stored.write_text("".join(json.dumps(record) + "\n" for record in records))
    monkeypatch.setattr(commongen, "load_source", lambda *arguments: pytest.fail("loaded a model"))
    again = run(model_folder, "--sets", sets_file, "--out", out, "--max-new-tokens", "8")
    assert again["results"][0]["both"] == 0.5
    with pytest.raises(pytest.fail.Exception):  # answers of another length are others
        run(model_folder, "--sets", sets_file, "--out", out, "--max-new-tokens", "9")


def test_stored_answers_belong_to_the_weights(commongen, model_folder, tmp_path, random_decoder, tokenizer):
    save_model(tmp_path / "again" / "M2", random_decoder(seed=1, vocab_size=len(tokenizer)), tokenizer, {})
    names = {commongen.answers_name(str(folder), dtype) for folder in (model_folder, tmp_path / "again" / "M2")
             for dtype in (torch.float32, torch.bfloat16)}
    assert len(names) == 4
    save_model(model_folder, random_decoder(seed=1, vocab_size=len(tokenizer)), tokenizer, {})  # trained again
    assert commongen.answers_name(str(model_folder), torch.float32) not in names


def test_a_hugging_face_folder_answers_alike(commongen, model_folder, tmp_path, decoder, tokenizer, monkeypatch):
    pytest.importorskip("transformers")
    hf.export(decoder, tokenizer, tmp_path / "hf")
    monkeypatch.setattr(sys, "argv", ["commongen.py", "x", "--sets", "x", "--max-new-tokens", "8"])
    options = commongen.parse_options()
    prompts = ["Write a story.", "News?", "Write a story."]
    ours, theirs = (commongen.answers_of(str(folder), prompts, options) for folder in (model_folder, tmp_path / "hf"))
    assert ours == theirs and ours[0] == ours[2] and len(ours) == 3


def test_weights_have_the_dtype(commongen, model_folder):
    for dtype in (torch.float32, torch.bfloat16):
        assert {p.dtype for p in commongen.load_lm(str(model_folder), "cpu", dtype).model.parameters()} == {dtype}


def test_limit_examples_and_dtype(run, sets_file, model_folder, tmp_path, random_decoder, tokenizer, lemmatizer):
    save_model(tmp_path / "long", random_decoder(vocab_size=len(tokenizer), max_seq_len=1024), tokenizer, {})
    document = run(tmp_path / "long", "--sets", sets_file, "--limit", "1", "--examples", "--dtype", "bfloat16", "--out",
                   tmp_path / "out", "--max-new-tokens", "4")
    assert document["examples"] and document["results"][0]["sets"] == 1
    (stored,) = (tmp_path / "out").glob("*-bfloat16.jsonl")
    (record,) = map(json.loads, stored.read_text().splitlines())
    assert record["prompt"].startswith("Write one short and simple sentence") and "dog (noun)" in record["prompt"]


# Wrong input.


GOOD = json.dumps(SETS[0])


@pytest.mark.parametrize("content, options, message", [
    (None, [], "missing.jsonl"),
    ("", [], "holds no sets"),
    (GOOD + '\n{"concepts": ["dog_N"\n' + GOOD, [], "line 2"),
    (GOOD + '\n{"words": ["dog_N"]}', [], 'line 2: "concepts"'),
    (GOOD + '\n{"concepts": []}', [], 'line 2: "concepts"'),
    (GOOD + '\n{"concepts": ["dog_N", "run"]}', [], "line 2: the concept 'run'"),
    (GOOD + '\n{"concepts": ["dog_N", "red_A"]}', [], "line 2: the concept 'red_A'"),
    (GOOD + '\n{"concepts": ["dog_N", 3]}', [], "line 2: the concept 3"),
    (GOOD + '\n{"concepts": ["dog food_N"]}', [], "line 2: the concept 'dog food_N'"),
    (GOOD + '\n{"concepts": ["dog_N"], "outputs": ["text"]}', [], 'line 2: "outputs"'),
    (GOOD + '\n{"concepts": ["dog_N"], "outputs": {"good": 1}}', [], 'line 2: "outputs"'),
    (GOOD, ["--score-only", "best"], "--score-only best: set 1"),
    (GOOD + '\n{"concepts": ["dog_N"]}', ["--score-only", "good"], "set 2"),
    (GOOD, ["--out", "sets.jsonl"], "sets.jsonl"),
    (GOOD, ["nowhere/M7"], "nowhere/M7"),
    (GOOD, ["sets.jsonl"], "not a GGUF file"),
    (GOOD, ["package:no_such_package"], "no_such_package"),
    (GOOD, ["--perplexity-under", "nowhere/M0"], "nowhere/M0"),
])
def test_wrong_input_is_one_line_and_code_2_before_a_model_is_loaded(
        commongen, monkeypatch, capsys, tmp_path, model_folder, lemmatizer, content, options, message):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("sets.jsonl").write_text(content)
    monkeypatch.setattr(commongen, "load_source", lambda *arguments: pytest.fail("loaded a model"))
    file = "missing.jsonl" if content is None else "sets.jsonl"
    monkeypatch.setattr(sys, "argv", ["commongen.py", "M2", *options, "--sets", file])
    with pytest.raises(SystemExit) as exit:
        commongen.in_one_line(commongen.main)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1 and message in error, error


@pytest.mark.parametrize("options, message", [
    ([], "name a model"), (["M2", "--limit", "0"], "--limit must be at least 1"),
    (["M2", "--max-new-tokens", "0"], "--max-new-tokens must be"), (["M2", "--dtype", "int8"], "int8")])
def test_a_wrong_option_is_code_2(commongen, monkeypatch, capsys, options, message):
    monkeypatch.setattr(sys, "argv", ["commongen.py", *options, "--sets", "sets.jsonl"])
    with pytest.raises(SystemExit) as exit:
        commongen.main()
    assert exit.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("content, message", [
    ('{"prompt": "Write a story.", "resp', "answers .*line 1.* is not valid JSON"),
    ('{"prompt": "Write a story."}', "answers .*line 1.* has no text 'response'")])
def test_a_damaged_file_of_answers_is_named(commongen, monkeypatch, tmp_path, model_folder, content, message):
    monkeypatch.setattr(sys, "argv", ["commongen.py", str(model_folder), "--sets", "x", "--out", str(tmp_path / "out")])
    options = commongen.parse_options()
    path = tmp_path / "out" / commongen.answers_name(str(model_folder), torch.float32)
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        commongen.answers_of(str(model_folder), ["Write a story."], options)


@pytest.mark.parametrize("package", ["HanTa.HanoverTagger", "lemminflect"])
def test_a_missing_package_names_the_extra(sentences, monkeypatch, package):
    for name in ("HanTa.HanoverTagger", "lemminflect"):
        monkeypatch.setitem(sys.modules, name, None if name == package else sys)
    with pytest.raises(InputError, match=rf"{package}: pip install .minisr\[commongen\]"):
        sentences.Lemmatizer()


def test_the_help_explains_the_file(commongen, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["commongen.py", "--help"])
    with pytest.raises(SystemExit):
        commongen.main()
    shown = capsys.readouterr().out
    example = next(line for line in shown.splitlines() if line.strip().startswith('{"concepts"'))
    assert set(json.loads(example)) == {"concepts", "outputs"} and "_N for a noun or _V for a verb" in shown
    assert all(f"\n    {name} " in shown for name in (*commongen.INTERVALS, *commongen.COLUMNS))
