"""The processes of a run, started by torchrun or by `minisr run --processes N` (launcher.py).

Every process executes the same code. They share what takes time: batches of sampling (engine.py) and micro-batches of
training (gradients.py). All else each process computes by itself, with the same result. Process 0 alone writes files
and prints; the others read what it wrote, so all need the same folder. Without torchrun there is one process, and the
functions here return at once.
"""

import contextlib
import io
import os
import sys
from datetime import timedelta

LOST = 75  # exit code of a process that lost the others
PATIENCE = timedelta(days=7)  # one process may compute for hours while the others wait for it


class ProcessLost(Exception):
    """Another process of the run has ended."""


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    return rank() == 0


def start() -> None:
    """Connect the processes. Does nothing if there is only one."""
    if size() == 1:
        return
    import torch
    import torch.distributed as dist
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        backend = "cpu:gloo,cuda:nccl"
    rendezvous = os.environ.get("MINISR_RENDEZVOUS", "env://")
    with connected():
        dist.init_process_group(backend, rendezvous, PATIENCE, rank=rank(), world_size=size())
    if not is_main():
        sys.stdout = open(os.devnull, "w")
        sys.stderr = NoTerminal(open(2, "wb", closefd=False), line_buffering=True)


def finish() -> None:
    """Disconnect the processes when the work is done. Process 0 then goes on alone."""
    if size() == 1:
        return
    import torch.distributed as dist
    wait_for_all()
    dist.destroy_process_group()
    os.environ["WORLD_SIZE"] = "1"


class NoTerminal(io.TextIOWrapper):
    """A stream for errors alone: progress bars appear on terminals only."""

    def isatty(self) -> bool:
        return False


@contextlib.contextmanager
def connected():
    """Around communication: raises ProcessLost if it fails."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessLost from error


def gather(value) -> list:
    """Every process's value, by rank."""
    if size() == 1:
        return [value]
    import torch.distributed as dist
    values = [None] * size()
    with connected():
        dist.all_gather_object(values, value)
    return values


def agree(value):
    """Process 0's value, for decisions that depend on files."""
    if size() == 1:
        return value
    import torch.distributed as dist
    values = [value]
    with connected():
        dist.broadcast_object_list(values, src=0)
    return values[0]


def any_true(flag: bool) -> bool:
    """Whether the flag is true in any process."""
    return any(gather(flag))


def wait_for_all() -> None:
    """Return when every process has come here, e.g. when process 0 has written what the others read next."""
    gather(None)


def send(tensor, to: int) -> None:
    import torch.distributed as dist
    with connected():
        dist.send(tensor, to)


def receive(tensor, source: int):
    """Fill the tensor with one that another process sends."""
    import torch.distributed as dist
    with connected():
        dist.recv(tensor, source)
    return tensor


def broadcast(tensor) -> None:
    """Overwrite the tensor with process 0's."""
    import torch.distributed as dist
    with connected():
        dist.broadcast(tensor, src=0)
