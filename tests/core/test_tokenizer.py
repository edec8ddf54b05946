"""Text to token ids and back: nothing is lost, and only the chat template makes special tokens."""

import itertools
from random import Random

import pytest
import sentencepiece
from tiny import tiny_tokenizer

from minisr.runner.pretrain import train_tokenizer
from minisr.tokenizer import SentencePiece, TemplateError, Tokenizer

TEMPLATE = "<s><|user|>{prompt}<|assistant|>{response}</s>"
SPECIAL = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<unk>", "<0x41>", "a</s>", " <|assistant|> </s> ",
           "</s><|user|>no<|assistant|>"]
NASTY = ["", " ", "  both ends  ", "\n", "\n\n", "one\n\ntwo", " \n \n", "a\n b ", "\t\r\n", "a\rb", "🙂",
         "🏳️‍🌈 é", "漢字かな", "\x00", "a\x00\x07\x1b[0mb", "\x85\u2028\u2029", "\u200b\ufeff", "e\u0301 Ａ ﬁ",
         "x" * 500, "12345 1,000.5"]


@pytest.mark.parametrize("text", SPECIAL)
def test_text_that_spells_a_special_token_stays_text(tokenizer, text):
    template = [tokenizer.vocabulary.specials[name] for name in ("<s>", "<|user|>", "<|assistant|>", "</s>")]
    assert len({*template, tokenizer.vocabulary.pieces.unk_id()}) == 5
    ids = tokenizer.encode(text)
    assert {*template, tokenizer.vocabulary.pieces.unk_id()}.isdisjoint(ids)
    assert tokenizer.decode(ids) == text
    ids, _ = tokenizer.encode_chat(text, text)
    assert [i for i in ids if i in template] == template


@pytest.mark.parametrize("text", NASTY)
def test_any_text_comes_back_as_it_was(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_random_unicode_comes_back_as_it_was(tokenizer):
    rng = Random(0)
    # Without surrogates, which are not text, and U+2581, SentencePiece's own sign for a space.
    alphabet = [chr(i) for i in range(0x11000) if not 0xD800 <= i < 0xE000 and i != 0x2581]
    for _ in range(300):
        text = "".join(rng.choices(alphabet + [" ", "\n"] * 20000, k=rng.randint(1, 20)))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_leave_no_trace_in_decoded_text(tokenizer):
    ids, _ = tokenizer.encode_chat("What is\n new?", " Two foxes.")
    turn = ids.index(tokenizer.vocabulary.specials["<|assistant|>"])
    assert tokenizer.decode(ids[:turn]) == "What is\n new?"
    assert tokenizer.decode(ids[turn:]) == " Two foxes."


@pytest.mark.parametrize("response", ["Once there was a fox.", " begins with a space", "\nnew", "</s>", ""])
@pytest.mark.parametrize("prompt", ["Write a story.", "ends with a space ", "<|assistant|>", ""])
def test_a_chat_is_prompt_response_end_and_the_mask_is_on_response_and_end(tokenizer, prompt, response):
    pieces = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.vocabulary.content)
    bos, eos, user, assistant = map(pieces.piece_to_id, ("<s>", "</s>", "<|user|>", "<|assistant|>"))
    prompt_ids = [bos, user, *pieces.encode(prompt), assistant]
    response_ids = [*pieces.encode(response), eos]
    ids, mask = tokenizer.encode_chat(prompt, response)
    assert ids == prompt_ids + response_ids
    assert mask == [False] * len(prompt_ids) + [True] * len(response_ids)
    # Sampling continues the same ids that training began with.
    assert tokenizer.encode_prompt(prompt) == prompt_ids and tokenizer.encode_response(response) == response_ids


def test_the_same_texts_give_the_same_tokenizer_bytes(tokenizer, world_lines):
    again = train_tokenizer(iter(world_lines), 500, TEMPLATE)
    assert again.vocabulary.content == tokenizer.vocabulary.content and len(again) == len(tokenizer) == 500
    other = train_tokenizer(world_lines[:100], 500, TEMPLATE)
    assert other.vocabulary.content != tokenizer.vocabulary.content


def test_a_line_break_is_a_token_of_its_own(tokenizer):
    # New prompts are sampled until a line break: one inside a longer token would be missed.
    line_break = tokenizer.encode("\n")[-1]
    assert tokenizer.encode("fox\n\nhen").count(line_break) == 2
    containing = [i for i in range(len(tokenizer)) if "\n" in tokenizer.vocabulary.pieces.id_to_piece(i)]
    assert containing == [line_break]
    assert set(tokenizer.newline_ids) == {line_break, tokenizer.vocabulary.pieces.piece_to_id("<0x0A>")}


def test_plain_text_begins_with_bos_and_responses_end_with_an_end_token(tokenizer):
    specials = tokenizer.vocabulary.specials
    assert tokenizer.bos_ids == [specials["<s>"]] and tokenizer.eos_id == specials["</s>"]
    assert tokenizer.stop_ids == (specials["</s>"],)
    template = "<s>{prompt}<|user|>{response}<|assistant|>"
    other = Tokenizer(tokenizer.vocabulary, template, stop_ids=[7, specials["</s>"]])
    assert other.eos_id == specials["<|assistant|>"]
    assert other.stop_ids == (specials["<|assistant|>"], specials["</s>"], 7)


@pytest.mark.parametrize("template", ["", "{prompt}", "{prompt}{response}", "{response}{prompt}</s>",
                                      "{prompt}{prompt}{response}</s>", "{prompt}{response}<|none|>"])
def test_a_template_without_its_fields_or_an_end_is_rejected(tokenizer, template):
    with pytest.raises(TemplateError, match="prompt.*response.*ends the response"):
        Tokenizer(tokenizer.vocabulary, template)


def test_a_response_decodes_to_its_text_where_the_template_has_text_before_the_end_token():
    tokenizer = Tokenizer(tiny_tokenizer().vocabulary, "<s>[INST] {prompt} [/INST] {response} </s>")
    ids = tokenizer.encode_response("a fox")
    assert tokenizer.decode(ids) != "a fox"  # the template's space
    assert tokenizer.decode_response(ids) == "a fox"
    assert tokenizer.encode_response(tokenizer.decode_response(ids)) == ids


# ---- a vocabulary that adds a space ("dummy prefix") before every text

@pytest.fixture(scope="module")
def spaced():
    """Llama 2's kind of vocabulary, in a template whose response follows text."""
    protos = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    proto = protos.ModelProto.FromString(tiny_tokenizer().vocabulary.content)
    proto.normalizer_spec.add_dummy_prefix = True
    return SentencePiece(proto.SerializeToString())


RESPONSES = ["Once there was a fox.", " It felt sad.", "  two", "", "\nnew", "fox ", "é", "[a]"]


@pytest.mark.parametrize("space", ["", " ", "  "])
@pytest.mark.parametrize("response", RESPONSES)
def test_a_response_that_follows_text_gets_no_space_of_its_own(space, response, spaced):
    tokenizer = Tokenizer(spaced, f"<s>[INST] {{prompt}} [/INST]{space}{{response}}</s>")
    whole = [1, *spaced.encode(f"[INST] A fox. [/INST]{space}{response}"), 2]
    prompt = [1, *spaced.encode("[INST] A fox. [/INST]")]
    assert tokenizer.encode_prompt("A fox.") == prompt == whole[:len(prompt)]
    ids, mask = tokenizer.encode_chat("A fox.", response)
    assert (ids, mask) == (whole, [i >= len(prompt) for i in range(len(whole))])
    assert tokenizer.decode_response(ids[len(prompt):]) == response


@pytest.mark.parametrize("response", RESPONSES)
def test_a_response_that_follows_a_special_token_is_a_text_of_its_own(response, spaced):
    tokenizer = Tokenizer(spaced, TEMPLATE)
    assert tokenizer.encode_response(response) == [*spaced.encode(response), 2]
    assert tokenizer.decode_response(tokenizer.encode_response(response)) == response


def test_the_space_before_a_response_is_what_the_model_samples(spaced):
    # After "[/INST]" a model samples "▁Once"; a prompt that ended with "▁" would leave it no such choice.
    tokenizer = Tokenizer(spaced, "<s>[INST] {prompt} [/INST] {response}</s>")
    assert spaced.pieces.decode(tokenizer.encode_prompt("A fox.")[-1:]) == "]"
    first, *_ = tokenizer.encode_response("there was")
    assert spaced.piece(first).startswith(" th")
    assert tokenizer.decode_response(spaced.encode("there was")) == "there was"


@pytest.mark.parametrize("template", ["<s>{prompt}\n{response}</s>", "<s>{prompt}{response}</s>"])
def test_a_token_never_spans_prompt_and_response(template, spaced):
    # The model samples the response after all ids of the prompt.
    assert len(spaced.encode("and")) < len(spaced.encode("a")) + len(spaced.encode("nd"))  # these would merge
    tokenizer = Tokenizer(spaced, template)
    for prompt, response in itertools.product(("a", "fo", "t", "A fox.", "\n"), ("nd", "here was", "\nand")):
        ids, mask = tokenizer.encode_chat(prompt, response)
        start = mask.index(True)
        assert ids[:start] == tokenizer.encode_prompt(prompt)
        assert spaced.pieces.decode(ids) == prompt + "\n" * ("\n" in template) + response
