"""Text <-> token ids: a vocabulary, and the chat template that marks who speaks.

A chat template is data: one text with {prompt} and {response} in which special tokens are spelled
out, e.g. "<s><|user|>{prompt}<|assistant|>{response}</s>". Only the template's own spelling makes
special tokens: a prompt or response that spells "<|assistant|>" or "</s>" stays text, so that it can
open no turn of its own.
"""

import io
import re
from functools import cached_property
from pathlib import Path

import sentencepiece

from minisr.runner.files import InputError, need, read_text

TEMPLATES = Path(__file__).parent / "interop" / "templates"
USER, ASSISTANT = "<|user|>", "<|assistant|>"  # of the tokenizers that minisr trains
# Special tokens by which models end a text or a turn, whatever their template.
ENDS = {"</s>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>"}


class TemplateError(ValueError):
    """A chat template that lacks something or does not go with the vocabulary."""


class Tokenizer:
    """A vocabulary (SentencePiece or TokenizerJSON) and a chat template."""

    def __init__(self, vocabulary, template: str):
        """Raises TemplateError if the template lacks a field or the end of the response."""
        self.vocabulary, self.template = vocabulary, template
        self.begin = vocabulary.begin  # ids that open a plain text
        names = sorted(vocabulary.specials, key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")
        if [template.count(field) for field in ("{prompt}", "{response}")] != [1, 1]:
            raise TemplateError("a chat template names {prompt} and {response}, each exactly once")
        self._asking, _, after = template.partition("{response}")
        self._closing, *end = self._special.split(after)[:2]  # text, then the first special token
        if not end or "{prompt}" not in self._asking:
            raise TemplateError("a chat template has {prompt} before {response}, and after it one of the "
                                f"tokenizer's special tokens ({', '.join([*vocabulary.specials][:8])}), "
                                "where the answer ends")
        self.eos = vocabulary.specials[end[0]]

    def __len__(self) -> int:
        return len(self.vocabulary)

    def encode(self, text: str) -> list[int]:
        """Ids of a plain text: no special token, whatever the text spells."""
        try:
            text.encode()
        except UnicodeEncodeError as error:  # from a file's escaped surrogate
            raise InputError(f"half a character (a lone surrogate) in the text {text[:60]!r}") from error
        return self.vocabulary.encode(text)

    def decode(self, ids: list[int]) -> str:
        """The text of these ids; special tokens and ids that only pad the embedding leave no trace."""
        return self.vocabulary.decode([i for i in ids if i < len(self)])

    def chat_prompt(self, prompt: str) -> list[int]:
        """The template up to {response}: what the model answers to."""
        ids = []
        for part in self._special.split(self._asking):
            special = self.vocabulary.specials.get(part)
            ids += self.encode(part.replace("{prompt}", prompt)) if special is None else [special]
        return ids

    def answer(self, response: str) -> list[int]:
        """A response with its end."""
        return [*self.encode(response + self._closing), self.eos]

    def chat(self, prompt: str, response: str) -> tuple[list[int], list[bool]]:
        """A whole exchange and its loss mask: True on the response and its end, the targets."""
        asked, answered = self.chat_prompt(prompt), self.answer(response)
        return asked + answered, [False] * len(asked) + [True] * len(answered)

    @cached_property
    def stops(self) -> tuple[int, ...]:
        """Ids that end an answer: the template's, and what else ends a text."""
        others = {i for name, i in self.vocabulary.specials.items() if name in ENDS}
        return (self.eos, *sorted(others - {self.eos}))

    @cached_property
    def line_ends(self) -> tuple[int, ...]:
        """Ids with a line break in them; in a byte-level vocabulary there are many."""
        return tuple(i for i in range(len(self)) if "\n" in self.vocabulary.piece(i))

    def paint(self, ids: list[int], mask: list[bool]) -> str:
        """The tokens in the terminal's colours: green bears loss, grey does not."""
        return "".join(f"\033[{32 if target else 90}m{self.vocabulary.piece(i)}\033[0m"
                       for i, target in zip(ids, mask))

    @property
    def files(self) -> dict[str, bytes]:
        """What a model folder keeps of it, by file name."""
        return {self.vocabulary.FILE: self.vocabulary.content, "chat.txt": self.template.encode()}


class SentencePiece:
    """A tokenizer.model. Control symbols are its special tokens; it never makes them from text."""

    FILE = "tokenizer.model"

    def __init__(self, content: bytes):
        self.content = content
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=content)
        self.specials = {self.pieces.id_to_piece(i): i for i in range(len(self)) if self.pieces.is_control(i)}
        self.begin = [self.pieces.bos_id()] if self.pieces.bos_id() >= 0 else []
        self.encode, self.decode = self.pieces.encode, self.pieces.decode

    def __len__(self) -> int:
        return self.pieces.vocab_size()

    def piece(self, i: int) -> str:
        byte = self.pieces.is_byte(i)
        return self.decode([i]) if byte else self.pieces.id_to_piece(i).replace("▁", " ")


class TokenizerJSON:
    """A tokenizer.json, read by the tokenizers library (extra "hf")."""

    FILE = "tokenizer.json"

    def __init__(self, content: bytes):
        self.content = content
        library = need("tokenizers", "hf")
        try:
            self.pieces = library.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises nothing more special
            raise ValueError(f"not a tokenizer.json: {error}") from error
        self.pieces.no_truncation()
        self.pieces.no_padding()
        self.begin = self.pieces.encode("").ids
        self.pieces.encode_special_tokens = True  # from here on, text stays text
        added = sorted(self.pieces.get_added_tokens_decoder().items())
        self.specials = {token.content: i for i, token in added if token.special}

    def __len__(self) -> int:
        return self.pieces.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return self.pieces.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.pieces.decode(ids)

    def piece(self, i: int) -> str:
        return self.pieces.decode([i], skip_special_tokens=False)


def chat_template(name: str) -> str:
    """One of minisr's templates by its name, or the text of a file."""
    path = TEMPLATES / f"{name}.txt"
    if not path.exists():
        path = Path(name)
        if not path.exists():
            known = ", ".join(sorted(file.stem for file in TEMPLATES.glob("*.txt")))
            raise InputError(f"chat template {name!r} is neither a file nor one of {known}")
    return read_text(path, "chat template").removesuffix("\n")


def train_tokenizer(texts, vocab_size: int) -> Tokenizer:
    """Train a SentencePiece BPE model on texts; the same texts give the same bytes."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=vocab_size,
        model_type="bpe", character_coverage=1.0, byte_fallback=True, split_digits=False,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        user_defined_symbols=["\n"], control_symbols=[USER, ASSISTANT], num_threads=1,
        minloglevel=2)
    return Tokenizer(SentencePiece(model.getvalue()), chat_template("tiny"))
