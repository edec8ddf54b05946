"""Every model's evaluation: its answers to held-out prompts, its judging, and how it was made. See metrics.json.

Nothing here reaches training.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from minisr import InputError
from minisr.evaluate import bootstrap_ci, judge_metrics, mean, win_rates
from minisr.judge import judge, reward
from minisr.rng import derive_seed
from minisr.runner.command import command_judgements
from minisr.runner.data_sets import BY_MODELS
from minisr.runner.files import RESTORE, check_object, read_json, read_jsonl, write_json
from minisr.runner.storage import read_step, verify_checksum
from minisr.sampler import SamplingConfig
from minisr.worlds.catalog import true_score


def evaluate(run, models: list, keep) -> dict:
    """Write and return metrics.json: each model by itself, against the one before, and against the SFT baseline."""
    answers = {model.name: keep(model.answer, run.evaluation_prompts) for model in models}
    metrics = {"seed": run.config.seed, "models": {}}
    for model in models:
        judged = keep(model.judge_ranked, run.judge_evaluation)
        metrics["models"][model.name] = model_metrics(model, answers, judged)
    for model in models[:-1]:
        model.unload()
    if not has_more_models(run.folder / "metrics.json", metrics):  # of a finished run that is resumed
        write_json(run.folder / "metrics.json", metrics)
    return metrics


def check_judged(config, models: list) -> None:
    """Raise InputError if an evaluation would run the program that a run's config names as its judge."""
    unjudged = [model.name for model in models if not model.has_stored("judge_evaluation")]
    if config.judge.by == "command" and unjudged:
        raise InputError(f"the held-out responses are not judged yet for {', '.join(unjudged)}, and this run's config "
                         f"names a program as the judge: {config.judge.command!r}; minisr eval does not run it, but "
                         "minisr run with this run's config and folder does")


def has_more_models(path: Path, metrics: dict) -> bool:
    """Whether a metrics.json holds these models and later ones."""
    return evaluated_models(path) > set(metrics["models"])


def evaluated_models(path: Path) -> set[str]:
    """The models of a run that are in its metrics.json; none if there is no such file or it is damaged."""
    try:
        names = set(read_json(path, "metrics")["models"])
    except (InputError, LookupError, TypeError):
        return set()
    return {name for name in names if (path.parent / name / "meta.json").exists()}


def sample_answers(lm, prompts: list[str], config: SamplingConfig, seed: int) -> list[tuple[str, bool]]:
    """One (answer, finished) a prompt. An answer that training could not hold counts as not finished."""
    encoded = [lm.tokenizer.encode_prompt(prompt) for prompt in prompts]
    answers = []
    for ids, [completion] in zip(encoded, lm.sample(encoded, 1, config, seed, lm.tokenizer.stop_ids)):
        text = lm.tokenizer.decode_response(completion.ids)
        fits = len(ids) + len(lm.tokenizer.encode_response(text)) <= lm.max_seq_len
        answers.append((text, completion.finished and fits))
    return answers


def answer_held_out(model, prompts: list[str]) -> list[dict]:
    """Answers sampled at the paper's temperature and greedily; in a world with an oracle with its points."""
    config, seed = model.config.evaluate, model.seed("evaluation")
    sampled = sample_answers(model.lm, prompts, config, seed)
    greedy = sample_answers(model.lm, prompts, replace(config, temperature=0.0), derive_seed(seed, "greedy"))
    records = []
    for prompt, (sampled_text, _), (greedy_text, _) in zip(prompts, sampled, greedy):
        record = {"prompt": prompt, "sampled": sampled_text, "greedy": greedy_text}
        if world := model.run.world:
            request = world.oracle.parse_request(prompt)
            if request is None:
                raise InputError(f"evaluation prompt {prompt[:60]!r} is not a request of {world.name}")
            record["sampled_points"] = world.oracle.examine(request, sampled_text).points
            record["greedy_points"] = world.oracle.examine(request, greedy_text).points
        records.append(record)
    return records


def judge_held_out(model, ranked: list[dict]) -> list[dict]:
    """Judgements of responses that the annotator ranked: the model's own, or those of an outside judge."""
    by_command = model.config.judge.by == "command"
    if by_command and (records := judged_for_sft(model, ranked)):
        return records
    prompts = [record["prompt"] for record in ranked for _ in record["responses"]]
    responses = [response for record in ranked for response in record["responses"]]
    if by_command:
        remaining = iter(command_judgements(model.config, model.run.workspace, prompts, responses))
    else:
        remaining = iter(judge(model.lm, model.data.judge_template, prompts, responses, model.config.judge,
                               model.seed("judge evaluation")))
    records = []
    for record in ranked:
        judgements = [next(remaining) for _ in record["responses"]]
        records.append({**record, "rewards": [reward(js) for js in judgements],
                        "given": [[j.score for j in js] for js in judgements],
                        "judgements": [[j.text for j in js] for js in judgements]})
    return records


def judged_for_sft(model, ranked: list[dict]) -> list[dict]:
    """What an outside judge said when the run evaluated its first model, SFT: it judges no model, so it is asked once.

    Empty if it was not asked yet, or about other responses. Its command cannot change within a run."""
    path = model.run.folder / "SFT" / "judge_evaluation.jsonl"
    if model.name == "SFT" or not path.exists():
        return []
    records = read_step(path)
    asked = [{name: value for name, value in record.items() if name not in ("rewards", "given", "judgements")}
             for record in records]
    return records if asked == ranked else []


def export_answers(model, prompts: list[str], path: Path) -> None:
    """Answers for an outside judge, in AlpacaEval's format: those of the evaluation, and new ones to other prompts."""
    stored = model.folder / "answers.jsonl"
    if stored.exists():
        verify_checksum(stored)
    records = read_jsonl(stored, "answers", ("prompt", "sampled")) if stored.exists() else []
    answers = {record["prompt"]: record["sampled"] for record in records}
    others = [prompt for prompt in prompts if prompt not in answers]
    if others:
        sampled = sample_answers(model.lm, others, model.config.evaluate, model.seed("export"))
        answers |= {prompt: text for prompt, (text, _) in zip(others, sampled)}
        model.unload()
    generator = f"minisr {model.run.folder.resolve().name} {model.name}"
    write_json(path, [{"instruction": prompt, "output": answers[prompt], "generator": generator}
                      for prompt in prompts])


def histogram(scores) -> dict[str, int]:
    """How often each score was given; "unread" counts those that could not be parsed."""
    counts = Counter("unread" if score is None else f"{score:g}" for score in scores)
    return dict(sorted(counts.items()))


def answer_metrics(answers: list[dict]) -> dict:
    """Share of flawless answers, mean score, share of answers that earn each point, and mean length in characters.

    Each record has "sampled" and "greedy" texts, and their five points if there is an oracle."""
    result = {"length": float(np.mean([len(record["sampled"]) for record in answers]))}
    if "sampled_points" not in answers[0]:
        return result
    for way, suffix in (("sampled", ""), ("greedy", "_greedy")):
        points = np.array([record[f"{way}_points"] for record in answers])  # (prompts, 5)
        flawless, scores = points.all(1), points.sum(1)
        result[f"flawless{suffix}"] = float(flawless.mean())
        result[f"flawless{suffix}_ci95"] = bootstrap_ci(flawless)
        result[f"mean_score{suffix}"] = float(scores.mean())
        result[f"mean_score{suffix}_ci95"] = bootstrap_ci(scores)
        result[f"criteria{suffix}"] = [float(share) for share in points.mean(0)]
    return result


def model_metrics(model, answers: dict[str, list[dict]], judged: list[dict]) -> dict:
    """One model's entry in metrics.json; `answers` holds every model's up to the last one."""
    own = answers[model.name]
    result = answer_metrics(own)
    before = list(answers)[:list(answers).index(model.name)]
    against = {"previous": before[-1:], "sft": before[:1], "m1": before[1:2]}
    for label, others in against.items():
        if others and model.run.has_oracle:
            result[f"versus_{label}"] = win_rates(_scores(own), _scores(answers[others[0]]))
    scores = [s for r in judged for row in r["given"] for s in row]
    result["judge"] = {
        **judge_metrics([r["scores"] for r in judged], [r["rewards"] for r in judged]),
        "parse_rate": mean([s is not None for s in scores]),
        "histogram": histogram(scores)}
    if model.run.world:
        result |= model.run.world.measure_answers(own)
        result["judge"] |= model.run.world.measure_judge(judged)
    result |= training_summary(model)
    write_json(model.folder / "evaluation.json", result)
    return result


def read_counts(path: Path, *keys: str) -> dict:
    """What a step counted. Raises InputError for a file that lacks a number under one of these keys."""
    counts = check_object(read_json(path, "counts"), path)
    if missing := [key for key in keys if not isinstance(counts.get(key), int)]:
        raise InputError(f"counts {path}: {missing[0]!r} is missing or no number; {RESTORE}")
    return counts


def training_summary(model) -> dict:
    """The pairs that trained a model, what became of the other prompts, how the responses were scored, and the seconds
    that training and evaluation took.

    With dpo.positives_only no pair trains the model, so there are none, right or wrong."""
    seconds = _seconds(model.folder, "training", "answers", "judge_evaluation")
    if model.name in ("SFT", "M1"):
        return {"pairs": 0, "seconds": seconds}
    parent = model.folder.with_name(f"M{int(model.name[1:]) - 1}")
    seconds += _seconds(parent, "prompts", "responses", "rewards", "pairs")
    selection = read_counts(parent / "pairs.counts.json", "pairs")
    responses = read_counts(parent / "responses.counts.json", "finished", "cut", "distinct")
    trained_on_pairs = not model.run.config.dpo.positives_only
    summary = {"pairs": selection["pairs"] if trained_on_pairs else 0, "selection": selection, "seconds": seconds,
               "distinct": responses["distinct"] / max(responses["finished"] + responses["cut"], 1)}
    if model.run.has_oracle and trained_on_pairs:
        summary |= pair_label_accuracy(parent)
    if model.run.has_oracle:
        summary["rewards"] = reward_metrics(model.run, parent)
    summary["prompts"] = read_counts(parent / "prompts.counts.json")
    summary["scores"] = read_counts(parent / "rewards.counts.json")
    return summary


def pair_label_accuracy(folder: Path) -> dict:
    """Shares of the pairs in which the oracle agrees with the preference, and in which it prefers the rejected one."""
    scores = [(true_score(p["prompt"], p["chosen"]), true_score(p["prompt"], p["rejected"]))
              for p in read_step(folder / "pairs.jsonl")]
    known = [(chosen, rejected) for chosen, rejected in scores if chosen is not None]
    if not known:
        return {}
    return {"pairs_right": sum(chosen > rejected for chosen, rejected in known) / len(known),
            "pairs_wrong": sum(chosen < rejected for chosen, rejected in known) / len(known)}


def reward_metrics(run, folder: Path) -> dict:
    """The mean reward of a model's own responses, and how often the rewards order two of them as the oracle does.

    If a model wrote the judgements, also the world's measures of single points."""
    records = own_responses(folder)
    metrics = judge_metrics([record["scores"] for record in records], [record["rewards"] for record in records])
    parsed = [reward for record in records for reward in record["rewards"] if reward is not None]
    result = {"mean": mean(parsed), "pairwise": metrics["pairwise"], "pairwise_ci95": metrics["pairwise_ci95"]}
    if run.config.judge.by in BY_MODELS:
        result |= run.world.measure_judge(records)
    return result


def own_responses(folder: Path) -> list[dict]:
    """A model's finished responses to requests of a world, as records like those of judge_evaluation.jsonl."""
    records = []
    for y, r in zip(read_step(folder / "responses.jsonl"), read_step(folder / "rewards.jsonl"), strict=True):
        finished = [i for i, done in enumerate(y["finished"]) if done]
        if not finished or true_score(y["prompt"], "") is None:
            continue
        responses = [y["responses"][i] for i in finished]
        records.append({"prompt": y["prompt"], "responses": responses,
                        "scores": [true_score(y["prompt"], response) for response in responses],
                        "rewards": [r["rewards"][i] for i in finished],
                        "judgements": [r["judgements"][i] for i in finished]})
    return records


def _seconds(folder: Path, *names: str) -> float:
    """The sum of these entries of timing.json; a missing clock counts as 0."""
    path = folder / "timing.json"
    timing = check_object(read_json(path, "timing"), path) if path.exists() else {}
    return sum(timing.get(name, 0.0) for name in names)


def _scores(answers: list[dict]) -> list[int]:
    return [sum(record["sampled_points"]) for record in answers]
