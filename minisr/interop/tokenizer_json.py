"""A Hugging Face tokenizer.json as a vocabulary for Tokenizer (needs the tokenizers library, extra "hf")."""

import json
from itertools import chain

from minisr.runner.files import import_extra


class TokenizerJSON:
    """The vocabulary in a tokenizer.json. It has the same methods and attributes as SentencePiece."""

    FILE = "tokenizer.json"

    def __init__(self, content: bytes):
        """Raises ValueError if the content is not a valid tokenizer.json."""
        self.content = content
        tokenizers = import_extra("tokenizers", "hf")
        try:
            self.pieces = tokenizers.Tokenizer.from_str(content.decode())
            changed = without_first_prefix(json.loads(content))
            self.after_special = tokenizers.Tokenizer.from_str(json.dumps(changed)) if changed else self.pieces
        except Exception as error:  # the library raises no more specific type
            raise ValueError(f"not a tokenizer.json: {error}") from error
        for pieces in (self.pieces, self.after_special):
            pieces.no_truncation()
            pieces.no_padding()
        # The largest id plus one. A vocabulary may leave ids out; they decode to nothing.
        self.size = 1 + max(self.pieces.get_vocab().values(), default=-1)
        self.bos_ids = leading_special_ids(self.pieces)
        added_tokens = self.pieces.get_added_tokens_decoder()
        self.specials = {token.content: i for i, token in sorted(added_tokens.items()) if token.special}
        # From here on, "</s>" in a text is encoded as text.
        self.pieces.encode_special_tokens = self.after_special.encode_special_tokens = True

    def __len__(self) -> int:
        return self.size

    def encode(self, text: str) -> list[int]:
        """Ids of a text that begins a sequence."""
        return self.pieces.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.pieces.decode(ids)

    def encode_after_special(self, text: str) -> list[int]:
        """Ids of a text that follows a special token."""
        return self.after_special.encode(text, add_special_tokens=False).ids

    def decode_after_special(self, ids: list[int]) -> str:
        return self.after_special.decode(ids)

    def encode_rendered(self, text: str) -> list[int]:
        """Ids of a whole chat as transformers encodes it: here "</s>" is the special token."""
        self.pieces.encode_special_tokens = False
        try:
            return self.encode(text)
        finally:
            self.pieces.encode_special_tokens = True

    def piece(self, i: int) -> str:
        return self.pieces.decode([i], skip_special_tokens=False)


def leading_special_ids(pieces) -> list[int]:
    """The ids that a tokenizer adds before a text; it may add others after it."""
    for text in chain("a", pieces.get_vocab()):  # a vocabulary without byte fallback drops a text that it lacks
        encoding = pieces.encode(text)
        added = encoding.special_tokens_mask  # 1 for each token that does not come from the text
        if 0 in added:
            return encoding.ids[:added.index(0)]
    return []


def without_first_prefix(settings: dict) -> dict | None:
    """The settings for a text after a special token, where they differ.

    With Metaspace's prepend_scheme "first", a space is added only before a text that begins a sequence."""
    found = [step for step in steps_of(settings.get("pre_tokenizer"), "pretokenizers")
             if step["type"] == "Metaspace" and step.get("prepend_scheme") == "first"]
    if not found:
        return None
    for step in [*found, *steps_of(settings.get("decoder"), "decoders")]:
        if step["type"] == "Metaspace":
            step["prepend_scheme"] = "never"
        if step["type"] == "Strip" and step["content"] == " ":
            step["start"] = 0  # the decoder removes no space, because none was added
    return settings


def steps_of(settings: dict | None, name: str) -> list[dict]:
    """The steps of a pre-tokenizer or decoder, which may be a sequence of them."""
    if not settings:
        return []
    if settings["type"] != "Sequence":
        return [settings]
    return [step for part in settings[name] for step in steps_of(part, name)]
