"""Collect the results of an experiment in the words world in one file, words.json.

    minisr experiment tiny_configs/experiments/words.toml --out runs/words_experiment
    python benchmarks/commongen.py runs/words_experiment/base-0/M* --sets FILE > plain.txt
    python notebooks/collect_words.py runs/words_experiment --commongen plain.txt

Results of the same variant and seed are replaced, all others in words.json are kept, so seeds may be collected one by
one.
"""

import argparse
import re
import sys
from pathlib import Path

from minisr import InputError
from minisr.runner.experiment import METRICS, lookup
from minisr.runner.files import parse_json, read_json, read_jsonl, read_text, write_json

GROUPS = [f"{way}.{group}" for way in ("words", "words_greedy") for group in ("all", "seen", "unseen")]
WORDS_METRICS = [f"{group}.{name}" for group in GROUPS
                 for name in ("cover", "form", "flawless", "lists", "length", "forms.repeats")]
ALL_METRICS = tuple(dict.fromkeys((*METRICS, *WORDS_METRICS, "judge.natural_pairwise")))
COMMONGEN_METRICS = ("cover", "form", "both", "single", "pos", "words", "list", "repeats", "ends", "ppl", "median")
RUN = re.compile(r"(?P<variant>.+)-(?P<seed>\d+)")
EXAMPLES = 5  # held-out prompts whose answers are stored


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path, help="the folder of an experiment, with a folder for each run")
    parser.add_argument("--commongen", type=Path, nargs="*", default=[], metavar="FILE",
                        help="what benchmarks/commongen.py printed")
    parser.add_argument("--english", type=Path, metavar="FOLDER", help="what minisr eval --export wrote about one run")
    parser.add_argument("--into", type=Path, default=Path(__file__).with_name("words.json"), metavar="FILE",
                        help="where the results are kept; default: words.json beside this script")
    options = parser.parse_args()
    content = read_json(options.into, "results") if options.into.exists() else {}
    content = {"runs": {}, "commongen": {}, "commongen_examples": {}, "texts": {}} | content
    for folder in finished_runs(options.experiment):
        add_run(content["runs"], folder)
        add_texts(content["texts"], folder)
    for path in options.commongen:
        document = read_commongen(path)
        add_commongen(content["commongen_examples" if document["examples"] else "commongen"], document["results"])
    if options.english:
        content["texts"]["english"] = read_english(options.english)
    write_json(options.into, content)


def finished_runs(experiment: Path) -> list[Path]:
    """The folders of an experiment's runs. Raises InputError if there are none."""
    folders = [path.parent for path in sorted(experiment.glob("*-*/metrics.json"))]
    if not folders:
        raise InputError(f"{experiment} has no finished run: no folder VARIANT-SEED with metrics.json")
    return folders


def read_english(folder: Path) -> dict[str, list[dict]]:
    """{model: answers} from the files that minisr eval --export wrote. Raises InputError if there are none."""
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise InputError(f"{folder} has no .json file; make it with minisr eval RUN --export {folder}")
    return {path.stem: read_json(path, "answers") for path in paths}


def add_run(runs: dict, folder: Path) -> None:
    """Add one run's metrics to {variant: {model: {metric: [value of each seed]}}}."""
    variant, seed = name_of_run(folder.name)
    metrics = read_json(folder / "metrics.json", "metrics")["models"]
    for model, measured in metrics.items():
        values = {metric: lookup(measured, metric) for metric in ALL_METRICS}
        values["mean_reward"] = mean_reward(measured.get("scores", {}))
        set_values(runs.setdefault(variant, {}).setdefault(model, {"seed": []}), seed, values)


def mean_reward(scores: dict[str, int]) -> float | None:
    """The mean score that the model before gave to its own responses; None for a model without pairs."""
    counts = {float(score): count for score, count in scores.items() if score != "unread"}
    total = sum(counts.values())
    return sum(score * count for score, count in counts.items()) / total if total else None


def read_commongen(path: Path) -> dict:
    """The JSON document in the last line that commongen.py printed."""
    document = parse_json((read_text(path, "output").splitlines() or [""])[-1], f"the last line of {path}")
    if not isinstance(document, dict) or not {"examples", "results"} <= set(document):
        raise InputError(f"the last line of {path} is not the JSON document that benchmarks/commongen.py prints")
    return document


def add_commongen(runs: dict, results: list[dict]) -> None:
    """Add CommonGen-lite's columns to {variant: {model: ...}}; outputs of other models are stored under "published"."""
    for result in results:
        path = Path(result["model"])
        is_published = path == Path(path.name)  # a name without a folder
        variant, seed = ("published", 0) if is_published else name_of_run(path.parent.name)
        values = {name: result.get(name) for name in COMMONGEN_METRICS}
        set_values(runs.setdefault(variant, {}).setdefault(path.name, {"seed": []}), seed, values)


def set_values(metrics: dict, seed: int, values: dict) -> None:
    """Set one seed's values in {"seed": [...], metric: [...]}, sorted by seed."""
    by_seed = {old: {name: metrics[name][i] for name in metrics} for i, old in enumerate(metrics["seed"])}
    by_seed[seed] = {"seed": seed, **values}
    for name in dict.fromkeys((*metrics, "seed", *values)):
        metrics[name] = [by_seed[key].get(name) for key in sorted(by_seed)]


def add_texts(texts: dict, folder: Path) -> None:
    """Store greedy answers to a few held-out prompts, and a few of M1's judgements, of a run on seed 0."""
    variant, seed = name_of_run(folder.name)
    if seed != 0:
        return
    answers = {}
    for path in sorted(folder.glob("*/answers.jsonl")):
        records = read_jsonl(path, "answers", ("prompt", "greedy"))[:EXAMPLES]
        answers[path.parent.name] = [{"prompt": record["prompt"], "answer": record["greedy"],
                                      "points": record.get("greedy_points", [])} for record in records]
    texts.setdefault("answers", {})[variant] = answers
    judged = folder / "M1" / "judge_evaluation.jsonl"
    if variant == "base" and judged.exists():
        records = read_jsonl(judged, "judgements", ("prompt",))[:EXAMPLES]
        texts["judgements"] = [{name: record[name] for name in ("prompt", "responses", "scores", "judgements")}
                               for record in records]


def name_of_run(name: str) -> tuple[str, int]:
    """("base", 0) of base-0."""
    match = RUN.fullmatch(name)
    if not match:
        raise InputError(f"{name} is no run of an experiment; their folders are named VARIANT-SEED")
    return match["variant"], int(match["seed"])


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"collect_words: {error}", file=sys.stderr)
        sys.exit(2)
