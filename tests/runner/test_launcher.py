"""The launcher of several processes, with a shell script in place of minisr: exit codes, messages, signals."""

import os
import signal
import sys
import threading
import time

import pytest

from minisr.runner import launcher
from minisr.runner.processes import EXIT_CODE_LOST

RESUME = "run the same command again to resume\n"
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="shell scripts")


@pytest.fixture
def launch(tmp_path, monkeypatch, capfd):
    """Launch a script in three processes: the exit code, and what they wrote to standard error."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(launcher, "GRACE_SECONDS", 0.3)

    def launch(script):
        program = tmp_path / "program"
        program.write_text(f"#!/bin/sh\ncd {tmp_path}\necho $$ > pid.$RANK\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))
        code = launcher.launch(["run", "tiny.toml"], 3)
        return code, capfd.readouterr().err
    yield launch
    for number, handler in before.items():
        signal.signal(number, handler)


def test_every_process_gets_the_arguments_its_rank_and_their_number(launch, tmp_path):
    assert launch('echo $RANK $LOCAL_RANK $WORLD_SIZE $MINISR_RENDEZVOUS $* > said.$RANK') == (0, "")
    said = [(tmp_path / f"said.{rank}").read_text().split() for rank in range(3)]
    rendezvous = said[0][3]
    assert said == [[f"{rank}", f"{rank}", "3", rendezvous, "-m", "minisr", "run", "tiny.toml"] for rank in range(3)]


@pytest.mark.parametrize("end, how", [("kill -9 $$", "was killed by signal 9"), ("exit 7", "ended with exit code 7")])
@pytest.mark.parametrize("victim", [0, 2])
def test_a_process_that_fails_ends_the_others_and_is_named(victim, end, how, launch, tmp_path):
    start = time.monotonic()
    all_started = "until [ -e pid.0 -a -e pid.1 -a -e pid.2 ]; do sleep 0.01; done"
    code, errors = launch(f"if [ $RANK = {victim} ]; then {all_started}; {end}; fi; exec sleep 20")
    assert (code, errors) == (130, f"minisr: process {victim} of 3 {how}; {RESUME}")
    assert time.monotonic() - start < 10
    for rank in range(3):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f"pid.{rank}").read_text()), 0)


def test_a_process_that_lost_another_one_is_not_to_blame(launch, monkeypatch):
    monkeypatch.setattr(launcher, "GRACE_SECONDS", 5.0)  # time for the one that is killed; nothing waits for it to pass
    code, errors = launch(f"if [ $RANK = 1 ]; then sleep 0.1; kill -9 $$; fi; exit {EXIT_CODE_LOST}")
    assert (code, errors) == (130, f"minisr: process 1 of 3 was killed by signal 9; {RESUME}")


@pytest.mark.parametrize("victims", ["0 1 2", "0", "1", "1 2"])
def test_wrong_input_is_one_line_whoever_finds_it(victims, launch):
    code, errors = launch(f"""case " {victims} " in *" $RANK "*)
        echo "minisr: no such key" >&2; exit 2;; esac
        exec sleep 20""")
    assert (code, errors) == (2, "minisr: no such key\n")


def test_a_traceback_of_another_process_is_shown_in_full(launch):
    code, errors = launch("if [ $RANK = 2 ]; then echo Traceback >&2; echo ValueError >&2; exit 1; fi; exec sleep 20")
    assert (code, errors) == (1, "Traceback\nValueError\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_to_all_processes(number, launch, tmp_path):
    def send():
        deadline = time.monotonic() + 10
        while len(list(tmp_path.glob("ready.*"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), number)
    sender = threading.Thread(target=send)
    sender.start()
    code, errors = launch("trap 'touch stopped.$RANK; exit 130' INT TERM; touch ready.$RANK\n"
                          "for i in $(seq 200); do sleep 0.05; done")
    sender.join()
    assert (code, errors) == (130, "")
    assert sorted(path.name for path in tmp_path.glob("stopped.*")) == ["stopped.0", "stopped.1", "stopped.2"]
