"""report.html: a run or an experiment on one HTML page, with charts, without scripts.

All content comes from the run's own files and nothing depends on a clock: the same run gives the same bytes.
"""

import os
from collections.abc import Iterator
from dataclasses import asdict
from html import escape
from pathlib import Path
from urllib.parse import quote

from minisr import InputError
from minisr.report import figures, markup
from minisr.report.markup import Chart, text
from minisr.report.run_charts import answer_charts, judge_charts, training_charts
from minisr.report.run_files import read_object_if_any
from minisr.report.seed_statistics import over_seeds
from minisr.report.table import LEGEND
from minisr.report.transcripts import held_out_answers, iteration
from minisr.runner.config import Config, differences, load_config
from minisr.runner.files import check_object, write_bytes

# Metric, title and caption of the charts of an experiment's page.
EXPERIMENT_CHARTS = (
    ("flawless", "Flawless, sampled", "Compare each variant's last model with its M1."),
    ("flawless_greedy", "Flawless, greedy", "The same comparison at temperature 0."),
    ("judge.pairwise", "Pairs the judge orders correctly", "Shows the step from SFT to M1, and the effect of "
     "iterating on the judge."),
    ("mean_score", "Mean score", "Expect a rise together with the flawless answers."),
    ("versus_m1.win", "Wins against M1", "Compare with the wins of a control such as a random judge."))


def write_page(folder: Path, out: Path | None = None) -> Path:
    """Write the page of a run's or an experiment's folder, by default as FOLDER/report.html."""
    folder = Path(folder)
    out = Path(out or folder / "report.html")
    if (folder / "results.json").exists():
        page = experiment_page(folder, out)
    elif (folder / "config.toml").exists():
        page = run_page(folder)
    else:
        raise InputError(f"{folder} holds no run (config.toml) and no finished experiment (results.json)")
    write_bytes(out, page.encode("utf-8", "replace"))  # a lone surrogate cannot be encoded
    return out


def run_page(folder: Path) -> str:
    """The page of a run, finished or not."""
    config = load_config(folder / "config.toml")
    names = ["SFT", *(f"M{t}" for t in range(1, config.iterations + 2))]
    evaluated = read_object_if_any(folder / "metrics.json").get("models", {})
    metrics = {name: check_object(evaluated[name], f"{folder}/metrics.json: {name}") for name in names
               if name in evaluated and (folder / name / "answers.jsonl").exists()}
    missing = [name for name in names if name not in metrics]
    parts = _settings(config, read_object_if_any(folder / "SFT/meta.json"))
    if missing:
        parts.append(f'<p class="bad">Unfinished: {", ".join(missing)} not evaluated yet.</p>')
    if metrics:
        parts += ["<h2>Results</h2>", markup.run_table(metrics),
                  f'<p class="soft">95 % intervals in brackets. {text(LEGEND)}</p>']
    parts += markup.section("Answers", answer_charts(folder, metrics))
    parts += markup.section("The judge", judge_charts(folder, names, metrics))
    parts += markup.section("Training and its data", training_charts(folder, names))
    parts += held_out_answers(folder, list(metrics))
    parts += iteration(folder / "M1")
    return markup.document(f"minisr run, seed {config.seed}", parts)


def _settings(config: Config, meta: dict) -> list[str]:
    """What was run: the settings that matter most, and all that differ from the defaults."""
    changed_keys = differences(asdict(Config()), asdict(config))
    changes = ", ".join(f"<code>{text(line)}</code>" for line in changed_keys)
    parts = [f"<p>M0: {text(config.seed_model or 'the model that minisr ships')}; seed data: "
             f"{text(config.seed_data.source)}; {config.iterations} iterations of {config.prompts.count} "
             f"prompts with N = {config.responses.candidates} responses each, judged "
             f"J = {config.judge.judgements} times by {text(config.judge.by)}.</p>"
             f"<p>Different from the defaults: {changes or 'nothing'}.</p>"]
    if meta:
        parts.append(f'<p class="soft">Made by minisr {text(meta.get("minisr"))}, '
                     f'PyTorch {text(meta.get("torch"))}.</p>')
    return parts


def experiment_page(folder: Path, out: Path) -> str:
    """The page of an experiment: means over seeds with intervals, and links to the pages of its runs."""
    results = read_object_if_any(folder / "results.json")
    parts = ["<h2>Variants</h2>"]
    for variant, models in results.items():
        check_object(models, f"{folder}/results.json: {variant}")
        parts.append(_variant(folder, out, variant))
    parts += markup.section("Side by side", _experiment_charts(results))
    parts += ["<h2>Results</h2>", markup.experiment_table(results),
              '<p class="soft">Means over seeds ± the 95 % interval (Student\'s t); "-": at least one seed '
              "has no value. Models that a variant shares with the base are left out.</p>",
              "<h2>Differences on the same seed</h2>", markup.experiment_differences(results),
              '<p class="soft">Bold: the 95 % interval excludes 0. Expect about 1 in 20 to be bold by '
              "chance.</p>"]
    return markup.document(f"minisr experiment {folder.resolve().name}", parts)


def _experiment_charts(results: dict) -> Iterator[Chart]:
    """One chart per metric: the variants side by side, a point per model."""
    for metric, title, caption in EXPERIMENT_CHARTS:
        estimates, values = over_seeds(results, metric)
        if estimates:
            is_share = metric != "mean_score"
            yield Chart(figures.rows, title, caption, (
                list(results), estimates, "mean and 95 % interval; ticks: seeds", is_share, values))


def _variant(folder: Path, out: Path, variant: str) -> str:
    """What a variant changes in the base's config, and links to the pages of its runs."""
    seeds = _seeds(folder, variant)
    changes = []
    if seeds:
        base = folder / f"base-{seeds[0]}" / "config.toml"
        own = folder / f"{variant}-{seeds[0]}" / "config.toml"
        if base.is_file():
            changes = differences(asdict(load_config(base)), asdict(load_config(own)))
    parts = [f"<p><b>{text(variant)}</b> " + ", ".join(f"<code>{text(change)}</code>" for change in changes)]
    for seed in seeds:
        page = folder / f"{variant}-{seed}" / "report.html"
        if page.exists():
            link = quote(os.path.relpath(page, out.parent).replace(os.sep, "/"))
            parts.append(f'<a class="soft" href="{escape(link)}">seed {text(seed)}</a>')
    return "\n".join([*parts, "</p>"])


def _seeds(folder: Path, variant: str) -> list[str]:
    """The seeds for which an experiment's folder holds a run of this variant, in numerical order."""
    seeds = []
    for run in folder.glob("*-*"):
        name, _, seed = run.name.rpartition("-")
        if name == variant and (run / "config.toml").exists():
            seeds.append(seed)
    return sorted(seeds, key=lambda seed: (len(seed), seed))
