"""The gradient of a batch, shared by the processes of a run, with the same bits for any number of them.

It is the sum of its micro-batches' gradients. Floating-point sums depend on the order, so the order is fixed: the
gradients are added one after another, in the order of GradientSum.order. Each process computes a contiguous part.
Process 0 accumulates its own, the next process adds its gradients to this sum one by one, and so on; the last one sends
the total to all.
"""

from collections import Counter
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from minisr.rng import derive_seed
from minisr.runner import processes

BUFFERS = WeakKeyDictionary()  # {optimizer: the vectors of its steps}, since new memory costs more than the sums


class GradientSum:
    """The gradient of all that an optimizer trains, for a list of loss functions; each returns (loss, metrics).

    Dropout's random numbers depend on the seed and on the index of the loss."""

    def __init__(self, optimizer, loss_fns: list[Callable], seed: int):
        self.optimizer, self.loss_fns, self.seed = optimizer, loss_fns, seed
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.buffers: list[Tensor] = BUFFERS.setdefault(optimizer, [])
        # The losses of a DPO batch are those of its pairs, then those of its replayed examples. Interleaving both
        # halves gives every process some of either.
        half = -(-len(loss_fns) // 2)
        self.order = sorted(range(len(loss_fns)), key=lambda i: i % half)
        self.metrics: dict[int, Counter] = {}  # of the losses that this process computed
        self.error: Exception | None = None  # the first one in computing them

    def owner(self, position: int) -> int:
        """The process that computes the loss at this position of the order."""
        return position * processes.size() // len(self.loss_fns)

    def compute(self) -> None:
        """Set .grad of all parameters, in all processes. If self.error is set afterwards, they are meaningless."""
        rank = processes.rank()
        own = [index for position, index in enumerate(self.order) if self.owner(position) == rank]
        if processes.size() == 1:
            for index in own:
                self.backward(index)
        else:
            self.compute_together(own, owners=sorted({self.owner(p) for p in range(len(self.order))}))

    def compute_together(self, own: list[int], owners: list[int]) -> None:
        position = owners.index(processes.rank()) if own else None
        if position == 0:
            for index in own:
                self.backward(index)
        gradients = [self.gradient(index, number) for number, index in enumerate(own, 1)] if position else []
        total = self.collect_gradients(0) if position == 0 else self.buffer(0)  # (N,) N numbers are trained
        if position:
            processes.receive(total, owners[position - 1])
            for gradient in gradients:
                total += gradient
        if own and position + 1 < len(owners):
            processes.send(total, owners[position + 1])
        processes.broadcast(total, owners[-1])
        parts = total.split([p.numel() for p in self.parameters])
        for parameter, part in zip(self.parameters, parts):
            parameter.grad = part.view_as(parameter)

    def backward(self, index: int) -> None:
        """Add the gradient of one loss to .grad. After an error, nothing more is computed: others may wait for us."""
        if self.error is not None:
            return
        try:
            torch.manual_seed(derive_seed(self.seed, index))
            loss, values = self.loss_fns[index]()
            loss.backward()
            self.metrics[index] = Counter({"loss": loss.item(), **values})
        except (MemoryError, RuntimeError) as error:
            self.error = error.with_traceback(None)  # which would keep what it computed in memory

    def gradient(self, index: int, number: int) -> Tensor:
        """The gradient of one loss, in a buffer: (N,)."""
        self.backward(index)
        gradient = self.collect_gradients(number)
        self.optimizer.zero_grad()
        return gradient

    def collect_gradients(self, number: int) -> Tensor:
        """The present .grad of all parameters, zeros where there is none, in a buffer: (N,)."""
        gradients = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in self.parameters]
        return torch.cat(gradients, out=self.buffer(number))

    def buffer(self, number: int) -> Tensor:
        """One of the buffers: (N,). It holds whatever was last written to it."""
        while len(self.buffers) <= number:
            first = self.parameters[0]
            self.buffers.append(torch.empty(sum(p.numel() for p in self.parameters), dtype=first.dtype,
                                            device=first.device))
        return self.buffers[number]

    def total_metrics(self, gathered: list[dict[int, Counter]]) -> Counter:
        """The sum of all losses' metrics, added in the order of the losses."""
        by_index = {index: values for part in gathered for index, values in part.items()}
        total = Counter()
        for index in range(len(self.loss_fns)):
            total.update(by_index[index])
        return total


def is_out_of_memory(error: Exception) -> bool:
    """Whether PyTorch ran out of memory. On a CPU it raises a RuntimeError without a type of its own."""
    messages = ("can't allocate memory", "not enough memory")  # of Linux and macOS, of Windows
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(m in str(error) for m in messages)
