"""Text <-> token ids: a vocabulary, and the chat template that marks the speaker roles.

A chat template is one text with {prompt} and {response} in which special tokens are spelled out, e.g.
"<s><|user|>{prompt}<|assistant|>{response}</s>". Only the template's own text makes special tokens: a prompt or a
response that spells "<|assistant|>" or "</s>" stays text, so it cannot open or close a turn.
"""

import re
from functools import cached_property

import sentencepiece


class TemplateError(ValueError):
    """The chat template lacks a field, or does not match the vocabulary."""


class Tokenizer:
    """A vocabulary (SentencePiece, or one with the same methods) and a chat template."""

    def __init__(self, vocabulary, template: str, stop_ids=()):
        """template: the chat template's text. stop_ids: ids that end a response, besides the template's end token.

        Raises TemplateError if the template lacks a field or the end of the response."""
        self.vocabulary, self.template, self.bos_ids = vocabulary, template, vocabulary.bos_ids
        names = sorted(vocabulary.specials, key=len, reverse=True)
        # (?!) never matches: a vocabulary may have no special tokens.
        self._special = re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")
        before, _, after = template.partition("{response}")
        # A space before {response} belongs to the response: most vocabularies join it with the first word.
        self._before_response = before.rstrip(" ")
        self._space_before_response = before[len(self._before_response):]
        # The text between the last special token and the response; "a" stands for the prompt.
        self._text_before_response = self._special.split(self._before_response)[-1].replace("{prompt}", "a")
        self._after_response, *end = self._special.split(after)[:2]  # text, then the first special token
        if re.findall(r"\{prompt\}|\{response\}", template) != ["{prompt}", "{response}"] or not end:
            raise TemplateError("a chat template contains {prompt} once, then {response} once, then a special token "
                                f"that ends the response (one of {', '.join([*vocabulary.specials][:8])})")
        self.eos_id = vocabulary.specials[end[0]]
        self.stop_ids = (self.eos_id, *sorted({*stop_ids} - {self.eos_id}))

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
        before = self.vocabulary.encode_after_special(self._text_before_response)
        decoded = self.vocabulary.decode_after_special(before + [i for i in ids if i < len(self)])
        text = decoded.removeprefix(self.vocabulary.decode_after_special(before))
        return text.removeprefix(self._space_before_response).removesuffix(self._after_response)

    def encode_prompt(self, prompt: str) -> list[int]:
        """The template up to {response}: the model continues with its answer."""
        beginning, *parts = self._special.split(self._before_response)  # text, then special token, text, ...
        ids = [*self.encode(beginning.replace("{prompt}", prompt))]
        for special, text in zip(parts[::2], parts[1::2]):
            ids.append(self.vocabulary.specials[special])
            ids += self.vocabulary.encode_after_special(text.replace("{prompt}", prompt))
        return ids

    def encode_response(self, response: str) -> list[int]:
        """A response, the template's text after it, and the end token, as ids that continue a prompt."""
        text = self._space_before_response + response + self._after_response
        for text_before in (self._text_before_response, "\n", ""):  # the empty text always matches
            before, ids = map(self.vocabulary.encode_after_special, (text_before, text_before + text))
            if ids[:len(before)] == before:  # else a token would span the end of the prompt
                return [*ids[len(before):], self.eos_id]

    def encode_chat(self, prompt: str, response: str) -> tuple[list[int], list[bool]]:
        """A whole exchange and its loss mask: True on the response and its end token, the targets of training."""
        prompt_ids, response_ids = self.encode_prompt(prompt), self.encode_response(response)
        return prompt_ids + response_ids, [False] * len(prompt_ids) + [True] * len(response_ids)

    @cached_property
    def newline_ids(self) -> tuple[int, ...]:
        """Ids of tokens that contain a line break."""
        return tuple(i for i in range(len(self)) if "\n" in self.vocabulary.piece(i))


class SentencePiece:
    """A SentencePiece model. Its control symbols are the special tokens; encoding text never produces them."""

    FILE = "tokenizer.model"

    def __init__(self, content: bytes):
        self.content, self.pieces = content, sentencepiece.SentencePieceProcessor(model_proto=content)
        self.specials = {self.pieces.id_to_piece(i): i for i in range(len(self)) if self.pieces.is_control(i)}
        # The ids that begin a plain text.
        self.bos_ids = [self.pieces.bos_id()] if self.pieces.bos_id() >= 0 else []
        # With a "dummy prefix", a space is added before every text, also after a special token.
        self.encode = self.encode_after_special = self.pieces.encode
        self.decode = self.decode_after_special = self.pieces.decode

    def __len__(self) -> int:
        return self.pieces.vocab_size()

    def piece(self, i: int) -> str:
        """The text of one token."""
        return self.decode([i]) if self.pieces.is_byte(i) else self.pieces.id_to_piece(i).replace("▁", " ")
