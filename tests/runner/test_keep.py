"""keep: a step is taken once, its stored result is used, and an interrupted one resumes between two batches."""

import time
from dataclasses import replace

import pytest
from small_run import files, jsonl, model_of, prompts_of

from minisr import InputError
from minisr.lm import ResponseConfig
from minisr.loop import self_reward
from minisr.runner import processes
from minisr.runner.config import Config, load_config
from minisr.runner.files import jsonl_bytes, read_json, write_json
from minisr.runner.journal import Journal
from minisr.runner.run import Run, check_consistency
from minisr.runner.steps import FILES, StoredModel, keep, run_loop
from minisr.runner.stop import Stop
from minisr.runner.storage import write_with_checksum

SMALL_BATCHES = ("prompts.rows=4", "prompts.round_size=4", "prompts.count=10", "responses.rows=8", "judge.rows=8",
                 "evaluate.rows=3")
STEPS = [*FILES, "train_dpo"]
SAMPLING_STEPS = [step for step in FILES if step != "select_pairs"]


@pytest.fixture(autouse=True)
def not_stopped():
    yield
    Stop.requested = Stop.at_once = False


def inputs_of(run, step, name="M1"):
    """What the loop passes to a step of a model, from the files of a run."""
    x = prompts_of(run / name)
    y, r, pairs = (jsonl(run / name / f"{what}.jsonl") for what in ("responses", "rewards", "pairs"))
    return {"new_prompts": (), "respond": (x,), "judge": (x, y), "select_pairs": (x, y, r), "train_dpo": (pairs,),
            "answer": ([record["prompt"] for record in jsonl(run / "seed/evaluation.jsonl")],),
            "judge_ranked": (jsonl(run / "seed/judge_evaluation.jsonl"),)}[step]


def not_to_be_taken(name):
    def step(self, *inputs):
        raise AssertionError(f"{name} was taken again")
    step.__name__ = name
    return step


FinishedModel = type("FinishedModel", (StoredModel,), {step: not_to_be_taken(step) for step in (*STEPS, "train_sft")})


def test_a_step_whose_file_exists_is_not_taken_again_and_loads_no_weights(copy):
    before, run = files(copy), Run(copy, load_config(copy / "config.toml"))
    run.load_lm = None
    for step in STEPS:
        kept = keep(getattr(FinishedModel(run, "M1"), step), *inputs_of(copy, step))
        if step == "train_dpo":
            assert kept.name == "M2"
        else:
            stored = jsonl(copy / f"M1/{FILES[step]}.jsonl")
            assert stored and kept == ([record["prompt"] for record in stored] if step == "new_prompts" else stored)
    for name, examples in (("SFT", run.ift), ("M1", run.ift + run.eft)):
        assert keep(FinishedModel(run, "M0").train_sft, name, examples).name == name
    assert files(copy) == before


@pytest.mark.parametrize("step", ["respond", "judge", "select_pairs"])
def test_a_step_made_from_other_inputs_than_the_present_ones_is_refused(step, copy):
    *same, last = inputs_of(copy, step)
    other = [*last[:-1], last[0]]
    with pytest.raises(InputError, match=f"M1/{FILES[step]}.jsonl was made from other results .* move it away"):
        keep(getattr(model_of(copy, "M1"), step), *same, other)
    path = copy / f"M1/{FILES[step]}.jsonl"
    path.unlink()
    index = copy / "M1/hashes.json"
    older = {name: value for name, value in read_json(index, "hashes").items() if name != "made_from"}
    write_json(index, older)  # as an older version left it
    kept = keep(getattr(model_of(copy, "M1"), step), *same, last)
    assert keep(getattr(FinishedModel(Run(copy, load_config(copy / "config.toml")), "M1"), step), *same, last) == kept


def test_a_model_trained_on_other_pairs_is_refused(copy):
    pairs, = inputs_of(copy, "train_dpo")
    with pytest.raises(InputError, match="M2 was trained on other examples .* move it away"):
        keep(model_of(copy, "M1").train_dpo, pairs[1:])


def test_the_seconds_of_an_interrupted_step_are_counted(copy):
    model, path = model_of(copy, "M1"), copy / "M1/timing.json"
    before = read_json(path, "timing")
    with pytest.raises(KeyboardInterrupt), model.clock("pairs"):
        time.sleep(0.05)
        raise KeyboardInterrupt
    with model.clock("pairs"):
        time.sleep(0.05)
    assert read_json(path, "timing")["pairs"] >= before["pairs"] + 0.1


def test_process_0_decides_whether_a_step_is_taken(copy, monkeypatch):
    run = Run(copy, load_config(copy / "config.toml"))
    # The files are there, but were not when process 0 looked.
    monkeypatch.setattr(processes, "value_of_main", lambda _: False)
    for step in STEPS:
        with pytest.raises(AssertionError, match=f"{step} was taken again"):
            keep(getattr(FinishedModel(run, "M1"), step), *inputs_of(copy, step))


def test_another_process_writes_nothing_and_reads_what_process_0_wrote(copy, monkeypatch):
    run, path, before = Run(copy, load_config(copy / "config.toml")), copy / "M1/pairs.jsonl", files(copy)
    inputs, pairs = inputs_of(copy, "select_pairs"), jsonl(path)
    path.rename(path.with_suffix(".being-written"))

    def select_pairs(*_):
        return []
    monkeypatch.setattr(StoredModel, "select_pairs", select_pairs)
    monkeypatch.setattr(processes, "_rank", 1)
    monkeypatch.setattr(processes, "wait_for_all", lambda: path.with_suffix(".being-written").rename(path))
    assert keep(StoredModel(run, "M1").select_pairs, *inputs) == pairs
    assert files(copy) == before


def test_a_step_without_its_file_is_taken(copy):
    for step in STEPS:
        path = copy / ("M2/meta.json" if step == "train_dpo" else f"M1/{FILES[step]}.jsonl")
        inputs = inputs_of(copy, step)
        path.rename(path.with_suffix(".old"))
        model = FinishedModel(Run(copy, load_config(copy / "config.toml")), "M1")
        with pytest.raises(AssertionError, match=f"{step} was taken again"):
            keep(getattr(model, step), *inputs)
        path.with_suffix(".old").rename(path)


def test_later_steps_use_what_earlier_ones_stored(copy):
    kept = jsonl(copy / "M1/prompts.jsonl")[3:6]
    write_with_checksum(copy / "M1/prompts.jsonl", jsonl_bytes(kept))
    for step in ("respond", "judge", "select_pairs"):
        (copy / f"M1/{FILES[step]}.jsonl").unlink()
    (copy / "M2/meta.json").unlink()
    changed = dict(kept[0], prompt="News?")
    model = model_of(copy, "M1")
    respond = model.respond

    def respond_and_change(x):
        return [dict(respond(x)[0], **changed), *respond(x)[1:]]
    respond_and_change.__name__, respond_and_change.__self__ = "respond", model
    y = keep(respond_and_change, [record["prompt"] for record in kept])
    assert [record["prompt"] for record in y] == ["News?", *(record["prompt"] for record in kept[1:])]
    assert self_reward(model, keep).name == "M2"
    assert prompts_of(copy / "M1") == [record["prompt"] for record in kept]
    assert jsonl(copy / "M1/responses.jsonl") == y
    assert [record["prompt"] for record in jsonl(copy / "M1/rewards.jsonl")] == [record["prompt"] for record in y]


def with_small_batches(run):
    return StoredModel(Run(run, load_config(run / "config.toml", overrides=SMALL_BATCHES)), "M1")


@pytest.fixture
def take(copy, monkeypatch):
    """Take one of M1's steps anew in small batches: the bytes of its files, and the batches that were computed."""
    inputs = {step: inputs_of(copy, step) for step in SAMPLING_STEPS}
    inputs["judge"] = tuple(records[:4] for records in inputs["judge"])
    computed = []

    def add(self, value, *key, add=Journal.add):
        add(self, value, *key)
        computed.append(key)
        Stop.requested = run_step.stop_after_each_batch
    monkeypatch.setattr(Journal, "add", add)

    def run_step(step):
        keep(getattr(with_small_batches(copy), step), *inputs[step])
        name = FILES[step]
        assert not (copy / f"M1/{name}.journal").exists()
        made = [(copy / f"M1/{file}").read_bytes() for file in (f"{name}.jsonl", f"{name}.counts.json")]
        (copy / f"M1/{name}.jsonl").unlink()
        batches = list(computed)
        computed.clear()
        return made, batches
    run_step.stop_after_each_batch = False
    run_step.copy, run_step.inputs = copy, inputs
    return run_step


@pytest.mark.parametrize("step", SAMPLING_STEPS)
def test_a_step_interrupted_after_every_batch_gives_the_same_bytes(step, take):
    (take.copy / f"M1/{FILES[step]}.jsonl").unlink()
    expected, batches = take(step)
    assert len(set(batches)) == len(batches) >= 3
    take.stop_after_each_batch, interruptions = True, 0
    while True:
        Stop.requested = False
        try:
            made, computed = take(step)
            break
        except KeyboardInterrupt:
            interruptions += 1
    assert interruptions == len(batches) and computed == batches  # each batch was computed once
    assert made == expected


def test_the_journal_of_other_inputs_is_not_used(take):
    (take.copy / "M1/responses.jsonl").unlink()
    take.stop_after_each_batch = True
    with pytest.raises(KeyboardInterrupt):
        take("respond")
    take.stop_after_each_batch = Stop.requested = False
    take.inputs["respond"] = ([f"{prompt} Please." for prompt in take.inputs["respond"][0]],)
    made, batches = take("respond")
    assert batches == [batches[0], *batches[:1], *batches[2:]] and len(batches) == 1 + 4
    assert made == take("respond")[0]  # as without an interruption


def test_a_journal_belongs_to_the_models_weights_the_config_and_the_inputs(copy):
    model = model_of(copy, "M1")
    config = load_config(copy / "config.toml", overrides=("judge.top_p=0.5",))
    journals = [model.journal("x", ["a"]), model.journal("x", ["b"]), model.journal("x", ["a"], []),
                StoredModel(Run(copy, config), "M1").journal("x", ["a"]), model_of(copy, "M2").journal("x", ["a"])]
    assert len({journal.fingerprint for journal in journals}) == 5
    assert model_of(copy, "M1").journal("x", ["a"]).fingerprint == journals[0].fingerprint


def test_a_finished_run_with_a_damaged_or_missing_model_is_refused(copy):
    for name in ("M0", "M1", "M2"):
        path = copy / name / "model.pt"
        content = path.read_bytes()
        path.write_bytes(content + b"x")
        with pytest.raises(InputError, match=f"{name}/model.pt is not the file"):
            run_loop(Run(copy, load_config(copy / "config.toml")))
        path.unlink()
        with pytest.raises(InputError, match=f"{name}/model.pt is missing; restore it from a copy"):
            run_loop(Run(copy, load_config(copy / "config.toml")))
        path.write_bytes(content)


def test_a_resume_that_fails_keeps_the_metrics_of_later_models(copy):
    before = (copy / "metrics.json").read_bytes()
    with open(copy / "M2" / "answers.jsonl", "a") as file:
        file.write("x")
    with pytest.raises(InputError, match="answers.jsonl"):
        run_loop(Run(copy, load_config(copy / "config.toml")))
    assert (copy / "metrics.json").read_bytes() == before


def test_one_candidate_is_refused():
    with pytest.raises(InputError, match="candidates must be at least 2"):
        check_consistency(replace(Config(), responses=ResponseConfig(candidates=1)))
