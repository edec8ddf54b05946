"""What metrics.json tells of a model: its answers, its judging, and how it was made.

It is told, never learned from.
"""

from pathlib import Path

from minisr.evaluate import answer_metrics, histogram, judge_metrics, win_rates
from minisr.runner.files import read_json, read_jsonl, write_json
from minisr.runner.stages import Model
from minisr.worlds.tiny import oracle


def model_metrics(model: Model, answers: dict[str, list[dict]], ranked: list[dict]) -> dict:
    """One model's entry in metrics.json; `answers` holds every model's up to this one."""
    own = answers[model.name]
    result = answer_metrics(own)
    before = list(answers)[:list(answers).index(model.name)]
    against = {"previous": before[-1:], "sft": before[:1], "m1": before[1:2]}
    for label, [other] in ((k, v) for k, v in against.items() if v and model.run.has_oracle):
        result[f"versus_{label}"] = win_rates(_scores(own), _scores(answers[other]))
    judged = model.judge_ranked(ranked)
    scores = [s for r in judged for row in r["given"] for s in row]
    result["judge"] = {
        **judge_metrics([r["scores"] for r in judged], [r["rewards"] for r in judged]),
        "parse_rate": sum(s is not None for s in scores) / len(scores),
        "histogram": histogram(scores)}
    result |= making(model)
    write_json(model.folder / "evaluation.json", result)
    model.release()
    return result


def making(model: Model) -> dict:
    """The pairs that made a model, what became of the other prompts, how the responses were scored, and the
    seconds its making and evaluation took."""
    seconds = _seconds(model.folder, "training", "answers", "judge_evaluation")
    if model.name in ("SFT", "M1"):
        return {"pairs": 0, "seconds": seconds}
    parent = model.folder.with_name(f"M{int(model.name[1:]) - 1}")
    seconds += _seconds(parent, "prompts", "responses", "rewards", "pairs")
    selection, responses, *counts = (read_json(parent / f"{name}.counts.json", "counts")
                                     for name in ("pairs", "responses", "prompts", "rewards"))
    return {"pairs": selection["pairs"], "selection": selection, "seconds": seconds,
            "distinct": responses["distinct"] / max(responses["finished"] + responses["cut"], 1),
            **(truth_of_pairs(parent) if model.run.has_oracle else {}),
            **dict(zip(("prompts", "scores"), counts))}


def truth_of_pairs(folder: Path) -> dict:
    """Shares of the pairs in which the oracle, too, prefers the chosen response, or prefers the rejected."""
    scores = [(oracle.score(p["prompt"], p["chosen"]), oracle.score(p["prompt"], p["rejected"]))
              for p in read_jsonl(folder / "pairs.jsonl", "pairs")]
    known = [(chosen, rejected) for chosen, rejected in scores if chosen is not None]
    if not known:
        return {}
    return {"pairs_right": sum(chosen > rejected for chosen, rejected in known) / len(known),
            "pairs_wrong": sum(chosen < rejected for chosen, rejected in known) / len(known)}


def _seconds(folder: Path, *names: str) -> float:
    """What timing.json tells of them; a clock that is lost is no reason to stop."""
    path = folder / "timing.json"
    timing = read_json(path, "timing") if path.exists() else {}
    return sum(timing.get(name, 0.0) for name in names)


def _scores(answers: list[dict]) -> list[int]:
    return [sum(record["sampled_points"]) for record in answers]
