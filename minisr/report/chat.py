"""`minisr chat`: ask a model, which answers several times and judges each of its answers."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from minisr import InputError, judge
from minisr.interop.chat_templates import chat_template
from minisr.interop.source import load_source
from minisr.lm import LM
from minisr.report.table import label
from minisr.rng import derive_seed
from minisr.runner.engine import best_lm
from minisr.runner.files import check_encodable, printable
from minisr.runner.run import ENGLISH_TEMPLATE, WORLD_TEMPLATE, load_template
from minisr.sampler import SamplingConfig

EXAMPLE = "Write a story about a sad pig at the river."


@dataclass
class Chat:
    """A loaded model with all that it needs to answer and judge."""

    lm: LM
    judge_template: str
    answers: int  # to each question
    config: SamplingConfig

    def ask(self, question: str, seed: int) -> None:
        """Print the model's answers to a question with their rewards, best first."""
        check_encodable(question, "question")
        texts = self._answer(question, seed)
        judge_config = judge.JudgeConfig(max_new_tokens=self.config.max_new_tokens)
        judged = judge.judge(self.lm, self.judge_template, [question] * self.answers, texts, judge_config,
                             derive_seed(seed, "chat judge"))
        for text, judgements in sorted(zip(texts, judged), key=_rank):
            _print_answer(text, judgements)
        if all(judge.reward(judgements) is None for judgements in judged):
            self._explain_unparsed()

    def _answer(self, question: str, seed: int) -> list[str]:
        tokenizer = self.lm.tokenizer
        [completions] = self.lm.sample([tokenizer.encode_prompt(question)], self.answers, self.config,
                                       derive_seed(seed, "chat"), tokenizer.stop_ids)
        return [tokenizer.decode_response(completion.ids) for completion in completions]

    def _explain_unparsed(self) -> None:
        """What to try if no judgement has a score."""
        print("No judgement could be parsed. Models are trained to judge from M1 on.")
        if is_tiny_world(self.lm.tokenizer):
            print(f"A model of the tiny world understands only its requests, e.g. {EXAMPLE}")
        else:
            print("If the judgements are cut off, raise --max-new-tokens.")


def _rank(answer: tuple[str, list[judge.Judgement]]) -> tuple[bool, float]:
    """Sorts answers by reward, the highest first; those without a reward come last."""
    reward = judge.reward(answer[1])
    return reward is None, -(reward or 0.0)


def chat(source: str, question: str | None, n: int, template: Path | None, config: SamplingConfig,
         seed: int) -> None:
    """Answer a question n times and judge each answer; without a question, read them from standard input."""
    check_options(question, n, config)
    lm = best_lm(*load_source(source))
    session = Chat(lm, load_template(template or default_template(source, lm)), n, config)
    if question is not None:
        session.ask(question, seed)
        return
    for turn, asked in enumerate(questions()):
        try:
            session.ask(asked, seed + turn)
        except InputError as error:  # a question that is too long does not end the chat
            print(error, file=sys.stderr)


def questions() -> Iterator[str]:
    """The lines of standard input that are not empty. From a file or a program it is UTF-8."""
    if sys.stdin.isatty():
        print(f"Ask something, e.g. {EXAMPLE}   (Ctrl-D ends the chat)")
    elif hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")
    try:
        yield from (line.strip() for line in sys.stdin if line.strip())
    except UnicodeDecodeError as error:
        raise InputError("standard input is not UTF-8 text; save the questions as UTF-8") from error


def default_template(source: str, lm: LM) -> Path:
    """The judge prompt of the run that a model's folder belongs to, else the one of the model's language."""
    for path in (Path(source).absolute(), Path(source).resolve()):  # a run may hold a link to a model, or be linked to
        of_run = path.parent / "judge.txt"
        if of_run.exists() and (of_run.parent / "config.toml").exists():
            return of_run
    return WORLD_TEMPLATE if is_tiny_world(lm.tokenizer) else ENGLISH_TEMPLATE


def check_options(question: str | None, n: int, config: SamplingConfig) -> None:
    """Raise InputError for an option out of range."""
    if question is not None and not question.strip():
        raise InputError("--ask is empty: write a question, or leave --ask out to be asked for questions")
    if not 1 <= n <= 64:
        raise InputError(f"-n must lie between 1 and 64, not {n}")
    if not config.temperature >= 0:  # nan too
        raise InputError(f"--temperature must be at least 0, not {config.temperature}")
    if config.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens must be at least 1, not {config.max_new_tokens}")


def is_tiny_world(tokenizer) -> bool:
    """Whether a model speaks the language of the tiny world, judging by its chat template."""
    return tokenizer.template == chat_template("tiny")


def _print_answer(text: str, judgements: list[judge.Judgement]) -> None:
    """An answer, its reward, and the first judgement that has a score."""
    reward = judge.reward(judgements)
    parsed = [judgement for judgement in judgements if judgement.score is not None]
    shown = printable((parsed or judgements)[0].text).replace("\n", "\n        | ")
    printed_reward = label("unread") if reward is None else f"{reward:6.2f}"
    print(f"{printed_reward}  {printable(text)}")
    scores = ", ".join(f"{judgement.score:g}" for judgement in parsed) or "none"
    print(f"        (scores {scores}; {len(parsed)} of {len(judgements)} judgements parsed; the first:)")
    print(f"        | {shown}")
