"""Variants x seeds of one config: the same run under several controls, and a table with intervals.

    base = "../tiny.toml"
    seeds = [0, 1, 2, 3, 4]
    variant_seeds = [0, 1, 2]  # of the variants, if not all; every one is also a seed of the base
    common.threads = 1         # in every run: two runs side by side (--jobs 2) beat two threads in one
    [variants.random]          # what differs from the base, as in a config
    judge.by = "random"

Every run is an ordinary run in OUT/VARIANT-SEED and goes on where it stopped. What a variant has in
common with the base of the same seed (everything up to M1's responses, when only `judge.by` or `dpo`
differ) is copied, not made again.
"""

import shutil
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minisr.config import load_config, to_toml
from minisr.records import InputError, read_json, read_text, write_bytes, write_json

# Half-width of a 95 % interval of a mean in standard errors: Student's t for n - 1 = 1, 2, ... 9.
STUDENT_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


def experiment(path: Path, out: Path, jobs: int) -> dict:
    """Run all that is missing; write and return {variant: {model: {figure: [value of each seed]}}}."""
    plan = read_plan(path)
    variants, seeds = plan["variants"], plan["seeds_of"]
    for names in (["base"], [name for name in variants if name != "base"]):  # variants copy from base
        work = [(name, seed) for seed in seeds["base"] for name in names if seed in seeds[name]]
        with ThreadPoolExecutor(jobs) as pool:
            done = pool.map(lambda ns: _run(out, plan, *ns), work)
            list(tqdm(done, total=len(work), desc=" and ".join(names)))
    results = {name: collect([out / f"{name}-{seed}" for seed in seeds[name]]) for name in variants}
    write_json(out / "results.json", results)
    return results


def read_plan(path: Path) -> dict:
    """An experiment file, checked: base config, seeds, and each variant's overrides."""
    try:
        plan = tomllib.loads(read_text(path, "experiment"))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"experiment {path} is not valid TOML: {error}") from error
    if set(plan) - {"variants", "common", "variant_seeds"} != {"base", "seeds"}:
        raise InputError(f"experiment {path} must have base and seeds, and may have variant_seeds, common "
                         "and [variants.NAME]")
    fewer = plan.get("variant_seeds", plan["seeds"])
    lists = isinstance(plan["seeds"], list) and isinstance(fewer, list)
    if not lists or not fewer or not set(fewer) <= set(plan["seeds"]):
        raise InputError(f"experiment {path}: seeds is a list like [0, 1, 2], variant_seeds a part of it")
    sections = [plan.get("variants", {}), plan.get("common", {})]
    if not isinstance(plan["base"], str) or not all(isinstance(section, dict) for section in sections) \
            or not all(isinstance(variant, dict) for variant in sections[0].values()):
        raise InputError(f"experiment {path}: base is a file name, common and each variant a section")
    plan["base"] = Path(path).parent / plan["base"]
    tables = {"base": {}, **plan.get("variants", {})}
    plan["common"] = tuple(overrides(plan.get("common", {})))
    plan["variants"] = {name: tuple(overrides(table)) for name, table in tables.items()}
    plan["seeds_of"] = {name: plan["seeds"] if name == "base" else fewer for name in tables}
    for changes in plan["variants"].values():
        load_config(plan["base"], overrides=(*plan["common"], *changes))  # told now, not in an hour
    return plan


def overrides(table: dict, prefix: str = ""):
    """{"judge": {"by": "random"}} -> "judge.by=random"."""
    for name, value in table.items():
        if isinstance(value, dict):
            yield from overrides(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}={value}"


def _run(out: Path, plan: dict, name: str, seed: int) -> None:
    """One run in a process of its own; its last words are in OUT/NAME-SEED.log."""
    folder, changes = out / f"{name}-{seed}", plan["variants"][name]
    if name != "base" and not folder.exists():
        share(out / f"base-{seed}", folder, changes)
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "minisr", "run", str(plan["base"]), "--out", str(folder)]
    for change in (f"seed={seed}", *plan["common"], *changes):
        command += ["--set", change]
    with open(f"{folder}.log", "w", encoding="utf-8") as log:
        if subprocess.run(command, stdout=log, stderr=log).returncode:
            raise InputError(f"{folder} failed; {folder}.log tells why")


def share(base: Path, folder: Path, changes: tuple[str, ...]) -> None:
    """Copy from the base run what a variant with these changes would make again just so."""
    if not all(change.startswith(("judge.by=", "dpo.")) for change in changes):
        return
    beside = folder.with_name(folder.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)
    for part in ("seed", "M0", "SFT", "M1"):
        shutil.copytree(base / part, beside / part)
    if any(change.startswith("judge.by=") for change in changes):
        for name in ("rewards", "pairs"):
            for file in (beside / "M1").glob(f"{name}.*"):
                file.unlink()
    config = load_config(base / "config.toml", overrides=changes)
    write_bytes(beside / "config.toml", to_toml(config).encode())
    beside.rename(folder)


# Heading, figure in metrics.json and factor of each column of the table.
COLUMNS = (
    ("flawless %", "flawless", 100), ("greedy %", "flawless_greedy", 100), ("score", "mean_score", 1),
    ("wins M1 %", "versus_m1.win", 100), ("loses %", "versus_m1.lose", 100),
    ("pairwise %", "judge.pairwise", 100), ("5-best %", "judge.five_best", 100),
    ("exact %", "judge.exact", 100), ("Spearman", "judge.spearman", 1), ("Kendall", "judge.kendall", 1),
    ("parsed %", "judge.parse_rate", 100), ("chars", "length", 1), ("pairs", "pairs", 1))


def collect(folders: list[Path]) -> dict:
    """{model: {figure: [value of each seed]}} from the runs' metrics.json; None where there is none."""
    runs = [read_json(folder / "metrics.json", "metrics")["models"] for folder in folders]
    return {model: {figure: [_figure(run[model], figure) for run in runs] for _, figure, _ in COLUMNS}
            for model in runs[0]}


def _figure(metrics: dict, path: str):
    """metrics["judge"]["pairwise"] for "judge.pairwise"."""
    for name in path.split("."):
        metrics = (metrics or {}).get(name)
    return metrics


def mean_and_interval(values: list[float]) -> tuple[float, float]:
    """Mean over seeds and the half-width of its 95 % interval (Student's t; 0 for one seed)."""
    if len(values) < 2:
        return values[0], 0.0
    t = STUDENT_T[len(values) - 2] if len(values) - 2 < len(STUDENT_T) else 1.96
    return float(np.mean(values)), float(t * np.std(values, ddof=1) / np.sqrt(len(values)))


def markdown(results: dict) -> str:
    """The results as a Markdown table: mean over seeds, plus or minus the 95 % interval."""
    lines = ["| variant | model | " + " | ".join(head for head, _, _ in COLUMNS) + " |",
             "|---|---|" + "---|" * len(COLUMNS)]
    for variant, models in results.items():
        for model, metrics in models.items():
            cells = [_cell(metrics[figure], factor) for _, figure, factor in COLUMNS]
            lines.append(f"| {variant} | {model} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: list, factor: float) -> str:
    if None in values:
        return "-"
    mean, half = mean_and_interval([factor * value for value in values])
    digits = 2 if factor == 1 and abs(mean) < 10 else 0 if abs(mean) >= 100 or factor == 1 else 1
    return f"{mean:.{digits}f} ± {half:.{digits}f}"
