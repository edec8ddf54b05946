"""The sets of the seed data while they are read: which records are used, which are left out, and why.

Records are measured against the seed model's context before anything is made: one that does not fit would stop the run
later, in the step that needs it.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

from minisr import InputError
from minisr.judge import judge_prompt
from minisr.prompts import few_shot_prompt, normalize
from minisr.runner.files import file_digest, printable

SHORTEST_JUDGEMENT = "Score: 5"
NO_REASONS = 'no reasons; add them, or set seed_data.eft_by to "baseline", or seed_data.reasons to false'
BY_MODELS = ("self", "M1", "word_points")  # values of judge.by with which a trained model writes the judgements
HELD_OUT = "prompt held out for evaluation"
SHOWN_PLACES = 3  # of the records left out for one reason, in the table
STORED_PLACES = 100


class DataSet:
    """Records with their places ("line 7") in a file, and how many others of the file were left out, and why."""

    def __init__(self, path: Path | None, records: list[tuple[str, dict]]):
        self.path, self.records = path, records
        self.total = len(records)  # of the file
        self.formats = Counter()
        self.later_turns = 0
        self.left_out: dict[str, list[str]] = {}  # reason -> places
        self.used = 0
        self.taken: list[str] = []  # places of the records that are used

    def leave_out(self, reason: str, place: str) -> None:
        self.left_out.setdefault(reason, []).append(place)

    def take(self, limit: int, reject: Callable[[dict], tuple[str, str] | None], surplus: str) -> list[dict]:
        """The first `limit` records that are not rejected: reject(record) gives a reason and a remark, or None.

        The others count as left out; those beyond the limit for the reason `surplus`."""
        taken, self.taken = [], []
        for place, record in self.records:
            rejected = (surplus, "") if len(taken) == limit else reject(record)
            if rejected is None:
                taken.append(record)
                self.taken.append(place)
            else:
                reason, remark = rejected
                self.leave_out(reason, f"{place}{remark}")
        self.used = len(taken)
        return taken

    def drop(self, indices, reason: str) -> None:
        """Leave out these of the records that were taken."""
        for i in indices:
            self.leave_out(reason, self.taken[i])
        self.used -= len(indices)

    def problems(self) -> str:
        """Why records were left out, in one line."""
        return "; ".join(f"{reason} ({len(places)}: {shorten(places)})" for reason, places in self.left_out.items())

    def counts(self) -> dict:
        """What seed/counts.json says of this set."""
        return {"file": self.path.name if self.path else None, "records": self.total, "formats": dict(self.formats),
                "used": self.used, "later_turns": self.later_turns,
                "sha256": file_digest(self.path) if self.path else None,
                "left_out": {reason: {"count": len(places), "where": places[:STORED_PLACES]}
                             for reason, places in self.left_out.items()}}


class Context:
    """The seed model's context, in which every example must fit as it will be used."""

    def __init__(self, tokenizer, max_seq_len: int, template: str, config):
        """template: the judge prompt; config: the run's. Raises InputError if the judge prompt alone is too long."""
        self.tokenizer, self.max_seq_len, self.template, self.config = tokenizer, max_seq_len, template, config
        length = self.chat_length(judge_prompt(template, "", ""), SHORTEST_JUDGEMENT)
        if length > max_seq_len and config.judge.by in BY_MODELS:
            raise InputError(f"the judge prompt alone has {length} tokens, and the model's context is {max_seq_len}: "
                             "name a shorter judge prompt in judge.template, or another seed_model")
        self.check_examples()

    def check_examples(self) -> None:
        """Raise InputError if the context cannot hold an example prompt and a new one of prompts.max_new_tokens."""
        config = self.config.prompts
        if config.source != "self" or not self.config.iterations:
            return
        room = self.max_seq_len - self.list_length("a")
        if room < 1:
            raise InputError(f"the model's context of {self.max_seq_len} tokens is too small for an example prompt and "
                             "a new one; choose another seed_model")
        if config.max_new_tokens > room:
            raise InputError(f"prompts.max_new_tokens = {config.max_new_tokens} leaves no room for an example in the "
                             f"model's context of {self.max_seq_len} tokens; set it to {room} or less")

    def check_cut_off(self, data: dict[str, list[dict]]) -> None:
        """Raise InputError if most training examples are longer than what the model may write in their place.

        The model would learn to write texts that are cut off and so get no reward."""
        if self.config.iterations:
            self.check_lengths("responses", "IFT answers", [record["response"] for record in data["ift"]])
        if self.config.judge.by in BY_MODELS and self.config.seed_data.eft_by == "annotator":
            reasons = self.config.seed_data.reasons
            self.check_lengths("judge", "judgements of EFT data",
                               [text for record in data["ranked"] for text in annotator_judgements(record, reasons)])

    def check_lengths(self, section: str, what: str, texts: list[str]) -> None:
        limit = getattr(self.config, section).max_new_tokens
        lengths = [len(self.tokenizer.encode_response(text)) for text in texts]
        longer = sum(length > limit for length in lengths)
        if 2 * longer > len(lengths):
            raise InputError(f"{section}.max_new_tokens = {limit} is too small: {longer} of {len(lengths)} {what} are "
                             f"longer, up to {max(lengths)} tokens, so what the model learns to write would be cut "
                             f"off; set it to {max(lengths)} or more")

    @property
    def too_long(self) -> str:
        return f"longer than the model's context of {self.max_seq_len} tokens"

    def chat_length(self, prompt: str, response: str) -> int:
        """Tokens of a whole exchange."""
        return len(self.tokenizer.encode_chat(prompt, response)[0])

    def instruction_length(self, record: dict) -> int:
        """Tokens of an IFT record as a training example, or of its prompt as the only example for new prompts."""
        length = self.chat_length(record["prompt"], record["response"])
        if self.config.prompts.source != "self":
            return length
        return max(length, self.list_length(record["prompt"]) + 1)  # one new token

    def list_length(self, prompt: str) -> int:
        """Tokens of the list of examples for new prompts, with this as the only example."""
        text = few_shot_prompt(self.tokenizer, [prompt], [], self.config.prompts, Random(0), 0)
        return len(self.tokenizer.bos_ids) + len(self.tokenizer.encode(text))

    def prompt_length(self, record: dict) -> int:
        """Tokens of a prompt with an empty answer."""
        return self.chat_length(record["prompt"], "")

    def judged_length(self, record: dict) -> int:
        """Tokens of the longest judgement of a record's responses, the annotator's if EFT uses it."""
        judgements = [SHORTEST_JUDGEMENT] * len(record["responses"])
        if self.config.seed_data.eft_by == "annotator":
            judgements = annotator_judgements(record, self.config.seed_data.reasons)
        return max(self.chat_length(judge_prompt(self.template, record["prompt"], response), judgement)
                   for response, judgement in zip(record["responses"], judgements))


def reject_too_long(context: Context | None,
                    length: Callable[[Context, dict], int]) -> Callable[[dict], tuple[str, str] | None]:
    """A `reject` for DataSet.take, from one of Context's lengths. Without a context nothing is too long."""
    def reject(record: dict) -> tuple[str, str] | None:
        if context is None:
            return None
        tokens = length(context, record)
        return (context.too_long, f" ({tokens} tokens)") if tokens > context.max_seq_len else None
    return reject


def annotator_judgements(record: dict, reasons: bool) -> list[str]:
    """The annotator's reason and score for each response, or the score alone."""
    if reasons and "reasons" not in record:
        raise InputError(f"judged responses: {NO_REASONS}")
    texts = record["reasons"] if reasons else [""] * len(record["scores"])
    return [f"{text}\nScore: {score}".lstrip() for text, score in zip(texts, record["scores"])]


def reject_held_out(held_out: list[dict], reject) -> Callable[[dict], tuple[str, str] | None]:
    """Rejects records whose prompt, up to case, spaces and punctuation, is held out, then as `reject` does."""
    known = {canonical(record["prompt"]) for record in held_out}
    return lambda record: (HELD_OUT, "") if canonical(record["prompt"]) in known else reject(record)


def canonical(prompt: str) -> str:
    return normalize(prompt) or prompt


def describe(sets: dict[str, DataSet]) -> str:
    """The table of what was read, what is used, and what was left out and why."""
    rows = [("seed data", "file", "records", "read as", "used", "left out", "why, and where")]
    for name, data in sets.items():
        if not data.path and not data.total:  # no judged file, and none needed
            continue
        read_as = ", ".join(f"{name} {count}" for name, count in data.formats.most_common()) or "-"
        cells = (name, data.path.name if data.path else "-", str(data.total), read_as, str(data.used))
        reasons = [(str(len(places)), f"{reason}: {shorten(places)}") for reason, places in data.left_out.items()]
        for number, left_out in enumerate(reasons or [("0", "")]):
            rows.append((*(cells if number == 0 else [""] * len(cells)), *left_out))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    lines.insert(1, "-" * max(map(len, lines)))
    lines += [f"{name}: {data.later_turns} later turns of chats are not used, only first exchanges"
              for name, data in sets.items() if data.later_turns]
    return printable("\n".join(lines))


def shorten(places: list[str]) -> str:
    """The first places of a list."""
    return ", ".join(places[:SHOWN_PLACES]) + (", ..." if len(places) > SHOWN_PLACES else "")
