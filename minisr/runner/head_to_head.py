"""`minisr eval RUN --judge COMMAND`: pairs of a run's models, compared by an outside judge (section 3.1.2).

The judge sees both answers to each held-out prompt in both orders. A model wins where it is preferred both times and
loses where the other one is; if the two verdicts disagree, the prompt is a tie.
"""

from minisr import InputError
from minisr.evaluate import win_rates
from minisr.runner.command import Command, read_text_of
from minisr.runner.files import check_encodable, write_json, write_jsonl
from minisr.runner.journal import Journal, remove_journals

VERDICTS = ("a", "b", "tie", None)


def head_to_head(run, models: list, keep, line: str) -> dict:
    """Compare each model with the one before and with the SFT baseline; write and return head_to_head.json."""
    if len(models) < 2:
        raise InputError(f"{run.folder} has only {models[0].name} so far: there is no other model to compare it with")
    check_encodable(line, "--judge")
    command = Command(line, "--judge", run.config.judge.timeout)
    command.arguments()  # reports an error in it before the models answer
    answers = {model.name: keep(model.answer, run.evaluation_prompts) for model in models}
    names, contests, records = list(answers), [], []
    path = run.folder / "head_to_head.journal"
    for i, name in enumerate(names[1:], 1):
        for other in dict.fromkeys((names[i - 1], names[0])):
            journal = Journal(path, line, name, other, answers[name], answers[other])
            with run.workspace.step(title=f"{name} against {other}", journal=journal):
                judged = compare(command, answers[name], answers[other], run.workspace, f"{name} {other}")
            contests.append({"model": name, "other": other, **summary([record["outcome"] for record in judged])})
            records += [{"model": name, "other": other, **record} for record in judged]
    result = {"command": line, "contests": contests}
    write_jsonl(run.folder / "head_to_head.jsonl", records)
    write_json(run.folder / "head_to_head.json", result)
    remove_journals(path)
    return result


def compare(command: Command, ours: list[dict], theirs: list[dict], workspace, key: str) -> list[dict]:
    """One record per prompt: both verdicts, and the outcome 1 (win), 0 (tie), -1 (lose) or None (no verdict)."""
    questions = []
    for own, other in zip(ours, theirs, strict=True):
        a, b = own["sampled"], other["sampled"]
        questions += [{"prompt": own["prompt"], "response_a": a, "response_b": b},
                      {"prompt": own["prompt"], "response_a": b, "response_b": a}]
    verdicts = command.ask(questions, read_verdict, workspace, key)
    return [{"prompt": own["prompt"], "outcome": outcome(first[0], second[0]), "verdicts": [first[0], second[0]],
             "texts": [first[1], second[1]]} for own, first, second in zip(ours, verdicts[::2], verdicts[1::2])]


def read_verdict(answer: dict) -> tuple[str | None, str]:
    """(verdict, text) of {"better": "a", "b", "tie" or null, "text": why}."""
    if not isinstance(answer, dict) or "better" not in answer:
        raise ValueError('expected a JSON object with "better"')
    if answer["better"] not in VERDICTS:
        raise ValueError('better must be "a", "b", "tie" or null')
    return answer["better"], read_text_of(answer)


def outcome(first: str | None, second: str | None) -> int | None:
    """Of the verdict with the model's answer as a, and of the one with it as b."""
    if None in (first, second):
        return None
    return {("a", "b"): 1, ("b", "a"): -1}.get((first, second), 0)


def summary(outcomes: list[int | None]) -> dict:
    """Shares of the prompts with two verdicts, with intervals; "unread" counts the other prompts."""
    read = [value for value in outcomes if value is not None]
    # The outcomes are differences already, so they are compared with zeros.
    return {"prompts": len(read), "unread": len(outcomes) - len(read),
            **(win_rates(read, [0] * len(read)) if read else {})}
