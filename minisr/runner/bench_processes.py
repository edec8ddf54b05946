"""minisr bench --processes N: how long each step of the loop takes when N processes share it, beside one process.

Both do the same work in the same batches with the code of a run, in turns: N processes of one thread each, and process
0 alone with all threads while the others wait. Process 0 measures and prints.
"""

import json
import statistics

import torch
from tqdm import tqdm

from minisr.bench import WORKS, load_on, model_names, prepare, seconds, summary, works
from minisr.runner import processes
from minisr.runner.engine import Workspace, run_lm_class
from minisr.runner.resumable import DEFAULT_MICRO_BATCHES


def bench(name: str | None, only: list[str], repeats: int, threads: int, dtype: str = "auto") -> None:
    """Measure, print a table and, as the last line, the same as JSON. threads: of the one process.

    bench.check_options has checked the options."""
    processes.start("auto")
    n, is_main = processes.size(), processes.is_main()
    hardware = processes.value_of_main(prepare(threads, dtype) if is_main else None)
    results = [result for model in model_names(name) for result in measure(model, only, repeats, hardware)]
    processes.finish()
    if not is_main:
        return
    print_table(results, n, threads)
    print(json.dumps({"machine": hardware, "processes": n, "results": results}))


def measure(name: str, only: list[str], repeats: int, hardware: dict) -> list[dict]:
    """The results of one model: all processes, and one of them as their peer."""
    n, threads = processes.size(), hardware["threads"]
    lm = load_lm(name, hardware)
    parts = n * -(-DEFAULT_MICRO_BATCHES // n)  # the same number for each process
    runs = {work: run for work, run in works(lm, parts=parts).items() if work in (only or WORKS)}
    tokens = {}
    for work, (run, cost) in runs.items():  # warm up
        torch.set_num_threads(1)
        tokens[work] = cost(run()).tokens
        time_alone(run, threads)
    together, alone = {work: [] for work in runs}, {work: [] for work in runs}
    for work in tqdm([*runs] * repeats, "timing", leave=False, disable=None):
        together[work].append(time_together(runs[work][0]))
        alone[work].append(time_alone(runs[work][0], threads))
    if not processes.is_main():
        return []
    return [compare(work, name, tokens[work], together[work], alone[work]) for work in runs]


def load_lm(name: str, hardware: dict):
    """The fast engine of a run."""
    lm = run_lm_class("fast")(*load_on(hardware, name))
    lm.workspace = Workspace()
    return lm


def time_together(run) -> float:
    """Seconds in process 0 of work that all processes share."""
    torch.set_num_threads(1)
    processes.wait_for_all()
    return seconds(run)


def time_alone(run, threads: int) -> float:
    """Seconds of the same work in process 0 alone; the others do not wait here, but before the next shared work."""
    processes.wait_for_all()
    if not processes.is_main():
        return 0.0
    torch.set_num_threads(threads)
    with processes.alone():
        return seconds(run)


def compare(work: str, model: str, tokens: int, together: list[float], alone: list[float]) -> dict:
    """The entry of one work, from the seconds of each turn; ratio: how many times as fast as one process."""
    ours, theirs = (summary(work, model, [tokens] * len(times), times) for times in (together, alone))
    ratios = [slower / faster for slower, faster in zip(alone, together)]
    return ours | {"engine": "fast", "peer": "one process", "theirs": theirs["ours"], "their_runs": theirs["runs"],
                   "their_seconds_median": theirs["seconds_median"], "their_seconds_min": theirs["seconds_min"],
                   "their_seconds_max": theirs["seconds_max"], "ratio": statistics.median(ratios),
                   "ratio_min": min(ratios), "ratio_max": max(ratios)}


def print_table(results: list[dict], n: int, threads: int) -> None:
    """Seconds of one process and of all, and their ratio turn by turn: medians [min, max]."""
    print(f"{'work':11}{'model':9}{f'1 process, threads: {threads}':25}{f'processes: {n}':25}ratio [min, max]")
    for r in results:
        alone, together = (f"{r[f'{side}median']:.3f} [{r[f'{side}min']:.3f}, {r[f'{side}max']:.3f}]"
                           for side in ("their_seconds_", "seconds_"))
        print(f"{r['work']:11}{r['model']:9}{alone:25}{together:25}"
              f"{r['ratio']:.2f} [{r['ratio_min']:.2f}, {r['ratio_max']:.2f}]")
