import io
import json
import os
import pickle
from contextlib import redirect_stderr, redirect_stdout
from random import Random

import pytest
import torch
from small_run import settings
from tiny import tiny_model, tiny_tokenizer

from minisr import InputError
from minisr.cli import main
from minisr.interop.chat_templates import chat_template
from minisr.interop.shape import MODEL_KEYS_RENAMED
from minisr.runner.checkpoint import digest, save_model
from minisr.runner.config import RENAMED, load_config
from minisr.runner.files import short_reason, write_jsonl
from minisr.runner.pretrain import train_tokenizer
from minisr.runner.run import Run
from minisr.worlds.tiny.corpus import document

CONFIG = """threads = 1
device = "cpu"
seed_model = "{}"
seed_data = {{ift = 4, ranked = 4, judge_evaluation = 2, evaluation = 2}}
"""


@pytest.fixture
def at(tmp_path):
    """A folder with run.toml, the seed model M0 that it names, and a run with its seed data."""
    save_model(tmp_path / "M0", tiny_model(context=320), tiny_tokenizer(), {"made_by": "test"})
    (tmp_path / "run.toml").write_text(CONFIG.format(tmp_path / "M0"))
    run = Run.open(tmp_path / "run", load_config(tmp_path / "run.toml"))
    assert len(run.ift) == 4
    return tmp_path


CASES = []


def case(*named, marks=()):
    """The texts that the one line must contain. The function breaks something and returns the command."""
    def wrap(broken):
        CASES.append(pytest.param(broken, named, id=broken.__name__, marks=marks))
        return broken
    return wrap


def run(at, *changes, out="run"):
    return ["run", at / "run.toml", "--out", at / out, *settings(*changes)]


def run_config(at, text, *changes):
    (at / "run.toml").write_text(text)
    return run(at, *changes)


def chat(at, question="News?"):
    return ["chat", at / "M0", "--ask", question, "-n", "1"]


def stored(at, content):
    """Put content in model.pt, with the hash that makes it look genuine."""
    (at / "M0/model.pt").write_bytes(content)
    (at / "M0/meta.json").write_text(json.dumps({"hash": digest(content)}))
    return chat(at)


SETTINGS = [  # a wrong setting, and texts that the one line must contain
    ("judge.judgments=2", "[judge]", "unknown key 'judgments'", "judgements", "template"),  # the known ones
    ("reward.by=oracle", "unknown key 'reward'", "judge", "dpo"),
    ("judge=3", "judge must be a section [judge]"),
    ("dpo.beta=much", "[dpo]", "beta must be a number", "'much'"),
    ("iterations=2.5", "iterations must be a whole number", "2.5"),
    ("prompts.keywords=3", "keywords must be a list, each item a string"),
    ("responses.top_p=1.5", "[responses]", "top_p must lie between 0 and 1", "1.5"),
    ("dpo.beta=nan", "[dpo]", "beta must be at least 0, not nan"),
    ("iterations=-1", "iterations must lie between 0 and 100, not -1"),
    ("dpo.batch_size=0", "[dpo]", "batch_size must be at least 1, not 0"),
    ("prompts.max_rouge_l=1.1", "[prompts]", "max_rouge_l must lie between 0 and 1", "1.1"),
    ("seed_model=a\udcffb", "--set", "lone surrogate"),
    ("judge.by=1", 'by must be a string, not 1; put it in quotes: by = "1"'),
    ("judge.by=human", "[judge]", "by must be one of self, M1, word_points, oracle", "'human'"),
    ("judge.by", "--set judge.by", "section.key=value"),
    ("seed=7", "another config", "seed: 0 -> 7", "--out"),
    ("iterations=1", "another config", "iterations: 2 -> 1"),
    ("engine=slow", "engine must be one of fast, plain", "'slow'"),
    ("dtype=float16", "dtype must be one of auto, float32, bfloat16, float64", "'float16'"),
    ("dpo.recompute=true", "[dpo]", "'recompute' is now called 'gradient_checkpointing'"),
    ("sft.clip=1.0", "[sft]", "'clip' is now called 'max_grad_norm'"),
    ("dpo.nll=0.3", "[dpo]", "'nll' is now called 'nll_weight'"),
    ("dpo.replay=0.5", "[dpo]", "'replay' is now called 'replay_weight'"),
    ("prompts.own_shots=2", "[prompts]", "'own_shots' is now called 'generated_shots'"),
    ("prompts.rouge=0.7", "[prompts]", "'rouge' is now called 'max_rouge_l'"),
    ("sft.warmup=0.1", "[sft]", "'warmup' is now called 'warmup_fraction'"),
    ("dpo.final_learning_rate=0.0", "[dpo]", "'final_learning_rate' is now called 'min_learning_rate'"),
    ("prompts.attempts=2.0", "[prompts]", "'attempts' is now called 'max_attempts_factor'"),
    ("prompts.written_by=people", "[prompts]", "'written_by' is now called 'source'"),
    ("judge.clip=1.0", "[judge]", "unknown key 'clip'"),  # this section never had it
]


COMMANDS = {  # what is wrong: the command, and texts that the one line must contain
    "no config": (lambda at: ["run", at / "no.toml", "--out", at / "run"], "cannot read config", "no.toml"),
    "no seed model": (lambda at: run(at, f"seed_model={at}/no", out="new"), "there is no model", f"{os.sep}no",
                      "a .gguf file, or package:NAME"),
    "no such world": (lambda at: run(at, "seed_data.source=wolrd", out="new"),
                      "seed_data.source: there is no file or folder wolrd"),
    "source with a long name": (lambda at: run(at, f"seed_data.source={'x' * 300}", out="new"),
                                "seed_data.source: there is no file or folder xxx"),
    "run with a long name": (lambda at: ["show", at / ("x" * 300)], "there is no folder", "xxx"),
    "name with a line break": (lambda at: ["eval", at / "a\nb"], "there is no folder", "a b"),
    "template's text in place of its file": (
        lambda at: ["import", at / "M0", "--out", at / "new", "--chat", "<s>{prompt}\n{response}</s>" + "!" * 300],
        "chat template '<s>{prompt}\\n", "neither a file", "write a template's text into a file"),
    "judge prompt's text in place of its file": (
        lambda at: run(at, "judge.template=Rate {prompt}\n{response}\nScore: <total>", out="new"),
        "template must be a path, but 'Rate {prompt}\\n"),
    "no judge prompt": (lambda at: [*chat(at), "--template", at / "no.txt"], "judge prompt", "no.txt"),
    # The tests may run as root, which ignores permissions: the folder is a file, or would be in one.
    "file as folder": (lambda at: run(at, out="run.toml"), "run.toml is a file", "choose a folder with --out"),
    "folder with other things": (lambda at: run(at, out="M0"), "M0 is no run", "chat.txt", "no config.toml", "--out"),
    "folder in a file": (lambda at: run(at, out="run.toml/new"), "cannot write", "run.toml/new"),
    "long question": (lambda at: chat(at, "Write a story. " * 99), "tokens; the model takes 1 to 319"),
    "question with a lone surrogate": (lambda at: chat(at, "News\ud800?"), "question: a lone surrogate"),
    "question of spaces": (lambda at: chat(at, "  "), "--ask is empty"),
    "chat with a run": (lambda at: ["chat", at / "run", "--ask", "News?"], "is a run", "one of its models"),
    "no answers to show": (lambda at: ["show", at / "run", "--answers", "2"], "no evaluated model yet"),
    "zero answers to show": (lambda at: ["show", at / "run", "--answers", "0"], "--answers takes 1 or more"),
    "fewer answers than none": (lambda at: ["show", at / "run", "--answers", "-3"], "takes 1 or more"),
    "no run to show": (lambda at: ["show", at / "no"], "there is no folder", f"{os.sep}no"),
    "prompts without export": (lambda at: ["eval", at / "run", "--prompts", at / "p"],
                               "--prompts needs --export FOLDER"),
    "judge and export": (lambda at: ["eval", at / "run", "--judge", "python x.py", "--export", at / "answers"],
                         "--judge and --export do not go together"),
    "import over a model": (lambda at: ["import", at / "M0", "--out", at / "M0"], "already holds a model"),
    "show of SFT": (lambda at: ["show", at / "run", "--model", "SFT"], "SFT holds no judged iteration"),
    "show of a model with no name": (lambda at: ["show", at / "run", "--model", ""], "no judged iteration"),
    "nothing to show": (lambda at: ["show", at / "run"], "no judged iteration", "no model of this run"),
    "eval of no run": (lambda at: ["eval", at / "M0"], "M0 is no run: it has no config.toml; minisr run makes one"),
    "eval of a folder of runs": (lambda at: ["eval", at], "is no run", "it holds runs, e.g. ", f"{os.sep}run"),
    "show of no run": (lambda at: ["show", at / "M0"], "M0 is no run: it has no config.toml"),
    "show of answers of no run": (lambda at: ["show", at / "M0", "--answers", "1"], "M0 is no run"),
    "pretrain into a file": (lambda at: ["pretrain", pretrain_config(at), "--out", at / "run.toml"],
                           "run.toml is a file", "--out"),
    "import into a file": (lambda at: ["import", at / "M0", "--out", at / "run.toml"], "run.toml is a file", "--out"),
    "chat with a file": (lambda at: ["chat", at / "run.toml"], "run.toml is a file, but not a GGUF file"),
    "pretrain config in run": (lambda at: ["run", pretrain_config(at), "--out", at / "new"],
                               "belongs to another command: minisr pretrain"),
    "pretrain config in experiment": (lambda at: ["experiment", pretrain_config(at), "--out", at / "new"],
                                      "belongs to another command: minisr pretrain"),
    "run's config in experiment": (lambda at: ["experiment", at / "run.toml", "--out", at / "new"],
                                   "belongs to another command: minisr run"),
    "run's config in pretrain": (lambda at: ["pretrain", at / "run.toml", "--out", at / "new"],
                                 "belongs to another command: minisr run"),
    "no answers": (lambda at: [*chat(at), "-n", "0"], "-n must lie between 1 and 64, not 0"),
    "negative temperature": (lambda at: [*chat(at), "--temperature=-1"], "--temperature must be at least 0, not -1.0"),
    "temperature that is no number": (lambda at: [*chat(at), "--temperature=nan"], "--temperature", "not nan"),
    "no new tokens": (lambda at: [*chat(at), "--max-new-tokens", "0"], "--max-new-tokens must be at least 1, not 0"),
    "eval of no model": (lambda at: ["eval", at / "run"], "no trained model yet", "minisr run"),
}


def pretrain_config(at):
    (at / "pretrain.toml").write_text("tokens = 1000\n")
    return at / "pretrain.toml"


@case("experiment.toml belongs to another command: minisr experiment")
def experiment_in_run(at):
    (at / "experiment.toml").write_text('base = "run.toml"\nseeds = [0]\n')
    return ["run", at / "experiment.toml", "--out", at / "new"]


@case("run/M1 is a model; give its run", "run")
def eval_of_a_model_in_a_run(at):
    (at / "run/M1").mkdir()
    (at / "run/M1/meta.json").write_text("{}")
    return ["eval", at / "run/M1"]


@case("run.toml", "source must be a string, not 2024", 'source = "2024"')
def folder_that_is_a_number_in_a_config(at):
    return run_config(at, "[seed_data]\nsource = 2024\n")


@case("M1 has no prompts", "prompts.counts.json")
def show_of_an_iteration_without_prompts(at):
    for name in ("responses", "rewards"):
        write_jsonl(at / f"run/M1/{name}.jsonl", [])
    return ["show", at / "run"]


RESPONSES = {"prompt": "News?", "responses": ["a", "b"], "finished": [True, True]}
REWARDS = {"prompt": "News?", "rewards": [1, 0], "scores": [[1], [0]], "judgements": [["c"], ["d"]]}


def iteration(at, responses, rewards):
    write_jsonl(at / "run/M1/responses.jsonl", responses)
    write_jsonl(at / "run/M1/rewards.jsonl", rewards)
    return ["show", at / "run", "--prompt", str(len(responses) - 1)]


@case("M1: responses.jsonl has 2 records, rewards.jsonl has 1", "restore it from a copy, or move it away")
def show_of_an_iteration_with_fewer_rewards(at):
    return iteration(at, [RESPONSES] * 2, [REWARDS])


@case("responses.jsonl, line 2: 'finished' is missing or of the wrong type", "restore it from a copy")
def show_of_responses_of_another_version(at):
    return iteration(at, [RESPONSES, {**RESPONSES, "finished": None}], [REWARDS] * 2)


@case("the models answered different numbers of prompts (SFT 1, M1 0)", "restore it from a copy")
def show_of_answers_of_which_some_are_missing(at):
    write_jsonl(at / "run/SFT/answers.jsonl", [{"prompt": "News?", "sampled": "a", "greedy": "a"}])
    write_jsonl(at / "run/M1/answers.jsonl", [])
    return ["show", at / "run", "--answers", "2"]


@case("rewards.jsonl is not the file that minisr wrote there (damaged or edited)", "restore it from a copy")
def show_of_rewards_that_were_edited(at):
    command = iteration(at, [RESPONSES], [REWARDS])
    (at / "run/M1/hashes.json").write_text(json.dumps({"rewards.jsonl": "0"}))
    return command


@case("answers.jsonl is not the file that minisr wrote there (damaged or edited)", "restore it from a copy")
def show_of_answers_that_were_edited(at):
    write_jsonl(at / "run/SFT/answers.jsonl", [{"prompt": "News?", "sampled": "a", "greedy": "a"}])
    (at / "run/SFT/hashes.json").write_text(json.dumps({"answers.jsonl": "0"}))
    return ["show", at / "run", "--answers", "2"]


@case("results.json is not a JSON object {...}")
def report_of_results_of_another_type(at):
    (at / "runs").mkdir()
    (at / "runs/results.json").write_text("[]\n")
    return ["report", at / "runs"]


@case("answers.jsonl, line 1: 'sampled' is missing or of the wrong type", "restore it from a copy")
def report_of_answers_of_another_version(at):
    write_jsonl(at / "run/SFT/answers.jsonl", [{"prompt": "News?", "text": "a"}])
    (at / "run/metrics.json").write_text('{"seed": 0, "models": {"SFT": {}}}')
    return ["report", at / "run"]


@case("rewards.jsonl, line 1: 'judgements' is missing or of the wrong type", "restore it from a copy")
def show_of_rewards_of_another_version(at):
    return iteration(at, [RESPONSES], [{key: REWARDS[key] for key in ("prompt", "rewards", "scores")}])


def test_an_iteration_whose_pairs_are_not_selected_yet_is_shown(at):
    command = [*iteration(at, [RESPONSES], [REWARDS]), "--model", "M1/"]
    code, out, err = in_process(command)
    assert (code, err) == (0, "") and out.endswith("M1's pairs are not selected yet\n")


@case("run.toml", "not valid TOML", "line 1")
def config_that_is_no_toml(at):
    return run_config(at, "threads = = 1\n")


@case("--set seed.x=1", "seed is a key, not a section")
def set_of_a_key_in_a_key(at):
    return run_config(at, "seed = 1\n", "seed.x=1")


@case("model.pt", "truncated or changed", "restore it from a copy")
def truncated_weights(at):
    content = (at / "M0/model.pt").read_bytes()
    (at / "M0/model.pt").write_bytes(content[:-100])
    return run(at)


@case("model.pt", "truncated or changed", "restore it from a copy")
def weights_with_a_flipped_byte(at):
    content = bytearray((at / "M0/model.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (at / "M0/model.pt").write_bytes(content)
    return chat(at)


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@case("M0", "is not a minisr model")
def weights_that_are_a_program(at):
    buffer = io.BytesIO()
    torch.save({"config": Evil(at / "executed"), "weights": {}}, buffer)
    return stored(at, buffer.getvalue())


@case("M0", "is not a minisr model")
def weights_that_are_a_program_in_a_bare_pickle(at):
    return stored(at, pickle.dumps(Evil(at / "executed")))


@case("M0", "is not a minisr model")
def weights_of_another_shape_than_their_config(at):
    content = torch.load(at / "M0/model.pt")
    content["config"]["ffn_dim"] += 8
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return stored(at, buffer.getvalue())


def with_weight(at, name, value):
    content = torch.load(at / "M0/model.pt")
    content["weights"][name][-1] = value
    buffer = io.BytesIO()
    torch.save(content, buffer)
    stored(at, buffer.getvalue())


@case("M0/model.pt", "the weight blocks.1.feed_forward.down_proj.weight contains NaN")
def weights_with_a_nan(at):
    with_weight(at, "blocks.1.feed_forward.down_proj.weight", float("nan"))
    return chat(at)


@case("M0/model.pt", "the weight norm.weight contains NaN or infinity")
def weights_with_an_infinity(at):
    with_weight(at, "norm.weight", float("-inf"))
    return run(at)


@case("M0", "is not a minisr model")
def weights_that_are_something_else(at):
    buffer = io.BytesIO()
    torch.save(torch.zeros(3), buffer)
    return stored(at, buffer.getvalue())


def unsealed(at):
    """Remove the checksums, as in files of the first versions or of another program."""
    (at / "run/seed/hashes.json").unlink(missing_ok=True)
    meta = json.loads((at / "M0/meta.json").read_text())
    (at / "M0/meta.json").write_text(json.dumps({**meta, "files": {}}))


@case("ift.jsonl", "damaged or edited", "restore it from a copy, or move it away")
def seed_data_that_was_edited(at):
    text = (at / "run/seed/ift.jsonl").read_text()
    (at / "run/seed/ift.jsonl").write_text(text.replace("e", "a", 1))
    return run(at)


@case("tokenizer.model", "not the file that meta.json describes")
def tokenizer_that_was_exchanged(at):
    (at / "M0/tokenizer.model").write_bytes(b"none")
    return chat(at)


@case("hashes.json", "not valid JSON", "restore it from a copy, or move it away")
def broken_hashes(at):
    (at / "run/seed/hashes.json").write_text("{")
    return run(at)


@case("tokenizer.model has 510 pieces", "the model only 500", "do not belong together")
def tokenizer_of_another_size(at):
    unsealed(at)
    rng = Random(0)
    other = train_tokenizer([document(rng) for _ in range(300)], 510, chat_template("tiny"))
    assert len(other) > len(tiny_tokenizer())
    (at / "M0/tokenizer.model").write_bytes(other.vocabulary.content)
    return chat(at)


@case("M0", "is not a minisr model")
def tokenizer_that_is_none(at):
    unsealed(at)
    (at / "M0/tokenizer.model").write_bytes(b"none")
    return chat(at)


@case("meta.json", "not valid JSON", "line 1")
def broken_meta(at):
    (at / "M0/meta.json").write_text('{"hash": ')
    return chat(at)


@case("meta.json", "hash")
def meta_without_a_hash(at):
    (at / "M0/meta.json").write_text('{"made_by": "test"}')
    return chat(at)


@case("ift.jsonl", "line 2", "not valid JSON")
def broken_line_in_the_seed_data(at):
    unsealed(at)
    lines = (at / "run/seed/ift.jsonl").read_text().split("\n")
    (at / "run/seed/ift.jsonl").write_text("\n".join([lines[0], lines[1][:-5], *lines[2:]]))
    return run(at)


@case("ift.jsonl", "line 3", "not a JSON object")
def line_in_the_seed_data_that_is_no_object(at):
    unsealed(at)
    lines = (at / "run/seed/ift.jsonl").read_text().split("\n")
    (at / "run/seed/ift.jsonl").write_text("\n".join([*lines[:2], "[1, 2]", *lines[3:]]))
    return run(at)


@case("ift.jsonl", "response")
def record_in_the_seed_data_without_its_response(at):
    unsealed(at)
    write_jsonl(at / "run/seed/ift.jsonl", [{"prompt": "News?"}])
    return run(at)


@case("judge.txt", "{response}", "exactly once", "0 times")
def judge_prompt_without_its_field(at):
    (at / "judge.txt").write_text("Is this an answer to {prompt}?")
    return run(at, f"judge.template={at}/judge.txt", out="new")


@case("already holds a model", "--out")
def export_over_a_model(at):
    (at / "M0/config.json").write_text("{}")
    return ["export", at / "M0", "--out", at / "M0"]


@case("prompts 0 to 1", "there is no 2")
def show_of_a_prompt_that_is_not_there(at):
    iteration(at, [RESPONSES] * 2, [REWARDS] * 2)
    return ["show", at / "run", "--prompt", "2"]


@case("M1-old holds no judged iteration", "choose --model from M1")
def show_of_a_folder_that_is_no_model(at):
    for name in ("M1", "M1-old"):
        write_jsonl(at / f"run/{name}/rewards.jsonl", [{"prompt": "a"}])
    return ["show", at / "run", "--model", "M1-old"]


def one_line(code, out, err, *named):
    assert code == 2 and "Traceback" not in out + err
    assert err.startswith("minisr: ") and err.count("\n") == 1 and err.endswith("\n")
    assert [words for words in named if words not in err] == []


def in_process(command):
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([str(part) for part in command])
    return code, out.getvalue(), err.getvalue()


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("change, named", [(c, n) for c, *n in SETTINGS])
def test_a_wrong_setting_is_one_line_and_changes_nothing(change, named, at):
    before = snapshot(at)
    one_line(*in_process(run(at, change)), *named)
    assert snapshot(at) == before


@pytest.mark.parametrize("changes, message", [
    (("dpo.min_learning_rate=0.1",), "dpo.min_learning_rate = 0.1 is larger than dpo.learning_rate"),
    (("sft.learning_rate=1e-6",), "larger than sft.learning_rate = 1e-06: lower it, too"),
    (("prompts.max_words=1",), "prompts.min_words is larger than prompts.max_words"),
    (("pairs.length_control=0.5", "pairs.rejected_from=next"), "length_control has no effect"),
    (("dpo.positives_only=true", "dpo.consistency=true"), "positives_only = true trains without DPO"),
    (("dpo.positives_only=true", "dpo.reference=M1"), "positives_only = true trains without DPO")])
def test_settings_that_contradict_each_other_are_one_line(changes, message, at):
    one_line(*in_process(["run", at / "run.toml", "--out", at / "new", *settings(*changes)]), message)
    assert not (at / "new").exists()


def test_a_gpu_that_is_not_there_is_one_line(at, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    one_line(*in_process(run(at, "device=cuda", out="new")), 'device is "cuda", but PyTorch sees no GPU', "auto")
    assert not (at / "new").exists()


def test_every_former_key_of_a_run_is_among_the_wrong_settings():
    # Those of [model], which only pretraining has, are in test_pretrain.py.
    keys = {change.partition("=")[0].rpartition(".")[2] for change, *_ in SETTINGS}
    assert set(RENAMED) - set(MODEL_KEYS_RENAMED) <= keys


@pytest.mark.parametrize("wrong", COMMANDS)
def test_a_wrong_command_is_one_line_and_changes_nothing(wrong, at):
    command, *named = COMMANDS[wrong]
    before = snapshot(at)
    one_line(*in_process(command(at)), *named)
    after = snapshot(at)
    assert [path for path in before if after.get(path) != before[path]] == []


@pytest.mark.parametrize("broken, named", CASES)
def test_wrong_input_is_one_line_that_names_it_and_changes_nothing(broken, named, at):
    command = broken(at)
    before = snapshot(at)
    one_line(*in_process(command), *named)
    after = snapshot(at)
    assert [path for path in before if after.get(path) != before[path]] == []
    assert not list(at.rglob("*.part")) and not (at / "executed").exists()


@pytest.mark.parametrize("fail, reason", [
    (lambda: {}["llama.block_count"], "'llama.block_count' is missing"),
    (lambda: next(iter(["text"]))["role"], "a value in it is missing or of the wrong type"),
    (lambda: "text".get, "a value in it is missing or of the wrong type"),
    (lambda: [][0], "a value in it is missing or of the wrong type"),
    (lambda: int("x\ny"), r"invalid literal for int() with base 10: 'x\ny'")])
def test_the_reason_of_an_error_speaks_of_the_file_not_of_python(fail, reason):
    with pytest.raises(Exception) as caught:
        fail()
    assert short_reason(caught.value) == reason


def test_an_evil_model_would_do_harm_if_it_were_trusted(at):
    # Otherwise the tests above would prove nothing.
    weights_that_are_a_program(at)
    torch.load(at / "M0/model.pt", weights_only=False)
    assert (at / "executed").is_dir()


@pytest.mark.parametrize("size, named", [(60, "vocab_size 60"), (9000, "vocab_size 9000")])
def test_a_vocabulary_that_does_not_suit_the_text_is_one_line(size, named, tmp_path, capfd):
    # capfd, because SentencePiece writes to stderr directly.
    (tmp_path / "pretrain.toml").write_text(f"threads = 1\ntokenizer_documents = 20\nmodel = {{vocab_size = {size}}}\n")
    code = main(["pretrain", str(tmp_path / "pretrain.toml"), "--out", str(tmp_path / "M0")])
    one_line(code, *capfd.readouterr(), named)
    assert not (tmp_path / "M0").exists()


@pytest.mark.parametrize("error, message", [
    (OSError(28, "No space left on device"), "No space left"),
    (RuntimeError("[enforce fail] unexpected pos 9"), "disk may be full")])  # what torch.save raises then
def test_a_checkpoint_on_a_full_disk_is_an_error_and_leaves_no_partial_file(
        error, message, tmp_path, monkeypatch):
    def save(value, file):
        file.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(InputError, match=message):
        save_model(tmp_path / "M0", tiny_model(), tiny_tokenizer(), {})
    assert list((tmp_path / "M0").iterdir()) == []
