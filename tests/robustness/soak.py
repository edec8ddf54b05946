"""Repeat the loop in one process for hours: memory must not grow, and speed must not fall.

    TQDM_DISABLE=1 python tests/robustness/soak.py [--minutes 120]

The same small run is repeated, each time in a new temporary folder that is removed after it. After each iteration
M_t -> M_{t+1}, its seconds are recorded and, of the process, the resident memory, the open file descriptors, the
threads and the Python objects. Ends with exit code 1 if, from the third run on,
- memory or objects rise by more than 5 % along the straight line fitted to all iterations,
- there are more descriptors or threads in the last quarter of the time than in the first,
- iterations per second in the last quarter are more than 15 % below those of the second quarter,
or if a run's files differ from those of the first run. Each iteration is compared with those at the same place of a
run. Linux only: the numbers are read from /proc.
"""

import argparse
import gc
import os
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import linear_regression, mean

import kills

from minisr.report.page import write_page
from minisr.runner.config import load_config
from minisr.runner.run import Run
from minisr.runner.steps import run_loop
from minisr.runner.storage import folder_lock

CONFIG = kills.CONFIG.replace("iterations = 1", "iterations = 4")
FIRST, RISE, SLOWER, ROWS = 3, 0.05, 0.15, 12
HEAD = (f"{'minutes':>8}{'run':>6}{'model':>7}{'MB':>9}{'descriptors':>13}{'threads':>9}{'objects':>10}"
        f"{'seconds':>9}{'CPU':>7}")


@dataclass
class Sample:
    """One iteration, and the state of the process after it."""

    minutes: float  # since the start
    run: int
    model: str  # the one that was trained
    memory: float  # resident, MB
    descriptors: int
    threads: int
    objects: int  # in use when the run began
    seconds: float
    cpu: float

    def row(self) -> str:
        return (f"{self.minutes:8.1f}{self.run:6}{self.model:>7}{self.memory:9.1f}{self.descriptors:13}"
                f"{self.threads:9}{self.objects:10}{self.seconds:9.2f}{self.cpu:7.2f}")


def main() -> int:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--minutes", type=float, default=120, help="default 120; the last run is completed")
    minutes, samples, expected, problems, size, rows = parser.parse_args().minutes, [], None, [], 0, 0
    start, number = time.perf_counter(), 0
    print(HEAD + "\n" + "-" * len(HEAD), flush=True)
    while (elapsed := (time.perf_counter() - start) / 60) < minutes:
        number += 1
        with tempfile.TemporaryDirectory() as folder:
            one_run(Path(folder), number, start, samples)
            found = kills.files(Path(folder) / "run")
            size = max(size, sum(path.stat().st_size for path in Path(folder).rglob("*")))
        expected = expected or found
        problems += [f"run {number}: {name}" for name in kills.differences(found, expected)]
        if elapsed >= minutes * rows / ROWS:
            print(samples[-1].row(), flush=True)
            rows += 1
    print(f"\n{len(samples)} iterations in {number} runs, each {size / 1e6:.0f} MB on the disk\n")
    problems += faults([sample for sample in samples if sample.run >= FIRST])
    print("\n".join(problems) or "no growth, no loss of speed, and every run wrote the same files")
    return 1 if problems else 0


def one_run(folder: Path, number: int, start: float, samples: list[Sample]) -> None:
    """What `minisr run` does, with a sample after each iteration."""
    (folder / "config.toml").write_text(CONFIG)
    gc.collect()  # or garbage would be counted too
    objects = len(gc.get_objects())
    run = Run.open(folder / "run", load_config(folder / "config.toml"))
    clocks = []

    def after(metrics: dict) -> None:
        name, now, cpu = list(metrics["models"])[-1], time.perf_counter(), time.process_time()
        if name not in ("SFT", "M1"):
            samples.append(Sample((now - start) / 60, number, name, *held(), objects, now - clocks[0],
                                  cpu - clocks[1]))
        clocks[:] = time.perf_counter(), time.process_time()
    with folder_lock(run.folder):
        run_loop(run, after)
    write_page(run.folder)


def held() -> tuple[float, int, int]:
    """Resident memory in MB, open descriptors and threads of this process."""
    status = Path("/proc/self/status").read_text()
    memory, threads = (int(re.search(rf"{name}:\s*(\d+)", status)[1]) for name in ("VmRSS", "Threads"))
    return memory * 1024 / 1e6, len(os.listdir("/proc/self/fd")), threads


def faults(samples: list[Sample]) -> list[str]:
    """Print how each number developed; return what grew or slowed down."""
    quarters = [[], [], [], []]
    for sample in samples:
        elapsed = (sample.minutes - samples[0].minutes) / (samples[-1].minutes - samples[0].minutes or 1)
        quarters[min(int(4 * elapsed), 3)].append(sample)
    if min(map(len, quarters)) < 2:
        return ["too few iterations; run it for more minutes"]
    found = []

    def report(what: str, bad: bool) -> None:
        print(what)
        found.extend([f"FAULT: {what}"] if bad else [])
    for figure in ("memory", "objects"):
        rise = line_rise([sample.minutes for sample in samples], relative(samples, figure))
        report(f"{figure}: {100 * rise:+.1f} % from run {FIRST} to the end", rise > RISE)
    for figure in ("descriptors", "threads"):
        most = [max(getattr(sample, figure) for sample in quarter) for quarter in quarters]
        report(f"{figure}, most in each quarter: {most}", most[-1] > most[0])
    for figure, judged in (("seconds", True), ("cpu", False)):
        of_all = dict(zip(map(id, samples), relative(samples, figure)))
        speed = [1 / mean(of_all[id(sample)] for sample in quarter) for quarter in quarters]
        what = "wall-clock time" if judged else "CPU time (for information)"
        report(f"iterations per second of {what} in each quarter, relative to the mean: "
             + " ".join(f"{value:.2f}" for value in speed), judged and speed[3] < (1 - SLOWER) * speed[1])
    return found


def relative(samples: list[Sample], figure: str) -> list[float]:
    """A number relative to its mean at the same place of all runs."""
    means = {model: mean(getattr(other, figure) for other in samples if other.model == model)
             for model in {sample.model for sample in samples}}
    return [getattr(sample, figure) / means[sample.model] for sample in samples]


def line_rise(times: list[float], values: list[float]) -> float:
    """How far the line fitted to the values rises from the first to the last, relative to its start."""
    slope, level = linear_regression(times, values)
    return slope * (times[-1] - times[0]) / (level + slope * times[0])


if __name__ == "__main__":
    sys.exit(main())
