"""Text <-> token ids: a vocabulary, and the chat template that marks who speaks.

A chat template is a text that contains {prompt}, {response} and special tokens, for example
"<s><|user|>{prompt}<|assistant|>{response}</s>". Special tokens are recognized only in the template.
A prompt or response that contains "<|assistant|>" or "</s>" is encoded as ordinary text, so it cannot
open or close a turn.
"""

import io
import re
from functools import cached_property

import sentencepiece

from minisr import InputError

USER, ASSISTANT = "<|user|>", "<|assistant|>"  # special tokens of the tokenizers that minisr trains
# Special tokens with which models end a text or a turn, whatever their template.
END_TOKENS = {"</s>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>"}


class TemplateError(ValueError):
    """A chat template is incomplete or does not fit the vocabulary."""


class Tokenizer:
    """A vocabulary (SentencePiece or interop's TokenizerJSON) with a chat template."""

    def __init__(self, vocabulary, template: str):
        """Raises TemplateError if the template lacks a field or an end of the response."""
        self.vocabulary, self.template = vocabulary, template
        self.bos_ids = vocabulary.bos_ids  # ids at the start of a plain text
        specials = sorted(vocabulary.specials, key=len, reverse=True)
        self._special_token = re.compile(f"({'|'.join(map(re.escape, specials)) or '(?!)'})")
        if template.count("{prompt}") != 1 or template.count("{response}") != 1:
            raise TemplateError("a chat template must contain {prompt} and {response}, each exactly once")
        self._before_response, _, after = template.partition("{response}")
        self._after_response, *end = self._special_token.split(after)[:2]  # text, first special token
        if not end or "{prompt}" not in self._before_response:
            some = ", ".join([*vocabulary.specials][:8])
            raise TemplateError("a chat template must have {prompt} before {response}, and after {response} "
                                f"one of the tokenizer's special tokens ({some}), where the response ends")
        self.eos_id = vocabulary.specials[end[0]]

    def __len__(self) -> int:
        return len(self.vocabulary)

    def encode(self, text: str) -> list[int]:
        """The ids of a plain text. They never include a special token."""
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can contain such a character as an escape
            raise InputError(f"half a character (a lone surrogate) in the text {text[:60]!r}") from error
        return self.vocabulary.encode(text)

    def decode(self, ids: list[int]) -> str:
        """The text of these ids, without special tokens and without ids beyond the vocabulary."""
        return self.vocabulary.decode([i for i in ids if i < len(self)])

    def encode_prompt(self, prompt: str) -> list[int]:
        """The template up to {response}: what the model continues."""
        ids = []
        for part in self._special_token.split(self._before_response):
            if part in self.vocabulary.specials:
                ids.append(self.vocabulary.specials[part])
            else:
                ids += self.encode(part.replace("{prompt}", prompt))
        return ids

    def encode_response(self, response: str) -> list[int]:
        """The template from {response} to the end of the turn."""
        return [*self.encode(response + self._after_response), self.eos_id]

    def encode_chat(self, prompt: str, response: str) -> tuple[list[int], list[bool]]:
        """(ids, loss mask) of a whole exchange. The mask is True on the response and its end."""
        prompt_ids, response_ids = self.encode_prompt(prompt), self.encode_response(response)
        return prompt_ids + response_ids, [False] * len(prompt_ids) + [True] * len(response_ids)

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a response: the template's, then the vocabulary's other END_TOKENS."""
        others = {i for token, i in self.vocabulary.specials.items() if token in END_TOKENS}
        return (self.eos_id, *sorted(others - {self.eos_id}))

    @cached_property
    def newline_ids(self) -> tuple[int, ...]:
        """Ids of tokens that contain a line break. A byte-level vocabulary has many."""
        return tuple(i for i in range(len(self)) if "\n" in self.vocabulary.piece(i))

    @property
    def files(self) -> dict[str, bytes]:
        """The files that store this tokenizer in a model folder, by name."""
        return {self.vocabulary.FILE: self.vocabulary.content, "chat.txt": self.template.encode()}


class SentencePiece:
    """A SentencePiece model. Its control symbols are the special tokens; text never produces them."""

    FILE = "tokenizer.model"

    def __init__(self, content: bytes):
        self.content = content
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=content)
        self.specials = {self.pieces.id_to_piece(i): i for i in range(len(self)) if self.pieces.is_control(i)}
        self.bos_ids = [self.pieces.bos_id()] if self.pieces.bos_id() >= 0 else []
        self.encode, self.decode = self.pieces.encode, self.pieces.decode

    def __len__(self) -> int:
        return self.pieces.vocab_size()

    def piece(self, i: int) -> str:
        """The text of one token."""
        if self.pieces.is_byte(i):
            return self.decode([i])
        return self.pieces.id_to_piece(i).replace("▁", " ")


def train_tokenizer(texts, vocab_size: int, template: str) -> Tokenizer:
    """Train a SentencePiece BPE model on texts. The same texts give the same bytes."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=vocab_size,
        model_type="bpe", character_coverage=1.0, byte_fallback=True, split_digits=False,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        user_defined_symbols=["\n"], control_symbols=[USER, ASSISTANT], num_threads=1,
        minloglevel=2)
    return Tokenizer(SentencePiece(model.getvalue()), template)
