"""minisr's chat templates by name, which of them a model uses, and how they are written in Jinja."""

import os
import sys
from pathlib import Path

from minisr import InputError
from minisr.interop.jinja_templates import JinjaTemplate, compare, template_from_jinja
from minisr.runner.files import read_text

FOLDER = Path(__file__).parent / "templates"
FIX = ("name one of minisr's chat templates, or a text file with {prompt} and {response}: --chat NAME, or chat = NAME "
       "in a config")


def chat_template(name: str) -> str:
    """The text of a template: one of minisr's by its name, or a file by its path."""
    path = FOLDER / f"{name}.txt"
    if not os.path.exists(path):  # unlike Path.exists, False for a name that no file can have
        path = Path(name)
    if not os.path.exists(path):
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.txt")))
        fix = "; write a template's text into a file, and name the file" if "{" in name else ""
        raise InputError(f"chat template {name[:60]!r} is neither a file nor one of {known}{fix}")
    return read_text(path, "chat template").removesuffix("\n")


def choose_chat_template(source, vocabulary, jinja: JinjaTemplate, stop_ids: set[int], chosen: str = "") -> str:
    """The template that a model is used with: the chosen one, or the model's own.

    A chosen template that differs from the model's own is used, and one line on stderr tells the difference. The
    model's own must be one that minisr can write: {prompt}, {response} and constant text; InputError otherwise.
    `source` names the model in messages."""
    if chosen:
        template = chosen
        if chosen == chat_template("plain"):
            template = with_tokens_of(vocabulary, jinja, stop_ids, chosen)
        if difference := chosen_differs(template, vocabulary, jinja):
            note(f"the chosen chat template is not the one of {source}: {difference}")
        return template
    if not jinja.text:
        name = template_by_tokens(vocabulary.specials)
        note(f"{source} has no chat template; minisr uses its template {name!r}")
        template = chat_template(name)
        return with_tokens_of(vocabulary, jinja, stop_ids, template) if name == "plain" else template
    try:
        template = template_from_jinja(jinja, vocabulary.specials)
        difference = compare(template, vocabulary, jinja)
    except InputError as error:
        raise InputError(f"minisr cannot use the chat template of {source}: {error}; {FIX}") from error
    if difference:
        note(f"the chat template of {source}: {difference}")
    return template


def chosen_differs(template: str, vocabulary, jinja: JinjaTemplate) -> str | None:
    """How a chosen template differs from the model's own, in one line; None if it does not."""
    if not jinja.text:
        return None
    try:
        return compare(template, vocabulary, jinja)
    except InputError as error:
        return str(error)


def note(line: str) -> None:
    print(f"minisr: {' '.join(line.split())}", file=sys.stderr)


def template_by_tokens(specials: dict[str, int]) -> str:
    """The name of the template for a model that has none, by the special tokens that were made for one."""
    if "<|start_header_id|>" in specials:
        return "llama3"
    return "tiny" if {"<s>", "</s>", "<|user|>", "<|assistant|>"} <= specials.keys() else "plain"


def with_tokens_of(vocabulary, jinja: JinjaTemplate, stop_ids: set[int], template: str) -> str:
    """A template in which <s> and </s> stand for the tokens that begin a text and end it in this vocabulary."""
    names = {i: name for name, i in vocabulary.specials.items()}
    begin = "".join(names.get(i, "") for i in vocabulary.bos_ids)
    ends = [jinja.tokens.get("eos_token"), *(names.get(i) for i in sorted(stop_ids))]
    end = next((token for token in ends if token in vocabulary.specials), None)
    if end is None:
        raise InputError(f"the template 'plain' needs a special token that ends a response, and the model's files "
                         f"declare none; {FIX}")
    return template.replace("<s>", begin).replace("</s>", end)


def to_jinja(template: str) -> str:
    """One of minisr's templates as Jinja, for a user message, then an assistant message, and no other."""
    before_response, _, after_response = template.partition("{response}")
    before_prompt, _, after_prompt = before_response.partition("{prompt}")
    space = after_prompt[len(after_prompt.rstrip(" ")):]  # as in Tokenizer, it belongs to the response
    return ("{% for message in messages %}"
            "{% if loop.index0 == 0 and message['role'] == 'user' %}"
            + jinja_text(before_prompt) + "{{ message['content'] }}" + jinja_text(after_prompt.removesuffix(space))
            + "{% elif loop.index0 == 1 and message['role'] == 'assistant' %}"
            + jinja_text(space) + "{{ message['content'] }}" + jinja_text(after_response)
            + "{% else %}"
            "{{ raise_exception('this template takes a user message, then an assistant message, "
            "and no other') }}"
            "{% endif %}"
            "{% endfor %}")


def jinja_text(text: str) -> str:
    """Jinja code that prints a text as it is."""
    return "{{ " + repr(text) + " }}" if text else ""
