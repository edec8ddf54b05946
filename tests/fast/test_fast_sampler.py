"""Sampling with shared prefixes against the core's sampler: in float64 the same tokens, whatever is switched off."""

import math
from random import Random

import pytest
import torch
from generated import for_all, one_of
from hypothesis import assume
from hypothesis import strategies as st
from tiny import tiny_model

from minisr import sampler
from minisr.fast import sampler as fast_sampler
from minisr.fast.decode_step import DecodeStep
from minisr.fast.rng import seeds_to_tensor, uniform
from minisr.fast.sampler import (
    MIN_SHARED_TOKENS,
    DecodingConfig,
    Options,
    common_prefix_length,
    group_by_length,
    prefill,
    shared_prefix_length,
)
from minisr.rng import row_seeds
from minisr.sampler import Completion, SamplingConfig

STOP_IDS = (2, 7)
DEFAULT = Options()


def random_prompts(lengths, common=0, seed=0, vocab_size=60):
    """Prompts that begin with the same `common` tokens, and then have these many tokens of their own."""
    rng = Random(seed)
    header = [rng.randrange(vocab_size) for _ in range(common)]
    return [header + [rng.randrange(vocab_size) for _ in range(length)] for length in lengths]


def assert_same_samples(model, prompts, n, config, stop_ids=STOP_IDS, options=DEFAULT):
    """Returns the samples."""
    seeds = row_seeds(5, len(prompts), n)
    expected = sampler.generate(model, prompts, seeds, config, stop_ids)
    found = fast_sampler.generate(model, prompts, seeds, config, stop_ids, options)
    assert [[(c.ids, c.finished) for c in row] for row in found] == [[(c.ids, c.finished) for c in row]
                                                                     for row in expected]
    return found


@pytest.fixture(scope="module")
def model(random_decoder):
    """Few words, so that rows end at different steps; float64, so that rounding decides no draw."""
    return random_decoder(vocab_size=24, std=0.2).double()


LENGTHS = [3, 8, 1, 8, 5, 20]


# The same tokens.


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("top_p", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("common", [0, MIN_SHARED_TOKENS - 1, MIN_SHARED_TOKENS, 40])
@pytest.mark.parametrize("n", [1, 4])
def test_in_float64_the_tokens_are_those_of_the_core(model, temperature, top_p, common, n):
    prompts = random_prompts(LENGTHS, common, vocab_size=24)
    assert shared_prefix_length(prompts) == (common if common >= MIN_SHARED_TOKENS else 0)
    config = SamplingConfig(temperature, top_p, max_new_tokens=5 if top_p == 0 else 40)
    rows = assert_same_samples(model, prompts, n, config)
    if temperature == 1 and top_p > 0:
        lengths = {len(completion.ids) for row in rows for completion in row}
        assert len(lengths) > 3 and {completion.finished for row in rows for completion in row} >= {True}


TRICKS = ("prefix-sharing", "row-dropping", "decode-step", "prefill-groups", "unsorted-top-p")


@pytest.mark.parametrize("off", [(trick,) for trick in TRICKS] + [TRICKS], ids=", ".join)
@pytest.mark.parametrize("n", [1, 4])
def test_each_trick_can_be_switched_off(model, off, n):
    options = Options(record_logps=True, without=frozenset(off))
    for common in (0, 20):
        for temperature, top_p in ((0.0, 1.0), (0.7, 0.9), (1.0, 1.0)):
            prompts = random_prompts(LENGTHS, common, vocab_size=24)
            rows = assert_same_samples(model, prompts, n, SamplingConfig(temperature, top_p, 20), options=options)
            assert_logps_are_the_models(model, prompts, rows)


@pytest.mark.parametrize("name, function", [
    ("prefix-sharing", "shared_prefix_length"), ("row-dropping", "PrefixCache.select_rows"),
    ("decode-step", "DecodeStep"), ("unsorted-top-p", "sample_top_p")])
def test_a_trick_that_is_switched_off_is_not_used(model, monkeypatch, name, function):
    def fail(*_):
        raise AssertionError(f"{function} is used")

    monkeypatch.setattr(f"minisr.fast.sampler.{function}", fail)
    prompts = random_prompts(LENGTHS, 20, vocab_size=24)
    sampling = (model, prompts, row_seeds(1, len(prompts), 4), SamplingConfig(1.0, 0.9, 20), STOP_IDS)
    with pytest.raises(AssertionError, match="is used"):
        fast_sampler.generate(*sampling)
    fast_sampler.generate(*sampling, Options(without=frozenset([name])))


def test_without_groups_all_prompts_are_prefilled_together(model, monkeypatch):
    groups = []
    monkeypatch.setattr(fast_sampler, "PREFILL_TOKENS", 1)
    monkeypatch.setattr(fast_sampler, "extend", lambda model, ids, *rest, extend=fast_sampler.extend, **select:
                        groups.append(len(ids)) or extend(model, ids, *rest, **select))
    for without, expected in (((), [1, 1, 1]), (("prefill-groups",), [3])):
        fast_sampler.prefill(model, [[1], [1, 2], [1, 2, 3]], 1, 4, Options(without=frozenset(without)))
        assert groups == expected
        groups.clear()


SHAPES = [dict(n_kv_heads=1), dict(n_kv_heads=4), dict(n_layers=1), dict(tie_embeddings=True), dict(head_dim=6),
          dict(rope_theta=300.0, norm_eps=1e-2), dict(n_layers=0)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_tokens_are_the_same_for_every_shape_of_the_model(random_decoder, shape):
    model = random_decoder(vocab_size=24, std=0.2, **shape).double()
    prompts = random_prompts(LENGTHS, 20, vocab_size=24)
    rows = assert_same_samples(model, prompts, 3, SamplingConfig(1.0, 0.9, 30), options=Options(record_logps=True))
    assert_logps_are_the_models(model, prompts, rows)


def test_the_tokens_are_the_same_in_float32_where_no_draw_is_close(random_decoder):
    model = random_decoder(vocab_size=24, std=0.2)
    for common, n in ((0, 1), (20, 4)):
        assert_same_samples(model, random_prompts(LENGTHS, common, vocab_size=24), n, SamplingConfig(1.0, 0.9, 40))


@pytest.mark.parametrize("lengths, common, n", [([1], 0, 1), ([1], 0, 5), ([30], 30, 2), ([0, 1], 20, 2),
                                                ([0, 0], 20, 3), ([4] * 7, 0, 2), (range(1, 60), 20, 1)])
def test_unusual_batches(model, lengths, common, n):
    # One prompt, equal prompts, a prompt that is the beginning of another, several groups in prefill.
    prompts = random_prompts(lengths, common, vocab_size=24)
    assert_same_samples(model, prompts, n, SamplingConfig(1.0, 0.9, 12))


def test_rows_end_at_max_seq_len_each_with_its_own_room(random_decoder):
    model = random_decoder(vocab_size=24, std=0.2, max_seq_len=48).double()
    prompts, config = random_prompts([27, 1, 10], 20, vocab_size=24), SamplingConfig(1.0, 1.0, 100)
    assert_same_samples(model, prompts, 2, config)
    rows = assert_same_samples(model, prompts, 2, config, stop_ids=(-1,))
    assert [[len(completion.ids) for completion in row] for row in rows] == [[1, 1], [27, 27], [18, 18]]


@pytest.mark.parametrize("stop_ids", [(2,), (2, 7, 9), (23,), (1000,), tuple(range(24))])
def test_any_stop_ids(model, stop_ids):
    prompts = random_prompts(LENGTHS, vocab_size=24)
    rows = assert_same_samples(model, prompts, 3, SamplingConfig(1.0, 1.0, 25), stop_ids)
    assert all(completion.finished == (completion.ids[-1] in stop_ids) for row in rows for completion in row)


@for_all(slow=1_000, weights=st.integers(0, 20), lengths=st.lists(one_of(1, 2, 3, 10, 30), min_size=1, max_size=6),
         common=one_of(0, 5, MIN_SHARED_TOKENS - 1, MIN_SHARED_TOKENS, 17), n=st.integers(1, 4),
         how=st.builds(SamplingConfig, one_of(0.0, 0.7, 1.0), one_of(0.0, 0.5, 0.9, 1.0), st.integers(1, 12)),
         stop_ids=one_of((2,), (2, 7), (0, 1, 2, 3, 4, 5), (99,)))
def test_generated_batches(weights, lengths, common, n, how, stop_ids):
    model = tiny_model(vocab_size=12, context=60, seed=weights).double()
    with torch.no_grad():
        model.embed.weight.mul_(3)
    assert_same_samples(model, random_prompts(lengths, common, seed=weights, vocab_size=12), n, how, stop_ids)


# Recorded log-probabilities.


@torch.no_grad()
def assert_logps_are_the_models(model, prompts, rows, tolerance=1e-9):
    """Of finished completions, at temperature 1, whatever the temperature of sampling; the others have none."""
    for prompt, completions in zip(prompts, rows):
        for completion in completions:
            if not completion.finished:
                assert completion.logp is None
                continue
            ids = completion.ids
            logps = model(torch.tensor([prompt + ids]))[0, len(prompt) - 1:-1].log_softmax(-1)
            assert completion.logp == pytest.approx(logps[range(len(ids)), ids].sum().item(), abs=tolerance)


@pytest.mark.parametrize("double", [True, False])
def test_recorded_log_probabilities_are_the_models_whatever_the_temperature(random_decoder, double):
    model = random_decoder(vocab_size=12, std=0.2)
    model = model.double() if double else model
    prompts = random_prompts([3, 8, 1, 8, 5], vocab_size=12)
    rows = fast_sampler.generate(model, prompts, row_seeds(3, 5, 4), SamplingConfig(0.6, 0.9, 100), STOP_IDS,
                                 Options(record_logps=True))
    finished = [completion for row in rows for completion in row if completion.finished]
    assert len(finished) > 15 and all(completion.logp < -0.5 for completion in finished)
    assert len({len(completion.ids) for completion in finished}) > 6  # rows leave at different steps
    assert_logps_are_the_models(model, prompts, rows, tolerance=1e-9 if double else 1e-4)


def test_nothing_is_recorded_by_default(model):
    rows = fast_sampler.generate(model, random_prompts(LENGTHS, vocab_size=24), row_seeds(3, 6, 2),
                                 SamplingConfig(1.0, 1.0, 40), STOP_IDS)
    assert {completion.logp for row in rows for completion in row} == {None}


# Prefill.


def test_the_common_prefix_is_the_one_that_brute_force_finds():
    rng = Random(0)
    for _ in range(2000):
        prompts = [[rng.randrange(2) for _ in range(rng.randint(1, 6))] for _ in range(rng.randint(1, 4))]
        fitting = [k for k in range(min(map(len, prompts))) if len({tuple(p[:k]) for p in prompts}) == 1]
        assert common_prefix_length(prompts) == max(fitting)


def test_a_single_prompt_shares_no_prefix_and_short_prefixes_are_not_shared():
    assert shared_prefix_length(random_prompts([5], 40)) == 0
    assert shared_prefix_length([[1] * (MIN_SHARED_TOKENS + 1)] * 3) == MIN_SHARED_TOKENS
    assert shared_prefix_length([[1] * MIN_SHARED_TOKENS] * 3) == 0  # each prompt needs a token of its own


def test_groups_are_consecutive_and_large_enough():
    rng = Random(1)
    for _ in range(300):
        lengths = sorted(rng.randint(1, 50) for _ in range(rng.randint(1, 30)))
        groups = group_by_length(lengths, 60)
        assert [i for rows in groups for i in range(rows.start, rows.stop)] == list(range(len(lengths)))
        sizes = [sum(lengths[rows]) for rows in groups]
        assert all(size >= 60 for size in sizes[:-1])
        assert all(size - lengths[rows][-1] < 60 for size, rows in zip(sizes, groups))


@torch.no_grad()
def test_a_prefill_in_groups_is_the_prefill_of_each_prompt_alone(decoder):
    # Enough tokens for several groups, with and without a prefix of all prompts.
    for common in (0, 20):
        prompts = random_prompts(range(10, 70, 2), common, seed=6, vocab_size=400)
        groups = group_by_length([len(prompt) - common for prompt in prompts], fast_sampler.PREFILL_TOKENS)
        assert len(groups) > 1
        for n in (1, 2):
            logits, cache = prefill(decoder, prompts, n, 4)
            step = DecodeStep(decoder, max(map(len, prompts)) + 1)
            assert cache.seq_lens.tolist() == [len(prompt) for prompt in prompts for _ in range(n)]
            next_logits = step(torch.full((30 * n,), 7), cache).view(30, n, -1)
            for prompt, row, after in zip(prompts, logits, next_logits):
                expected = decoder(torch.tensor([[*prompt, 7]]))[0]
                torch.testing.assert_close(row, expected[-2], atol=3e-5, rtol=1e-5)
                torch.testing.assert_close(after, expected[-1].expand(n, -1), atol=3e-5, rtol=1e-5)


# Top-p without sorting.

SEEDS = row_seeds(5, 64, 1)[:, 0]
LOGITS = st.lists(one_of(-math.inf, 0.0, 0.0, *(i / 4 for i in range(-32, 33))), min_size=1, max_size=12)


def draw_without_sorting(logits, temperature, top_p, seeds, step):
    seeds = seeds_to_tensor(seeds, "cpu")
    how = DecodingConfig(SamplingConfig(temperature, top_p), STOP_IDS, Options())
    return fast_sampler.sample_top_p(logits, how, seeds, step, uniform(seeds, 64 * step))


def distance_to_the_edge(logits, temperature, top_p):
    """The smallest difference between top_p and the mass of all more probable tokens, over the tokens."""
    p = (logits / max(temperature, 1e-30)).softmax(-1)
    mass_before = (p * (p > p[:, None])).sum(-1)
    return (mass_before - top_p).abs().min().item()


@for_all(logits=LOGITS, temperature=one_of(0.0, 1e-50, 1e-6, 0.3, 0.7, 1.0, 2.0, 100.0), step=st.integers(0, 300),
         top_p=one_of(0.0, 1e-9, 1e-6, 0.01, 0.1, 0.5, 0.9, 0.999, 1.0) | st.floats(0, 1))
def test_rejection_and_sorting_give_the_same_tokens_from_the_same_numbers(logits, temperature, top_p, step):
    assume(max(logits) > -math.inf)
    logits = torch.tensor(logits, dtype=torch.float64)
    # Where top_p is the exact mass of some tokens, the order of a sum decides.
    assume(temperature == 0 or top_p in (0, 1) or distance_to_the_edge(logits, temperature, top_p) > 1e-9)
    rows = logits.expand(64, -1)
    expected = sampler.sample_top_p(rows, temperature, top_p, SEEDS, step)
    assert torch.equal(draw_without_sorting(rows, temperature, top_p, SEEDS, step), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("top_p", [0.0, 1e-6, 0.05, 0.5, 0.9, 0.99, 1.0])
def test_rejection_and_sorting_agree_on_different_rows_with_ties(top_p, dtype):
    logits = 3 * torch.randn(400, 50, generator=torch.Generator().manual_seed(0))
    logits[:200] = logits[:200].round()  # many equally probable tokens
    logits, seeds = logits.to(dtype), row_seeds(1, 400, 1)[:, 0]
    for temperature in (0.0, 0.7, 1.0):
        for step in range(4):
            expected = sampler.sample_top_p(logits, temperature, top_p, seeds, step)
            assert torch.equal(draw_without_sorting(logits, temperature, top_p, seeds, step), expected)


def test_a_nucleus_that_all_attempts_miss_gives_the_most_probable_token():
    logits = torch.zeros(300, 4000)
    logits[:, 1234] = 0.1  # the whole nucleus of a tiny top_p: 64 attempts hit it once in 60 rows
    seeds = row_seeds(2, 300, 1)[:, 0]
    for draw in (sampler.sample_top_p, draw_without_sorting):
        assert set(draw(logits, 1.0, 1e-9, seeds, 3).tolist()) == {1234}


@for_all(slow=1_000, table=st.lists(LOGITS, min_size=1, max_size=5), step=st.integers(0, 7),
         temperature=one_of(0.0, 0.3, 1.0), top_p=one_of(0.0, 0.5, 0.9, 1.0))
def test_a_row_draws_alone_what_it_draws_among_others(table, temperature, top_p, step):
    logits = torch.full((len(table), 12), -torch.inf)
    for row, values in zip(logits, table):
        row[:len(values)] = torch.tensor(values)
        row[0] = 0.0
    seeds = SEEDS[:len(table)]
    drawn = draw_without_sorting(logits, temperature, top_p, seeds, step)
    alone = [draw_without_sorting(row[None], temperature, top_p, seeds[i:i + 1], step) for i, row in enumerate(logits)]
    assert torch.equal(drawn, torch.cat(alone))


def test_a_completion_ends_with_its_first_stop_token(successor_decoder):
    rows = fast_sampler.generate(successor_decoder(), [[3], [8]], row_seeds(0, 2, 2), SamplingConfig(0.0, 1.0, 30),
                                 (12, 10))
    assert rows == [[Completion([4, 5, 6, 7, 8, 9, 10], True)] * 2, [Completion([9, 10], True)] * 2]
