"""`minisr run --processes N`: start N processes on this machine, as torchrun does, and watch them.

Process 0 has the terminal. If one process ends too early, the others are ended as well, and one line names it.
"""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from minisr import InputError
from minisr.runner.processes import EXIT_CODE_LOST

GRACE_SECONDS = 5.0  # for the other processes to report the same error, or that they lost one
INTERRUPTED = 130
# The network interface of processes on one machine: without it gloo looks up the machine's name, which may fail.
LOOPBACK = {"linux": {"GLOO_SOCKET_IFNAME": "lo"}, "darwin": {"GLOO_SOCKET_IFNAME": "lo0"}}.get(sys.platform, {})


def number_of_processes(text: str) -> int:
    """N from the command line."""
    if not text.isdecimal() or not 1 <= int(text) <= 1024:
        raise InputError(f'--processes must be a number from 1 to 1024 or "auto", not {text!r}')
    return int(text)


def automatic_number(device: str, threads: int) -> int:
    """N for --processes auto: one per GPU, or without GPUs for cores / threads."""
    gpus = available_gpus() if device != "cpu" else 0
    return gpus or max(1, available_cores() // threads)


def available_gpus() -> int:
    import torch
    return torch.cuda.device_count()


def available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def launch(arguments: list[str], n: int) -> int:
    """Run `minisr ARGUMENTS` in n processes; return the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        workers = [Worker(arguments, rank, n, Path(folder)) for rank in range(n)]
        stop_signals = forward_signals(workers)
        try:
            failed = wait(workers)
        finally:
            for worker in workers:
                worker.kill()
        if failed is None:
            return 0
        return report(failed, workers, interrupted=bool(stop_signals))


class Worker:
    """One of the processes."""

    def __init__(self, arguments: list[str], rank: int, n: int, folder: Path):
        self.rank, self.n = rank, n
        self.errors = folder / f"{rank}.stderr"  # of all but process 0, which writes to the terminal
        environment = {**LOOPBACK, **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n),
                       "LOCAL_WORLD_SIZE": str(n), "MINISR_RENDEZVOUS": str(folder / "rendezvous")}
        with open(self.errors, "wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "minisr", *arguments], env=environment, stdin=subprocess.PIPE,
                stdout=None if rank == 0 else subprocess.DEVNULL, stderr=None if rank == 0 else errors,
                start_new_session=True)  # Ctrl-C reaches the launcher alone, which passes it on once

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def forward_signals(workers: list[Worker]) -> list[int]:
    """Pass Ctrl-C and SIGTERM on to all processes; return a list that collects them."""
    received = []

    def forward(number, _):
        received.append(number)
        for worker in workers:
            if worker.process.poll() is None:
                worker.process.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    return received


def wait(workers: list[Worker]) -> Worker | None:
    """Wait until all processes have succeeded or one has failed; return the one that failed first.

    An interrupted process has not failed: the others may still be saving their work."""
    deadline = None
    while True:
        codes = [worker.process.poll() for worker in workers]
        if all(code == 0 for code in codes):
            return None
        failed = [worker for worker, code in zip(workers, codes) if code]
        if deadline is None and any(code not in (None, 0, INTERRUPTED) for code in codes):
            deadline = time.monotonic() + GRACE_SECONDS
        if failed and (None not in codes or deadline is not None and time.monotonic() > deadline):
            return min(failed, key=lambda worker: (worker.process.returncode == EXIT_CODE_LOST, worker.rank))
        time.sleep(0.02)


def report(failed: Worker, workers: list[Worker], interrupted: bool) -> int:
    """Say in one line which process failed, unless process 0 has printed the reason; return the exit code."""
    code = failed.process.returncode
    if workers[0].process.returncode == 0:  # its reader has gone, e.g. `minisr run ... | head`
        return 0
    if failed.rank == 0 and code in (1, 2, INTERRUPTED):
        return code
    if interrupted:
        print("\nminisr: interrupted; to resume, run the same command again", file=sys.stderr)
        return INTERRUPTED
    errors = failed.errors.read_text(errors="replace").strip()
    if code == EXIT_CODE_LOST:  # all have lost each other: each knows why, and process 0 leaves it to us
        errors = max(worker.errors.read_text(errors="replace").strip() for worker in workers)
    if code in (1, 2, EXIT_CODE_LOST) and errors:
        print(errors if code == 1 else errors.splitlines()[-1], file=sys.stderr)
        return INTERRUPTED if code == EXIT_CODE_LOST else code
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    print(f"minisr: process {failed.rank} of {failed.n} {how}; run the same command again to resume", file=sys.stderr)
    return INTERRUPTED


def is_worker() -> bool:
    """Whether a launcher started this process."""
    return "MINISR_RENDEZVOUS" in os.environ


def end_with_launcher() -> None:
    """In a worker: end this process when the launcher is gone."""
    if not is_worker():
        return

    def watch():
        while os.read(0, 1):  # returns b"" when the launcher's end of the pipe is closed
            pass
        os._exit(EXIT_CODE_LOST)

    threading.Thread(target=watch, daemon=True).start()
