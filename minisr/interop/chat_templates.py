"""minisr's chat templates by name, and how they correspond to the Jinja templates of other libraries."""

import re
from pathlib import Path

from minisr import InputError
from minisr.runner.files import read_text

FOLDER = Path(__file__).parent / "templates"
CHATML_SYSTEM = re.compile(r"<\|im_start\|>system\n[^'\"{}<>]*<\|im_end\|>\n")


def chat_template(name: str) -> str:
    """The text of a template: one of minisr's by its name, or a file by its path."""
    path = FOLDER / f"{name}.txt"
    if not path.exists():
        path = Path(name)
    if not path.exists():
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.txt")))
        raise InputError(f"chat template {name!r} is neither a file nor one of {known}")
    return read_text(path, "chat template").removesuffix("\n")


def recognize_chat_template(jinja: str | None, specials) -> str:
    """The one of minisr's templates that a model uses, recognized by its special tokens and its Jinja
    template.

    The Jinja template is searched for markers, never executed. A default system message in it is kept."""
    jinja = (jinja or "").replace("\\n", "\n")
    if "<|im_start|>" in jinja and "<|im_start|>" in specials:
        system = CHATML_SYSTEM.search(jinja)
        return (system[0] if system else "") + chat_template("chatml")
    if "<|start_header_id|>" in specials:
        return chat_template("llama3")
    if "[INST]" in jinja and "<s>" in specials and "</s>" in specials:
        return chat_template("llama2")
    if "<|user|>" in jinja and "</s>" in specials and "<|user|>" not in specials:  # TinyLlama, Zephyr
        return chat_template("zephyr")
    if "</s>" not in specials:
        raise InputError("none of minisr's chat templates fits this model; name one of them, or a text file "
                         "with {prompt} and {response}: --chat NAME, or chat = NAME in a config")
    return chat_template("tiny" if "<|user|>" in specials else "plain")


def to_jinja(template: str) -> str:
    """One of minisr's templates as Jinja, for a user message, then an assistant message, and no other."""
    before_response, _, after_response = template.partition("{response}")
    before_prompt, _, after_prompt = before_response.partition("{prompt}")
    return ("{% for message in messages %}"
            "{% if loop.index0 == 0 and message['role'] == 'user' %}"
            + jinja_text(before_prompt) + "{{ message['content'] }}" + jinja_text(after_prompt)
            + "{% elif loop.index0 == 1 and message['role'] == 'assistant' %}"
            "{{ message['content'] }}" + jinja_text(after_response)
            + "{% else %}"
            "{{ raise_exception('this template takes a user message, then an assistant message, "
            "and no other') }}"
            "{% endif %}"
            "{% endfor %}")


def jinja_text(text: str) -> str:
    """Jinja code that prints a text as it is."""
    return "{{ " + repr(text) + " }}" if text else ""
