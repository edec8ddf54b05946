"""A SentencePiece BPE model as a tokenizer.json, with the same ids for every text (extra "hf")."""

from minisr import InputError
from minisr.runner.files import need
from minisr.tokenizer import SentencePiece


def tokenizer_json(vocabulary: SentencePiece) -> bytes:
    """For those who read no tokenizer.model. Between special tokens each text is encoded by itself."""
    proto = need("sentencepiece.sentencepiece_model_pb2", "hf").ModelProto.FromString(vocabulary.content)
    normal = proto.normalizer_spec
    given = [p.piece for p in proto.pieces if p.type == p.USER_DEFINED and len(p.piece) > 1]
    if proto.trainer_spec.model_type != 2 or normal.remove_extra_whitespaces or given:
        raise InputError("only a SentencePiece model of type BPE that keeps all spaces and has no pieces "
                         "given by its user can be exported")
    tokenizers = need("tokenizers", "hf")
    pieces = vocabulary.pieces
    texts = [pieces.id_to_piece(i) for i in range(len(vocabulary))]
    ids = {text: i for i, text in enumerate(texts)}
    # Control symbols and pieces given by the user are whole from the start, never merged.
    whole = {i for i, piece in enumerate(proto.pieces) if piece.type != piece.NORMAL}
    model = tokenizers.models.BPE(
        vocab=ids, merges=merges([t for i, t in enumerate(texts) if i not in whole], pieces, ids),
        unk_token=texts[pieces.unk_id()], fuse_unk=True, byte_fallback=proto.trainer_spec.byte_fallback)
    made = tokenizers.Tokenizer(model)
    steps = [tokenizers.normalizers.Replace(" ", "▁")]
    if normal.add_dummy_prefix:
        steps.insert(0, tokenizers.normalizers.Prepend("▁"))
    if normal.precompiled_charsmap:
        steps.insert(0, tokenizers.normalizers.Precompiled(normal.precompiled_charsmap))
    made.normalizer = tokenizers.normalizers.Sequence(steps)
    parts = tokenizers.decoders
    undo = [parts.Replace("▁", " "), parts.ByteFallback(), parts.Fuse()]
    if normal.add_dummy_prefix:
        undo.append(parts.Strip(" ", 1, 0))
    made.decoder = parts.Sequence(undo)
    made.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False)
                             for name in vocabulary.specials])
    if vocabulary.bos_ids:
        bos = texts[vocabulary.bos_ids[0]]
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, vocabulary.bos_ids[0])])
    return made.to_str(pretty=True).encode()


def merges(texts: list[str], pieces, ids: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third: the best-scored result first, of equal ones the lower id."""
    found = []
    for text in texts:
        rank = (-pieces.get_score(ids[text]), ids[text])
        found += [(*rank, ids[text[:k]], ids[text[k:]], text[:k], text[k:]) for k in range(1, len(text))
                  if text[:k] in ids and text[k:] in ids]
    return [(left, right) for *_, left, right in sorted(found)]
