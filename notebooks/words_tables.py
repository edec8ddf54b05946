"""Print the tables of "Results: a real model" in README.md from words.json: python notebooks/words_tables.py"""

import argparse
import sys
from pathlib import Path

from minisr import InputError
from minisr.report.seed_statistics import mean_and_interval
from minisr.runner.files import read_json

# The metrics of words.json that are printed as they are: their columns.
OWN_PROMPTS = {"words_greedy.all.cover": "all words", "words_greedy.all.form": "a sentence",
               "words_greedy.all.flawless": "both", "words_greedy.all.lists": "lists",
               "words.all.flawless": "both, sampled", "judge.pairwise": "judge, pairwise"}
COMMONGEN = {"cover": "all words", "form": "a sentence", "both": "both", "pos": "all words, with part of speech"}
VARIANTS = {"base": "-", "word_points": "the reward leaves out the sentence's point", "random": "random rewards",
            "oracle": "true rewards", "frozen": "M1 judges in every iteration",
            "no_replay": "no EFT examples in DPO",
            "positives_only": "no DPO: M0 is fine-tuned on the seed data and M1's responses of reward 5",
            "worst": "the paper's pairs: best against worst"}
BOTH = "words_greedy.all.flawless"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, nargs="?", default=Path(__file__).with_name("words.json"),
                        help="what collect_words.py wrote; default: words.json beside this script")
    content = read_json(parser.parse_args().file, "results")
    print(table(own_prompts(content["runs"]["base"])))
    print()
    print(table(commongen(content["commongen"], content["commongen_examples"])))
    print()
    print(table(variants(content["runs"])))


def own_prompts(models: dict) -> list[dict[str, str]]:
    """Every model of base on the held-out prompts."""
    rows = []
    for name, metrics in models.items():
        row = {"": name} | {title: percent(metrics, metric) for metric, title in OWN_PROMPTS.items()}
        row["both, mean"] = mean_cell(metrics, BOTH)
        successor = models.get(f"M{int(name[1:]) + 1}", {}) if name != "SFT" else {}
        row["own pairwise"] = percent(successor, "rewards.pairwise")  # stored with the pairs that this model scored
        if name not in ("SFT", "M1"):
            row["pairs"] = ", ".join(map(str, metrics["pairs"]))
            row["pairs right"] = percent(metrics, "pairs_right")
        rows.append(row)
    return rows


def commongen(results: dict, with_examples: dict) -> list[dict[str, str]]:
    """M0, every model of base, and the published answers on CommonGen-lite."""
    base, published = results["base"], results["published"]
    trained = sorted(name for name in base if name not in ("M0", "SFT"))
    rows = []
    for name in ("M0", "SFT", *trained, *published):
        metrics = base.get(name) or published[name]
        title = f"*{name}* (published answers)" if name in published else name
        row = {"": title} | {column: percent(metrics, metric) for metric, column in COMMONGEN.items()}
        row["both, mean"] = mean_cell(metrics, "both")
        row["perplexity under M0"] = ", ".join(f"{value:.1f}" for value in metrics["ppl"])
        row["with examples: both"] = percent(with_examples["base"].get(name, {}), "both")
        rows.append(row)
    return rows


def variants(runs: dict) -> list[dict[str, str]]:
    """M2 and M3 of every variant that has been run, with the difference from base on the same seeds."""
    rows = []
    for variant, what in VARIANTS.items():
        for model in ("M2", "M3"):
            metrics = runs.get(variant, {}).get(model)
            if not metrics or (variant, model) == ("frozen", "M2"):  # which is base's M2
                continue
            row = {"": f"{variant} {model}", "what differs": what, "seeds": ", ".join(map(str, metrics["seed"]))}
            row |= {title: percent(metrics, metric) for metric, title in OWN_PROMPTS.items()}
            row["pairs right"] = percent(metrics, "pairs_right")
            if variant != "base":
                row["both, minus base"] = difference_cell(metrics, runs["base"][model], BOTH)
            what = ""  # once for both models
            rows.append(row)
    return rows


def percent(metrics: dict, name: str) -> str:
    """The values of all seeds, in percent; empty where the metric was not measured."""
    values = metrics.get(name, [None])
    return "" if None in values else ", ".join(f"{100 * value:.1f}" for value in values)


def mean_cell(metrics: dict, name: str) -> str:
    """The mean of a share and the half-width of its 95 % interval over seeds, in percent; empty for one seed."""
    values = [100 * value for value in metrics[name]]
    if len(values) < 2:
        return ""
    mean, interval = mean_and_interval(values)
    return f"{mean:.1f} ± {interval:.1f}"


def difference_cell(metrics: dict, base: dict, name: str) -> str:
    """The mean difference from base on the same seeds, in points, and the half-width of its 95 % interval.

    It is bold if the interval excludes 0."""
    of_base = dict(zip(base["seed"], base[name]))
    differences = [100 * (value - of_base[seed]) for seed, value in zip(metrics["seed"], metrics[name])]
    mean, interval = mean_and_interval(differences)
    if len(differences) == 1:
        return f"{mean:+.1f}"
    text = f"{mean:+.1f} ± {interval:.1f}"
    return f"**{text}**" if abs(mean) > interval else text


COLUMNS = ["", "what differs", "seeds", "all words", "a sentence", "both", "both, mean", "both, minus base", "lists",
           "both, sampled", "all words, with part of speech", "perplexity under M0", "judge, pairwise", "own pairwise",
           "pairs", "pairs right", "with examples: both"]


def table(rows: list[dict[str, str]]) -> str:
    """A table in Markdown: the columns that any row has, in the order of COLUMNS."""
    columns = [column for column in COLUMNS if any(row.get(column) is not None for row in rows)]
    lines = [columns, *([row.get(column, "") for column in columns] for row in rows)]
    printed = [f"| {' | '.join(cells)} |" for cells in lines]
    return "\n".join([printed[0], "|" + "---|" * len(columns), *printed[1:]])


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"words_tables: {error}", file=sys.stderr)
        sys.exit(2)
