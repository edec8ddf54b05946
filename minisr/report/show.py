"""`minisr show`: follow one prompt through an iteration, or compare the models' answers."""

import re
import sys
from pathlib import Path

import torch

from minisr import InputError
from minisr.dpo import encode_pairs
from minisr.lm import LM
from minisr.report.table import label
from minisr.runner.checkpoint import load_model
from minisr.runner.files import RESTORE, printable
from minisr.runner.storage import check_run, read_step
from minisr.sft import Example
from minisr.worlds.catalog import true_score

MODEL_NAME = re.compile(r"M[1-9][0-9]*")  # a model that writes and judges responses


def show_prompt(run: Path, name: str, number: int) -> None:
    """Print a prompt x_i, its responses, a judgement of each, the pair, and the effect of DPO on the pair."""
    name = name.rstrip("/")  # of a shell that completes the name of a folder
    folder = run / name
    _check_iteration(run, name)
    responses, rewards = read_step(folder / "responses.jsonl"), read_step(folder / "rewards.jsonl")
    if not responses:
        raise InputError(f"{folder} has no prompts: all that it wrote were rejected, see prompts.counts.json there")
    if not 0 <= number < len(responses):
        raise InputError(f"{folder} has the prompts 0 to {len(responses) - 1}; there is no {number}")
    if len(responses) != len(rewards):
        raise InputError(f"{folder}: responses.jsonl has {len(responses)} records, rewards.jsonl has {len(rewards)}; "
                         f"{RESTORE}")
    prompt, pairs_path = responses[number]["prompt"], folder / "pairs.jsonl"
    pairs = read_step(pairs_path) if pairs_path.exists() else None
    print(f"{name}'s iteration, prompt {number} of {len(responses)} (choose with --model and --prompt)\n\n"
          f"x  {printable(prompt)}\n")
    _print_responses(responses[number], rewards[number])
    if pairs is None:
        print(f"{name}'s pairs are not selected yet")
        return
    pair = next((pair for pair in pairs if pair["prompt"] == prompt), None)
    if pair is None:
        print("no pair: equal rewards, identical responses, or fewer than two responses with a reward")
        return
    print(printable(f"chosen    y_w  {pair['chosen']}\nrejected  y_l  {pair['rejected']}\n"))
    _print_training(run, name, pair)


def _check_iteration(run: Path, name: str) -> None:
    """Raise an error unless the run holds the judged responses of this model."""
    check_run(run)
    if not MODEL_NAME.fullmatch(name) or not (run / name / "rewards.jsonl").exists():
        judged = sorted(path.parent.name for path in run.glob("M*/rewards.jsonl")
                        if MODEL_NAME.fullmatch(path.parent.name))
        advice = f"choose --model from {', '.join(judged)}" if judged else "no model of this run has one yet"
        raise InputError(f"{run / name} holds no judged iteration; {advice}")


def _print_responses(responses: dict, rewards: dict) -> None:
    """Each response with its reward, the scores behind it, and its first judgement."""
    for n, response in enumerate(responses["responses"]):
        print(f"y^{n + 1}  {printable(response)}")
        reward = _reward(rewards["rewards"][n], rewards["scores"][n], responses["finished"][n])
        print(f"     {reward}{_true_score(responses['prompt'], response)}; the first judgement:")
        judgement = printable(rewards["judgements"][n][0])
        print("     | " + judgement.replace("\n", "\n     | ") + "\n")


def _reward(reward: float | None, scores: list[float | None], is_finished: bool) -> str:
    """A reward in words, or why there is none."""
    if reward is None:
        reason = "all judgements unparsed" if is_finished else "the response was cut off"
        return f"no reward ({reason})"
    printed = ", ".join(label("unread") if score is None else f"{score:g}" for score in scores)
    return f"reward {reward:.2f}, scores {printed}"


def _true_score(prompt: str, response: str) -> str:
    """The oracle's score, if the prompt belongs to a world that has one."""
    score = true_score(prompt, response)
    return "" if score is None else f" (oracle: {score})"


def _print_training(run: Path, name: str, pair: dict) -> None:
    """The pair's log-probabilities before and after DPO, and the tokens in the loss."""
    successor = f"M{int(name[1:]) + 1}"
    if not (run / successor / "meta.json").exists():
        print(f"{successor} is not trained yet")
        return
    print(f"{'log p(y|x)':14}{'chosen':>10}{'rejected':>10}{'difference':>12}")
    for which in (name, successor):
        lm = LM(*load_model(run / which))
        [encoded] = encode_pairs(lm, [pair])
        with torch.no_grad():
            chosen, rejected = (value.item() for value in lm.pair_logps([encoded]))
        print(f"{which:14}{chosen:10.2f}{rejected:10.2f}{chosen - rejected:12.2f}")
    if sys.stdout.isatty():  # a file shows no colours
        print("\ntokens in the loss (green):")
        for response in (encoded.chosen, encoded.rejected):
            print(colorize_loss_mask(lm.tokenizer, encoded.example(response)))


def colorize_loss_mask(tokenizer, example: Example) -> str:
    """The tokens in terminal colors: green where the loss mask is True, else gray."""
    green, gray, reset = "\033[32m", "\033[90m", "\033[0m"
    return "".join(f"{green if is_target else gray}{printable(tokenizer.vocabulary.piece(i))}{reset}"
                   for i, is_target in zip(example.ids, example.mask))


def show_answers(run: Path, count: int) -> None:
    """Print the first held-out prompts with every model's sampled answer."""
    if count < 1:
        raise InputError("--answers takes 1 or more")
    check_run(run)
    names = [name for name in ("SFT", *(f"M{t}" for t in range(1, 100)))
             if (run / name / "answers.jsonl").exists()]
    if not names:
        raise InputError(f"{run} has no evaluated model yet; minisr run evaluates each model that it trains")
    answers = [read_step(run / name / "answers.jsonl") for name in names]
    if len({*map(len, answers)}) > 1:
        sizes = ", ".join(f"{name} {len(records)}" for name, records in zip(names, answers))
        raise InputError(f"{run}: the models answered different numbers of prompts ({sizes}); {RESTORE}")
    for records in list(zip(*answers))[:count]:
        print(f"x    {printable(records[0]['prompt'])}\n")
        for name, record in zip(names, records):
            points = f"  ({sum(record['sampled_points'])} points)" if "sampled_points" in record else ""
            text = printable(record["sampled"]).replace("\n", "\n     ")
            print(f"{name:4} {text}{points}\n")
