"""What does a training step cost in communication? Measured for 2 and 4 processes here, extrapolated to 512.

    python benchmarks/communication.py             --quick for the tiny model alone

Gradients are added up from one process to the next, and the last sends the total to all (runner/gradients.py), over
gloo on this machine's loopback. No model runs: the vectors have the length of its gradient. The largest ones need 8 GB
of memory.
"""

import json
import multiprocessing
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from math import ceil, log2
from pathlib import Path

import torch
from sides import OneLineParser, in_one_line

from minisr.bench import machine, seconds
from minisr.runner import processes
from minisr.runner.gradients import GradientSum

PARAMETERS = {"tiny": 873_600, "SmolLM2": 134_515_008, "8B": 8_030_000_000}  # SmolLM2-135M, Llama 3 8B
RANKS = (8, 64, 512)
FLOAT32, BFLOAT16 = 4, 2  # bytes
LAYERS = 32  # of the 8B model: FSDP2 gathers one at a time
OBJECT = ({0: {"loss": 0.7, "dpo_loss": 0.7, "margin": 0.1, "accuracy": 0.5, "chosen_logp": -20.0}}, False)  # a step's


@dataclass(frozen=True)
class Network:
    """Between any two ranks, each with a connection of its own."""

    bandwidth: float  # bytes/s
    latency: float  # s
    sums: float  # bytes/s of gradients added to others


def chain_seconds(gradient_bytes: float, ranks: int, network: Network) -> float:
    """Of one step: the sum is sent to the next rank and added to there, and at the end broadcast along a tree."""
    hop = gradient_bytes / network.bandwidth + network.latency
    return (ranks - 1) * (hop + gradient_bytes / network.sums) + ceil(log2(ranks)) * hop


def chain_bytes(gradient_bytes: float, ranks: int) -> float:
    """On the network in one step, all ranks together: the sum moves ranks - 1 times, and so does the total."""
    return 2 * (ranks - 1) * gradient_bytes


def ring_seconds(total_bytes: float, ranks: int, network: Network, pieces: int = 1) -> float:
    """Of an all-gather or a reduce-scatter of this total, in pieces one after the other: FSDP2, and gather()."""
    return (ranks - 1) * (total_bytes / ranks / network.bandwidth + pieces * network.latency)


def sharded_seconds(parameters: int, ranks: int, network: Network) -> float:
    """Of FSDP2 in one micro-batch: bfloat16 weights gathered for forward and backward, float32 gradients scattered."""
    gather = ring_seconds(parameters * BFLOAT16, ranks, network, LAYERS)
    return 2 * gather + ring_seconds(parameters * FLOAT32, ranks, network, LAYERS)


def extrapolate(network: Network) -> list[dict]:
    """One row a model and number of ranks."""
    rows = []
    for model, parameters in PARAMETERS.items():
        for ranks in RANKS:
            size = parameters * FLOAT32
            rows.append({"model": model, "ranks": ranks, "gigabytes": chain_bytes(size, ranks) / 1e9,
                         "chain_seconds": chain_seconds(size, ranks, network),
                         "ring_seconds": 2 * ring_seconds(size, ranks, network),
                         "gather_seconds": ring_seconds(ranks * (8 + processes.SMALL_BYTES), ranks, network),
                         "sharded_seconds": sharded_seconds(parameters, ranks, network)})
    return rows


# Measuring.


class Vectors(GradientSum):
    """The sum of vectors that are there already, one a process."""

    def __init__(self, vector: torch.Tensor):
        super().__init__(torch.optim.SGD([torch.nn.Parameter(vector)]), [None] * processes.size(), 0)
        self.vector = vector

    def backward(self, index: int) -> None:
        self.parameters[0].grad = self.vector.clone()


def loopback_bytes() -> int:
    """Received so far on the loopback by any program, by Linux's count; 0 on other systems."""
    path = Path("/proc/net/dev")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) for line in lines if line.split()[0] == "lo:"), 0)


def best(run, repeats: int) -> float:
    """The shortest time of several calls, which all processes start together."""
    times = []
    for _ in range(repeats):
        processes.wait_for_all()
        times.append(seconds(run))
    return min(times)


def measure(model: str, repeats: int) -> dict:
    """Seconds and bytes of one gradient's communication; the same in all processes but for their clocks."""
    vector = torch.ones(PARAMETERS[model])
    total, n = Vectors(vector), processes.size()
    total.compute()  # warm up: memory and connections
    if not bool((total.parameters[0].grad == n).all()):
        raise RuntimeError("the sum is wrong")
    processes.wait_for_all()
    before = loopback_bytes()
    processes.wait_for_all()  # the others begin when process 0 has counted
    total.compute()
    processes.wait_for_all()
    counted = loopback_bytes() - before
    other = torch.zeros_like(vector)
    return {"model": model, "processes": n, "expected_bytes": chain_bytes(vector.nbytes, n), "loopback_bytes": counted,
            "step_seconds": best(total.compute, repeats),
            "broadcast_seconds": best(lambda: processes.broadcast(vector, 0), repeats),
            "sum_seconds": best(lambda: vector.add_(other), repeats),
            "allocation_seconds": best(lambda: torch.zeros_like(vector).add_(1.0), repeats),
            "gather_seconds": best(lambda: processes.gather(OBJECT), 20 * repeats)}


def work(rank: int, n: int, folder: str, models: list[str], repeats: int, results) -> None:
    """One of the processes."""
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(n), "MINISR_RENDEZVOUS": str(Path(folder) / f"{n}")})
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    torch.set_num_threads(1)
    processes.start()
    for model in models:
        result = measure(model, repeats)
        if processes.is_main():
            results.put(result)
    processes.finish()


def run_processes(n: int, models: list[str], repeats: int) -> list[dict]:
    """The measurements of all models, with n processes."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        started = [context.Process(target=work, args=(rank, n, folder, models, repeats, results), daemon=True)
                   for rank in range(n)]
        for process in started:
            process.start()
        measured = [results.get(timeout=300) for _ in models]
        for process in started:
            process.join()
    return measured


def print_measured(measured: list[dict]) -> None:
    print(f"{'measured':10}{'processes':>10}{'MB a step':>12}{'on loopback':>13}{'step s':>10}{'broadcast s':>13}"
          f"{'sum s':>9}{'new s':>9}{'gather s':>10}")
    for r in measured:
        print(f"{r['model']:10}{r['processes']:10}{r['expected_bytes'] / 1e6:12,.1f}{r['loopback_bytes'] / 1e6:13,.1f}"
              f"{r['step_seconds']:10.4f}{r['broadcast_seconds']:13.4f}{r['sum_seconds']:9.4f}"
              f"{r['allocation_seconds']:9.4f}{r['gather_seconds']:10.4f}")


def print_extrapolated(rows: list[dict]) -> None:
    print(f"\n{'on paper':10}{'ranks':>10}{'GB a step':>12}{'chain s':>13}{'ring s':>10}{'FSDP2 s':>13}"
          f"{'gather s':>19}")
    for r in rows:
        print(f"{r['model']:10}{r['ranks']:10}{r['gigabytes']:12,.2f}{r['chain_seconds']:13.4f}{r['ring_seconds']:10.4f}"
              f"{r['sharded_seconds']:13.4f}{r['gather_seconds']:19.4f}")


def main() -> None:
    parser = OneLineParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the tiny model with 2 processes alone")
    parser.add_argument("--repeats", type=int, default=5, metavar="K", help="measurements; the best counts; default 5")
    parser.add_argument("--gigabits", type=float, default=100.0, metavar="G",
                        help="assumed network bandwidth per rank in Gbit/s, of which 80 %% is used; default 100")
    parser.add_argument("--latency", type=float, default=50.0, metavar="US",
                        help="assumed network latency in microseconds; default 50")
    options = parser.parse_args()
    if options.repeats < 1 or options.gigabits <= 0 or options.latency < 0:
        parser.error("--repeats must be at least 1, --gigabits more than 0, --latency at least 0")
    models, counts = (["tiny"], [2]) if options.quick else (["tiny", "SmolLM2"], [2, 4])
    measured = [result for n in counts for result in run_processes(n, models, options.repeats)]
    measured.sort(key=lambda r: list(PARAMETERS).index(r["model"]))
    print_measured(measured)
    print("step: one gradient added up and sent to all; new: a vector in memory not used before; best of "
          f"{options.repeats}")
    largest = next(r for r in reversed(measured) if r["processes"] == 2)
    sums = PARAMETERS[largest["model"]] * FLOAT32 / largest["sum_seconds"]
    network = Network(options.gigabits * 0.8e9 / 8, options.latency / 1e6, sums)
    rows = extrapolate(network)
    print_extrapolated(rows)
    print(json.dumps({"machine": machine("cpu", 1), "network": asdict(network), "measured": measured,
                      "extrapolated": rows}))


if __name__ == "__main__":
    in_one_line(main)
