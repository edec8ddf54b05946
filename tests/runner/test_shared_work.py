"""What processes share, with threads in their place: batches of sampling, their journals, gradients, and one writer."""

import copy
import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from minisr.runner import processes
from minisr.runner.checkpoint import save_model
from minisr.runner.config import TrainConfig
from minisr.runner.engine import PlainRunLM, Workspace
from minisr.runner.files import write_json
from minisr.runner.gradients import GradientSum
from minisr.runner.journal import Journal, TrainingState, remove_journals
from minisr.runner.stop import Stop
from minisr.runner.storage import folder_lock
from minisr.train import make_optimizer, micro_batches

PATIENCE = 10  # seconds, after which a thread that waits for another one fails


class Threads:
    """The functions of processes.py for n threads, each of which counts as a process."""

    def __init__(self, n: int):
        self.n, self.local, self.values = n, threading.local(), [None] * n
        self.barrier = threading.Barrier(n, timeout=PATIENCE)
        self.mail = {(source, to): queue.Queue() for source in range(n) for to in range(n)}

    def rank(self):
        return self.local.rank

    def size(self):
        return self.n

    def gather(self, value):
        self.values[self.rank()] = value
        self.barrier.wait()
        values = list(self.values)
        self.barrier.wait()
        return values

    def send(self, tensor, to):
        self.mail[self.rank(), to].put(tensor.clone())

    def receive(self, tensor, source):
        tensor.copy_(self.mail[source, self.rank()].get(timeout=PATIENCE))

    def broadcast(self, tensor, source):
        tensor.copy_(self.gather(tensor.clone())[source])


@pytest.fixture
def in_processes(monkeypatch):
    """Call a function in n threads that take the place of processes: its results, by rank."""
    def in_processes(n, work):
        threads = Threads(n)
        for name in ("rank", "size", "gather", "send", "receive", "broadcast"):
            monkeypatch.setattr(processes, name, getattr(threads, name))

        def as_process(rank):
            threads.local.rank = rank
            return work()
        with ThreadPoolExecutor(n) as pool:
            return list(pool.map(as_process, range(n)))
    return in_processes


# Batches.

BATCHES = [[0, 1], [2], [3, 4, 5], [6], [7]]


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_each_batch_is_computed_by_one_process_and_all_have_all_results(n, in_processes):
    computed = []

    def compute(batch):
        computed.append((processes.rank(), batch))
        return [10 * x for x in batch]
    results = in_processes(n, lambda: Workspace().share(compute, BATCHES))
    assert results == [[0, 10, 20, 30, 40, 50, 60, 70]] * n
    assert sorted(computed) == sorted((i % n, batch) for i, batch in enumerate(BATCHES))


def test_the_journals_of_any_number_of_processes_are_read_by_any_other(tmp_path, in_processes):
    computed = []

    def compute(batch):
        computed.append(batch)
        return batch

    def share():
        return Workspace(journal=Journal(tmp_path / "a.journal", "inputs")).share(compute, BATCHES, "key")
    for n in (3, 1, 2, 4):
        assert in_processes(n, share) == [[0, 1, 2, 3, 4, 5, 6, 7]] * n
        assert sorted(computed) == sorted(BATCHES)  # by the first three processes, once
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.journal", "a.journal.1", "a.journal.2"]
    in_processes(2, lambda: remove_journals(tmp_path / "a.journal"))
    assert not list(tmp_path.iterdir())


def test_a_signal_to_one_process_stops_all(monkeypatch):
    for gathered in ([False, True], [True, False]):
        monkeypatch.setattr(processes, "gather", lambda _, gathered=gathered: gathered)
        with pytest.raises(KeyboardInterrupt):
            Stop.check()
    monkeypatch.setattr(processes, "gather", lambda _: [False, False])
    Stop.check()


# Gradients.


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_gradient_and_metrics_have_the_same_bits_for_any_number_of_processes(count, in_processes):
    vectors = torch.randn(count, 50, generator=torch.Generator().manual_seed(0))

    def compute():
        p = torch.ones(50, requires_grad=True)

        def loss(vector):
            return (vector * p).sum(), {"first": vector[0].item()}
        gradient = GradientSum(torch.optim.SGD([p]), [partial(loss, vector) for vector in vectors], seed=0)
        gradient.compute()
        gathered = processes.gather(gradient.metrics)
        assert sum(map(len, gathered)) == count  # each loss was computed once
        return p.grad, gradient.total_metrics(gathered)
    [(expected, metrics)] = in_processes(1, compute)
    torch.testing.assert_close(expected, vectors.sum(0))
    assert metrics["first"] == pytest.approx(vectors[:, 0].sum().item(), abs=1e-5)
    for n in (2, 3, 4, 5, 9):
        for gradient, found in in_processes(n, compute):
            assert torch.equal(gradient, expected) and found == metrics


def test_the_next_step_uses_the_memory_of_the_last_one(in_processes):
    def take_steps():
        p, places = torch.ones(50, requires_grad=True), []
        optimizer = torch.optim.SGD([p])
        for coefficients in ([1.0, 2.0, 4.0], [3.0, 5.0, 7.0]):
            gradient = GradientSum(optimizer, [lambda c=c: (c * p.sum(), {}) for c in coefficients], seed=0)
            gradient.compute()
            assert p.grad.tolist() == [sum(coefficients)] * 50
            places.append([buffer.data_ptr() for buffer in gradient.buffers])
            optimizer.zero_grad()
        return places
    for places in in_processes(2, take_steps):
        assert places[0] == places[1]
    assert [len(places[0]) for places in in_processes(2, take_steps)] == [1, 2]


@pytest.mark.parametrize("victim", [0, 1])
def test_where_one_process_runs_out_of_memory_all_halve_the_micro_batch(victim, in_processes):
    model, rows = tiny_model(), torch.arange(24).reshape(8, 3)

    def gradient(micro_batch):
        lm = PlainRunLM(copy.deepcopy(model), tiny_tokenizer())
        config = TrainConfig(batch_size=8, micro_batch=micro_batch)

        def make_loss_fns(batch, config):
            def loss(part):
                if len(part) > 2 and processes.rank() == victim:
                    raise MemoryError
                return lm.model(rows[part]).square().mean((1, 2)).sum() / 8, {"rows": len(part)}
            return [partial(loss, part) for part in micro_batches(batch, config)]
        optimizer = make_optimizer(lm.model.named_parameters(), config)
        metrics, config = lm.gradients_within_memory(optimizer, make_loss_fns, list(range(8)), config, seed=0)
        return metrics, config.micro_batch, torch.cat([p.grad.flatten() for p in lm.model.parameters()])
    [(expected, _, whole)] = in_processes(1, partial(gradient, 2))
    assert expected["rows"] == 8
    for metrics, size, found in in_processes(2, partial(gradient, 4)):
        assert (metrics, size) == (expected, 2) and torch.equal(found, whole)


# Files.


def test_process_0_alone_writes_and_removes_files(tmp_path, monkeypatch):
    model = tiny_model()
    optimizer = make_optimizer(model.named_parameters(), TrainConfig())
    (tmp_path / "training.json").write_text("of process 0")
    (tmp_path / "a.journal").write_text("of process 0")
    monkeypatch.setattr(processes, "_rank", 1)
    write_json(tmp_path / "a.json", {})
    save_model(tmp_path / "M1", model, tiny_tokenizer(), {})
    TrainingState(tmp_path, "x").save([], model, optimizer)
    TrainingState.remove(tmp_path)
    remove_journals(tmp_path / "a.journal")
    with folder_lock(tmp_path):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.journal", "training.json"]
    monkeypatch.setattr(processes, "_rank", 0)
    write_json(tmp_path / "a.json", {})
    assert (tmp_path / "a.json").exists()
