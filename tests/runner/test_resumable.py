"""A run goes on with another value of a key that changes no result, or only its last bit, and with no other change."""

import shutil
from dataclasses import replace

import pytest
import torch
from small_run import MODELS, files, jsonl, minisr, model_of, prompts_of, settings
from tiny import tiny_model, tiny_tokenizer

from minisr import InputError
from minisr.interop import hf
from minisr.runner.checkpoint import load_model, save_model
from minisr.runner.config import Config, JudgeConfig, SeedConfig, load_config
from minisr.runner.files import read_json, write_json, write_jsonl
from minisr.runner.journal import Journal
from minisr.runner.run import Run, check_resumable
from minisr.runner.sources import changed_files, keep_stored_paths
from minisr.runner.steps import StoredModel, keep
from minisr.runner.stop import Stop
from minisr.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("no_drawing")
FREE = ("threads=3", "device=cpu", "engine=plain", "responses.rows=8", "judge.rows=8", "evaluate.rows=3",
        "lora.alpha=5.0", "sft.micro_batch=2", "dpo.micro_batch=2", "sft.save_every=7", "dpo.save_every=7")
DECIDING = ("seed=1", "dtype=float64", "prompts.round_size=8", "responses.candidates=3", "sft.batch_size=4",
            "dpo.dropout=0.1", "responses.max_new_tokens=9", "sft.optimizer=muon", "chat=tiny")
NOT_WITH_DROPOUT = ("engine=plain", "sft.micro_batch=2", "device=cuda")


@pytest.fixture(autouse=True)
def not_stopped():
    yield
    Stop.requested = False


@pytest.fixture
def empty(tmp_path):
    (tmp_path / "empty.toml").write_text("")

    def config(*changes):
        return load_config(tmp_path / "empty.toml", overrides=changes)
    return config


@pytest.mark.parametrize("change", FREE)
def test_a_key_that_decides_no_result_may_change(change, empty):
    assert empty(change) != empty()
    check_resumable(empty(), empty(change), "run")


def test_gradient_checkpointing_may_change(empty):
    check_resumable(empty(), empty("sft.gradient_checkpointing=true", "dpo.gradient_checkpointing=true"), "run")


@pytest.mark.parametrize("change", DECIDING)
def test_a_key_that_decides_results_may_not_change(change, empty):
    with pytest.raises(InputError, match=f"another config .*{change.partition('=')[0]}: "):
        check_resumable(empty(), empty(change), "run")


@pytest.mark.parametrize("change", NOT_WITH_DROPOUT)
def test_what_decides_the_dropped_units_may_not_change_with_dropout(change, empty, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=f"{change.partition('=')[0]}: "):
        check_resumable(empty("sft.dropout=0.1"), empty("sft.dropout=0.1", change), "run")


@pytest.mark.parametrize("change", ["device=cpu", "sft.micro_batch=4", "dpo.micro_batch=4"])
def test_a_default_that_is_spelled_out_changes_nothing(change, empty, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    dropout = ("sft.dropout=0.1", "dpo.dropout=0.1")
    check_resumable(empty(*dropout), empty(*dropout, change), "run")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    if change == "device=cpu":
        with pytest.raises(InputError, match="device: 'cuda' -> 'cpu'"):
            check_resumable(empty(*dropout), empty(*dropout, change), "run")


def test_another_device_may_not_change_the_dtype():
    cpu, gpu = Config(device="cpu"), Config(device="cuda")  # the default dtype is bfloat16 on a GPU
    with pytest.raises(InputError, match="dtype: 'float32' -> 'bfloat16'"):
        check_resumable(cpu, gpu, "run")
    check_resumable(cpu, replace(gpu, dtype="float32"), "run")
    check_resumable(cpu, replace(gpu, engine="plain"), "run")  # which has no bfloat16


def test_more_iterations_may_follow_and_not_fewer():
    check_resumable(Config(iterations=1), Config(iterations=2), "run")
    with pytest.raises(InputError, match="iterations: 2 -> 1"):
        check_resumable(Config(iterations=2), Config(iterations=1), "run")


def test_a_run_from_before_rounds_had_a_size_keeps_its_own(config, copy):
    path, new = copy / "config.toml", load_config(config)
    before_prompts, section, rest = path.read_text().replace("round_size = 512\n", "").partition("[prompts]")
    path.write_text(before_prompts + section + rest)
    assert Run.open(copy, new).config.prompts.round_size == 512  # a round was a batch of 512 rows
    path.write_text(before_prompts + section + rest.replace("rows = 512", "rows = 8", 1))
    with pytest.raises(InputError, match="prompts.round_size: 8 -> 512.; set it as before, or"):
        Run.open(copy, new)
    Run.open(copy, load_config(config, overrides=("prompts.round_size=8",)))
    assert load_config(path).prompts.round_size == 8


def test_a_finished_run_takes_other_rows_and_threads_and_records_them(config, copy):
    before = files(copy)
    changes = settings("responses.rows=8", "threads=2")
    for _ in range(2):  # the second command changes nothing
        code, _, err = minisr("run", config, "--out", copy, *changes)
        assert (code, err) == (0, "")
        after = files(copy)
        assert {name for name in after if after[name] != before.get(name)} <= {
            "config.toml", "config_changes.jsonl", "report.html"}
        [record] = jsonl(copy / "config_changes.jsonl")
        assert record["changes"] == ["responses.rows: 512 -> 8", "threads: 1 -> 2"]
    results = [f"{name}/meta.json" for name in ("M0", *MODELS)] + ["M1/responses.jsonl", "SFT/answers.jsonl"]
    assert set(results) < set(record["made_before"]) == {
        name for name in before if name.count("/") == 1 and name.endswith((".jsonl", "meta.json"))}
    assert load_config(copy / "config.toml").responses.rows == 8
    minisr("run", config, "--out", copy)
    assert [record["changes"] for record in jsonl(copy / "config_changes.jsonl")][1:] == [
        ["responses.rows: 8 -> 512", "threads: 2 -> 1"]]


def respond(folder, rows, monkeypatch, stop_after=None):
    """M1's responses in batches of so many rows, and how many batches were computed."""
    computed = []

    def add(self, value, *key, add=Journal.add):
        add(self, value, *key)
        computed.append(key)
        Stop.requested = len(computed) == stop_after
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", add)
        config = load_config(folder / "config.toml", overrides=(f"responses.rows={rows}",))
        step = StoredModel(Run(folder, config), "M1").respond
        try:
            return keep(step, prompts_of(folder / "M1")), len(computed)
        except KeyboardInterrupt:
            Stop.requested = False
            return None, len(computed)


def test_batches_of_another_size_are_not_taken_from_a_journal(copy, monkeypatch):
    path = copy / "M1/responses.jsonl"
    path.unlink()
    expected, count = respond(copy, 8, monkeypatch)
    assert count == 4  # of two prompts with four responses
    path.unlink()
    assert respond(copy, 16, monkeypatch, stop_after=1) == (None, 1)
    assert respond(copy, 8, monkeypatch, stop_after=3) == (None, 3)
    assert respond(copy, 8, monkeypatch) == (expected, 1)


def test_the_journal_of_another_engine_and_number_of_threads_is_used(copy):
    config = load_config(copy / "config.toml")
    others = [replace(config, threads=2), replace(config, engine="plain"), replace(config, device="auto")]
    fingerprints = {StoredModel(Run(copy, c), "M1").journal("x").fingerprint for c in [config, *others]}
    assert fingerprints == {model_of(copy, "M1").journal("x").fingerprint}



def test_a_folder_with_what_an_interrupted_start_or_a_system_leaves_becomes_a_run(tmp_path, empty):
    for name in (".lock", ".DS_Store", "config.toml.part"):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / name).write_text("")
    Run.open(tmp_path / "run", empty())
    assert (tmp_path / "run/config.toml").exists()


# The files that a run was made from

def own_files(folder, judge_text="Score: N. Rate {response} to {prompt}\n"):
    """A seed model, a judge prompt and data of a user's own, and a config that names them."""
    save_model(folder / "model", tiny_model(context=320), tiny_tokenizer(), {"made_by": "test"})
    (folder / "judge.txt").write_text(judge_text)
    (folder / "data").mkdir()
    write_jsonl(folder / "data/ift.jsonl", [{"prompt": f"Say {i}.", "response": "No."} for i in range(6)])
    write_jsonl(folder / "data/judged.jsonl", [{"prompt": f"{i}?", "responses": ["Blue.", "No."], "scores": [5, 0],
                                                "reasons": ["Good.", "Bad."]} for i in range(4)])
    return config_of(folder)


def config_of(folder):
    return Config(threads=1, seed_model=str(folder / "model"), judge=JudgeConfig(template=str(folder / "judge.txt")),
                  seed_data=SeedConfig(source=str(folder / "data"), judge_evaluation=1, evaluation=2))


@pytest.fixture
def begun(tmp_path):
    """The folder of own_files, in a folder of its own, and a run that has copied them."""
    (tmp_path / "old").mkdir()
    run = Run.open(tmp_path / "run", own_files(tmp_path / "old"))
    assert len(run.ift) == 4
    StoredModel(run, "M0").copy_seed_model()
    return tmp_path


def test_a_run_goes_on_where_its_files_have_moved_or_are_gone(begun, capsys):
    old = config_of(begun / "old")
    before = Run.open(begun / "run", old).fingerprint
    (begun / "old").rename(begun / "new")
    for config in (old, config_of(begun / "new")):
        run = Run.open(begun / "run", config)
        assert run.config == old and run.fingerprint == before and len(run.ift) == 4
    assert capsys.readouterr().err == "" and not (begun / "run/config_changes.jsonl").exists()
    (begun / "new/data/evaluation.jsonl").write_text('{"prompt": "What is new?"}\n')
    with pytest.raises(InputError, match="another config .*seed_data.source: "):
        Run.open(begun / "run", config_of(begun / "new"))


@pytest.mark.parametrize("name, key", [("judge.txt", "judge.template"), ("data/judged.jsonl", "seed_data.source"),
                                       ("model/meta.json", "seed_model")])
def test_other_files_elsewhere_are_another_config(name, key, begun):
    shutil.copytree(begun / "old", begun / "new")
    path = begun / "new" / name
    text = path.read_text().replace("Good", "Fine").replace("Rate", "Judge")
    path.write_text(text.replace('"hash": "', '"hash": "0'))
    with pytest.raises(InputError, match=f"another config \\({key}: "):
        Run.open(begun / "run", config_of(begun / "new"))


@pytest.mark.parametrize("name", ["judge.txt", "data/judged.jsonl", "data/ift.jsonl"])
def test_a_run_says_that_it_goes_on_with_its_copy_of_a_file_that_has_changed(name, begun, capsys):
    config = config_of(begun / "old")
    path = begun / "old" / name
    path.write_text(path.read_text().replace("o", "a"))
    run = Run.open(begun / "run", config)
    assert capsys.readouterr().err == (f"minisr: {path} has changed since {begun}/run was made from it; this run goes "
                                       "on with a copy. For a new run choose another folder with --out\n")
    assert run.judge_template.startswith("Score: N. Rate") and run.ift[0]["response"] == "No."


def save_seed_model_again(folder, **changes):
    """The same weights with another chat template or other ids that end a response."""
    model, tokenizer = load_model(folder)
    values = {"template": tokenizer.template, "stop_ids": tokenizer.stop_ids} | changes
    save_model(folder, model, Tokenizer(tokenizer.vocabulary, **values), {"made_by": "test"})


@pytest.mark.parametrize("changes", [{"template": "<s>{prompt} ->{response}</s>"}, {"stop_ids": [5]}],
                         ids=["template", "stop_ids"])
def test_a_seed_model_of_the_same_weights_with_another_tokenizer_is_another_config(changes, begun):
    (begun / "old").rename(begun / "new")
    save_seed_model_again(begun / "new/model")
    Run.open(begun / "run", config_of(begun / "new"))
    save_seed_model_again(begun / "new/model", **changes)
    with pytest.raises(InputError, match=r"another config \(seed_model: "):
        Run.open(begun / "run", config_of(begun / "new"))


@pytest.mark.parametrize("file, changes", [("config.json", {"rope_theta": 99.0}),
                                           ("config.json", {"max_position_embeddings": 4096}),
                                           ("generation_config.json", {"eos_token_id": [2, 5]}),
                                           ("chat.txt", "<s>{prompt} ->{response}</s>")])
def test_a_hugging_face_folder_of_the_same_weights_with_other_settings_is_another_config(file, changes, tmp_path):
    pytest.importorskip("safetensors")
    config = own_files(tmp_path)
    model, old, new = (tmp_path / name for name in ("model", "old", "new"))
    hf.export(*load_model(model), old)
    StoredModel(Run.open(tmp_path / "run", replace(config, seed_model=str(old))), "M0").copy_seed_model()
    old.rename(new)
    moved = replace(config, seed_model=str(new))
    assert Run.open(tmp_path / "run", moved).config.seed_model == str(old)
    if isinstance(changes, dict):
        write_json(new / file, read_json(new / file, "settings") | changes)
    else:
        (new / file).write_text(changes)
    with pytest.raises(InputError, match=r"another config \(seed_model: "):
        Run.open(tmp_path / "run", moved)


def spoil(path, kind):
    """Make a file one that cannot be read."""
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "link to itself":
        path.symlink_to(path)
    else:
        path.write_bytes(b"\xff\xfe\xff")


@pytest.mark.parametrize("kind", ["folder", "link to itself", "no text"])
@pytest.mark.parametrize("name", ["judge.txt", "data/ift.jsonl", "data/judged.jsonl"])
def test_a_file_that_cannot_be_read_counts_as_gone(name, kind, begun, capsys):
    spoil(begun / "old" / name, kind)
    Run.open(begun / "run", config_of(begun / "old"))
    changed = kind == "no text" and name.startswith("data")  # its bytes are compared
    assert ("has changed since" in capsys.readouterr().err) == changed


def test_a_folder_that_may_not_be_read_and_a_name_that_is_too_long_count_as_gone(begun, monkeypatch):
    config, run = config_of(begun / "old"), begun / "run"
    long = replace(config, judge=replace(config.judge, template="x" * 5000),
                   seed_data=replace(config.seed_data, source="x" * 5000))
    assert changed_files(long, run) == [] and keep_stored_paths(config, long, run) == long

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr("minisr.runner.sources.find_file", refuse)
    assert changed_files(config, run) == []
    other = replace(config, seed_data=replace(config.seed_data, source="elsewhere"))
    assert keep_stored_paths(config, other, run) == other


@pytest.mark.parametrize("content", ["[]", "3", '{"ift": 3}', '{"ift": {"sha256": []}, "judged": []}', "{"])
def test_counts_of_another_shape_tell_nothing_of_changes(content, begun, capsys):
    (begun / "run/seed/counts.json").write_text(content)
    for hashes in ("{}", None):
        if hashes:
            (begun / "run/seed/hashes.json").write_text(hashes)
        else:
            (begun / "run/seed/hashes.json").unlink()
        Run.open(begun / "run", config_of(begun / "old"))
    assert capsys.readouterr().err == ""
    (begun / "old").rename(begun / "new")
    with pytest.raises(InputError, match=r"another config \(seed_data.source: "):
        Run.open(begun / "run", config_of(begun / "new"))
