"""The processes of a run, started by torchrun or by `minisr run --processes N` (launcher.py).

Every process executes the same code. They share what takes time: batches of sampling (engine.py) and micro-batches of
training (gradients.py). All else each process computes by itself, with the same result. Process 0 alone writes files
and prints; the others read what it wrote, so all need the same folder. Without torchrun or --processes there is
one process, and the functions here return at once.

Every function that communicates has to be called by all processes, in the same order. Among them are Stop.check and the
properties of a Run that read seed data.
"""

import atexit
import contextlib
import io
import os
import pickle
import sys
from datetime import timedelta

from minisr import InputError

EXIT_CODE_LOST = 75  # of a process that lost the connection to another
SMALL_BYTES = 4096  # of a value that gather sends at once
TIMEOUT = timedelta(days=7)  # one process may compute for hours while the others wait for it


class ProcessLost(Exception):
    """The connection to another process of the run failed, usually because that process has ended."""


_rank, _size = 0, 1  # until start()


def rank() -> int:
    return _rank


def size() -> int:
    """The number of processes."""
    return _size


def is_main() -> bool:
    return rank() == 0


def planned_size() -> int:
    """The number of processes that torchrun or the launcher has started."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"the environment has WORLD_SIZE={text!r}; unset it, or start the processes with torchrun")
    return int(text)


def start(device: str = "cpu") -> None:
    """Connect the processes: by gloo, and on GPUs also by nccl. Does nothing if there is only one."""
    global _rank, _size
    if planned_size() == 1:
        return
    check_environment()
    import torch
    import torch.distributed as dist

    # The default arguments of this module's functions hold the group that exists when it is imported. If an optimizer
    # imported it later, the group's threads would outlive disconnect, and could abort the process when it ends.
    import torch.distributed.nn.functional  # noqa: F401
    backend = "gloo"
    if device != "cpu" and torch.cuda.is_available():
        check_gpus(torch.cuda.device_count())
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        backend = "cpu:gloo,cuda:nccl"
    _rank, _size = int(os.environ["RANK"]), planned_size()
    with connected():
        if path := os.environ.get("MINISR_RENDEZVOUS"):
            store = dist.FileStore(path, _size)
            dist.init_process_group(backend, store=store, timeout=TIMEOUT, rank=_rank, world_size=_size)
        else:
            dist.init_process_group(backend, timeout=TIMEOUT)
    atexit.register(disconnect)  # after an error; PyTorch's own threads may abort a process that ends connected
    if not is_main():
        sys.stdout = open(os.devnull, "w")
        sys.stderr = NoTerminal(open(2, "wb", closefd=False), errors="backslashreplace", line_buffering=True)


def check_environment() -> None:
    """Raise InputError for a WORLD_SIZE that neither torchrun nor the launcher has set."""
    names = ("RANK",) if "MINISR_RENDEZVOUS" in os.environ else ("RANK", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in names if name not in os.environ]:
        raise InputError(f"the environment has WORLD_SIZE={planned_size()}, but no {missing[0]}; unset WORLD_SIZE, or "
                         "start the processes with torchrun")


def check_gpus(gpus: int) -> None:
    """Raise InputError if this machine has fewer GPUs than processes."""
    n = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if n > gpus:
        available = "1 GPU" if gpus == 1 else f"{gpus} GPUs"
        raise InputError(f'{n} processes, but this machine has {available}; start at most as many, or set device = '
                         '"cpu" (of minisr bench: CUDA_VISIBLE_DEVICES=)')


def finish() -> None:
    """Disconnect the processes when the work is done. Each then goes on alone."""
    global _rank, _size
    if size() == 1:
        return
    wait_for_all()
    disconnect()
    _rank, _size = 0, 1


def disconnect() -> None:
    import torch.distributed as dist
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def alone():
    """Within it, this process shares nothing, as if it were the only one."""
    global _rank, _size
    before = _rank, _size
    _rank, _size = 0, 1
    try:
        yield
    finally:
        _rank, _size = before


class NoTerminal(io.TextIOWrapper):
    """stderr of the processes other than 0: it says that it is no terminal, so that tqdm draws no bars."""

    def isatty(self) -> bool:
        return False


@contextlib.contextmanager
def connected():
    """Around communication: raises ProcessLost if it fails."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessLost(" ".join(str(error).split())[:200]) from error


def gather(value) -> list:
    """Every process's value, by rank.

    Like dist.all_gather_object, but a small value takes one exchange, not one for its length and one for itself."""
    if size() == 1:
        return [value]
    data = pickle.dumps(value)
    messages = gather_bytes(len(data).to_bytes(8, "big") + data[:SMALL_BYTES], 8 + SMALL_BYTES)
    lengths = [int.from_bytes(message[:8], "big") for message in messages]
    values = [message[8:] for message in messages]
    if max(lengths) > SMALL_BYTES:
        values = gather_bytes(data, max(lengths))
    return [pickle.loads(value) for value in values]  # ignores what follows the value


def gather_bytes(data: bytes, length: int) -> list[bytes]:
    """Every process's data, followed by zeros up to this length."""
    import torch
    import torch.distributed as dist
    own = torch.frombuffer(bytearray(data.ljust(length, b"\0")), dtype=torch.uint8)
    received = [torch.empty_like(own) for _ in range(size())]
    with connected():
        dist.all_gather(received, own)
    return [tensor.numpy().tobytes() for tensor in received]


def value_of_main(value):
    """Process 0's value, e.g. what it found in files, so that all processes decide alike."""
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


def check_same(value, folder) -> None:
    """Raise InputError unless all processes have the same value, e.g. of something that they read from the folder."""
    values = gather(value)
    if any(other != values[0] for other in values):
        raise InputError(f"the processes of this run do not see the same files in {folder}, or are not of the same "
                         "version; all machines need one shared folder and the same minisr and PyTorch")


def wait_for_all() -> None:
    """Return when every process has come here, e.g. when process 0 has written what the others read next."""
    gather(None)


def send(tensor, to: int) -> None:
    import torch.distributed as dist
    with connected():
        dist.send(tensor, to)


def receive(tensor, source: int) -> None:
    """Fill the tensor with one that another process sends."""
    import torch.distributed as dist
    with connected():
        dist.recv(tensor, source)


def broadcast(tensor, source: int) -> None:
    """Overwrite the tensor with that of one process."""
    import torch.distributed as dist
    with connected():
        dist.broadcast(tensor, src=source)
