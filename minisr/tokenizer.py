"""Text <-> token ids: a vocabulary, and the chat template that marks the speaker roles.

A chat template is one text with {prompt} and {response} in which special tokens are spelled out, e.g.
"<s><|user|>{prompt}<|assistant|>{response}</s>". Only the template's own text makes special tokens: a prompt or a
response that spells "<|assistant|>" or "</s>" stays text, so it cannot open or close a turn.
"""

import re
from functools import cached_property

import sentencepiece

# Common end-of-text and end-of-turn tokens. Where a vocabulary has one, it ends a response.
END_TOKENS = {"</s>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>"}


class TemplateError(ValueError):
    """The chat template lacks a field, or does not match the vocabulary."""


class Tokenizer:
    """A vocabulary (SentencePiece, or one with the same methods) and a chat template."""

    def __init__(self, vocabulary, template: str):
        """template: the chat template's text. Raises TemplateError if it lacks a field or the end of the response."""
        self.vocabulary, self.template = vocabulary, template
        self.bos_ids = vocabulary.bos_ids  # ids that begin a plain text
        names = sorted(vocabulary.specials, key=len, reverse=True)
        # (?!) never matches: a vocabulary may have no special tokens.
        self._special = re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")
        self._before_response, _, after = template.partition("{response}")
        self._after_response, *end = self._special.split(after)[:2]  # text, then the first special token
        fields = re.findall(r"\{prompt\}|\{response\}", template)
        if fields != ["{prompt}", "{response}"] or not end:
            raise TemplateError("a chat template contains {prompt} once, then {response} once, then a special token "
                                f"that ends the response (one of {', '.join([*vocabulary.specials][:8])})")
        self.eos_id = vocabulary.specials[end[0]]

    def __len__(self) -> int:
        return len(self.vocabulary)

    def encode(self, text: str) -> list[int]:
        """Ids of a plain text. No special token, whatever the text spells."""
        return self.vocabulary.encode(text)

    def decode(self, ids: list[int]) -> str:
        """The text of these ids, without special tokens and unused rows of the embedding."""
        return self.vocabulary.decode([i for i in ids if i < len(self)])

    def decode_response(self, ids: list[int]) -> str:
        """The inverse of encode_response."""
        return self.decode(ids).removesuffix(self._after_response)

    def encode_prompt(self, prompt: str) -> list[int]:
        """The template up to {response}: the model continues with its answer."""
        ids = []
        for part in self._special.split(self._before_response):
            if part in self.vocabulary.specials:
                ids.append(self.vocabulary.specials[part])
            else:
                ids += self.encode(part.replace("{prompt}", prompt))
        return ids

    def encode_response(self, response: str) -> list[int]:
        """A response, the template's text after it, and the end token."""
        return [*self.encode(response + self._after_response), self.eos_id]

    def encode_chat(self, prompt: str, response: str) -> tuple[list[int], list[bool]]:
        """A whole exchange and its loss mask: True on the response and its end token, the targets of training."""
        prompt_ids, response_ids = self.encode_prompt(prompt), self.encode_response(response)
        return prompt_ids + response_ids, [False] * len(prompt_ids) + [True] * len(response_ids)

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a response: the template's end token first, then every other end token of the vocabulary."""
        others = {i for name, i in self.vocabulary.specials.items() if name in END_TOKENS}
        return (self.eos_id, *sorted(others - {self.eos_id}))

    @cached_property
    def newline_ids(self) -> tuple[int, ...]:
        """Ids of tokens that contain a line break."""
        return tuple(i for i in range(len(self)) if "\n" in self.vocabulary.piece(i))


class SentencePiece:
    """A SentencePiece model. Its control symbols are the special tokens; encoding text never produces them."""

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
