"""Run an experiment: variants of one config, each on several seeds, gathered in results.json.

experiment_plan.py describes the experiment file. Each run is an ordinary run in OUT/VARIANT-SEED, started in
its own process, and can be resumed. What a variant shares with the base run of the same seed is copied
(reuse.py).
"""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from minisr import InputError
from minisr.runner.config import Config, load_stored_config
from minisr.runner.experiment_plan import Plan, read_plan
from minisr.runner.files import check_object, read_json, write_json
from minisr.runner.reuse import copy_unaffected
from minisr.runner.run import check_resumable
from minisr.runner.sources import keep_stored_paths
from minisr.runner.stop import Stop

# The metrics of a model that results.json holds, as paths in metrics.json; criteria.4 is correct form.
METRICS = ("flawless", "flawless_greedy", "mean_score", "versus_m1.win", "versus_m1.lose", "judge.pairwise",
           "judge.five_best", "judge.exact", "judge.spearman", "judge.kendall", "judge.parse_rate", "length",
           "pairs", "pairs_right", "rewards.pairwise", "distinct", "criteria.4", "words.all.cover",
           "words.unseen.cover", "words.unseen.flawless", "words.all.lists", "words.all.length", "judge.words_right",
           "judge.form_right")


def experiment(path: Path, out: Path, jobs: int, only: list[str] | None = None) -> dict:
    """Run everything that is missing, write results.json and return its content.

    With `only`, run these variants and the base runs on their seeds. The result is
    {variant: {model: {metric: [value on each seed]}}}."""
    plan = read_plan(path, only)
    selected = _select_variants(path, plan, only)
    seeds = sorted({seed for name in selected for seed in plan.seeds[name]})
    base_runs = [("base", seed) for seed in seeds]
    variant_runs = [(name, seed) for name in selected if name != "base" for seed in plan.seeds[name]]
    _run_all("base", base_runs, plan, out, jobs)  # first, because variants copy from the base
    return _run_all("variants", variant_runs, plan, out, jobs)


def _select_variants(path: Path, plan: Plan, only: list[str] | None) -> list[str]:
    """The variants to run, in the plan's order."""
    for name in only or ():
        if name not in plan.variants:
            raise InputError(f"experiment {path} has no variant {name}; it has {', '.join(plan.variants)}")
    return [name for name in plan.variants if not only or name in only]


def _run_all(title: str, runs: list[tuple[str, int]], plan: Plan, out: Path, jobs: int) -> dict:
    """Run (variant, seed) pairs, `jobs` at a time, and gather the results of all finished runs."""
    with ThreadPoolExecutor(jobs) as pool:
        finished_runs = pool.map(lambda run: _run(out, plan, *run), runs)
        logs = list(tqdm(finished_runs, title, len(runs), disable=None))
    results = gather(plan, out)
    failed = [str(log) for log in logs if log is not None]
    if failed:
        raise InputError(f"{len(failed)} of {len(runs)} runs failed, the others are finished; see the reason "
                         f"in {', '.join(failed)}")
    return results


def _run(out: Path, plan: Plan, variant: str, seed: int) -> Path | None:
    """Run one variant on one seed. Returns the path of its log if it failed."""
    Stop.check()
    folder = out / f"{variant}-{seed}"
    if variant != "base" and not folder.exists():
        copy_unaffected(out / f"base-{seed}", folder, plan.config(variant, seed))
    command = [sys.executable, "-m", "minisr", "run", str(plan.base), "--out", str(folder)]
    for change in plan.changes(variant, seed):
        command += ["--set", change]
    log = folder.with_name(f"{folder.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    return log if _run_process(command, log) else None


def _run_process(command: list[str], log: Path) -> int:
    """Run a command with its output in a log file. Returns the exit code.

    A request to stop is passed on as SIGTERM, a second one as SIGKILL."""
    with open(log, "w", encoding="utf-8") as file:
        # In its own session, Ctrl-C does not reach the process: it gets one SIGTERM, from here.
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
        while process.poll() is None and not Stop.requested:
            time.sleep(0.1)
        if Stop.requested:
            process.terminate()
            while process.poll() is None and not Stop.at_once:
                time.sleep(0.1)
            process.kill()  # no effect on a process that has ended
            process.wait()
            Stop.check()
    return process.returncode


def gather(plan: Plan, out: Path) -> dict:
    """Write and return the results of all variants whose runs are finished on all their seeds.

    A variant whose runs were made with another config is left out, and a line on stderr says so."""
    results = {}
    for variant, seeds in plan.seeds.items():
        last_model = f"M{plan.config(variant).iterations + 1}"
        folders = {seed: out / f"{variant}-{seed}" for seed in seeds}
        if not all(is_finished(folder, last_model) for folder in folders.values()):
            continue
        try:
            for seed, folder in folders.items():
                check_made_with(plan.config(variant, seed), folder)
        except InputError as error:
            print(f"minisr: results.json leaves out {variant}: {error}", file=sys.stderr)
            continue
        results[variant] = collect(list(folders.values()), last_model)
    write_json(out / "results.json", results)
    return results


def is_finished(run: Path, last_model: str) -> bool:
    """Whether a run has the metrics of its last model."""
    path = run / "metrics.json"
    return path.exists() and last_model in check_object(read_json(path, "metrics"), path).get("models", {})


def check_made_with(config: Config, run: Path) -> None:
    """Raise InputError if a run was made with another config; it may have more iterations."""
    stored = load_stored_config(run / "config.toml")
    config = replace(config, iterations=max(config.iterations, stored.iterations))
    check_resumable(stored, keep_stored_paths(stored, config, run), run)


def collect(folders: list[Path], last_model: str) -> dict:
    """{model: {metric: [value of each run]}} from the runs' metrics.json; "seed" holds the runs' seeds.

    Models after last_model, which a run has if it was continued, are left out. A value is None where the metric was
    not measured."""
    runs = [read_json(folder / "metrics.json", "metrics") for folder in folders]
    models = list(runs[0]["models"])
    results = {}
    for model in models[:models.index(last_model) + 1]:
        results[model] = {"seed": [run["seed"] for run in runs]}
        for metric in METRICS:
            results[model][metric] = [lookup(run["models"][model], metric) for run in runs]
    return results


def lookup(metrics: dict, path: str):
    """A model's metric by its path: "judge.pairwise", or "criteria.4" for an entry of a list.

    Returns None where it was not measured."""
    value = metrics
    for name in path.split("."):
        if value is None:
            return None
        value = value[int(name)] if isinstance(value, list) else value.get(name)
    return value
