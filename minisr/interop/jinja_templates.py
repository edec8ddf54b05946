"""A model's own chat template (Jinja) as one of minisr's, and where the two differ (extra "hf" or "gguf").

A Jinja template is a program of unknown origin. It runs in Jinja's sandbox, as transformers runs it, and nowhere
else. It does not learn today's date (strftime_now), because the same files must give the same run every day.
"""

import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version

from minisr import InputError
from minisr.runner.files import import_extra, short_reason
from minisr.tokenizer import Tokenizer

SAFE_VERSION = (3, 1, 6)  # older versions of Jinja have known ways out of the sandbox
# Exchanges on which a template is compared with the model's own, and two that show whether it strips messages and
# removes a model's thoughts.
EXCHANGES = [("What is 2 + 2?", "It is 4."), ("One line.\n\nAnother: \"it's\" <b>", "Two\nlines\n\nand {'a': 1}"),
             (" ".join(["A long request."] * 300), " ".join(["A long response."] * 300))]
SPACED = (" \n How? ", " \n So. \n")
THOUGHT = ("Why?", "<think>\nHm.\n</think>\n\nSo.")


@dataclass
class JinjaTemplate:
    """A chat template of transformers, and the special tokens that it may name ("bos_token", "eos_token", ...)."""

    text: str | None
    tokens: dict[str, str] = field(default_factory=dict)

    def render(self, *turns: str, system: str | None = None) -> str:
        """The text of a chat: a prompt that asks for the response, or a prompt and a response."""
        messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), turns)]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        try:
            return self.compiled.render(messages=messages, add_generation_prompt=len(turns) == 1, tools=None,
                                        documents=None, **self.tokens)
        except InputError:
            raise
        except Exception as error:  # the program may fail in any way
            raise InputError(f"it fails: {short_reason(error)}") from error

    @cached_property
    def compiled(self):
        sandbox, ext = import_extra("jinja2.sandbox", "hf"), import_extra("jinja2.ext", "hf")
        if tuple(map(int, re.findall(r"\d+", version("jinja2"))[:3])) < SAFE_VERSION:
            raise InputError(f'jinja2 {version("jinja2")} is not safe: pip install "jinja2>=3.1.6"')

        class Generation(ext.Extension):
            """{% generation %} marks what transformers trains on; it prints its content."""

            tags = {"generation"}

            def parse(self, parser):
                next(parser.stream)
                return parser.parse_statements(["name:endgeneration"], drop_needle=True)

        environment = sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols])
        environment.filters["tojson"] = to_json
        environment.globals["raise_exception"] = raise_exception
        return environment.from_string(self.text)


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """The filter tojson as in transformers: no character is escaped for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message):
    raise ValueError(message)


def template_from_jinja(jinja: JinjaTemplate, specials: dict[str, int]) -> str:
    """minisr's template for the chats that a Jinja template writes: it is applied to "{prompt}" and "{response}".

    It ends with the first special token after the response, the last token that a model samples. Raises InputError
    if the Jinja template does not contain both messages once."""
    text = jinja.render("{prompt}", "{response}")
    if re.findall(r"\{prompt\}|\{response\}", text) != ["{prompt}", "{response}"]:
        raise InputError(f"for one prompt and one response it renders {text!r}")
    before, after = text.split("{response}")
    names = "|".join(map(re.escape, sorted(specials, key=len, reverse=True))) or "(?!)"
    end = re.search(names, after)
    if end:
        return f"{before}{{response}}{after[:end.end()]}"
    eos = jinja.tokens.get("eos_token")
    if eos not in specials:
        raise InputError("it ends a response with no special token")
    return f"{before}{{response}}{after.rstrip()}{eos}"


def compare(template: str, vocabulary, jinja: JinjaTemplate) -> str | None:
    """How a template of minisr differs from the model's own, in one line; None if it does not.

    Raises InputError if the model's own writes other text, or changes messages in another way than stripping them."""
    tokenizer, system = Tokenizer(vocabulary, template), system_message(template, jinja)
    found = []
    for exchange in EXCHANGES:
        ours, theirs = fill(template, *exchange), jinja.render(*exchange, system=system)
        if not theirs.startswith(ours) and theirs.rstrip() == ours.removesuffix(tokenizer_end(tokenizer)):
            found.append(f"it ends a response with no special token; minisr adds {tokenizer_end(tokenizer)}")
        elif not theirs.startswith(ours):
            raise InputError(f"it writes {shorten(theirs)}, minisr {shorten(ours)}")
        prompt = jinja.render(exchange[0], system=system)
        found.append(compare_prompts(fill(template.partition("{response}")[0].rstrip(" "), *exchange), prompt))
        if not any(found) and not same_ids(tokenizer, exchange, prompt, theirs):
            found.append("its tokenizer encodes the text beside special tokens in another way; token ids differ")
    if not jinja.render(*SPACED, system=system).startswith(fill(template, *SPACED)) and not any(found):
        found.append("it strips spaces and line breaks around messages; minisr keeps them")
    if "</think>" not in jinja.render(*THOUGHT, system=system):
        found.append("it removes thoughts (<think>) from responses; minisr keeps them")
    if "strftime_now" in jinja.text:
        found.append("it writes today's date; minisr always writes the template's default")
    return "; ".join(dict.fromkeys(filter(None, found))) or None


def compare_prompts(ours: str, theirs: str) -> str | None:
    """The same for the prompts alone, which the model continues."""
    if theirs == ours:
        return None
    if theirs.rstrip(" ") == ours:
        return "it ends a prompt with a space; minisr leaves it to the response"
    if ours.startswith(theirs):
        return f"it asks for no response at the end of a prompt; minisr adds {ours[len(theirs):]!r}"
    raise InputError(f"it ends a prompt with {shorten(theirs)}, but a conversation has {shorten(ours)} there")


def same_ids(tokenizer: Tokenizer, exchange: tuple[str, str], prompt: str, conversation: str) -> bool:
    """Whether the tokenizers library gives minisr's ids for rendered texts, as far as the response's end token."""
    encode = getattr(tokenizer.vocabulary, "encode_rendered", None)
    if encode is None:  # SentencePiece alone knows no special tokens
        return True
    prompt_ids, ids = encode(prompt), encode(conversation)
    if ids[:len(prompt_ids)] != prompt_ids:  # a token spans the end of the prompt: theirs is two different prompts
        return prompt_ids == tokenizer.encode_prompt(exchange[0])
    ours, _ = tokenizer.encode_chat(*exchange)
    return ids[:len(ours)] == ours


def system_message(template: str, jinja: JinjaTemplate) -> str | None:
    """The system message with which a Jinja template writes the same prompt; None stands for no such message."""
    before = template.partition("{response}")[0]
    if jinja.render("{prompt}", "{response}").startswith(before):
        return None
    try:
        with_system = jinja.render("{prompt}", "{response}", system="{system}").partition("{response}")[0]
    except InputError:  # it takes no system message
        return None
    head, _, tail = with_system.partition("{system}")
    if with_system.count("{system}") == 1 and before.startswith(head) and before[len(head):].endswith(tail):
        return before[len(head):].removesuffix(tail)
    return None


def fill(template: str, prompt: str, response: str = "") -> str:
    values = {"{prompt}": prompt, "{response}": response}
    return re.sub(r"\{prompt\}|\{response\}", lambda name: values[name[0]], template)


def tokenizer_end(tokenizer: Tokenizer) -> str:
    """The text of the token that ends a response."""
    return next(name for name, i in tokenizer.vocabulary.specials.items() if i == tokenizer.eos_id)


def shorten(text: str) -> str:
    """The text in quotes, cut to its last 160 characters: templates usually differ there."""
    return repr(text) if len(text) <= 160 else f"...{text[-160:]!r}"
