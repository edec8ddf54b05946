"""A judge from outside: a program that reads JSON lines on standard input and writes one JSON line for each, in order.

It is started once for each batch of records, without a shell, and sees the end of its input. Finished batches are
stored in the journal of the step, like the model's own judgements.
"""

import contextlib
import json
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import threading
import time
from dataclasses import dataclass

from minisr import InputError
from minisr.judge import MAX_SCORE, Judgement
from minisr.runner.files import LONE_SURROGATE, has_lone_surrogate, printable, unique_keys
from minisr.runner.stop import Stop

BATCH = 64  # records for one start of the program
GRACE_SECONDS = 1.0  # of silence after the program has ended, in which what it has started may still write
# What a launcher sets for minisr's processes; a program that uses torch.distributed itself must not join them.
LAUNCHER_VARIABLES = re.compile("(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_.*|TORCHELASTIC_.*|"
                                "GLOO_SOCKET_IFNAME|MINISR_RENDEZVOUS")


@dataclass(frozen=True)
class Command:
    """A command line, what error messages call it, and after how many seconds of silence it counts as hung."""

    line: str
    name: str = "judge.command"
    timeout: int = 600

    def arguments(self) -> list[str]:
        """The program and its arguments. Raises InputError if there is no such program."""
        try:
            arguments = [os.path.expanduser(argument) for argument in shlex.split(self.line)]
        except ValueError as error:
            raise InputError(f"{self.name} {self.line!r} is no command line: {error}") from error
        if not arguments or shutil.which(arguments[0]) is None:
            raise InputError(f"{self.name} {self.line!r}: there is no such program; name one that can be run, e.g. "
                             '"python my_judge.py"')
        return arguments

    def ask(self, records: list[dict], read_answer, workspace, *key) -> list:
        """Return read_answer(answer) of the program's answer to each record; see the module's docstring.

        read_answer takes a JSON object. It returns a value that JSON can store, or raises ValueError."""
        def ask_batch(numbered: list[tuple[int, dict]]) -> list:
            return self.ask_batch([record for _, record in numbered], numbered[0][0], read_answer)

        return workspace.share(ask_batch, groups(list(enumerate(records, 1)), BATCH), *key)

    def ask_batch(self, records: list[dict], first: int, read_answer) -> list:
        """The answers to one batch, whose first record has the number `first`."""
        def label(i: int) -> str:
            return f"record {first + i} (prompt {records[i]['prompt'][:40]!r})"

        answers = []
        with Program(self, records) as program:
            for line in program.lines():
                if len(answers) == len(records):
                    raise InputError(f"{self.name} wrote more lines than the {len(records)} it was given, after "
                                     f"{label(len(records) - 1)}; it must write one line for each")
                try:
                    answer = parse_line(line)
                    check_order(answer, records, len(answers))
                    answers.append(read_answer(answer))
                except ValueError as error:
                    wrote = line.decode(errors="replace")[:80]
                    raise InputError(f"{self.name}, {label(len(answers))}: {error}; it wrote {wrote!r}") from error
            self.check_end(program, label(len(answers)) if len(answers) < len(records) else None)
        return answers

    def check_end(self, program: "Program", unanswered: str | None) -> None:
        """Raise InputError unless the program has ended well and answered every record."""
        code, waiting = program.exit_code(), f", without an answer to {unanswered}" if unanswered else ""
        if code is None and not unanswered:
            raise InputError(f"{self.name} has answered every record, but did not end within {self.timeout} seconds; "
                             "it must end when it has read its whole input")
        if code is None:
            where = " in the run's config.toml" if self.name == "--judge" else ""  # minisr eval takes no --set
            raise InputError(f"{self.name} was silent for {self.timeout} seconds{waiting}; make it faster, or "
                             f"set a longer judge.timeout{where}")
        if code or unanswered:
            raise InputError(f"{self.name} ended with exit code {code}{waiting}{program.last_words()}; fix it, "
                             "then run the same command again: finished batches are kept")


class Program:
    """A running command. It is in a session of its own, so that Ctrl-C reaches minisr alone, which then ends it."""

    def __init__(self, command: Command, records: list[dict]):
        self.command, self.output, self.errors, self.hung = command, queue.Queue(), b"", False
        self.input = "".join(json.dumps(record) + "\n" for record in records).encode()

    def __enter__(self) -> "Program":
        pipe = subprocess.PIPE
        try:
            self.process = subprocess.Popen(self.command.arguments(), stdin=pipe, stdout=pipe, stderr=pipe,
                                            env=environment(), start_new_session=True)
        except OSError as error:
            raise InputError(f"{self.command.name} {self.command.line!r} cannot be run: {error.strerror}") from error
        for work in (self._write, self._read, self._read_errors):
            threading.Thread(target=work, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(OSError):
            if hasattr(os, "killpg"):
                os.killpg(self.process.pid, signal.SIGKILL)  # also what the program started
            else:
                self.process.kill()
        self.process.wait()

    def _write(self) -> None:
        with contextlib.suppress(OSError), self.process.stdin as pipe:  # it may end before it has read everything
            pipe.write(self.input)

    def _read(self) -> None:
        with self.process.stdout as pipe:
            for line in pipe:
                self.output.put(line)
        self.output.put(None)

    def _read_errors(self) -> None:
        with self.process.stderr as pipe:
            for line in pipe:
                self.errors = line.strip() or self.errors

    def lines(self):
        """Each line that the program writes, until it closes its output, is silent for too long, or has ended.

        What it has started, such as a server, may keep the output open after its end."""
        deadline = time.monotonic() + self.command.timeout
        while True:
            try:
                line = self.output.get(timeout=0.1)
            except queue.Empty:
                if Stop.requested:
                    raise KeyboardInterrupt from None
                if self.process.poll() is not None:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
                if time.monotonic() > deadline:
                    self.hung = self.process.poll() is None
                    return
                continue
            if line is None:
                return
            deadline = time.monotonic() + self.command.timeout
            if line.strip():
                yield line.strip()

    def exit_code(self) -> int | None:
        """None if it is hung."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return None if self.hung else self.process.wait(self.command.timeout)
        return None

    def last_words(self) -> str:
        """The last line on standard error, of a progress bar its last state."""
        time.sleep(0.1)  # for the thread that reads it
        text = printable(self.errors.decode(errors="replace").rpartition("\r")[2])
        return f" ({text[:200]})" if text else ""


def environment() -> dict[str, str]:
    """The program's environment: minisr's own without its launcher's variables.

    Programs in Python write UTF-8 in it and buffer no output."""
    kept = {name: value for name, value in os.environ.items() if not LAUNCHER_VARIABLES.fullmatch(name)}
    return {**kept, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}


def judge_command(config) -> Command:
    """The judge of a run's config."""
    return Command(config.judge.command, timeout=config.judge.timeout)


def command_judgements(config, workspace, prompts: list[str], responses: list[str]) -> list[list[Judgement]]:
    """J judgements of each (prompt, response), as judge.judge returns them."""
    J = config.judge.judgements
    records = [{"prompt": x, "response": y, "judgement": j} for x, y in zip(prompts, responses) for j in range(J)]
    answers = judge_command(config).ask(records, read_score, workspace, "command")
    return [[Judgement(text, score) for score, text in of_response] for of_response in groups(answers, J)]


def parse_line(line: bytes):
    """The JSON value in one line of a program's output. Raises ValueError that says what is wrong with it."""
    try:
        return json.loads(line, object_pairs_hook=unique_keys)
    except UnicodeDecodeError as error:
        raise ValueError("the line is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"the line is not JSON ({error.msg}); only answers may go to standard output, everything "
                         "else to standard error") from error
    except RecursionError as error:
        raise ValueError("the line is nested too deeply") from error


def check_order(answer, records: list[dict], i: int) -> None:
    """Raise ValueError if the answer to record i repeats the prompt and response of another record instead.

    A program that asks in parallel and writes each answer as it comes mixes up their order. Answers that repeat only
    one of the two, or that compare pairs, are not checked."""
    def texts(record: dict) -> tuple:
        return record.get("prompt"), record.get("response")

    if not isinstance(answer, dict) or None in texts(answer) or texts(answer) == texts(records[i]):
        return
    if texts(answer) in map(texts, records):
        raise ValueError("the line repeats the texts of another record; answers must come in the order of the records")


def read_score(answer: dict) -> tuple[float | None, str]:
    """(score, text) of {"score": 0 to 5 or null, "text": why}."""
    if not isinstance(answer, dict) or "score" not in answer:
        raise ValueError('expected a JSON object with "score"')
    score = answer["score"]
    is_number = type(score) in (int, float)  # neither true nor a text; NaN lies in no range
    if score is not None and not (is_number and 0 <= score <= MAX_SCORE):
        raise ValueError(f"score must be a number from 0 to {MAX_SCORE} or null")
    return score, read_text_of(answer)


def read_text_of(answer: dict) -> str:
    """The optional "text" of an answer."""
    text = answer.get("text") or ""
    if not isinstance(text, str):
        raise ValueError('"text" must be a string')
    if has_lone_surrogate(text):
        raise ValueError(f"{LONE_SURROGATE} in the text")
    return text


def groups(values: list, size: int) -> list[list]:
    """The values in order, `size` at a time."""
    return [values[i:i + size] for i in range(0, len(values), size)]
