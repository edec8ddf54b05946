"""Judges from outside: a program that scores responses, and one that compares two models."""

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import kills
import pytest
from small_run import jsonl, minisr, settings

from minisr import InputError
from minisr.evaluate import win_rates
from minisr.judge import Judgement
from minisr.runner import evaluation
from minisr.runner.command import BATCH, Command, read_score
from minisr.runner.config import JudgeConfig, load_config
from minisr.runner.engine import Workspace
from minisr.runner.files import read_json
from minisr.runner.head_to_head import read_verdict
from minisr.runner.journal import Journal
from minisr.runner.run import Run
from minisr.runner.steps import StoredModel

pytestmark = pytest.mark.usefixtures("no_drawing")
README = Path(__file__).parents[2] / "tiny_configs" / "README.md"
RECORDS = [{"prompt": f"Prompt {i}", "response": f"{i % 6}"} for i in range(5)]
EACH = "import json, sys\nfor n, line in enumerate(sys.stdin, 1):\n    asked = json.loads(line)\n    "
ECHO = EACH + "print(json.dumps({'score': int(asked['response']), 'text': asked['prompt']}))"
BACKWARDS = ("import json, sys\nfor asked in [json.loads(line) for line in sys.stdin][::-1]: "
             "print(json.dumps({**asked, 'score': int(asked['response'])}))")
SERVER = ("import subprocess, sys\n"  # a process that keeps the program's output open after its end
          "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n")
ORACLE = EACH + ("from minisr.worlds.tiny import oracle; "
                 "print(json.dumps({'score': oracle.score(asked['prompt'], asked['response'])}))")


def python(code: str) -> str:
    return shlex.join([sys.executable, "-c", code])


def ask(code: str, records=RECORDS, timeout=20, workspace=None):
    return Command(python(code), timeout=timeout).ask(records, read_score, workspace or Workspace(), "key")


def test_every_record_gets_its_answer_in_order():
    records = [{"prompt": f"Prompt {i} \u2028 é", "response": f"{i % 6}"} for i in range(2 * BATCH + 3)]
    assert ask(ECHO, records) == [(i % 6, f"Prompt {i} \u2028 é") for i in range(2 * BATCH + 3)]


def test_a_score_may_be_missing_and_a_text_too():
    assert ask(EACH + "print('{\"score\": null}')") == [(None, "")] * 5
    assert ask("import sys\nsys.stdin.read()\nprint('\\n'.join(['{\"score\": 2.5}'] * 5))") == [(2.5, "")] * 5


def test_an_answer_may_repeat_what_was_asked():
    assert ask(ECHO.replace("{", "{**asked, ")) == ask(ECHO)
    assert ask(ECHO.replace("{", "{'prompt': 'Rate ' + asked['prompt'], 'response': '0', ")) == ask(ECHO)


def test_an_answer_may_have_a_prompt_or_a_response_of_its_own():
    own = [{"prompt": "Rate it.", "response": text} for text in ("No.", "Yes.", "Perhaps.")]
    for fields in ("'response': 'Yes.', ", "'prompt': 'Rate it.', 'response': '0', ", "'prompt': 'Rate it.', "):
        assert ask(EACH + f"print(json.dumps({{{fields}'score': n}}))", own) == [(1, ""), (2, ""), (3, "")]


def test_answers_about_pairs_may_repeat_them_in_one_order():
    pairs = [{"prompt": "Which?", "response_a": a, "response_b": b} for a, b in ("xy", "yx")]
    code = EACH + ("a, b = sorted([asked['response_a'], asked['response_b']]); print(json.dumps("
                   "{'prompt': 'Which?', 'response_a': a, 'response_b': b, 'better': 'tie'}))")
    command = Command(python(code), "--judge", timeout=20)
    assert command.ask(pairs, read_verdict, Workspace(), "key") == [("tie", "")] * 2


@pytest.mark.parametrize("name, advice", [("judge.command", "set a longer judge.timeout$"),
                                          ("--judge", "set a longer judge.timeout in the run's config.toml$")])
def test_who_is_silent_too_long_is_told_what_works(name, advice):
    with pytest.raises(InputError, match=advice):
        Command(python("import time; time.sleep(60)"), name, timeout=1).ask(RECORDS, read_score, Workspace(), "key")


@pytest.mark.parametrize("begin, end", [("", "\\r\\n"), ("\\ufeff", "\\n"), ("\\n \\n", " \\t\\n")])
def test_a_line_may_end_and_begin_as_elsewhere(begin, end):
    assert ask(EACH + f"print('{begin}{{\"score\": 3}}', end='{end}')") == [(3, "")] * 5


def test_a_program_in_python_writes_utf_8(monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    assert ask(EACH + "print(json.dumps({'score': 1, 'text': 'schön'}, ensure_ascii=False))") == [(1, "schön")] * 5


def test_much_noise_on_standard_error_stops_nothing():
    noise = "sys.stderr.write('INFO ' * 100_000)"
    assert ask(f"import sys; {noise}\n{ECHO}; {noise}") == ask(ECHO)


@pytest.mark.skipif(sys.platform == "win32", reason="process groups")
def test_a_server_that_the_program_has_started_is_not_waited_for():
    start = time.monotonic()
    assert ask(SERVER + ECHO) == ask(ECHO)
    assert time.monotonic() - start < 15


def answers(last: str) -> str:
    """A program that answers two records, and then writes this."""
    return EACH + f"print('{{\"score\": 1}}' if n < 3 else {last!r})"


FAILURES = {  # the program, and what the error says
    "ends at once": ("raise SystemExit(3)", "exit code 3, without an answer to record 1 .*'Prompt 0'"),
    "crashes": (EACH + "1 / 0", "exit code 1, without an answer to record 1.*ZeroDivisionError"),
    "fails at the end": (ECHO + "\nsys.exit(4)", "exit code 4"),
    "too few lines": (EACH + "n < 4 and print('{\"score\": 1}')",
                      "exit code 0, without an answer to record 4 .*'Prompt 3'"),
    "too many lines": (ECHO + "\nprint('{\"score\": 1}')", "more lines than the 5"),
    "dies midway": (EACH + "print('{\"score\": 1}', flush=True)\n    n == 3 and __import__('os').kill("
                    "__import__('os').getpid(), 9)", "exit code -9, without an answer to record 4"),
    "no JSON": (answers("Score: 4"), "record 3 .*'Prompt 2'.*it wrote 'Score: 4'"),
    "cut JSON": (answers('{"score": 4'), "record 3"),
    "no object": (answers("[4]"), 'record 3 .*JSON object with "score"'),
    "another key": (answers('{"rating": 4}'), 'record 3 .*JSON object with "score"'),
    "above": (answers('{"score": 5.01}'), "record 3 .*from 0 to 5"),
    "below": (answers('{"score": -1}'), "record 3 .*from 0 to 5"),
    "NaN": (answers('{"score": NaN}'), "record 3 .*from 0 to 5"),
    "infinite": (answers('{"score": Infinity}'), "record 3 .*from 0 to 5"),
    "huge": (answers('{"score": 1' + "0" * 400 + "}"), "record 3"),
    "a text": (answers('{"score": "4"}'), "record 3 .*from 0 to 5"),
    "true": (answers('{"score": true}'), "record 3 .*from 0 to 5"),
    "text of another type": (answers('{"score": 4, "text": [1]}'), "record 3 .*\"text\" must be a string"),
    "a lone surrogate": (answers('{"score": 4, "text": "\\ud800"}'), "record 3"),
    "deep": (answers("[" * 100_000), "record 3 .*nested too deeply"),
    "two scores": (answers('{"score": 1, "score": 5}'), "record 3 .*the key 'score' comes twice"),
    "a log line": ("print('Loading the judge', flush=True)\n" + ECHO,
                   "record 1 .*only answers may go to standard output.*it wrote 'Loading the judge'"),
    "a progress bar": ("print('50%|###', end='')\n" + ECHO, "record 1 .*standard output.*it wrote '50%|###"),
    "Latin-1": (EACH + "sys.stdout.buffer.write('{\"score\": 1, \"text\": \"schön\"}\\n'.encode('latin-1'))",
                "record 1 .*not UTF-8"),
    "another order": (BACKWARDS, "record 1 .*another record; answers must come in the order of the records"),
    "a bar and colours": ("import sys; sys.stderr.write('\\r 10%\\r 90%\\r\\x1b[31mno memory\\x1b[0m\\n'); sys.exit(1)",
                          r"exit code 1, .* \(\\x1b\[31mno memory\\x1b\[0m\)"),
    "a server outlives it": (SERVER + "sys.exit(3)", "exit code 3, without an answer to record 1"),
    "does not end": (ECHO + "\n__import__('time').sleep(60)",
                     "answered every record, but did not end within 1 seconds"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_one_line_that_names_the_record(name):
    code, message = FAILURES[name]
    start = time.monotonic()
    with pytest.raises(InputError, match=message) as error:
        ask(code, timeout=1 if name == "does not end" else 20)
    assert time.monotonic() - start < 15
    assert "\n" not in str(error.value) and str(error.value).startswith("judge.command")


@pytest.mark.parametrize("code", [EACH + "n == 3 and __import__('time').sleep(60); print('{\"score\": 1}', flush=True)",
                                  "import os, time; os.close(1); time.sleep(60)"])
def test_silence_ends_at_the_timeout(code):
    start = time.monotonic()
    with pytest.raises(InputError, match="silent for 1 seconds, without an answer to record [13] "):
        ask(code, timeout=1)
    assert time.monotonic() - start < 15


def test_a_byte_order_mark_before_the_first_answer_is_no_fault():
    # PowerShell writes one.
    code = "import sys\nsys.stdout.reconfigure(encoding='utf-8-sig')\n" + ECHO
    assert ask(code) == [(i % 6, f"Prompt {i}") for i in range(5)]


def test_a_tilde_is_the_home_folder_in_a_command(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my judge.py").write_text(ECHO)
    command = Command(f"{shlex.quote(sys.executable)} '~/my judge.py'", timeout=20)
    assert command.ask(RECORDS, read_score, Workspace(), "key") == [(i % 6, f"Prompt {i}") for i in range(5)]


@pytest.mark.parametrize("line, message", [("no-such-program --x", "no such program"), ("python 'open", "command line"),
                                           ("", "no such program"), ("/", "no such program")])
def test_a_command_that_cannot_be_run_is_refused(line, message):
    with pytest.raises(InputError, match=message):
        Command(line).ask(RECORDS, read_score, Workspace())


def test_no_shell_reads_the_command():
    command = Command(python(ECHO) + " ; exit 1 > /dev/null $HOME")
    assert command.ask(RECORDS, read_score, Workspace())[4] == (4, "Prompt 4")


def test_the_program_is_no_process_of_the_launcher(monkeypatch):
    launchers = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME",
                 "MINISR_RENDEZVOUS", "TORCHELASTIC_RUN_ID")
    for name in (*launchers, "RANKING"):
        monkeypatch.setenv(name, "1")
    code = EACH + "import os; print(json.dumps({'score': 1, 'text': ' '.join(os.environ)}))"
    [(_, text)] = Command(python(code)).ask_batch(RECORDS[:1], 1, read_score)
    assert not set(launchers) & set(text.split()) and {"RANKING", "PATH"} <= set(text.split())


def test_a_slow_program_in_python_is_not_silent(monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    slow = EACH + "print('{\"score\": 1}')\n    __import__('time').sleep(0.7)"
    assert ask(slow, RECORDS[:4], timeout=2) == [(1, "")] * 4  # 2.8 seconds in all


def test_finished_batches_are_kept(tmp_path):
    records = [{"prompt": f"{i}", "response": "3"} for i in range(3 * BATCH)]
    log, broken = tmp_path / "log", tmp_path / "broken"
    broken.touch()
    code = EACH + (f"import os; print(asked['prompt'], file=open({str(log)!r}, 'a'))\n"
                   f"    if asked['prompt'] == '{BATCH + 5}' and os.path.exists({str(broken)!r}): sys.exit(1)\n"
                   "    print(json.dumps({'score': 3, 'text': asked['prompt']}))")

    def asked_again():
        workspace = Workspace(journal=Journal(tmp_path / "journal", "inputs"))
        return ask(code, records, workspace=workspace)

    with pytest.raises(InputError, match=f"record {BATCH + 6} "):
        asked_again()
    broken.unlink()
    log.unlink()
    assert [text for _, text in asked_again()] == [f"{i}" for i in range(3 * BATCH)]
    assert log.read_text().split() == [f"{i}" for i in range(BATCH, 3 * BATCH)]


# A whole run

SHORT = ("iterations=1", "seed_data.ift=8", "seed_data.ranked=4", "seed_data.evaluation=2",
         "evaluate.max_new_tokens=16")
SHORT_SETTINGS = settings(*SHORT)


def test_the_oracle_behind_a_command_gives_the_rewards_of_the_oracle(config, tmp_path):
    log = f"print(asked['prompt'], file=open({str(tmp_path / 'log')!r}, 'a')); "
    command = f"judge.command={json.dumps(python(ORACLE.replace('from minisr', log + 'from minisr')))}"
    runs = {"oracle": ["judge.by=oracle"], "command": ["judge.by=command", command]}
    for name, changes in runs.items():
        code, _, error = minisr("run", config, *settings(*changes, *SHORT), "--out", tmp_path / name)
        assert code == 0, error
    by_oracle, by_command = (jsonl(tmp_path / name / "M1" / "rewards.jsonl") for name in runs)
    assert [r["rewards"] for r in by_command] == [r["rewards"] for r in by_oracle]
    assert all(len(scores) == 2 for record in by_command for scores in record["scores"])  # J = 2
    assert jsonl(tmp_path / "command/M1/pairs.jsonl") == jsonl(tmp_path / "oracle/M1/pairs.jsonl")
    for model in ("SFT", "M2"):  # the judge that is measured is the command
        judge = read_json(tmp_path / "command/metrics.json", "metrics")["models"][model]["judge"]
        assert judge["pairwise"] == judge["exact"] == judge["parse_rate"] == 1
    # It is asked about the held-out responses J = 2 times, not again for each of three models.
    ranked = jsonl(tmp_path / "command/seed/judge_evaluation.jsonl")
    asked = Counter((tmp_path / "log").read_text().splitlines())
    assert {r["prompt"]: asked[r["prompt"]] for r in ranked} == {r["prompt"]: 2 * len(r["responses"]) for r in ranked}


def test_the_judgements_of_other_held_out_responses_are_not_taken(copy, monkeypatch):
    run = Run(copy, replace(load_config(copy / "config.toml"), judge=JudgeConfig(by="command", command="python")))
    other = [{**record, "responses": record["responses"][::-1]} for record in run.judge_evaluation]
    asked = []
    monkeypatch.setattr(evaluation, "command_judgements", lambda config, workspace, prompts, responses:
                        asked.extend(responses) or [[Judgement("", 3)]] * len(responses))
    M1 = StoredModel(run, "M1")
    assert M1.judge_ranked(run.judge_evaluation) == jsonl(copy / "SFT/judge_evaluation.jsonl") and asked == []
    assert [record["rewards"] for record in M1.judge_ranked(other)] == [[3] * 3] * len(other)
    assert asked == [response for record in other for response in record["responses"]]
    (copy / "SFT/judge_evaluation.jsonl").write_text("")
    with pytest.raises(InputError, match="SFT/judge_evaluation.jsonl is not the file that minisr wrote"):
        M1.judge_ranked(other)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_the_program_ends_when_it_writes_and_minisr_was_killed(tmp_path):
    judge = EACH + f"open({str(tmp_path / 'pid')!r}, 'w').write(str(__import__('os').getpid()))\n" \
                   "    __import__('time').sleep(0.1); print('{\"score\": 1}')"
    ask_it = ("from minisr.runner.command import Command, read_score\n"
              f"Command({python(judge)!r}).ask_batch([{{'prompt': ''}}] * 600, 1, read_score)")
    asking = subprocess.Popen([sys.executable, "-c", ask_it])
    deadline = time.monotonic() + 60
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    asking.kill()
    asking.wait()
    start = time.monotonic()
    while kills.is_alive(int((tmp_path / "pid").read_text())):
        assert time.monotonic() - start < 30  # the whole batch takes a minute
        time.sleep(0.1)


@pytest.mark.parametrize("changes, message", [
    (["judge.by=command"], "go together"), (["judge.command=python"], "go together"),
    (["judge.by=command", "judge.command=no-such-program x.py"], "no such program"),
    (["judge.by=command", f"judge.command={sys.executable} no_such_file.py"],
     "exit code 2, without an answer to record 1"),
    (["judge.by=command", f"judge.command={json.dumps(python(answers('x').replace('3', '1')))}"], "it wrote 'x'"),
])
def test_a_wrong_judge_is_found_before_anything_is_made(config, tmp_path, changes, message):
    code, _, error = minisr("run", config, *settings(*changes), "--out", tmp_path / "run")
    assert code == 2 and message in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_ctrl_c_ends_the_program_and_the_run(config, tmp_path):
    marker = tmp_path / "pid"
    code = ("import os, sys, time\n"
            f"first = not os.path.exists({str(marker)!r} + '.asked'); open({str(marker)!r} + '.asked', 'w')\n"
            "if first: [print('{\"score\": 1}') for _ in sys.stdin]; sys.exit()\n"
            f"open({str(marker)!r}, 'w').write(str(os.getpid())); time.sleep(600)")
    run = subprocess.Popen([sys.executable, "-m", "minisr", "run", config, "--out", tmp_path / "run", "--set",
                            "judge.by=command", "--set", f"judge.command={json.dumps(python(code))}",
                            *SHORT_SETTINGS], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (marker.exists() and marker.read_text()) and time.monotonic() < deadline and run.poll() is None:
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    _, error = run.communicate(timeout=30)
    assert run.returncode == 130 and b"Traceback" not in error
    assert not kills.is_alive(int(marker.read_text()))


def test_eval_never_starts_the_program_that_a_config_names(copy, tmp_path):
    path, marker = copy / "config.toml", tmp_path / "started"
    command = python(f"open({str(marker)!r}, 'w')")
    text = path.read_text()
    assert text.count('by = "self"') == text.count('command = ""') == 1
    path.write_text(text.replace('by = "self"', 'by = "command"').replace(
        'command = ""', f"command = {json.dumps(command)}"))
    assert minisr("eval", copy)[0] == 0  # everything is judged already
    for name in ("judge_evaluation.jsonl", "judge_evaluation.counts.json"):
        (copy / "M2" / name).rename(tmp_path / name)
        code, _, error = minisr("eval", copy)
        assert code == 2 and error.count("\n") == 1 and not marker.exists()
        assert "not judged yet for M2" in error and repr(command) in error and "minisr run" in error
        (tmp_path / name).rename(copy / "M2" / name)


# The examples of the README, as printed

def scripts() -> list[str]:
    chapter = README.read_text().split("## A judge of your own")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", chapter, re.DOTALL)


def test_the_readmes_judge_works_as_printed(config, tmp_path):
    script = tmp_path / "my judge.py"
    script.write_text(scripts()[0])
    assert len(scripts()[0].splitlines()) == 5
    command = json.dumps(shlex.join([sys.executable, str(script)]))
    code, _, error = minisr("run", config, "--set", "judge.by=command", "--set", f"judge.command={command}",
                            *SHORT_SETTINGS, "--out", tmp_path / "run")
    assert code == 0, error
    for y, r in zip(jsonl(tmp_path / "run/M1/responses.jsonl"), jsonl(tmp_path / "run/M1/rewards.jsonl")):
        expected = [min(5, len(set(text.split())) / 5) if done else None
                    for text, done in zip(y["responses"], y["finished"])]
        assert r["rewards"] == expected


# minisr eval RUN --judge COMMAND

def compare(folder, code: str) -> tuple[str, dict]:
    exit_code, out, error = minisr("eval", folder, "--judge", python(code))
    assert exit_code == 0, error
    return out, {(c["model"], c["other"]): c for c in read_json(folder / "head_to_head.json", "results")["contests"]}


def test_the_readmes_comparison_works_as_printed(copy):
    (copy / "head_to_head.journal.1").touch()  # of an interrupted comparison with more processes
    out, contests = compare(copy, scripts()[1])
    assert list(contests) == [("M1", "SFT"), ("M2", "M1"), ("M2", "SFT"), ("M3", "M2"), ("M3", "SFT")]
    for (model, other), contest in contests.items():
        lengths = [[len(r["sampled"]) for r in jsonl(copy / name / "answers.jsonl")] for name in (model, other)]
        expected = win_rates(*lengths)
        assert {name: contest[name] for name in expected} == expected
        assert contest["prompts"] == 8 and contest["unread"] == 0
        assert re.search(rf"^{model} +{other} +{100 * expected['win']:.0f} \[", out, re.MULTILINE)
    verdicts = jsonl(copy / "head_to_head.jsonl")
    assert len(verdicts) == 5 * 8 and not [*copy.glob("head_to_head.journal*")]


def test_a_judge_that_always_prefers_the_first_answer_sees_only_ties(copy):
    _, contests = compare(copy, EACH + "print('{\"better\": \"a\"}')")
    assert {contest["tie"] for contest in contests.values()} == {1}


def test_no_verdict_is_left_out_and_counted(copy):
    _, contests = compare(copy, EACH + "print(json.dumps({'better': None if n == 1 else 'tie'}))")
    assert all((c["prompts"], c["unread"], c["tie"]) == (7, 1, 1) for c in contests.values())
    out, contests = compare(copy, EACH + "print('{\"better\": null}')")
    assert all(c["prompts"] == 0 and "win" not in c for c in contests.values()) and "  -  " in out


@pytest.mark.parametrize("code, message", [
    (EACH + "print('{\"better\": \"c\"}')", "--judge, record 1 .*better must be"),
    (EACH + "print('{\"score\": 1}')", '--judge, record 1 .*"better"'),
    ("raise SystemExit(1)", "--judge ended with exit code 1"),
    ("'\udcff'", "--judge: a lone surrogate")])  # a byte of the command line that is no UTF-8
def test_a_wrong_comparison_is_one_line(finished, code, message):
    exit_code, _, error = minisr("eval", finished, "--judge", python(code))
    assert exit_code == 2 and re.search(message, error) and error.count("\n") == 1
    assert not (finished / "head_to_head.json").exists()


def test_a_comparison_goes_on_where_it_failed(copy, tmp_path):
    log, broken = tmp_path / "log", tmp_path / "broken"
    code = EACH + (f"import os; n == 1 and print('start', file=open({str(log)!r}, 'a'))\n"
                   f"    if len(open({str(log)!r}).readlines()) == 3 and os.path.exists({str(broken)!r}): sys.exit(1)\n"
                   "    print('{\"better\": \"tie\"}')")
    broken.touch()
    assert minisr("eval", copy, "--judge", python(code))[0] == 2
    broken.unlink()
    assert minisr("eval", copy, "--judge", python(code))[0] == 0
    assert log.read_text().split() == ["start"] * (3 + 3)  # two of five contests were kept


def test_one_model_alone_is_compared_with_none(copy):
    for name in ("M1", "M2", "M3"):
        shutil.rmtree(copy / name)
    code, out, error = minisr("eval", copy, "--judge", python(EACH + "print('{\"better\": \"tie\"}')"))
    assert (code, out) == (2, "") and "has only SFT so far" in error and error.count("\n") == 1
    assert not (copy / "head_to_head.json").exists()
