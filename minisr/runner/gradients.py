"""The gradient of a batch, shared by the processes of a run, with the same bits for any number of them.

It is the sum of its micro-batches' gradients. Floating-point sums depend on the order, so the order is fixed: the sum
of the first half of the micro-batches plus the sum of the second half, each summed in the same way. Each process
computes a contiguous part, and the partial sums travel along this tree to process 0, which sends the total to all.
"""

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from minisr.rng import derive_seed
from minisr.runner import processes


class GradientSum:
    """The gradient of all that an optimizer trains, for a list of losses: functions that return (loss, metrics).

    Dropout's random numbers depend on the seed and on the index of the loss."""

    def __init__(self, optimizer, losses: list[Callable], seed: int):
        self.optimizer, self.losses, self.seed = optimizer, losses, seed
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        # The losses of a DPO batch are those of its pairs, then those of its replayed examples. Interleaving both
        # halves gives every process some of either.
        half = -(-len(losses) // 2)
        self.order = sorted(range(len(losses)), key=lambda i: i % half)
        self.metrics: dict[int, Counter] = {}  # of the losses that this process computed
        self.error: Exception | None = None  # the first one in computing them

    def owner(self, position: int) -> int:
        """The process that computes the loss at this position of the order."""
        return position * processes.size() // len(self.losses)

    def compute(self) -> None:
        """Set .grad of all parameters, in all processes. If self.error is set afterwards, they are meaningless."""
        total = self.sum(0, len(self.losses))
        total = self.collect_gradients() if total is None else total  # a vector to receive it
        if processes.size() > 1:
            processes.broadcast(total)
        parts = total.split([p.numel() for p in self.parameters])
        for parameter, part in zip(self.parameters, parts):
            parameter.grad = part.view_as(parameter)

    def sum(self, first: int, last: int) -> Tensor | None:
        """The gradients at positions first to last - 1 as one vector in the process that owns the first; else None."""
        if last - first == 1:
            return self.gradient(self.order[first]) if self.owner(first) == processes.rank() else None
        middle = (first + last) // 2
        left, right = self.sum(first, middle), self.sum(middle, last)
        left_owner, right_owner = self.owner(first), self.owner(middle)
        if left_owner != right_owner and processes.rank() == right_owner:
            processes.send(right, left_owner)
        if processes.rank() != left_owner:
            return None
        if right_owner != left_owner:
            right = processes.receive(torch.empty_like(left), right_owner)
        return left.add_(right)

    def gradient(self, index: int) -> Tensor:
        """The gradient of one loss, as a vector."""
        if self.error is None:
            try:
                torch.manual_seed(derive_seed(self.seed, index))  # of dropout: the same numbers in any process
                loss, values = self.losses[index]()
                loss.backward()
                self.metrics[index] = Counter({"loss": loss.item(), **values})
            except (MemoryError, RuntimeError) as error:  # the other processes wait for a vector all the same
                self.error = error
        flat = self.collect_gradients()
        self.optimizer.zero_grad()
        return flat

    def collect_gradients(self) -> Tensor:
        """The present gradients of all parameters as one vector; zeros where there is none."""
        return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in self.parameters])

    def total_metrics(self, gathered: list[dict[int, Counter]]) -> Counter:
        """The sum of all losses' metrics, added in the order of the losses."""
        by_index = {index: values for part in gathered for index, values in part.items()}
        total = Counter()
        for index in range(len(self.losses)):
            total.update(by_index[index])
        return total
