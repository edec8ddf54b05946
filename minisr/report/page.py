"""report.html: a run or an experiment as one file that any browser opens, with pictures, without scripts.

All numbers come from the run's own files and none from a clock: the same run gives the same bytes.
"""

import os
from collections import defaultdict
from dataclasses import asdict
from html import escape
from pathlib import Path
from statistics import mean
from urllib.parse import quote

import numpy as np

from minisr import InputError
from minisr.judge import MAX_SCORE
from minisr.report import figures, markup
from minisr.report.markup import text
from minisr.report.table import LEGEND
from minisr.runner.config import Config, differences, load_config
from minisr.runner.experiment import mean_and_interval
from minisr.runner.files import read_json, read_jsonl, write_bytes
from minisr.worlds.tiny import oracle

HELD_OUT, EXAMPLES = 12, 6  # prompts shown


def write_page(folder: Path, out: Path | None = None) -> Path:
    """Write the page of a run's or an experiment's folder, FOLDER/report.html if not told where."""
    folder, out = Path(folder), Path(out or Path(folder) / "report.html")
    if (folder / "results.json").exists():
        page = experiment_page(folder, out)
    elif (folder / "config.toml").exists():
        page = run_page(folder)
    else:
        raise InputError(f"{folder} holds no run (config.toml) and no finished experiment (results.json)")
    write_bytes(out, page.encode("utf-8", "replace"))  # half a surrogate pair is no character
    return out


def run_page(folder: Path) -> str:
    """A run as far as it has come."""
    config = load_config(folder / "config.toml")
    names = ["SFT", *(f"M{t}" for t in range(1, config.iterations + 2))]
    evaluated = _read(folder / "metrics.json").get("models", {})
    metrics = {name: evaluated[name] for name in names if name in evaluated}
    parts = [*_what_was_run(config, _read(folder / "SFT/meta.json"))]
    if missing := [name for name in names if name not in metrics]:
        parts.append(f'<p class="bad">Unfinished: {", ".join(missing)} not evaluated yet.</p>')
    if metrics:
        parts += ["<h2>Results</h2>", markup.run_table(metrics),
                  f'<p class="soft">95 % intervals in brackets. {text(LEGEND)}</p>']
    parts += markup.section("Answers", _answers(folder, metrics))
    parts += markup.section("The judge", _judge(folder, names, metrics))
    parts += markup.section("Training and its data", _training(folder, names))
    parts += [*_held_out(folder, list(metrics)), *_iteration(folder / "M1")]
    return markup.document(f"minisr run, seed {config.seed}", parts)


def experiment_page(folder: Path, out: Path) -> str:
    """An experiment's means over seeds, with intervals, and the way to its runs."""
    results, cards = read_json(folder / "results.json", "results"), []
    for figure, title, caption in (
            ("flawless", "Flawless, sampled", "Look for variants whose last model leaves M1 behind."),
            ("flawless_greedy", "Flawless, greedy", "Look for the same at temperature 0."),
            ("judge.pairwise", "Pairs the judge orders rightly", "Look for the step from SFT to M1, and for "
             "what iterating does to it."),
            ("mean_score", "Mean score", "Look for a rise together with the flawless answers."),
            ("versus_m1.win", "Wins against M1", "Look for more wins than a control has.")):
        points, seeds = over_seeds(results, figure)
        if points:
            cards.append((figures.rows, title, caption, list(results), points,
                          "mean and 95 % interval; ticks: seeds", figure != "mean_score", seeds))
    parts = [*_variants(folder, out, results), *markup.section("Side by side", cards),
             "<h2>Results</h2>", markup.experiment_table(results),
             '<p class="soft">Means over seeds ± the 95 % interval (Student\'s t); "-": not on every seed a '
             "number. Left out is what a variant has from the base.</p>",
             "<h2>Differences on the same seed</h2>", markup.compared_table(results),
             '<p class="soft">Bold: the interval does not reach 0. There are many: of twenty true zeros one '
             "is bold by chance.</p>"]
    return markup.document(f"minisr experiment {folder.resolve().name}", parts)


# What the pictures show: plain numbers from the run's files.

def estimate(m: dict, figure: str):
    """(value, low, high) of a figure such as "judge.pairwise" in a model's metrics; (value, value, value) if
    it has no interval, None if there is no number."""
    *sections, name = figure.split(".")
    for section in sections:
        m = m.get(section) or {}
    return None if m.get(name) is None else (m[name], *(m.get(f"{name}_ci95") or (m[name], m[name])))


def wins(metrics: dict) -> dict:
    """{"M2 against M1": win rates} of all that metrics.json compares, each once."""
    names, found = list(metrics), {}
    for i, name in enumerate(names):
        for label, other in (("sft", names[0]), ("m1", names[min(i, 1)]), ("previous", names[i - 1])):
            if f"versus_{label}" in metrics[name]:
                found[f"{name} against {other}"] = metrics[name][f"versus_{label}"]
    return found


def calibration(records: list[dict]) -> list[tuple]:
    """(true score, mean reward given, count) of the ranked responses whose judgements were read."""
    given = defaultdict(list)
    for record in records:
        for true, reward in zip(record["scores"], record["rewards"]):
            if reward is not None:
                given[true].append(reward)
    return [(true, mean(rewards), len(rewards)) for true, rewards in sorted(given.items())]


def score_shares(counts: dict) -> list[float]:
    """Shares of the scores 0 to 5, rounded to whole points, and of the unread ones."""
    shares = [0.0] * (MAX_SCORE + 2)
    for score, count in counts.items():
        shares[-1 if score == "unread" else int(float(score) + 0.5)] += count / sum(counts.values())
    return shares


def lengths(records: list[dict]) -> tuple[float, float, float]:
    """Mean length of the sampled answers in characters, and between what the middle 80 % lie."""
    sizes = [len(record["sampled"]) for record in records]
    return (mean(sizes), *(float(q) for q in np.quantile(sizes, (0.1, 0.9))))


def over_seeds(results: dict, figure: str) -> tuple[dict, dict]:
    """{model: [estimate of each variant]} and {model: [the values behind each]} of one figure."""
    points, seeds = {}, {}
    for model in dict.fromkeys(name for models in results.values() for name in models):
        values = [models.get(model, {}).get(figure) or [None] for models in results.values()]
        means = [None if None in row else mean_and_interval(row) for row in values]
        if any(means):
            points[model] = [m and (m[0], m[0] - m[1], m[0] + m[1]) for m in means]
            seeds[model] = values
    return points, seeds


# The cards of a run's page, each (picture, title, caption, numbers...). What was not measured has none.

def _answers(folder: Path, metrics: dict):
    names = list(metrics)
    for figure, title, label, caption in (
            ("flawless", "Flawless answers", "share of prompts", "Look for both rising from M1 on: if only "
             "the sampled ones do, the model has merely become surer of its habits."),
            ("mean_score", "Mean score", "0 to 5 points", "Look for a rise with the flawless answers: a fall "
             "means that some answers got much worse.")):
        ways = {way: [estimate(m, figure + suffix) for m in metrics.values()]
                for way, suffix in (("sampled", ""), ("greedy", "_greedy"))}
        if any(ways["sampled"]):
            yield figures.by_model, title, caption, names, ways, label, figure == "flawless"
    if versus := wins(metrics):
        shares = {part: [v[part] for v in versus.values()] for part in ("win", "tie", "lose")}
        marks = [(y, e) for y, v in enumerate(versus.values())
                 for e in (estimate(v, "win"), [1 - end for end in estimate(v, "lose")])]
        yield (figures.stacked, "Head to head", "Look for clearly more wins than losses from M2 on; black: "
               "the 95 % intervals of both.", list(versus), shares, "share of prompts", marks)
    if failed := {name: failures(m) for name, m in metrics.items() if "criteria" in m}:
        yield (figures.rows, "Failures by criterion", "Look for the point that most answers miss (first to "
               "third: the things asked for), and for one that is missed more often as others improve.",
               list(oracle.CRITERIA), failed, "share of sampled answers without the point", True)
    if metrics:
        sizes = [lengths(_read(folder / name / "answers.jsonl")) for name in names]
        yield (figures.by_model, "Length of the answers", "Look for growth without end: then the judge "
               "rewards length.", names, {"mean (line: the middle 80 %)": sizes}, "characters")


def failures(m: dict) -> list[tuple]:
    """For each criterion the share of sampled answers without its point, as an estimate."""
    return [(1 - share,) * 3 for share in m["criteria"]]


def _judge(folder: Path, names: list[str], metrics: dict):
    if metrics:
        five = {"pairwise": "pairwise", "five-best": "five_best", "exact": "exact", "Spearman": "spearman",
                "Kendall": "kendall"}
        yield (figures.rows, "The paper's five metrics", "Look for M1 far to the right of SFT, which is what "
               "EFT does, and for the later models staying there.", list(five),
               {name: [estimate(m, f"judge.{key}") for key in five.values()] for name, m in metrics.items()},
               "share or correlation")
    if judged := _each(folder, names, "judge_evaluation.jsonl", calibration):
        yield (figures.calibration, "Calibration", "Look for lines along the diagonal: above it the judge is "
               "too kind, and a flat one cannot tell good from bad (large mark: many responses).", judged)
    if given := _each(folder, names, "rewards.counts.json", score_shares):
        yield (figures.histogram, "Scores given in each iteration", "Look for scores moving right as the "
               "answers improve: once nearly all are 5, little is left to prefer.",
               [*map(str, range(MAX_SCORE + 1)), "unread"], given, "score", "share of judgements")


def _training(folder: Path, names: list[str]):
    logs = _each(folder, names, "train_log.jsonl", lambda log: [step for step in log if "dpo_loss" in step])
    for key, title, reference, caption in (
            ("dpo_loss", "DPO loss", float(np.log(2)), "Look for a fall from log 2 = 0.693, where the model "
             "is still its own reference."),
            ("margin", "DPO margin", 0.0, "Look for the chosen response's implicit reward rising over the "
             "rejected one's."),
            ("accuracy", "DPO accuracy", 0.5, "Look for the share of pairs with a positive margin ending "
             "above 0.8.")):
        if logs:
            values = {name: [step[key] for step in log] for name, log in logs.items()}
            yield figures.curves, title, caption, values, "mean of a batch", reference
    if pairs := _each(folder, names, "pairs.counts.json"):
        yield (figures.stacked, "What the prompts yielded", "Look for most yielding a pair: ties mean that "
               "the judge saw no difference, unread that it lost its format.", list(pairs),
               {part: [counts.get(part, 0) / max(sum(counts.values()), 1) for counts in pairs.values()]
                for part in ("pairs", "tie", "unread", "identical")}, "share of the iteration's prompts")
    made = _each(folder, names, "prompts.counts.json")
    if reasons := sorted({reason for counts in made.values() for reason in counts} - {"accepted"}):
        kept = ", ".join(f"{counts.get('accepted', 0):,} by {name}" for name, counts in made.items())
        yield (figures.rows, "Prompts thrown away", "Look for one reason that outweighs the rest: too strict "
               f"a filter, or a model that repeats itself (kept: {kept}).", reasons,
               {name: [(counts.get(reason, 0),) * 3 for reason in reasons] for name, counts in made.items()},
               "prompts")


# The other parts of a page, HTML each.

def _what_was_run(config: Config, meta: dict):
    changed = ", ".join(f"<code>{text(c)}</code>" for c in differences(asdict(Config()), asdict(config)))
    yield (f"<p>M0: {text(config.seed_model or 'the one minisr ships')}; seed data: "
           f"{text(config.seed_data.source)}; {config.iterations} iterations of {config.prompts.count} "
           f"prompts with N = {config.responses.candidates} responses each, judged "
           f"J = {config.judge.judgements} times by {text(config.judge.by)}.</p>"
           f"<p>Different from the defaults: {changed or 'nothing'}.</p>")
    if meta:
        yield (f'<p class="soft">Made by minisr {text(meta.get("minisr"))}, '
               f'PyTorch {text(meta.get("torch"))}.</p>')


def _variants(folder: Path, out: Path, results: dict):
    """What each variant changes, and links to its runs' pages."""
    yield "<h2>Variants</h2>"
    for variant in results:
        runs = [run for run in folder.glob("*-*") if run.name.rpartition("-")[0] == variant]
        seeds = sorted((run.name.rpartition("-")[2] for run in runs if (run / "config.toml").exists()),
                       key=lambda seed: (len(seed), seed))
        base, own = (folder / f"{name}-{seeds[0]}/config.toml" for name in ("base", variant)) \
            if seeds else (folder, folder)
        changed = differences(asdict(load_config(base)), asdict(load_config(own))) if base.is_file() else []
        yield f"<p><b>{text(variant)}</b> " + ", ".join(f"<code>{text(change)}</code>" for change in changed)
        for seed in seeds:
            page = folder / f"{variant}-{seed}" / "report.html"
            if page.exists():
                link = quote(os.path.relpath(page, out.parent).replace(os.sep, "/"))
                yield f'<a class="soft" href="{escape(link)}">seed {text(seed)}</a>'
        yield "</p>"


def _held_out(folder: Path, names: list[str]):
    """The first held-out prompts with every model's sampled answer."""
    answers = [_read(folder / name / "answers.jsonl")[:HELD_OUT] for name in names]
    if names:
        yield "<h2>Held-out prompts and every model's answer</h2>"
    for records in zip(*answers):
        yield markup.prompt(records[0]["prompt"], (markup.answer(name, r["sampled"], markup.points(r))
                                                   for name, r in zip(names, records)))


def _iteration(folder: Path):
    """The first prompts of an iteration: responses, rewards, a judgement in words, the pair."""
    responses, rewards = _read(folder / "responses.jsonl"), _read(folder / "rewards.jsonl")
    pairs = {pair["prompt"]: pair for pair in _read(folder / "pairs.jsonl")}
    no_pair = ['<p class="soft">No pair.</p>'] if (folder / "pairs.jsonl").exists() else []
    if responses:
        yield f"<h2>{folder.name}'s iteration: responses, rewards, pairs</h2>"
    for i, y in enumerate(responses[:EXAMPLES]):
        pair, rows, r = pairs.get(y["prompt"], {}), [], rewards[i] if rewards else {}
        sides = {(pair[side], pair[f"{side}_reward"]): f'<span class="{css}">{side}</span> '
                 for side, css in (("chosen", "good"), ("rejected", "bad")) if pair}
        for n, response in enumerate(y["responses"]):
            told = "" if y["finished"][n] else "cut off; "
            if r:
                reward, scores, words = (r[key][n] for key in ("rewards", "scores", "judgements"))
                told += sides.pop((response, reward), "")  # the first of equal ones is the pair's
                told += markup.judged(oracle.score(y["prompt"], response), reward, scores, words)
            rows.append(markup.answer(f"y<sup>{n + 1}</sup>", response, told))
        rows += [markup.answer("", other, f"{side} (by another model)") for (other, _), side in sides.items()]
        yield markup.prompt(y["prompt"], rows + ([] if pair else no_pair))


def _read(path: Path):
    """A file's records, or what a JSON file holds; empty if there is no such file yet."""
    if path.suffix == ".jsonl":
        return read_jsonl(path, "records") if path.exists() else []
    return read_json(path, "report") if path.exists() else {}


def _each(folder: Path, names: list[str], file: str, numbers=lambda content: content) -> dict:
    """{model: numbers(content of its file)} of the models that have any."""
    found = {name: content for name in names if (content := _read(folder / name / file))}
    return {name: made for name, content in found.items() if (made := numbers(content))}
