"""The fast engine: which replacement is used when, and which log-probabilities the frozen reference reads."""


import pytest
import torch
from tiny import EXAMPLES, PAIRS, tiny_lm

from minisr.dpo import DPOConfig, EncodedPair, encode_pairs, train_dpo
from minisr.fast import losses
from minisr.fast import sampler as fast_sampler
from minisr.fast.lm import REPLACEMENTS, FastLM
from minisr.lm import LM, ResponseConfig, respond
from minisr.runner.config import DPOConfig as RunDPOConfig
from minisr.runner.config import TrainConfig
from minisr.sampler import SamplingConfig
from minisr.sft import encode_examples, train_sft


@pytest.fixture
def lm():
    return tiny_lm("fast")


@pytest.fixture
def pairs(lm):
    return encode_pairs(lm, PAIRS)


@pytest.fixture
def computed(monkeypatch):
    """The pairs whose log-probabilities the model computes, in order."""
    pairs_computed = []

    def spy(model, pairs, *others):
        pairs_computed.extend(pairs)
        return pair_logps(model, pairs, *others)

    pair_logps = losses.pair_logps
    monkeypatch.setattr(losses, "pair_logps", spy)
    return pairs_computed


@torch.no_grad()
def plain_logps(lm, pairs):
    return torch.stack(LM(lm.model, lm.tokenizer).pair_logps(pairs), 1)  # (B, 2)


@torch.no_grad()
def read_logps(reference, pairs):
    return torch.stack(reference.pair_logps(pairs), 1)


# Recorded log-probabilities.


def test_the_log_probability_of_every_finished_response_is_recorded(lm):
    lm.model.double()
    config = ResponseConfig(candidates=6, temperature=1.0, top_p=1.0, max_new_tokens=60)
    records = respond(lm, ["Write a story.", "News?"], config, seed=0)
    finished = 0
    for record in records:
        prompt = lm.tokenizer.encode_prompt(record["prompt"])
        for text, logp, done in zip(record["responses"], record["logps"], record["finished"]):
            assert (logp is None) or done
            if logp is not None:
                finished += 1
                response = lm.tokenizer.encode_response(text)
                [[expected, _]] = plain_logps(lm, [EncodedPair(prompt, response, response)])
                assert logp == lm.recorded[tuple(prompt), tuple(response)] == pytest.approx(expected.item(), abs=1e-9)
    assert len(lm.recorded) >= finished


@pytest.fixture
def sampled(lm):
    """Prompts, and two different finished responses to each, sampled by lm."""
    prompts = [[5, 6, 7], [8, 9]]
    stop_ids = tuple(range(0, 500, 3))  # so that responses are short
    config = ResponseConfig(temperature=1.0, top_p=1.0, max_new_tokens=30)
    rows = lm.sample(prompts, 6, config, 0, stop_ids)
    pairs = []
    for prompt, completions in zip(prompts, rows):
        different = {tuple(completion.ids): completion for completion in completions if completion.finished}
        chosen, rejected, *_ = different.values()
        pairs.append(EncodedPair(prompt, chosen.ids, rejected.ids))
    return pairs


def test_the_reference_reads_what_was_recorded_while_sampling(lm, sampled, computed):
    logps = read_logps(lm.frozen_copy(), sampled)
    assert computed == []
    torch.testing.assert_close(logps, plain_logps(lm, sampled), atol=1e-4, rtol=1e-5)


def test_only_responses_are_recorded_not_judgements_prompts_or_answers(lm):
    stop_ids = tuple(range(0, 500, 3))
    lm.sample([[5, 6, 7]], 6, SamplingConfig(temperature=1.0, max_new_tokens=30), 0, stop_ids)
    assert lm.recorded == {}


def test_nothing_is_recorded_in_bfloat16(lm):
    lm.model.bfloat16()
    rows = lm.sample([[5, 6, 7]], 6, ResponseConfig(max_new_tokens=30), 0, tuple(range(0, 500, 3)))
    assert lm.recorded == {} and {completion.logp for completion in rows[0]} == {None}


def test_what_was_not_recorded_is_computed_once(lm, pairs, computed):
    reference = lm.frozen_copy()
    expected = plain_logps(lm, pairs)
    for _ in range(3):
        torch.testing.assert_close(read_logps(reference, pairs), expected, atol=1e-4, rtol=1e-5)
    assert computed == pairs


def test_recorded_values_are_used_as_they_are_and_only_the_rest_is_computed(lm, pairs, computed):
    expected = plain_logps(lm, pairs)
    for pair, logps in zip(pairs[:2], expected):  # recorded values with an offset, to recognize them
        lm.record(pair.prompt, pair.chosen, logps[0].item() + 0.5)
        lm.record(pair.prompt, pair.rejected, logps[1].item() + 0.5)
    lm.recorded.pop((tuple(pairs[1].prompt), tuple(pairs[1].rejected)))
    reference = lm.frozen_copy()
    torch.testing.assert_close(read_logps(reference, pairs), expected + torch.tensor([[0.5], [0.0], [0.0]]),
                               atol=1e-4, rtol=1e-5)
    assert computed == pairs[1:]  # of the second, only one side was known


def test_the_values_have_the_dtype_of_the_model(lm, pairs):
    for dtype, expected in ((torch.float64, torch.float64), (torch.float32, torch.float32),
                            (torch.bfloat16, torch.float32)):
        twin = lm.copy()
        twin.model.to(dtype)
        assert {x.dtype for x in twin.frozen_copy().pair_logps(pairs)} == {expected}


# A policy never reads records: not those of M_t, and not its own.


def record_wrong_logps(lm, pairs):
    for pair in pairs:
        for response in (pair.chosen, pair.rejected):
            lm.record(pair.prompt, response, 123.0)


def test_a_policy_computes_its_log_probabilities_whatever_is_recorded(lm, pairs, computed):
    record_wrong_logps(lm, pairs)
    torch.testing.assert_close(read_logps(lm, pairs), plain_logps(lm, pairs), atol=1e-4, rtol=1e-5)
    assert computed == pairs


def test_a_copy_has_records_of_its_own(lm, pairs):
    record_wrong_logps(lm, pairs[:1])
    twin = lm.copy()
    assert twin.recorded == lm.recorded
    twin.record([1], [2], -1.0)
    assert ((1,), (2,)) not in lm.recorded


def test_records_are_cleared_when_training_begins(lm, pairs):
    record_wrong_logps(lm, pairs)
    lm.prepare_training(TrainConfig())
    assert lm.recorded == {}


@pytest.mark.parametrize("train", [
    lambda lm: train_sft(lm, EXAMPLES, TrainConfig(learning_rate=1e-2), seed=0),
    lambda lm: train_dpo(lm, PAIRS, [], DPOConfig(learning_rate=1e-2), seed=0)], ids=["SFT", "DPO"])
def test_a_trained_model_reuses_no_record_of_the_model_it_was_trained_from(lm, pairs, train):
    for pair in pairs:  # as if all had been sampled
        [logps] = plain_logps(lm, [pair])
        lm.record(pair.prompt, pair.chosen, logps[0].item())
        lm.record(pair.prompt, pair.rejected, logps[1].item())
    before, trained = dict(lm.recorded), train(lm)
    assert trained.recorded == {} and lm.recorded == before
    after = read_logps(trained.frozen_copy(), pairs)
    torch.testing.assert_close(after, plain_logps(trained, pairs), atol=1e-4, rtol=1e-5)
    assert (after - plain_logps(lm, pairs)).abs().max() > 0.5


def test_the_next_iteration_has_a_reference_of_its_own(lm, pairs):
    M2 = train_dpo(lm, PAIRS, [], DPOConfig(learning_rate=1e-2, epochs=3), seed=0)
    for model in (lm, M2):
        torch.testing.assert_close(read_logps(model.frozen_copy(), pairs), plain_logps(model, pairs),
                                   atol=1e-4, rtol=1e-5)
    assert (plain_logps(M2, pairs) - plain_logps(lm, pairs)).abs().max() > 0.5


def test_a_frozen_copy_shares_the_weights(lm):
    frozen = lm.frozen_copy()
    assert frozen.model is lm.model and frozen.frozen and not lm.frozen


# Replacements can be left out.


@pytest.mark.parametrize("without", [(), *((name,) for name in REPLACEMENTS), REPLACEMENTS], ids=", ".join)
def test_with_some_replacements_left_out_the_results_are_those_of_the_plain_engine(without):
    plain, fast = tiny_lm(), tiny_lm("fast")
    plain.model.double(), fast.model.double()
    fast.without = frozenset(without)
    prompts, config = [[1, 2, 3] * 6 + [i] for i in range(5)], SamplingConfig(1.0, 0.9, 20)
    assert fast.sample(prompts, 3, config, 4, (2,)) == plain.sample(prompts, 3, config, 4, (2,))
    pairs, examples = encode_pairs(plain, PAIRS), encode_examples(plain, EXAMPLES)
    torch.testing.assert_close(fast.pair_logps(pairs), plain.pair_logps(pairs), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(fast.target_loss(examples), plain.target_loss(examples), atol=1e-10, rtol=1e-10)


def test_each_name_leaves_out_its_own_replacement(lm, monkeypatch):
    used = []
    monkeypatch.setattr(fast_sampler, "generate", lambda *args: used.append(args[-1]) or [[] for _ in args[1]])
    monkeypatch.setattr(losses, "pair_logps", lambda *args: used.append("packed"))
    monkeypatch.setattr(losses, "target_loss", lambda *args: used.append("selected"))
    lm.without = frozenset(["row-dropping"])
    lm.sample([[1, 2]], 1, SamplingConfig(), 0, (2,))
    assert used.pop() == fast_sampler.Options(without=lm.without)
    pairs, examples = encode_pairs(lm, PAIRS), encode_examples(lm, EXAMPLES)
    lm.without = frozenset(["packed-pairs"])
    assert len(lm.pair_logps(pairs)) == 2 and lm.target_loss(examples) is None and used == ["selected"]
    lm.without = frozenset(["target-selection"])
    assert lm.target_loss(examples) > 0 and lm.pair_logps(pairs) is None and used == ["selected", "packed"]


# Gradient checkpointing, from the config.


def test_gradient_checkpointing_is_a_setting_of_the_training(lm, monkeypatch):
    checkpointing = []

    def spy(model, pairs, gradient_checkpointing=False):
        checkpointing.append(gradient_checkpointing)
        return pair_logps(model, pairs, gradient_checkpointing)

    pair_logps = losses.pair_logps
    monkeypatch.setattr(losses, "pair_logps", spy)
    trained = []
    for value in (False, True):
        config = RunDPOConfig(gradient_checkpointing=value, learning_rate=1e-2, epochs=2)
        trained.append(train_dpo(lm, PAIRS, [], config, seed=0))
        assert checkpointing == [value, False, value]  # the second one is the reference, once
        checkpointing.clear()
        lm = tiny_lm("fast")
    for a, b in zip(*(model.model.parameters() for model in trained)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_it_is_an_lm_with_the_same_interface(lm):
    assert isinstance(lm, LM) and type(lm.copy()) is type(lm.frozen_copy()) is FastLM
