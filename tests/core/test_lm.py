"""A language model as one object: candidate responses, and copies whose weights are their own."""

from dataclasses import replace

import pytest
import torch
from tiny import ENGINES, EXAMPLES, PAIRS, chain, speaker, tiny_lm, tiny_tokenizer

from minisr.dpo import encode_pairs
from minisr.lm import ResponseConfig, respond
from minisr.sft import encode_examples


def test_responses_are_grouped_by_prompt_and_finished_with_their_end_token(engine):
    lm = ENGINES[engine](speaker("A fox."), tiny_tokenizer())
    records = respond(lm, ["Write.", "News?"], ResponseConfig(candidates=3, max_new_tokens=20), seed=0)
    assert [record["prompt"] for record in records] == ["Write.", "News?"]
    for record in records:
        assert record["responses"] == ["A fox."] * 3 and record["finished"] == [True] * 3
        assert len(record["logps"]) == 3


def test_a_response_without_its_end_token_counts_as_cut_off(engine):
    lm = ENGINES[engine](speaker("A fox."), tiny_tokenizer())
    needed = len(tiny_tokenizer().encode_response("A fox."))
    [record] = respond(lm, ["Write."], ResponseConfig(candidates=1, max_new_tokens=needed), seed=0)
    assert record["finished"] == [True]
    [record] = respond(lm, ["Write."], ResponseConfig(candidates=1, max_new_tokens=needed - 1), seed=0)
    assert record["finished"] == [False] and record["logps"] == [None]


@pytest.mark.parametrize("spare, finished", [(0, True), (-1, False)])
def test_a_response_that_does_not_fit_as_training_encodes_it_counts_as_cut_off(engine, spare, finished):
    # The model writes an incomplete UTF-8 sequence. Its text is U+FFFD, which training encodes as three bytes.
    tokenizer, prompt = tiny_tokenizer(), tiny_tokenizer().encode_prompt("Hi")
    byte = tokenizer.vocabulary.pieces.piece_to_id("<0xC3>")
    model = chain({prompt[-1]: byte, byte: tokenizer.eos_id}, len(tokenizer))
    as_trained = tokenizer.encode_response(tokenizer.decode([byte]))
    assert len(as_trained) > 3
    model.config = replace(model.config, max_seq_len=len(prompt) + len(as_trained) + spare)
    lm, config = ENGINES[engine](model, tokenizer), ResponseConfig(candidates=1, max_new_tokens=20)
    [record] = respond(lm, ["Hi"], config, seed=0)
    assert record["finished"] == [finished] and record["logps"] == [None]


def test_a_copy_has_weights_of_its_own_and_computes_the_same(engine):
    lm = tiny_lm(engine)
    twin, pairs, examples = lm.copy(), encode_pairs(lm, PAIRS), encode_examples(lm, EXAMPLES)
    assert type(twin) is type(lm) and twin.max_seq_len == lm.max_seq_len == 96
    assert torch.equal(torch.stack(twin.pair_logps(pairs)), torch.stack(lm.pair_logps(pairs)))
    assert twin.target_loss(examples).item() == lm.target_loss(examples).item()
    with torch.no_grad():
        for weight in twin.model.parameters():
            weight.zero_()
    assert all(weight.any() for weight in lm.model.parameters())


def test_no_training_can_move_a_plain_frozen_copy():
    lm = tiny_lm()
    frozen = lm.frozen_copy()
    assert not any(weight.requires_grad for weight in frozen.model.parameters())
    assert all(weight.requires_grad for weight in lm.model.parameters())
    own = {weight.data_ptr() for weight in frozen.model.parameters()}
    assert own.isdisjoint(weight.data_ptr() for weight in lm.model.parameters())
    with pytest.raises(RuntimeError, match="does not require grad"):
        frozen.target_loss(encode_examples(lm, EXAMPLES)).backward()
