"""For people: one prompt's whole way through an iteration, and a chat in which the model judges itself."""

import sys
from pathlib import Path

import torch

from minisr import InputError, dpo, judge
from minisr.interop.chat_templates import chat_template
from minisr.interop.source import load_source
from minisr.rng import derive_seed
from minisr.runner.checkpoint import load_model
from minisr.runner.engine import best_lm
from minisr.runner.files import printable, read_jsonl
from minisr.runner.run import ENGLISH_TEMPLATE, WORLD_TEMPLATE, load_template
from minisr.sampler import SamplingConfig
from minisr.worlds.tiny import oracle

EXAMPLE = "Write a story about a sad pig at the river."


def show_way(run: Path, name: str, number: int) -> None:
    """Print {x_i}, its responses, every judgement in words, the pair, and what DPO did to it."""
    folder = run / name
    if not (folder / "rewards.jsonl").exists():
        done = sorted(path.parent.name for path in run.glob("M*/rewards.jsonl"))
        raise InputError(f"{folder} holds no judged iteration; models that do: {', '.join(done) or 'none'}"
                         if run.is_dir() else f"there is no folder {run}")
    y = read_jsonl(folder / "responses.jsonl", "responses")
    r = read_jsonl(folder / "rewards.jsonl", "rewards")
    if not 0 <= number < len(y):
        raise InputError(f"{folder} has the prompts 0 to {len(y) - 1}; there is no {number}")
    print(f"{name}'s iteration, prompt {number} of {len(y)} (others: --model, --prompt)\n\n"
          f"x  {printable(y[number]['prompt'])}\n")
    for n, response in enumerate(y[number]["responses"]):
        reward = r[number]["rewards"][n]
        print(f"y^{n + 1}  {printable(response)}")
        none = "none (unread)" if y[number]["finished"][n] else "none (the response was cut off)"
        told = none if reward is None else f"{reward:.2f} = mean of {r[number]['scores'][n]}"
        print(f"     reward {told}{_truth(y[number]['prompt'], response)}; the first judgement:")
        print("     | " + printable(r[number]["judgements"][n][0]).replace("\n", "\n     | ") + "\n")
    pairs = [p for p in read_jsonl(folder / "pairs.jsonl", "pairs") if p["prompt"] == y[number]["prompt"]]
    if not pairs:
        print("no pair: equal rewards, or fewer than two responses that were finished and could be judged")
        return
    print(printable(f"chosen    y_w  {pairs[0]['chosen']}\nrejected  y_l  {pairs[0]['rejected']}\n"))
    _show_training(run, name, pairs[0])


def _truth(prompt: str, response: str) -> str:
    """What the oracle says, if the prompt is of its world."""
    points = oracle.score(prompt, response)
    return "" if points is None else f" (the oracle: {points})"


def _show_training(run: Path, name: str, pair: dict) -> None:
    """The pair's log-probabilities before and after DPO, and which tokens bear loss."""
    successor = f"M{int(name[1:]) + 1}"
    if not (run / successor / "meta.json").exists():
        print(f"{successor} is not trained yet")
        return
    print(f"{'log p(y|x)':14}{'chosen':>10}{'rejected':>10}{'difference':>12}")
    for which in (name, successor):
        lm = best_lm(*load_model(run / which))
        encoded = dpo.encode_pairs(lm, [pair])
        with torch.no_grad():
            chosen, rejected = (value.item() for value in lm.pair_logps(encoded))
        print(f"{which:14}{chosen:10.2f}{rejected:10.2f}{chosen - rejected:12.2f}")
    if sys.stdout.isatty():  # colours mean nothing in a file
        print("\nwhat bears loss (green):")
        prompt, *sides = encoded[0]
        for side in sides:
            print(colorize_loss_mask(lm.tokenizer, prompt + side, [False] * len(prompt) + [True] * len(side)))


def colorize_loss_mask(tokenizer, ids: list[int], mask: list[bool]) -> str:
    """The tokens in terminal colors: green where the loss mask is True, else gray."""
    green, gray, reset = "\033[32m", "\033[90m", "\033[0m"
    return "".join(f"{green if is_target else gray}{tokenizer.vocabulary.piece(i)}{reset}"
                   for i, is_target in zip(ids, mask))


def show_answers(run: Path, count: int) -> None:
    """Print the first held-out prompts with every model's answer, sampled at the evaluation's temperature."""
    names = [name for name in ("SFT", *(f"M{t}" for t in range(1, 100)))
             if (run / name / "answers.jsonl").exists()]
    if not names or count < 1:
        raise InputError("--answers takes 1 or more" if count < 1 else f"{run} has no evaluated model yet")
    columns = [read_jsonl(run / name / "answers.jsonl", "answers", ("prompt", "sampled")) for name in names]
    for rows in list(zip(*columns))[:count]:
        print(f"x    {printable(rows[0]['prompt'])}\n")
        for name, answer in zip(names, rows):
            points = f"  ({sum(answer['sampled_points'])} points)" if "sampled_points" in answer else ""
            print(f"{name:4} " + printable(answer["sampled"]).replace("\n", "\n     ") + points + "\n")


def chat(source: str, question: str | None, n: int, template: Path | None, config: SamplingConfig,
         seed: int) -> None:
    """Answer a question n times and judge each answer; without a question, ask for one after another."""
    if not 1 <= n <= 64 or config.temperature < 0 or config.max_new_tokens < 1 \
            or question is not None and not question.strip():
        raise InputError("chat takes a question that is not empty, 1 to 64 answers, a temperature from 0 up, "
                         "1 new token or more")
    lm = best_lm(*load_source(source))
    own = WORLD_TEMPLATE if in_world(lm.tokenizer) else ENGLISH_TEMPLATE
    judge_template = load_template(template or own)
    if question is not None:
        _answer(lm, question, n, judge_template, config, seed)
        return
    if sys.stdin.isatty():
        print(f"Ask something, e.g. {EXAMPLE}   (Ctrl-D ends)")
    for turn, line in enumerate(filter(str.strip, sys.stdin)):
        try:
            _answer(lm, line.strip(), n, judge_template, config, seed + turn)
        except InputError as error:  # one question too long is no reason to hang up
            print(error, file=sys.stderr)


def in_world(tokenizer) -> bool:
    """Whether a model speaks the tiny world's language, by its chat template."""
    return tokenizer.template == chat_template("tiny")


def _answer(lm, question, n, template, config, seed) -> None:
    tokenizer = lm.tokenizer
    [drawn] = lm.sample([tokenizer.encode_prompt(question)], n, config, derive_seed(seed, "chat"), tokenizer.stop_ids)
    texts = [tokenizer.decode(s.ids) for s in drawn]
    judged = judge.judge(lm, template, [question] * n, texts,
                         judge.JudgeConfig(max_new_tokens=config.max_new_tokens), derive_seed(seed, "chat judge"))
    for text, judgements in sorted(zip(texts, judged), key=lambda tj: -(judge.reward(tj[1]) or 0)):
        reward = judge.reward(judgements)
        read = [j for j in judgements if j.score is not None]
        print(f"{'unread' if reward is None else f'{reward:6.2f}'}  {printable(text)}")
        print(f"        ({len(read)} of {len(judgements)} judgements could be read)\n        | "
              + printable((read or judgements)[0].text).replace("\n", "\n        | "))
    if all(judge.reward(judgements) is None for judgements in judged):
        print("No judgement can be read: only from M1 on is a model trained to judge"
              + (f", and one of the tiny world knows only its requests, e.g. {EXAMPLE}" if in_world(tokenizer)
                 else "; or --max-new-tokens cuts them off"))
