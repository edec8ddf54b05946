"""The charts of a run's page, in its three sections. A chart whose numbers were not measured is left out."""

from collections.abc import Iterable, Iterator
from math import log
from pathlib import Path

from minisr.judge import MAX_SCORE
from minisr.report import chart_data, figures
from minisr.report.markup import Chart
from minisr.report.run_files import read_each, read_records
from minisr.report.table import label
from minisr.worlds.catalog import world_of_prompt
from minisr.worlds.words.sentence import FINE, REASONS

JUDGE_METRICS = {"pairwise": "pairwise", "five-best": "five_best", "exact": "exact", "Spearman": "spearman",
                 "Kendall": "kendall"}
PAIR_OUTCOMES = ("pairs", "tie", "unread", "identical")


def answer_charts(folder: Path, metrics: dict) -> Iterator[Chart]:
    """How good the answers to the held-out prompts are. metrics: {model: its metrics}."""
    yield from _quality_charts(metrics)
    yield from _comparison_chart(metrics)
    failures = {name: chart_data.failure_rates(m) for name, m in metrics.items() if "criteria" in m}
    if failures:
        yield Chart(figures.rows, "Failures by criterion",
                    "Shows which point most answers miss (the first ones are the requested items), and "
                    "whether one is missed more often while others improve.",
                    (_criteria(folder, failures), failures, "share of sampled answers without the point", True))
    yield from _form_charts(metrics)
    if metrics:
        lengths = [chart_data.lengths(read_records(folder / name / "answers.jsonl")) for name in metrics]
        yield Chart(figures.by_model, "Length of the answers",
                    "Length should level off. Growth without end means that the judge rewards length.",
                    (list(metrics), {"mean (line: the middle 80 %)": lengths}, "characters"))


def _criteria(folder: Path, names: Iterable[str]) -> list[str]:
    """The names of the points that the oracle gives."""
    prompt = read_records(folder / next(iter(names)) / "answers.jsonl")[0]["prompt"]
    return list(world_of_prompt(prompt).oracle.CRITERIA)


def _quality_charts(metrics: dict) -> Iterator[Chart]:
    """Flawless answers and mean score, sampled and greedy."""
    charts = (
        ("flawless", "Flawless answers", "share of prompts",
         "Expect both to rise after M1. If only the sampled answers improve, the model has merely become "
         "more certain of its habits."),
        ("mean_score", "Mean score", "0 to 5 points",
         "Expect a rise together with the flawless answers. A fall means that some answers became much "
         "worse."))
    for metric, title, axis_label, caption in charts:
        sampled = [chart_data.estimate(m, metric) for m in metrics.values()]
        greedy = [chart_data.estimate(m, f"{metric}_greedy") for m in metrics.values()]
        if any(sampled):
            yield Chart(figures.by_model, title, caption,
                        (list(metrics), {"sampled": sampled, "greedy": greedy}, axis_label,
                         metric == "flawless"))


def _form_charts(metrics: dict) -> Iterator[Chart]:
    """The share of each form of answer in the words world: a sentence, or the rule that it breaks."""
    forms = {name: m["words"]["all"]["forms"] for name, m in metrics.items() if "words" in m}
    if forms:
        reasons = [FINE, *REASONS]
        shares = {name: [of_model.get(reason, 0.0) for reason in reasons] for name, of_model in forms.items()}
        yield Chart(figures.rows, "Form of the answers",
                    "\"fine\" should not fall. A rise of one other form, such as lists, while all words are used more "
                    "often means that the answers please the judge without being sentences.",
                    (reasons, {name: [(share,) * 3 for share in row] for name, row in shares.items()},
                     "share of sampled answers", True))


def _comparison_chart(metrics: dict) -> Iterator[Chart]:
    """Wins, ties and losses of each model against earlier ones."""
    versus = chart_data.comparisons(metrics)
    if not versus:
        return
    shares = {outcome: [rates[outcome] for rates in versus.values()] for outcome in ("win", "tie", "lose")}
    intervals = []
    for bar, rates in enumerate(versus.values()):
        lose, low, high = chart_data.estimate(rates, "lose")
        intervals.append((bar, chart_data.estimate(rates, "win")))
        intervals.append((bar, (1 - lose, 1 - low, 1 - high)))  # losses are drawn from the right
    yield Chart(figures.stacked, "Head to head",
                "Expect clearly more wins than losses from M2 on. Black lines: the 95 % intervals of wins "
                "and losses.",
                (list(versus), shares, "share of prompts", intervals))


def judge_charts(folder: Path, names: list[str], metrics: dict) -> Iterator[Chart]:
    """How good the models' judgements are."""
    if metrics:
        estimates = {}
        for name, m in metrics.items():
            estimates[name] = [chart_data.estimate(m, f"judge.{key}") for key in JUDGE_METRICS.values()]
        yield Chart(figures.rows, "The paper's five metrics",
                    "Expect M1 far to the right of SFT, the effect of EFT, and the later models close to M1.",
                    (list(JUDGE_METRICS), estimates, "share or correlation"))
    judged = read_each(folder, names, "judge_evaluation.jsonl")
    points = {name: chart_data.calibration(records) for name, records in judged.items()}
    points = {name: of_model for name, of_model in points.items() if of_model}
    if points:
        yield Chart(figures.calibration, "Calibration",
                    "A calibrated judge lies on the diagonal. Above it the judge is too generous, and a flat "
                    "line cannot tell good answers from bad ones. Large mark: many responses.", (points,))
    counts = read_each(folder, names, "rewards.counts.json")
    if counts:
        shares = {name: chart_data.score_shares(of_model) for name, of_model in counts.items()}
        scores = [str(score) for score in range(MAX_SCORE + 1)]
        scores.append(f"\n{label('unread')}")  # one line lower, so that it does not touch the 5
        yield Chart(figures.histogram, "Scores given in each iteration",
                    "Expect the scores to move right as the answers improve. Once nearly all are 5, few "
                    "preferences are left.", (scores, shares, "score", "share of judgements"))


def training_charts(folder: Path, names: list[str]) -> Iterator[Chart]:
    """How DPO training went, and what became of the prompts that it was made from."""
    yield from _dpo_charts(folder, names)
    pairs = read_each(folder, names, "pairs.counts.json")
    if pairs:
        shares = {}
        for outcome in PAIR_OUTCOMES:
            shares[label(outcome)] = [counts.get(outcome, 0) / max(sum(counts.values()), 1)
                                      for counts in pairs.values()]
        yield Chart(figures.stacked, "Outcome of the prompts",
                    "Expect most prompts to yield a pair. A tie means that the judge saw no difference, "
                    "unparsed that it lost the output format.",
                    (list(pairs), shares, "share of the iteration's prompts"))
    prompts = read_each(folder, names, "prompts.counts.json")
    reasons = sorted({reason for counts in prompts.values() for reason in counts} - {"accepted"})
    if reasons:
        accepted = ", ".join(f"{counts.get('accepted', 0):,} by {name}" for name, counts in prompts.items())
        rejected = {}
        for name, counts in prompts.items():
            rejected[name] = [(counts.get(reason, 0),) * 3 for reason in reasons]
        yield Chart(figures.rows, "Rejected prompts",
                    "One reason that outweighs the others means that the filter is too strict or that the "
                    f"model repeats itself (accepted: {accepted}).", (reasons, rejected, "prompts"))


def _dpo_charts(folder: Path, names: list[str]) -> Iterator[Chart]:
    """Loss, margin and accuracy over the optimizer steps."""
    logs = read_each(folder, names, "train_log.jsonl")
    steps = {name: chart_data.dpo_steps(records) for name, records in logs.items()}
    steps = {name: of_model for name, of_model in steps.items() if of_model}
    charts = (
        ("dpo_loss", "DPO loss", log(2),
         "Expect a fall from log 2 = 0.693, the loss of a model that equals its reference."),
        ("margin", "DPO margin", 0.0,
         "Expect the implicit reward of the chosen response to rise above that of the rejected one."),
        ("accuracy", "DPO accuracy", 0.5,
         "The share of pairs with a positive margin. Expect it to end above 0.8."))
    for key, title, reference, caption in charts:
        if steps:
            values = {name: [step[key] for step in of_model] for name, of_model in steps.items()}
            yield Chart(figures.curves, title, caption, (values, "mean of a batch", reference))
