"""A SentencePiece BPE model as a tokenizer.json that gives the same ids for every text (extra "hf")."""

from minisr import InputError
from minisr.runner.files import import_extra
from minisr.tokenizer import SentencePiece

BPE = 2  # TrainerSpec.ModelType


def to_tokenizer_json(vocabulary: SentencePiece, prepend_scheme: str | None = None) -> bytes:
    """The content of a tokenizer.json, for libraries that do not read tokenizer.model.

    A dummy prefix is added as SentencePiece does, or with a prepend_scheme as LlamaTokenizer of transformers does:
    "always" is its legacy=True, "first" its legacy=False. Both leave out the space if a text begins with one."""
    proto = import_extra("sentencepiece.sentencepiece_model_pb2", "hf").ModelProto.FromString(vocabulary.content)
    check_exportable(proto)
    tokenizers = import_extra("tokenizers", "hf")
    result = tokenizers.Tokenizer(bpe_model(tokenizers, vocabulary, proto))
    result.normalizer = normalizer(tokenizers.normalizers, proto.normalizer_spec, prepend_scheme)
    if proto.normalizer_spec.add_dummy_prefix and prepend_scheme:
        result.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace("▁", prepend_scheme=prepend_scheme, split=False)
    result.decoder = decoder(tokenizers.decoders, proto.normalizer_spec)
    result.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False)
                               for name in vocabulary.specials])
    if vocabulary.bos_ids:
        bos_id = vocabulary.bos_ids[0]
        bos = vocabulary.pieces.id_to_piece(bos_id)
        result.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, bos_id)])
    return result.to_str(pretty=True).encode()


def has_dummy_prefix(vocabulary: SentencePiece) -> bool:
    """Whether the model adds a space before a text."""
    proto = import_extra("sentencepiece.sentencepiece_model_pb2", "hf").ModelProto.FromString(vocabulary.content)
    return proto.normalizer_spec.add_dummy_prefix


def without_bos(vocabulary: SentencePiece) -> SentencePiece:
    """The same model without a BOS token: SentencePiece has none if its piece is not a control symbol."""
    proto = import_extra("sentencepiece.sentencepiece_model_pb2", "hf").ModelProto.FromString(vocabulary.content)
    proto.trainer_spec.bos_piece = proto.trainer_spec.unk_piece
    return SentencePiece(proto.SerializeToString())


def check_exportable(proto) -> None:
    """Raise InputError for features that the conversion does not reproduce."""
    user_defined = [p for p in proto.pieces if p.type == p.USER_DEFINED and len(p.piece) > 1]
    if proto.trainer_spec.model_type != BPE or proto.normalizer_spec.remove_extra_whitespaces or user_defined:
        raise InputError("this SentencePiece model cannot be exported: it must be of type BPE, preserve all "
                         "spaces, and have no user-defined pieces longer than one character")


def bpe_model(tokenizers, vocabulary: SentencePiece, proto):
    """The pieces with their ids, and the merges that produce them."""
    pieces = vocabulary.pieces
    ids = {pieces.id_to_piece(i): i for i in range(len(vocabulary))}
    # Only normal pieces result from merges. Control symbols, bytes and user-defined pieces never do.
    merged = [p.piece for p in proto.pieces if p.type == p.NORMAL]
    return tokenizers.models.BPE(
        vocab=ids, merges=merges(merged, pieces, ids), unk_token=pieces.id_to_piece(pieces.unk_id()),
        fuse_unk=True, byte_fallback=proto.trainer_spec.byte_fallback)


def merges(texts: list[str], pieces, ids: dict[str, int]) -> list[tuple[str, str]]:
    """All ways to join two pieces into a third, in order of priority.

    Results with a higher score come first; of equal scores, the lower id. Ways to the same result are ordered
    by the ids of their parts."""
    found = []
    for text in texts:
        rank = (-pieces.get_score(ids[text]), ids[text])
        for k in range(1, len(text)):
            left, right = text[:k], text[k:]
            if left in ids and right in ids:
                found.append((rank, ids[left], ids[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def normalizer(normalizers, spec, prepend_scheme: str | None):
    """SentencePiece writes a space as "▁", and may add one before the text."""
    steps = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.add_dummy_prefix and not prepend_scheme:
        steps.append(normalizers.Prepend("▁"))
    steps.append(normalizers.Replace(" ", "▁"))
    return normalizers.Sequence(steps)


def decoder(decoders, spec):
    """The inverse of the normalizer."""
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)
