"""Collect the results of an experiment in the words world in one file, words.json.

    minisr experiment tiny_configs/experiments/words.toml --out runs/words_experiment
    python benchmarks/commongen.py runs/words_experiment/base-0/M* --sets FILE > plain.txt
    python notebooks/collect_words.py runs/words_experiment --commongen plain.txt

Runs that are not finished are named and left out. Results of the same variant and seed are replaced, all others in
words.json are kept, so seeds may be collected one by one. Seeds of one variant must have the same config.
"""

import argparse
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

from minisr import InputError
from minisr.runner.config import differences, load_stored_config
from minisr.runner.experiment import METRICS, is_finished, lookup
from minisr.runner.files import parse_json, read_json, read_jsonl, read_text, write_json
from minisr.runner.resumable import deciding_values

GROUPS = [f"{way}.{group}" for way in ("words", "words_greedy") for group in ("all", "seen", "unseen")]
OF_A_GROUP = ("cover", "cover_ci95", "form", "form_ci95", "flawless", "flawless_ci95", "lists", "length",
              "forms.repeats")
WORDS_METRICS = [f"{group}.{name}" for group in GROUPS for name in OF_A_GROUP]
JUDGE_METRICS = ("judge.pairwise_ci95", "judge.natural_pairwise", "judge.false_sentences", "pairs_wrong",
                 "rewards.mean", "rewards.pairwise_ci95", "rewards.form_right", "rewards.false_sentences")
ALL_METRICS = tuple(dict.fromkeys((*METRICS, *WORDS_METRICS, *JUDGE_METRICS)))
COMMONGEN_METRICS = ("cover", "cover_ci95", "form", "form_ci95", "both", "both_ci95", "single", "pos", "words", "list",
                     "repeats", "ends", "ppl", "median")
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
    content = {"configs": {}, "runs": {}, "eft": {}, "commongen": {}, "commongen_examples": {}, "texts": {}} | content
    folders = finished_runs(options.experiment)
    for folder in folders:
        check_config(content["configs"], folder)
        add_run(content["runs"], folder)
        add_texts(content["texts"], folder)
        if name_of_run(folder.name)[0] == "base":
            set_values(content["eft"], name_of_run(folder.name)[1], count_eft(folder / "seed"))
    for path in options.commongen:
        document = read_commongen(path)
        add_commongen(content["commongen_examples" if document["examples"] else "commongen"], document)
    if options.english:
        content["texts"]["english"] = read_english(options.english)
    write_json(options.into, content)


def finished_runs(experiment: Path) -> list[Path]:
    """The folders of an experiment's finished runs; the others are named on stderr. Raises InputError without any."""
    finished = []
    for path in sorted(experiment.glob("*-*/config.toml")):
        last_model = f"M{load_stored_config(path).iterations + 1}"
        if is_finished(path.parent, last_model):
            finished.append(path.parent)
        else:
            print(f"collect_words: {path.parent} is not finished ({last_model} is missing) and left out",
                  file=sys.stderr)
    if not finished:
        raise InputError(f"{experiment} has no finished run, that is, no folder VARIANT-SEED with metrics of its last "
                         "model; make some with minisr experiment")
    return finished


def check_config(configs: dict, folder: Path) -> None:
    """Store the config of a variant, {variant: config}. Raises InputError if another seed of it has another config."""
    variant, _ = name_of_run(folder.name)
    config = deciding_values(replace(load_stored_config(folder / "config.toml"), seed=0))
    config = json.loads(json.dumps(config))  # lists in place of tuples, as in the stored configs
    if changed := differences(configs.setdefault(variant, config), config):
        raise InputError(f"{folder} has another config than the other seeds of {variant} ({'; '.join(changed)}); move "
                         "it away")


def read_english(folder: Path) -> dict[str, list[dict]]:
    """{model: answers} from the files that minisr eval --export wrote. Raises InputError if there are none."""
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise InputError(f"{folder} has no .json file; make one with minisr eval RUN --export {folder}")
    return {path.stem: read_json(path, "answers") for path in paths}


def add_run(runs: dict, folder: Path) -> None:
    """Add one run's metrics to {variant: {model: {metric: [value of each seed]}}}."""
    variant, seed = name_of_run(folder.name)
    metrics = read_json(folder / "metrics.json", "metrics")["models"]
    for model, measured in metrics.items():
        for group in ("words", "words_greedy"):  # a reason that no answer has is not counted
            for texts in measured.get(group, {}).values():
                texts["forms"] = {"repeats": 0.0} | texts.get("forms", {})
        values = {metric: lookup(measured, metric) for metric in ALL_METRICS}
        set_values(runs.setdefault(variant, {}).setdefault(model, {"seed": []}), seed, values)


def count_eft(folder: Path) -> dict[str, int]:
    """How many EFT judgements there are, and how many of them quote an answer of five points, edited or not."""
    judgements = read_jsonl(folder / "eft.jsonl", "EFT data", ("response",))
    five = [record["response"].endswith("Score: 5") for record in judgements]
    ranked = read_jsonl(folder / "ranked.jsonl", "seed data")
    edited = [is_edited for record in ranked for score, is_edited in zip(record["scores"], record["edited"])
              if score == 5]
    return {"judgements": len(judgements), "five_points": sum(five), "answers_of_five_points": len(edited),
            "of_these_edited": sum(edited)}


def read_commongen(path: Path) -> dict:
    """The JSON document in the last line that commongen.py printed."""
    document = parse_json((read_text(path, "output").splitlines() or [""])[-1], f"the last line of {path}")
    if not isinstance(document, dict) or not {"examples", "score_only", "results"} <= set(document):
        raise InputError(f"the last line of {path} is not the JSON document that benchmarks/commongen.py prints; store "
                         "its whole output with > FILE")
    return document


def add_commongen(runs: dict, document: dict) -> None:
    """Add CommonGen-lite's columns to {variant: {model: ...}}; outputs of other models are stored under "published"."""
    for result in document["results"]:
        path = Path(result["model"])
        is_published = result["model"] in document["score_only"]
        variant, seed = ("published", 0) if is_published else name_of_run(path.parent.name)
        values = {name: result.get(name) for name in COMMONGEN_METRICS}
        set_values(runs.setdefault(variant, {}).setdefault(path.name, {"seed": []}), seed, values)


def set_values(metrics: dict, seed: int, values: dict) -> None:
    """Set one seed's values in {"seed": [...], metric: [...]}, sorted by seed."""
    by_seed = {old: {name: metrics[name][i] for name in metrics} for i, old in enumerate(metrics.get("seed", []))}
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
        raise InputError(f"{name or 'a model without a folder'} is no run of an experiment; name its models as "
                         "EXPERIMENT/VARIANT-SEED/MODEL")
    return match["variant"], int(match["seed"])


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"collect_words: {error}", file=sys.stderr)
        sys.exit(2)
