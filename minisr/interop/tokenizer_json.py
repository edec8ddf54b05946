"""A Hugging Face tokenizer.json as a vocabulary for Tokenizer (needs the tokenizers library, extra "hf")."""

from minisr.runner.files import need


class TokenizerJSON:
    """The vocabulary in a tokenizer.json. It has the same methods and attributes as SentencePiece."""

    FILE = "tokenizer.json"

    def __init__(self, content: bytes):
        """Raises ValueError if the content is not a valid tokenizer.json."""
        self.content = content
        tokenizers = need("tokenizers", "hf")
        try:
            self.pieces = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises no more specific type
            raise ValueError(f"not a tokenizer.json: {error}") from error
        self.pieces.no_truncation()
        self.pieces.no_padding()
        self.bos_ids = self.pieces.encode("").ids
        self.pieces.encode_special_tokens = True  # from here on, "</s>" in a text is encoded as text
        added_tokens = self.pieces.get_added_tokens_decoder()
        self.specials = {token.content: i for i, token in sorted(added_tokens.items()) if token.special}

    def __len__(self) -> int:
        return self.pieces.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return self.pieces.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.pieces.decode(ids)

    def piece(self, i: int) -> str:
        return self.pieces.decode([i], skip_special_tokens=False)
