"""What is read, what is left out and why: before anything is made, in the table and in seed/counts.json."""

import json
import re
from collections import Counter
from dataclasses import replace
from random import Random

import drawing
import pytest
from small_run import jsonl, minisr
from tiny import tiny_lm

from minisr import InputError, loop
from minisr.lm import ResponseConfig
from minisr.prompts import PromptConfig, few_shot_prompt
from minisr.runner.config import Config, SeedConfig
from minisr.runner.config import PromptConfig as PromptConfigOfRun
from minisr.runner.data_sets import SHORTEST_JUDGEMENT, Context, reject_too_long
from minisr.runner.files import write_jsonl
from minisr.runner.run import WORLD_TEMPLATE, Run
from minisr.runner.seed_data import eft_by_annotator, eft_record, load_seed_data
from minisr.runner.steps import StoredModel
from minisr.sampler import SamplingConfig
from minisr.sft import encode_examples
from minisr.worlds.tiny import corpus

LONG = "Write a story about a sad pig. " * 40  # more than the 256 tokens of the seed model that ships with minisr
JUDGED = {"prompt": "Name a colour.", "responses": ["Blue.", "No."], "scores": [5, 0], "reasons": ["Good.", "Bad."]}
SETTINGS = {"judge_evaluation": 2, "evaluation": 4}


@pytest.fixture
def folder(tmp_path):
    """A user's data, of which some do not fit and some hold no answer."""
    ift = [{"instruction": f"Say {i}.", "output": "No."} for i in range(8)]
    ift[2]["output"], ift[3]["instruction"], ift[5]["output"], ift[6]["output"] = LONG, LONG, "", None
    judged = [JUDGED | {"prompt": f"{i}?"} for i in range(6)]
    judged[1]["responses"], judged[4]["reasons"] = ["Blue.", LONG], ["Good.", LONG]
    source = tmp_path / "data"
    write_jsonl(source / "ift.jsonl", ift)
    write_jsonl(source / "judged.jsonl", judged)
    write_jsonl(source / "evaluation.jsonl", [{"prompt": "What is new?"}, {"prompt": LONG}, {"prompt": "And then?"}])
    return source


def config_for(source, **settings):
    return Config(threads=1, judge=Config().judge.__class__(template=str(WORLD_TEMPLATE)),
                  seed_data=SeedConfig(source=str(source), **{**SETTINGS, **settings}))


def test_what_does_not_fit_is_left_out_before_anything_is_made(folder, tmp_path):
    run = Run.open(tmp_path / "run", config_for(folder))
    assert sorted(path.name for path in run.folder.iterdir()) == [".lock", "config.toml", "hashes.json", "judge.txt"]
    assert [record["prompt"] for record in run.ift] == ["Say 0.", "Say 1.", "Say 4.", "Say 7."]
    assert [record["prompt"] for record in run.read_seed_file("ranked")] == ["0?", "2?"]
    assert [record["prompt"] for record in run.judge_evaluation] == ["3?", "5?"]
    assert run.evaluation_prompts == ["What is new?", "And then?"]
    assert len(run.eft) == 4
    counts = json.loads((run.folder / "seed/counts.json").read_text())
    too_long = "longer than the model's context of 256 tokens"
    left_out = {name: {reason: of["count"] for reason, of in data["left_out"].items()} for name, data in counts.items()}
    assert left_out == {
        "ift": {"empty answer": 1, "no answer": 1, too_long: 2}, "judged": {too_long: 2}, "evaluation": {too_long: 1}}
    [second, third] = counts["ift"]["left_out"][too_long]["where"]
    assert second.startswith("line 3 (") and third.startswith("line 4 (") and third.endswith(" tokens)")
    assert {name: (data["file"], data["records"], data["used"]) for name, data in counts.items()} == {
        "ift": ("ift.jsonl", 8, 4), "judged": ("judged.jsonl", 6, 4), "evaluation": ("evaluation.jsonl", 3, 2)}


def test_the_table_accounts_for_every_record(folder, tmp_path):
    run = Run.open(tmp_path / "run", config_for(folder, ift=3, ranked=1))
    rows = run.data_table.splitlines()
    assert [row.split("  ")[0] for row in rows[2:]] == ["ift", "", "", "", "judged", "", "evaluation"]
    assert "Alpaca 6" in rows[2] and "empty answer: line 6" in rows[2] and "beyond seed_data.ift = 3: line 8" in rows[5]
    for data in run.load_seed_data()[1].values():
        assert data.total == data.used + sum(map(len, data.left_out.values()))
    assert len(rows[0]) < 120 and rows[1] == "-" * max(map(len, rows))


def test_too_long_records_are_refused_where_the_config_says_so_all_at_once(folder, tmp_path):
    with pytest.raises(InputError) as error:
        Run.open(tmp_path / "run", config_for(folder, too_long="refuse"))
    message = str(error.value)
    assert "records are longer than the model's context of 256 tokens: " in message and "\n" not in message
    for part in ("ift.jsonl: line 3 (", "line 4 (", "judged.jsonl: line 2 (", "line 5 (", "evaluation.jsonl: line 2 ("):
        assert part in message
    assert not (tmp_path / "run").exists()


def test_a_judge_prompt_that_fills_the_context_is_an_error_before_anything_is_made(folder, tmp_path):
    (tmp_path / "judge.txt").write_text(f"{LONG}{{prompt}} {{response}} Score: <total>")
    config = config_for(folder)
    with pytest.raises(InputError, match=r"the judge prompt alone has \d+ tokens, and the model's context is 256"):
        Run.open(tmp_path / "run", Config(threads=1, judge=type(config.judge)(template=str(tmp_path / "judge.txt")),
                                          seed_data=config.seed_data))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("max_new_tokens, message", [
    (255, r"prompts\.max_new_tokens = 255 leaves no room for an example in the model's context of 256 tokens; set"),
    (4096, "prompts.max_new_tokens = 4096 leaves no room"), (40, None)])
def test_a_new_prompt_must_leave_room_for_examples(max_new_tokens, message, folder, tmp_path):
    config = replace(config_for(folder), prompts=PromptConfigOfRun(max_new_tokens=max_new_tokens))
    if message is None:
        Run.open(tmp_path / "run", config)
        return
    with pytest.raises(InputError, match=message) as error:
        Run.open(tmp_path / "run", config)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
    Run.open(tmp_path / "run", replace(config, prompts=replace(config.prompts, source="people"), seed_data=SeedConfig(
        ift=4, ranked=4, judge_evaluation=2, evaluation=2)))  # nobody is shown a list
    Run.open(tmp_path / "run0", replace(config, iterations=0))  # nobody writes a prompt
    limit = int(re.search(r"set it to (\d+) or less", str(error.value))[1])
    _, tokenizer = Run(tmp_path / "run", config).load_seed_model()
    for number in (limit, limit + 1):
        changed = replace(config, prompts=PromptConfigOfRun(max_new_tokens=number))
        assert passes(Context, tokenizer, 256, TEMPLATE, changed) == (number == limit)


def test_a_context_without_room_for_an_example_prompt_is_named():
    lm = tiny_lm(context=64)
    config = Config(prompts=PromptConfigOfRun(max_new_tokens=1))
    room = 64 - Context(lm.tokenizer, 64, TEMPLATE, config).list_length("a")
    Context(lm.tokenizer, 65 - room, TEMPLATE, config)
    with pytest.raises(InputError, match=rf"the model's context of {64 - room} tokens is too small for .* seed_model"):
        Context(lm.tokenizer, 64 - room, TEMPLATE, config)


@pytest.mark.parametrize("changed, message", [
    ("output", r"responses\.max_new_tokens = 64 is too small: 3 of 5 IFT answers are longer, up to \d+ tokens"),
    ("reasons", r"judge\.max_new_tokens = 40 is too small: \d+ of \d+ judgements of EFT data are longer"),
    (None, None)])
def test_what_the_model_learns_to_write_must_not_be_cut_off(changed, message, folder, tmp_path):
    text = "Write a story about a sad pig. " * 10
    instructions = [{"instruction": f"Say {i}.", "output": text if changed == "output" and i < 3 else "No."}
                    for i in range(5)]
    write_jsonl(folder / "ift.jsonl", instructions)
    reasons = [text, "Bad."] if changed is None else [text, text] if changed == "reasons" else ["Good.", "Bad."]
    write_jsonl(folder / "judged.jsonl", [JUDGED | {"prompt": f"{i}?", "reasons": reasons} for i in range(4)])
    config = config_for(folder)
    config = replace(config, judge=replace(config.judge, max_new_tokens=40))
    if message is None:  # no more than half of them
        Run.open(tmp_path / "run", config)
        return
    with pytest.raises(InputError, match=message) as error:
        Run.open(tmp_path / "run", config)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
    enough = int(re.search(r"; set it to (\d+) or more$", str(error.value))[1])
    Run.open(tmp_path / "run", replace(config, responses=replace(config.responses, max_new_tokens=enough),
                                      judge=replace(config.judge, max_new_tokens=enough)))


def test_what_no_model_writes_may_be_long(folder, tmp_path):
    text = "Write a story about a sad pig. " * 10
    write_jsonl(folder / "ift.jsonl", [{"instruction": f"Say {i}.", "output": text} for i in range(5)])
    write_jsonl(folder / "judged.jsonl", [JUDGED | {"prompt": f"{i}?", "reasons": [text, text]} for i in range(4)])
    config = config_for(folder, reasons=False)
    Run.open(tmp_path / "run", replace(config, iterations=0))  # the judgements have no reasons, and nobody responds


def test_sampled_answers_of_the_words_world_are_never_refused(tmp_path):
    config = Config(seed_data=SeedConfig(source="words", ift=4, ranked=2, judge_evaluation=2, evaluation=2))
    config = replace(config, responses=ResponseConfig(max_new_tokens=8))
    lm = tiny_lm(context=2048)
    context = Context(lm.tokenizer, 2048, TEMPLATE, config)

    def sampled(prompts):
        text = "a b " * 40
        return [{"prompt": x, "responses": [text] * 4, "finished": [True] * 4} for x in prompts]

    with pytest.raises(InputError, match="responses.max_new_tokens = 8 is too small: 4 of 4 IFT answers are longer"):
        load_seed_data(config.seed_data, 0, context)  # plain sentences, before anything is made
    data, _ = load_seed_data(config.seed_data, 0, context, sampled)
    assert len(data["ift"]) == 4


def test_a_new_prompt_that_leaves_no_room_for_an_answer_is_dropped(folder, tmp_path, monkeypatch):
    new = ["Write a story about a sad pig at the river.", LONG, "News?"]
    monkeypatch.setattr(loop, "new_prompts", lambda *_: (list(new), Counter(accepted=3)))
    config = replace(config_for(folder), responses=ResponseConfig(max_new_tokens=8))
    M0 = StoredModel(Run.open(tmp_path / "run", config), "M0").copy_seed_model()
    x = M0.new_prompts()
    assert x == [new[0], new[2]] and M0.counts["prompts"] == {"accepted": 2, "no room for an answer": 1}
    assert len(M0.respond(x)) == 2


def test_nothing_that_fits_is_an_error(folder, tmp_path):
    write_jsonl(folder / "ift.jsonl", [{"prompt": LONG, "response": "No."}] * 2)
    with pytest.raises(InputError, match=r"ift.jsonl has no instructions that can be used: longer than the model's .*"
                                         r"\(2: line 1 \(\d+ tokens\), line 2"):
        Run.open(tmp_path / "run", config_for(folder))


LENGTHS = range(1, 90)
TEMPLATE = "{prompt}|{response}|"


def contexts(eft_by="annotator"):
    lm = tiny_lm(context=64)
    config = Config(prompts=type(Config().prompts)(max_new_tokens=1), seed_data=SeedConfig(eft_by=eft_by))
    return lm, Context(lm.tokenizer, 64, TEMPLATE, config)


def passes(step, *inputs) -> bool:
    """Whether a step of the loop accepts its input."""
    try:
        step(*inputs)
    except InputError:
        return False
    return True


def kept(context, length, records):
    reject = reject_too_long(context, length)
    return [reject(record) is None for record in records]


def accepted(lm, encoded):
    config = SamplingConfig(max_new_tokens=1)
    return [passes(lm.sample, [ids], 1, config, 0, lm.tokenizer.stop_ids) for ids in encoded]


def test_an_instruction_fits_exactly_if_training_and_prompt_generation_accept_it():
    lm, context = contexts()
    for long in (("prompt",), ("response",), ("prompt", "response")):
        records = [{"prompt": "a", "response": "b"} | {name: "a " * n for name in long} for n in LENGTHS]
        trained = [passes(encode_examples, lm, [record]) for record in records]
        shots = [few_shot_prompt(lm.tokenizer, [record["prompt"]], [], PromptConfig(max_new_tokens=1), Random(0), 0)
                 for record in records]
        shown = accepted(lm, [[*lm.tokenizer.bos_ids, *lm.tokenizer.encode(text)] for text in shots])
        expected = [a and b for a, b in zip(trained, shown)]
        assert kept(context, Context.instruction_length, records) == expected
        assert {*expected} == {True, False} and (expected != trained) == (long == ("prompt",))


def test_an_evaluation_prompt_fits_exactly_if_sampling_accepts_it():
    lm, context = contexts()
    records = [{"prompt": "a " * n} for n in LENGTHS]
    expected = accepted(lm, [lm.tokenizer.encode_prompt(record["prompt"]) for record in records])
    assert kept(context, Context.prompt_length, records) == expected and {*expected} == {True, False}


@pytest.mark.parametrize("longest", ["prompt", "response", "reason"])
def test_a_judged_record_fits_exactly_if_training_accepts_all_its_judgements(longest):
    lm, context = contexts()
    records = []
    for n in LENGTHS:
        text = {"prompt": "a", "response": "b", "reason": "c"} | {longest: "a " * n}
        records.append({"prompt": text["prompt"], "responses": ["b", text["response"]], "scores": [5, 0],
                        "reasons": ["c", text["reason"]]})
    expected = [passes(encode_examples, lm, eft_by_annotator([record], TEMPLATE)) for record in records]
    assert kept(context, Context.judged_length, records) == expected and {*expected} == {True, False}


def test_where_the_baseline_judges_there_must_be_room_for_a_score():
    lm, context = contexts("baseline")
    records = [{"prompt": "a " * n, "responses": ["b", "c"], "scores": [5, 0]} for n in LENGTHS]
    shortest = [[eft_record(TEMPLATE, r["prompt"], y, SHORTEST_JUDGEMENT) for y in r["responses"]] for r in records]
    expected = [passes(encode_examples, lm, examples) for examples in shortest]
    assert kept(context, Context.judged_length, records) == expected and {*expected} == {True, False}


def test_the_tiny_world_fits_its_own_model_and_is_cut_to_a_smaller_context(tmp_path):
    config = Config(threads=1, seed_data=SeedConfig(ift=64, ranked=32, judge_evaluation=8, evaluation=16))
    run = Run.open(tmp_path / "run", config)
    assert run.data_table == "" and len(run.ift) == 64 and not (run.folder / "seed/counts.json").exists()
    _, tokenizer = run.load_seed_model()
    data, sets = load_seed_data(config.seed_data, 0, Context(tokenizer, 148, run.judge_template, config))
    assert 0 < len(data["ranked"]) < 32 and "longer than the model's context of 148 tokens" in sets["ranked"].left_out
    examples = data["ift"] + eft_by_annotator(data["ranked"], run.judge_template)
    assert max(len(tokenizer.encode_chat(e["prompt"], e["response"])[0]) for e in examples) == 148


def test_prompts_for_an_export_that_do_not_fit_are_named_by_their_lines(finished, tmp_path):
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": "News?"}, {"prompt": LONG}, {"prompt": "More?"}, {"prompt": LONG}])
    code, _, err = minisr("eval", finished, "--export", tmp_path / "out", "--prompts", tmp_path / "p.jsonl")
    assert code == 2 and err.startswith(f"minisr: {tmp_path}/p.jsonl: the model's context of 256 tokens has no room ")
    assert "line 2 (" in err and "line 4 (" in err and "line 1" not in err and not (tmp_path / "out").exists()


# A user's data in every common format, from one command

CONFIG = f"""
iterations = 1
device = "cpu"
threads = 1
seed_data = {{ift = 16, evaluation = 4, eft_by = "none"}}
sft = {{batch_size = 8, epochs = 1}}
prompts = {{count = 3, max_rouge_l = 0.95}}
responses = {{candidates = 2, max_new_tokens = 32}}
judge = {{judgements = 1, template = '{WORLD_TEMPLATE}', max_new_tokens = 32}}
evaluate = {{max_new_tokens = 16}}
dpo = {{batch_size = 4}}
"""
PEOPLES = corpus.ift_data(Random(0), 24)


def to_rows(number, x, y):
    first = {"message_id": f"{number}a", "parent_id": None, "role": "prompter", "text": x}
    return [first, {"message_id": f"{number}b", "parent_id": f"{number}a", "role": "assistant", "text": y, "rank": 0.0}]


FORMATS = {  # name in the table: (prompt, response) -> record; a record that cannot be used, and why
    "Alpaca": (lambda x, y: {"instruction": x, "input": "", "output": y},
               {"instruction": "News?", "input": "", "output": ""}, "empty answer"),
    "ShareGPT": (lambda x, y: {"conversations": [{"from": "human", "value": x}, {"from": "gpt", "value": y},
                                                 {"from": "human", "value": "Thanks."}]},
                 {"conversations": [{"from": "gpt", "value": "Hello."}]}, "no user's turn at the beginning"),
    "Dolly": (lambda x, y: {"instruction": x, "context": "", "response": y, "category": "creative_writing"},
              {"instruction": "News?", "context": "", "response": None, "category": "open_qa"}, "no answer"),
    "prompt/completion": (lambda x, y: {"prompt": x, "completion": y}, {"prompt": "News?", "completion": " "},
                          "empty answer"),
    "chat messages": (lambda x, y: {"messages": [{"role": "system", "content": ""}, {"role": "user", "content": x},
                                                 {"role": "assistant", "content": [{"type": "text", "text": y}]}]},
                      {"messages": [{"role": "user", "content": "News?"}]}, "no answer"),
    "preference (chosen)": (lambda x, y: {"prompt": x, "chosen": y, "rejected": "No."},
                            {"chosen": "News? No.", "rejected": "No."},
                            "a preference (chosen, rejected) without a prompt"),
    "OASST": (lambda x, y: {"message_tree_id": "t", "prompt": {"role": "prompter", "text": x, "replies": [
                  {"role": "assistant", "text": "No.", "rank": 1}, {"role": "assistant", "text": y, "rank": 0}]}},
              {"message_tree_id": "t", "prompt": {"role": "prompter", "text": "News?", "replies": []}}, "no answer"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_run_on_one_file_in_a_common_format(name, tmp_path, monkeypatch):
    to_format, useless, reason = FORMATS[name]
    records = [to_format(record["prompt"], record["response"]) for record in PEOPLES]
    (tmp_path / "my.json").write_text(json.dumps([useless, *records]))
    (tmp_path / "run.toml").write_text(CONFIG)
    iterations = 1 if name == "Alpaca" else 0  # once the whole loop; for the others until M1 is evaluated
    if name != "Alpaca":
        drawing.replace_by_titles(monkeypatch)
    code, out, err = minisr("run", tmp_path / "run.toml", "--set", f"seed_data.source={tmp_path}/my.json",
                            "--set", f"iterations={iterations}", "--out", tmp_path / "run")
    assert code == 0, err
    table, training = out.index("seed data"), out.index("SFT done")
    assert table < training and f"{name} 24" in out[:training] and f"{reason}: record 1 (line 1)" in out[:training]
    assert jsonl(tmp_path / "run/seed/ift.jsonl") == PEOPLES[:16]  # the same in every format
    assert [r["prompt"] for r in jsonl(tmp_path / "run/seed/evaluation.jsonl")] == [r["prompt"] for r in PEOPLES[-4:]]
    assert "judged" not in out[table:training].split("\n\n")[0]
    counts = json.loads((tmp_path / "run/seed/counts.json").read_text())["ift"]
    assert counts["left_out"][reason] == {"count": 1, "where": ["record 1 (line 1)"]}
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())["models"]
    assert list(metrics) == ["SFT", "M1", "M2"][:2 + iterations] and metrics["M1"]["judge"]["parse_rate"] is None


def test_open_assistants_flat_rows(tmp_path):
    rows = [row for i, r in enumerate(PEOPLES) for row in to_rows(i, r["prompt"], r["response"])]
    write_jsonl(tmp_path / "my.jsonl", rows)
    run = Run.open(tmp_path / "run", config_for(tmp_path / "my.jsonl", eft_by="none", ift=16))
    assert run.ift == PEOPLES[:16] and "OASST 24" in run.data_table


def test_the_table_is_printed_once(folder, tmp_path, monkeypatch):
    drawing.replace_by_titles(monkeypatch)
    (tmp_path / "run.toml").write_text(CONFIG.replace("eft_by", "judge_evaluation = 2, eft_by"))
    command = ("run", tmp_path / "run.toml", "--set", f"seed_data.source={folder}", "--set", "iterations=0",
               "--out", tmp_path / "run")
    outs = [minisr(*command)[1] for _ in range(2)]
    assert ["seed data" in out for out in outs] == [True, False]
    assert "pairwise" in outs[0]  # held-out judged prompts are used without EFT too
