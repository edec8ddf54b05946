"""Text <-> token ids: SentencePiece, and the chat template that marks who speaks.

Special tokens are control symbols, which SentencePiece never makes from text: a text that spells
"<|assistant|>" or "</s>" stays text, so that no prompt or response can open a turn of its own.
"""

import io

import sentencepiece

USER, ASSISTANT = "<|user|>", "<|assistant|>"


class Tokenizer:
    """A SentencePiece model with the two turn markers."""

    def __init__(self, model: bytes):
        self.model = model
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.bos, self.eos = self.pieces.bos_id(), self.pieces.eos_id()
        self.user, self.assistant = map(self.pieces.piece_to_id, (USER, ASSISTANT))

    def __len__(self) -> int:
        return self.pieces.vocab_size()

    def encode(self, text: str) -> list[int]:
        """Ids of a plain text: no special token, whatever the text spells."""
        return self.pieces.encode(text)

    def decode(self, ids: list[int]) -> str:
        """The text of these ids; special tokens leave no trace."""
        return self.pieces.decode(ids)

    def chat_prompt(self, prompt: str) -> list[int]:
        """<s> <|user|> prompt <|assistant|>: what the model answers to."""
        return [self.bos, self.user, *self.encode(prompt), self.assistant]

    def chat(self, prompt: str, response: str) -> tuple[list[int], list[bool]]:
        """A whole exchange and its loss mask: True on the response and its end, the targets."""
        asked = self.chat_prompt(prompt)
        answered = [*self.encode(response), self.eos]
        return asked + answered, [False] * len(asked) + [True] * len(answered)

    def paint(self, ids: list[int], mask: list[bool]) -> str:
        """The tokens in the terminal's colours: green bears loss, grey does not."""
        def show(i, target):
            piece = self.pieces.id_to_piece(i).replace("▁", " ")
            return f"\033[{32 if target else 90}m{piece}\033[0m"
        return "".join(map(show, ids, mask))


def train_tokenizer(texts, vocab_size: int) -> Tokenizer:
    """Train a SentencePiece BPE model on texts; the same texts give the same bytes."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=vocab_size,
        model_type="bpe", character_coverage=1.0, byte_fallback=True, split_digits=False,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        user_defined_symbols=["\n"], control_symbols=[USER, ASSISTANT], num_threads=1,
        minloglevel=2)
    return Tokenizer(model.getvalue())
