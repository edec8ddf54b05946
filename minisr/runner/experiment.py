"""Variants x seeds of one config: the same run under several controls, and tables with intervals.

    base = "../tiny.toml"
    seeds = [0, 1, 2, 3, 4]
    variant_seeds = [0, 1, 2]  # of the variants, if not all; every one is also a seed of the base
    common.threads = 1         # in every run: two runs side by side (--jobs 2) beat two threads in one
    [variants.base]            # what differs from the base's file, as in a config
    iterations = 3
    [variants.random]
    judge.by = "random"
    seeds = [0, 1, 2, 3, 4]    # of this variant

Every run is an ordinary run in OUT/VARIANT-SEED and goes on where it stopped. What a variant has in
common with the base of the same seed is copied, not made again.
"""

import shutil
import subprocess
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minisr import InputError
from minisr.runner.run import load_template
from minisr.runner.config import Config, differences, load_config, to_toml
from minisr.runner.files import read_json, read_text, write_bytes, write_json
from minisr.runner.stop import Stop

# Half-width of a 95 % interval of a mean in standard errors: Student's t for n - 1 = 1, 2, ... 19.
STUDENT_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.145, 2.13, 2.12,
             2.11, 2.10, 2.09)


def experiment(path: Path, out: Path, jobs: int, only: list[str] | None = None) -> dict:
    """Run all that is missing (of the variants in `only`, with the base they copy from), write results.json
    and return {variant: {model: {figure: [value of each seed]}}}."""
    plan = read_plan(path)
    variants, seeds = plan["variants"], plan["seeds"]
    if unknown := sorted(set(only or ()) - set(variants)):
        raise InputError(f"experiment {path} has no variant {unknown[0]}; it has {', '.join(variants)}")
    wanted = [name for name in variants if not only or name in only]
    needed = sorted({seed for name in wanted for seed in seeds[name]})
    rest = [(name, seed) for name in wanted if name != "base" for seed in seeds[name]]
    # Variants copy from the base, so it comes first; then one variant after another.
    for title, work in (("base", [("base", seed) for seed in needed]), ("variants", rest)):
        with ThreadPoolExecutor(jobs) as pool:
            logs = list(tqdm(pool.map(lambda ns: _run(out, plan, *ns), work), title, len(work)))
        results = gather(plan, out)
        if failed := [str(log) for log in logs if log]:
            raise InputError(f"{len(failed)} of {len(work)} runs failed, the others are finished; why: see "
                             + ", ".join(failed))
    return results


def gather(plan: dict, out: Path) -> dict:
    """results.json from the runs that are finished; a variant counts when all its seeds are."""
    folders = {name: [out / f"{name}-{seed}" for seed in plan["seeds"][name]] for name in plan["variants"]}
    results = {name: collect(runs) for name, runs in folders.items()
               if all(finished(run, plan, name) for run in runs)}
    write_json(out / "results.json", results)
    return results


def finished(run: Path, plan: dict, name: str) -> bool:
    """Whether metrics.json tells of every model of a run."""
    last = f"M{config_of(plan, name).iterations + 1}"
    return (run / "metrics.json").exists() and last in read_json(run / "metrics.json", "metrics")["models"]


def read_plan(path: Path) -> dict:
    """An experiment file, checked: its base config, each variant's overrides and seeds."""
    try:
        plan = tomllib.loads(read_text(path, "experiment"))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"experiment {path} is not valid TOML: {error}") from error
    if set(plan) - {"variants", "common", "variant_seeds"} != {"base", "seeds"}:
        raise InputError(f"experiment {path} must have base and seeds, and may have variant_seeds, common "
                         "and [variants.NAME]")
    tables, common = plan.get("variants", {}), plan.get("common", {})
    if not isinstance(plan["base"], str) or not isinstance(tables, dict) or not isinstance(common, dict) \
            or not all(isinstance(variant, dict) for variant in tables.values()):
        raise InputError(f"experiment {path}: base is a file name, common and each variant a section")
    tables = {"base": {}} | tables
    fewer = plan.get("variant_seeds", plan["seeds"])
    seeds = {name: table.pop("seeds", plan["seeds"] if name == "base" else fewer)
             for name, table in tables.items()}
    lists = all(isinstance(some, list) and some for some in [plan["seeds"], fewer, *seeds.values()])
    if not lists or not all(set(some) <= set(plan["seeds"]) for some in [fewer, *seeds.values()]):
        raise InputError(f"experiment {path}: seeds is a list like [0, 1, 2], variant_seeds and the seeds of "
                         "a variant are parts of it")
    plan = {"base": Path(path).parent / plan["base"], "common": tuple(overrides(common)), "seeds": seeds,
            "variants": {name: tuple(overrides(table)) for name, table in tables.items()}}
    for name in plan["variants"]:
        config = config_of(plan, name)  # what is wrong is told now, not in an hour
        if config.judge.template:
            load_template(Path(config.judge.template))
    return plan


def config_of(plan: dict, name: str, seed: int = 0) -> Config:
    return load_config(plan["base"], overrides=(f"seed={seed}", *plan["common"], *plan["variants"][name]))


def overrides(table: dict, prefix: str = ""):
    """{"judge": {"by": "random"}} -> "judge.by=random"."""
    for name, value in table.items():
        if isinstance(value, dict):
            yield from overrides(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}={str(value).lower() if isinstance(value, bool) else value}"


def _run(out: Path, plan: dict, name: str, seed: int) -> Path | None:
    """One run in a process of its own; its last words are in OUT/NAME-SEED.log, returned if it failed."""
    Stop.check()
    folder, changes = out / f"{name}-{seed}", plan["variants"][name]
    if name != "base" and not folder.exists():
        share(out / f"base-{seed}", folder, config_of(plan, name, seed))
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "minisr", "run", str(plan["base"]), "--out", str(folder)]
    for change in (f"seed={seed}", *plan["common"], *changes):
        command += ["--set", change]
    path = folder.with_name(f"{folder.name}.log")
    with open(path, "w", encoding="utf-8") as log:
        # In a session of its own Ctrl-C does not reach it: it is asked once, by us, as by SIGTERM.
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        while process.poll() is None and not Stop.asked:
            time.sleep(0.1)
        if Stop.asked:
            process.terminate()
            process.wait()
            Stop.check()
    return path if process.returncode else None


# What a run makes, in order; and where, if a key of the config is changed, it is no longer the same.
ORDER = ("eft", "M1", "judge_evaluation", "prompts", "responses", "rewards", "pairs", "M2")
CHANGES = {"seed_data.eft_by": "eft", "seed_data.reasons": "eft", "judge.template": "eft",
           "judge.judgements": "judge_evaluation", "prompts": "prompts", "responses": "responses",
           "judge.by": "rewards", "pairs": "pairs", "dpo": "M2", "iterations": None}


def share(base: Path, folder: Path, config: Config) -> None:
    """Copy from the base run what a run with this config would make again just so."""
    old = load_config(base / "config.toml")
    keys = [line.partition(": ")[0] for line in differences(asdict(old), asdict(config))]
    firsts = [next((CHANGES[name] for name in (key, key.split(".")[0]) if name in CHANGES), "seed")
              for key in keys]
    if "seed" in firsts:
        return
    if old.seed_data.eft_by == "baseline" and "judge.judgements" in keys:
        firsts.append("eft")
    first = min((ORDER.index(name) for name in firsts if name), default=None)  # None: only more iterations
    beside = folder.with_name(folder.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(base, beside)
    for name in ("metrics.json", "judge.txt"):
        (beside / name).unlink(missing_ok=True)
    for name in ORDER[first:] if first is not None else ():
        for path in _made_by(beside, name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_bytes(beside / "config.toml", to_toml(config).encode())
    beside.rename(folder)


def _made_by(run: Path, name: str) -> list[Path]:
    """The files and folders that a run has from this part of ORDER."""
    if name in ("M1", "M2"):
        return [folder for folder in run.glob("M[1-9]*") if name == "M1" or folder.name != "M1"]
    if name == "eft":
        return [run / "seed" / "eft.jsonl"]
    return [path for folder in ("SFT", "M1") for path in (run / folder).glob(f"{name}.*")]


# Heading, figure in metrics.json and factor of each column of the table.
COLUMNS = (
    ("flawless %", "flawless", 100), ("greedy %", "flawless_greedy", 100), ("score", "mean_score", 1),
    ("wins M1 %", "versus_m1.win", 100), ("loses %", "versus_m1.lose", 100),
    ("pairwise %", "judge.pairwise", 100), ("5-best %", "judge.five_best", 100),
    ("exact %", "judge.exact", 100), ("Spearman", "judge.spearman", 1), ("Kendall", "judge.kendall", 1),
    ("parsed %", "judge.parse_rate", 100), ("chars", "length", 1), ("pairs", "pairs", 1),
    ("right %", "pairs_right", 100), ("distinct %", "distinct", 100), ("form %", "criteria.4", 100))


def collect(folders: list[Path]) -> dict:
    """{model: {figure: [value of each seed]}} from the runs' metrics.json; None where there is none. The
    figure "seed" tells which seeds they are."""
    runs = [read_json(folder / "metrics.json", "metrics") for folder in folders]
    return {model: {"seed": [run["seed"] for run in runs]}
            | {figure: [_figure(run["models"][model], figure) for run in runs] for _, figure, _ in COLUMNS}
            for model in runs[0]["models"]}


def _figure(metrics: dict, path: str):
    """metrics["judge"]["pairwise"] for "judge.pairwise", metrics["criteria"][4] for "criteria.4"."""
    for name in path.split("."):
        metrics = metrics[int(name)] if isinstance(metrics, list) else (metrics or {}).get(name)
    return metrics


def repeated(results: dict, variant: str, model: str) -> bool:
    """Whether a variant has this model from the base: nothing differs on any seed."""
    base = results.get("base", {})
    return variant != "base" and model in base and \
        not any(map(any, paired(results[variant][model], base[model]).values()))


def compared(results: dict) -> dict:
    """{comparison: {figure: [difference on each seed]}}: the base's later models less its M1, each model that
    a variant made itself less the base's.

    Runs of one seed share their data, M0 and often M1, so their difference spreads less than either."""
    base = results.get("base", {})
    return {f"base {model} - M1": paired(base[model], base["M1"]) for model in list(base)[2:]} | {
        f"{variant} {model} - base {model}": paired(models[model], base[model])
        for variant, models in results.items() if variant != "base"
        for model in models if model in base and not repeated(results, variant, model)}


def paired(one: dict, other: dict) -> dict:
    """{figure: [one less other on each seed that both have]} of two models' values over seeds."""
    places = [(i, other["seed"].index(seed)) for i, seed in enumerate(one["seed"]) if seed in other["seed"]]
    values = {figure: [(one[figure][i], other[figure][j]) for i, j in places] for _, figure, _ in COLUMNS
              if figure in one and figure in other}
    return {figure: [None if None in pair else pair[0] - pair[1] for pair in pairs]
            for figure, pairs in values.items()}


def mean_and_interval(values: list[float]) -> tuple[float, float]:
    """Mean over seeds and the half-width of its 95 % interval (Student's t; 0 for one seed)."""
    if len(values) < 2:
        return values[0], 0.0
    t = STUDENT_T[len(values) - 2] if len(values) - 2 < len(STUDENT_T) else 1.96
    return float(np.mean(values)), float(t * np.std(values, ddof=1) / np.sqrt(len(values)))


def markdown(results: dict) -> str:
    """The results as a Markdown table: mean over seeds, plus or minus the 95 % interval. Left out is what a
    variant has from the base."""
    return table("variant | model", {f"{variant} | {model}": metrics for variant, models in results.items()
                                     for model, metrics in models.items()
                                     if not repeated(results, variant, model)})


def compared_markdown(results: dict) -> str:
    """The paired differences as a Markdown table: mean over seeds, plus or minus the 95 % interval."""
    return table("difference", compared(results), "+")


def table(head: str, rows: dict, sign: str = "", columns: tuple = COLUMNS) -> str:
    """rows, {name: {figure: [value of each seed]}}, in Markdown. With a sign they are differences: in bold
    where the 95 % interval does not reach 0."""
    heads = [head, *(name for name, _, _ in columns)]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * (" | ".join(heads).count(" | ") + 1)]
    for name, metrics in rows.items():
        cells = [_cell(metrics.get(figure), factor, sign) for _, figure, factor in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: list | None, factor: float, sign: str) -> str:
    if not values or None in values:
        return "-"
    mean, half = mean_and_interval([factor * value for value in values])
    digits = 2 if factor == 1 and abs(mean) < 10 else 0 if abs(mean) >= 100 or factor == 1 else 1
    told = f"{mean:{sign}.{digits}f} ± {half:.{digits}f}"
    return f"**{told}**" if sign and len(values) > 1 and abs(mean) > half else told
