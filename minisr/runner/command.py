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
from minisr.runner.stop import Stop

BATCH = 64  # records for one start of the program
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
            arguments = shlex.split(self.line)
        except ValueError as error:
            raise InputError(f"{self.name} {self.line!r} is no command line: {error}") from error
        if not arguments or shutil.which(arguments[0]) is None:
            raise InputError(f"{self.name} {self.line!r}: there is no such program; name one that can be run, e.g. "
                             '"python my_judge.py"')
        return arguments

    def ask(self, records: list[dict], read_answer, workspace, *key) -> list:
        """read_answer(answer, label) of the program's answer to each record; see the module's docstring.

        read_answer takes a JSON object, and returns what JSON can hold or raises ValueError."""
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
                    answers.append(read_answer(json.loads(line)))
                except (ValueError, RecursionError) as error:
                    raise InputError(f"{self.name}, {label(len(answers))}: {error}; it wrote {line[:80]!r}") from error
            waiting = f", without an answer to {label(len(answers))}" if len(answers) < len(records) else ""
            code = program.exit_code()
            if code is None:
                raise InputError(f"{self.name} was silent for {self.timeout} seconds{waiting}; make it faster, or "
                                 "set a longer timeout")
            if code or waiting:
                raise InputError(f"{self.name} ended with exit code {code}{waiting}{program.last_words()}; fix it, "
                                 "then run the same command again: finished batches are kept")
        return answers


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
        """Each line that the program writes, until it closes its output or is silent for too long."""
        deadline = time.monotonic() + self.command.timeout
        while True:
            try:
                line = self.output.get(timeout=0.1)
            except queue.Empty:
                if Stop.requested:
                    raise KeyboardInterrupt from None
                self.hung = time.monotonic() > deadline
                if self.hung:
                    return
                continue
            if line is None:
                return
            deadline = time.monotonic() + self.command.timeout
            if line.strip():
                yield line.decode(errors="replace").strip()

    def exit_code(self) -> int | None:
        """None if it is hung."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return None if self.hung else self.process.wait(self.command.timeout)
        return None

    def last_words(self) -> str:
        """The last line on standard error."""
        time.sleep(0.1)  # for the thread that reads it
        text = self.errors.decode(errors="replace")
        return f" ({text[:200]})" if text else ""


def environment() -> dict[str, str]:
    """The program's environment: minisr's own without its launcher's variables. Python buffers no output in it."""
    kept = {name: value for name, value in os.environ.items() if not LAUNCHER_VARIABLES.fullmatch(name)}
    return {**kept, "PYTHONUNBUFFERED": "1"}


def judge_command(config) -> Command:
    """The judge of a run's config."""
    return Command(config.judge.command, timeout=config.judge.timeout)


def command_judgements(config, workspace, prompts: list[str], responses: list[str]) -> list[list[Judgement]]:
    """J judgements of each (prompt, response), as judge.judge returns them."""
    J = config.judge.judgements
    records = [{"prompt": x, "response": y, "judgement": j} for x, y in zip(prompts, responses) for j in range(J)]
    answers = judge_command(config).ask(records, read_score, workspace, "command")
    return [[Judgement(text, score) for score, text in of_response] for of_response in groups(answers, J)]


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
        raise ValueError("text must be a text")
    text.encode()  # half a surrogate pair is a ValueError
    return text


def groups(values: list, size: int) -> list[list]:
    """The values in order, `size` at a time."""
    return [values[i:i + size] for i in range(0, len(values), size)]
