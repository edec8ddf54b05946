"""The texts on a run's page as HTML: held-out answers, and the responses and pairs of an iteration."""

from collections.abc import Iterator
from pathlib import Path

from minisr.report import markup
from minisr.report.run_files import read_records
from minisr.worlds.catalog import true_score

HELD_OUT_PROMPTS = 12  # shown on the page
ITERATION_PROMPTS = 6


def held_out_answers(folder: Path, names: list[str]) -> Iterator[str]:
    """The first held-out prompts with every model's sampled answer."""
    if not names:
        return
    yield "<h2>Held-out prompts and every model's answer</h2>"
    answers = [read_records(folder / name / "answers.jsonl")[:HELD_OUT_PROMPTS] for name in names]
    for records in zip(*answers):
        shown = [markup.answer(name, record["sampled"], markup.points(record))
                 for name, record in zip(names, records)]
        yield markup.prompt(records[0]["prompt"], shown)


def iteration(folder: Path) -> Iterator[str]:
    """The first prompts of a model's iteration: responses, rewards, a judgement in words, the pair."""
    responses = read_records(folder / "responses.jsonl")[:ITERATION_PROMPTS]
    rewards = read_records(folder / "rewards.jsonl")
    pairs = {pair["prompt"]: pair for pair in read_records(folder / "pairs.jsonl")}
    pairs_are_selected = (folder / "pairs.jsonl").exists()
    if responses:
        yield f"<h2>{folder.name}'s iteration: responses, rewards, pairs</h2>"
    for i, record in enumerate(responses):
        pair = pairs.get(record["prompt"])
        shown = _responses(record, rewards[i] if rewards else None, pair)
        if pairs_are_selected and pair is None:
            shown.append('<p class="soft">No pair.</p>')
        yield markup.prompt(record["prompt"], shown)


def _responses(record: dict, judged: dict | None, pair: dict | None) -> list[str]:
    """The responses to one prompt, each with its judgements and its part in the pair."""
    parts = {}  # what is left of the pair: {(text, reward): "chosen" or "rejected"}
    if pair is not None:
        parts[pair["chosen"], pair["chosen_reward"]] = "chosen"
        parts[pair["rejected"], pair["rejected_reward"]] = "rejected"
    shown = []
    for n, response in enumerate(record["responses"]):
        details = "" if record["finished"][n] else "cut off; "
        if judged is not None:
            reward = judged["rewards"][n]
            part = parts.pop((response, reward), None)  # the first of equal responses is the pair's
            details += markup.pair_part(part) if part else ""
            details += markup.judged(true_score(record["prompt"], response), reward,
                                     judged["scores"][n], judged["judgements"][n])
        shown.append(markup.answer(f"y<sup>{n + 1}</sup>", response, details))
    for (other, _), part in parts.items():
        shown.append(markup.answer("", other, f"{markup.pair_part(part)}(by another model)"))
    return shown
