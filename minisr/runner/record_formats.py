"""One record of a data set, in any of the common formats -> its first exchange: a prompt and the response to it.

Every format is first read as a chat, a list of (role, text) turns. A record that cannot be used raises LeftOut with the
reason. tiny_configs/README.md has the table of formats.
"""

import unicodedata
from typing import NamedTuple

from minisr.runner.files import LONE_SURROGATE, has_lone_surrogate

ROLES = {"user": "user", "human": "user", "prompter": "user",
         "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant",
         "bard": "assistant", "bot": "assistant", "model": "assistant", "ai": "assistant", "chatbot": "assistant",
         "system": "system", "developer": "system"}
CHAT_KEYS = {"messages": "chat messages", "conversations": "ShareGPT", "conversation": "ShareGPT"}
SYSTEM_KEYS = ("system", "system_prompt")
PROMPT_KEYS = ("instruction", "prompt", "question", "query")
CONTEXT_KEYS = ("input", "context")  # Alpaca's, Dolly's: what the instruction is about
RESPONSE_KEYS = ("output", "response", "completion", "answer")
TEXT_KEYS = ("content", "value", "text")  # of a message
NO_INPUT = "<noinput>"  # what Self-Instruct writes for an empty input
UNTRAINED = {"weight": 0, "train": False, "loss": False}  # of an answer that is not to be trained on


class LeftOut(Exception):
    """A record cannot be used, for this reason."""


class Exchange(NamedTuple):
    """A prompt and its response, None if the record has no answer."""

    format: str
    prompt: str
    response: str | None
    later_turns: int = 0  # turns of the chat that follow and are not used


def parse_exchange(record) -> Exchange:
    """The first exchange of a record. Raises LeftOut if it has no prompt."""
    if isinstance(record, str):
        record = {"prompt": record}
    if not isinstance(record, dict):
        raise LeftOut("not a record {...}")
    name, turns = read_turns(record)
    system = [text_of(record[key]) for key in SYSTEM_KEYS if key in record]
    turns = merge_turns([*(("system", text) for text in system), *turns])
    system = [turns.pop(0)[1]] if turns and turns[0][0] == "system" else []
    if not turns or turns[0][0] != "user":
        raise LeftOut("no user's turn at the beginning" if turns else "no prompt")
    prompt, answers = turns[0][1], turns[1:]
    if is_blank(prompt):
        raise LeftOut("empty prompt")
    if answers and answers[0][0] != "assistant":
        raise LeftOut("a turn of another role before the answer")
    prompt = "\n\n".join([*system, prompt])
    response = answers[0][1] if answers else None
    if has_lone_surrogate(prompt + (response or "")):
        raise LeftOut(LONE_SURROGATE)
    return Exchange(name, prompt, response, len(answers[1:]))


def parse_instruction(record) -> Exchange:
    """The first exchange of a record that must have an answer."""
    exchange = parse_exchange(record)
    if exchange.response is None or is_blank(exchange.response):
        raise LeftOut("no answer" if exchange.response is None else "empty answer")
    return exchange


def read_turns(record: dict) -> tuple[str, list[tuple[str, str]]]:
    """The name of a record's format, and its turns."""
    unliked = record.get("label") if "completion" in record else None
    if record.get("label") is False or record.get("kto_tag") is False or unliked in (0, "0", "false", "False"):
        raise LeftOut("labelled as a bad answer (label: false)")
    if "chosen" in record and "rejected" in record:
        return "preference (chosen)", preference_turns(record)
    for key, name in CHAT_KEYS.items():
        if isinstance(record.get(key), list) and record[key]:
            return name, chat_turns(record[key])
    if is_tree(record):
        return "OASST", tree_turns(record["prompt"])
    return prompt_and_response(record)


def prompt_and_response(record: dict) -> tuple[str, list[tuple[str, str]]]:
    """{prompt, response} in any of its names: Alpaca, Dolly, TRL's prompt/completion, minisr's own."""
    prompt_key = first_key(record, PROMPT_KEYS) or first_key(record, ("input",))
    response_key = first_key(record, RESPONSE_KEYS)
    if prompt_key is None:
        raise LeftOut("no prompt")
    turns = history_turns(record) + turns_of(record[prompt_key], "user")
    for key in CONTEXT_KEYS:
        if key in record and key != prompt_key and record[key] != NO_INPUT:
            turns.append(("user", text_of(record[key])))
    if response_key:
        turns += turns_of(record[response_key], "assistant")
    if response_key is None:
        return "prompts", turns
    if prompt_key == "instruction":
        return ("Dolly" if "context" in record else "Alpaca"), turns
    return f"{prompt_key}/{response_key}", turns


def preference_turns(record: dict) -> list[tuple[str, str]]:
    """The prompt and its preferred response. A conversational `chosen` may contain the prompt."""
    chosen = turns_of(record["chosen"], "assistant")
    if any(role == "user" for role, _ in chosen):
        return chosen
    key = first_key(record, (*CHAT_KEYS, *PROMPT_KEYS))
    if key is None:
        raise LeftOut("a preference (chosen, rejected) without a prompt")
    return turns_of(record[key], "user") + chosen


def history_turns(record: dict) -> list[tuple[str, str]]:
    """LLaMA-Factory's `history`: [question, answer] lists that come before the instruction."""
    turns = []
    history = record.get("history") or []
    if not isinstance(history, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in history):
        raise LeftOut("a history that is not a list of [question, answer]")
    for question, answer in history:
        turns += [("user", text_of(question)), ("assistant", text_of(answer))]
    return turns


def turns_of(value, role: str) -> list[tuple[str, str]]:
    """A text as one turn of this role; a message or a list of messages as the turns they are; null as none."""
    messages = value if isinstance(value, list) else [value]
    if messages and isinstance(messages[0], dict) and messages[0].keys() & {"role", "from"}:
        return chat_turns(messages)
    return [] if value is None else [(role, text_of(value))]


def chat_turns(messages: list) -> list[tuple[str, str]]:
    """Messages as {"role", "content"} or ShareGPT's {"from", "value"}. A message without content ends the chat."""
    turns = []
    for message in messages:
        if not isinstance(message, dict):
            raise LeftOut("a message that is not an object {...}")
        role, content = message.get("role", message.get("from")), message.get(first_key(message, TEXT_KEYS))
        if not isinstance(role, str):
            raise LeftOut("a message without a role")
        role = ROLES.get(role.strip().lower(), role)
        is_first_answer = role == "assistant" and role not in (known for known, _ in turns)
        if is_first_answer and any(message.get(key) == value for key, value in UNTRAINED.items()):
            raise LeftOut("an answer that is marked as not to be trained on")
        if content is None and role == "assistant":
            break
        turns.append((role, text_of(content)))
    return turns


def text_of(value) -> str:
    """The text of a prompt, an answer or a message: a text, a list of text parts, or "" for null."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        raise LeftOut(f"{KINDS[type(value)]} where a text should be")
    texts = [part.get("text") for part in value]
    if not all(isinstance(text, str) for text in texts):
        raise LeftOut("a part that is not text, such as an image")
    return "".join(texts)


def is_blank(text: str) -> bool:
    """Whether a text shows nothing: spaces, control characters and other invisible ones alone."""
    return all(unicodedata.category(c)[0] in "ZC" for c in text)


KINDS = {dict: "an object", list: "a list", int: "a number", float: "a number", bool: "true or false"}


def merge_turns(turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Neighbouring turns of one role as one turn, joined by an empty line; empty system turns are dropped."""
    merged = []
    for role, text in turns:
        if not text.strip() and (role == "system" or merged and merged[-1][0] == role):
            continue
        if merged and merged[-1][0] == role:
            text = "\n\n".join(part for part in (merged.pop()[1], text) if part.strip())
        merged.append((role, text))
    return merged


def is_tree(record: dict) -> bool:
    """Whether a record is a message tree of Open Assistant."""
    prompt = record.get("prompt")
    return isinstance(prompt, dict) and "text" in prompt


def tree_turns(prompt: dict) -> list[tuple[str, str]]:
    """The first message of a tree and its best reply: the one of the lowest rank, or the first without ranks."""
    replies = prompt.get("replies") or []
    if not isinstance(replies, list):
        raise LeftOut(f"{KINDS.get(type(replies), 'a text')} where replies should be")
    replies = [reply for reply in replies if isinstance(reply, dict) and not reply.get("deleted")]
    if prompt.get("deleted"):
        raise LeftOut("a deleted message")
    if prompt.get("parent_id") is not None:
        raise LeftOut("a reply to no message in the file")
    replies.sort(key=rank)  # stable: the first of equals stays first
    return chat_turns([{"role": message.get("role"), "content": message.get("text")}
                       for message in (prompt, *replies[:1])])


def rank(reply: dict) -> float:
    value = reply.get("rank")
    return value if isinstance(value, int | float) else float("inf")


def join_oasst_rows(records: list[tuple[str, object]]) -> list[tuple[str, object]]:
    """The rows of Open Assistant's flat files, one a message, as trees, each at the place of its first message.

    Ids are compared as they print, since JSON allows a list as an id. null is no id."""
    if not all(isinstance(record, dict) and {"message_id", "parent_id", "text"} <= record.keys()
               for _, record in records):
        return records
    known = {repr(row["message_id"]) for _, row in records if row["message_id"] is not None}
    replies, roots = {}, []
    for place, row in records:
        if repr(row["parent_id"]) in known:
            replies.setdefault(repr(row["parent_id"]), []).append(row)
        else:
            roots.append((place, row))
    return [(place, {"prompt": {**row, "replies": replies.get(repr(row["message_id"]))}}) for place, row in roots]


def first_key(record: dict, keys: tuple[str, ...]) -> str | None:
    """The first of these keys whose value is not null; else the first that is present; else None."""
    present = [key for key in keys if key in record]
    return next((key for key in present if record[key] is not None), present[0] if present else None)
