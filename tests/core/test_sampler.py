"""Sampling on each engine: against sequences known by hand, and against one row at a time without a cache."""

import itertools
from random import Random

import numpy as np
import pytest
import torch
from tiny import ENGINES, assert_drawn_from

from minisr import InputError
from minisr.rng import row_seeds
from minisr.sampler import Completion, SamplingConfig, sample_top_p

LOGITS = [2.0, -1.0, 0.5, 1.7, 0.1, -3.0, 1.0, 0.4]
DRAWS = 20_000


@pytest.fixture
def sample(engine):
    """Sample from a decoder with one of the engines."""
    def run(model, prompts, n, config, seed=0, stop_ids=(2,)):
        return ENGINES[engine](model, tokenizer=None).sample(prompts, n, config, seed, stop_ids)
    return run


def greedy(max_new_tokens, **other):
    return SamplingConfig(temperature=0.0, max_new_tokens=max_new_tokens, **other)


def random_prompts(lengths, seed=0, vocab_size=400):
    rng = Random(seed)
    return [[rng.randrange(5, 400) % vocab_size for _ in range(length)] for length in lengths]


@torch.no_grad()
def without_cache(model, prompt, max_new_tokens, stop_ids, seeds=None):
    """One row, computed anew for every token; greedy without seeds, else at temperature 1 and top-p 0.9."""
    ids = list(prompt)
    for step in range(max_new_tokens):
        logits = model(torch.tensor([ids]))[:, -1]
        ids.append(int(logits.argmax() if seeds is None else sample_top_p(logits, 1.0, 0.9, seeds, step)))
        if ids[-1] in stop_ids:
            break
    return ids[len(prompt):]


def nucleus(logits, temperature, top_p):
    """Brute force in float64: tokens by probability, as long as those before hold less than top_p."""
    p = np.exp(np.array(logits, dtype=np.float64) / temperature)
    order = np.argsort(-p)
    before = (p[order].cumsum() - p[order]) / p.sum()
    p[order[before >= top_p]] = 0
    return p / p.sum()


# Whole sequences.


def test_greedy_successors_are_the_numbers_that_follow(sample, successor_decoder):
    # A completion contains no token of its prompt, and ends with a stop token; one in the prompt stops nothing.
    expected = {(3, 4): (5, 20), (7,): (8, 20), (9, 1, 2, 3, 12): (13, 20), (20, 5): (6, 20), (21,): (22, 25)}
    completions = sample(successor_decoder(), list(map(list, expected)), 1, greedy(30), stop_ids=(25, 20))
    assert completions == [[Completion(list(range(first, last + 1)), finished=True)]
                           for first, last in expected.values()]


@pytest.mark.parametrize("max_new_tokens, finished", [(4, False), (5, True), (6, True)])
def test_finished_means_that_a_stop_token_was_drawn(sample, successor_decoder, max_new_tokens, finished):
    [[completion]] = sample(successor_decoder(), [[5]], 1, greedy(max_new_tokens), stop_ids=(10,))
    assert completion == Completion([6, 7, 8, 9, 10][:max_new_tokens], finished)


def test_a_completion_is_cut_off_where_it_and_its_own_prompt_fill_max_seq_len(sample, successor_decoder):
    prompts = [[0] * 14 + [3], [3], [0] * 9 + [3]]  # beside a long prompt, a short one has its full room
    rows = sample(successor_decoder(max_seq_len=16), prompts, 1, greedy(12), stop_ids=(31,))
    assert rows == [[Completion(list(range(4, 4 + n)), finished=False)] for n in (1, 12, 6)]


@pytest.mark.parametrize("shared", [0, 11, 16, 30])
def test_greedy_with_cache_equals_greedy_without_for_every_prompt_length(sample, decoder, shared):
    [header] = random_prompts([shared], seed=5)
    prompts = [header + rest for rest in random_prompts(range(1, 21))]
    expected = [without_cache(decoder, p, 16, stop_ids=(2,)) for p in prompts]
    assert len({token for ids in expected for token in ids}) > 50  # outputs that vary
    alone = [sample(decoder, [p], 1, greedy(16))[0][0].ids for p in prompts]
    together = [row[0].ids for row in sample(decoder, prompts, 1, greedy(16))]
    assert alone == together == expected


def test_samples_equal_one_row_at_a_time_without_cache(sample, random_decoder):
    # Few words, so that rows end at many different steps.
    model, n = random_decoder(vocab_size=12, std=0.2), 6
    prompts = random_prompts([3, 8, 1, 8, 5], vocab_size=12)
    rows, seeds = sample(model, prompts, n, SamplingConfig(1.0, 0.9, 20), 77, (2, 7)), row_seeds(77, 5, n)
    for i, j in itertools.product(range(len(prompts)), range(n)):
        expected = without_cache(model, prompts[i], 20, (2, 7), seeds[i, j:j + 1])
        assert rows[i][j] == Completion(expected, finished=expected[-1] in (2, 7))
    assert len({len(completion.ids) for row in rows for completion in row}) > 8


def test_batch_size_and_other_prompts_do_not_change_what_is_drawn(sample, decoder):
    def drawn(prompts, rows=512):
        completions = sample(decoder, prompts, 3, SamplingConfig(1.0, 0.95, 12, rows), seed=1)
        return [[completion.ids for completion in row] for row in completions]

    prompts, others = (random_prompts(lengths) for lengths in ([4, 9, 2, 9, 6, 1], [30, 2, 2, 17, 1, 5]))
    expected = drawn(prompts)
    for rows in (1, 3, 4, 7, 9):
        assert drawn(prompts, rows=rows) == expected
    for i, prompt in enumerate(prompts):
        assert drawn([*others[:i], prompt, *others[i + 1:]])[i] == expected[i]


def test_samples_differ_among_themselves_and_with_the_seed(sample, decoder):
    def drawn(seed):
        rows = sample(decoder, [[7, 8, 9]] * 2, 3, SamplingConfig(1.0, 0.95, 12), seed)
        return [[completion.ids for completion in row] for row in rows]

    a, b = drawn(seed=1)
    assert len(set(map(tuple, a + b))) == 6  # seeds depend on the prompt's number and on n
    assert drawn(seed=1) == [a, b]
    assert all(one != other for one, other in zip([a, b], drawn(seed=2)))


def test_nothing_to_sample_gives_no_result(sample, decoder):
    assert sample(decoder, [], 3, greedy(4)) == []


@pytest.mark.parametrize("wrong", [[], [1] * 16, [1] * 40])
def test_a_prompt_that_is_empty_or_fills_max_seq_len_is_rejected_by_its_number(sample, successor_decoder, wrong):
    model = successor_decoder(max_seq_len=16)
    with pytest.raises(InputError, match=rf"prompt 3 has {len(wrong)} tokens.* 1 to 15"):
        sample(model, [[1], [2], wrong, [3]], 1, greedy(4), stop_ids=(9,))
    [[completion]] = sample(model, [[1] * 15], 1, greedy(4), stop_ids=(9,))
    assert completion.ids == [2]


# One draw.


@pytest.mark.parametrize("temperature, top_p", [
    (1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (0.7, 0.9), (0.5, 0.9), (2.0, 0.6), (1.0, 0.5), (1.0, 0.99)])
def test_draws_follow_temperature_and_then_top_p(temperature, top_p):
    expected, seeds = nucleus(LOGITS, temperature, top_p), row_seeds(3, DRAWS, 1).flatten()
    drawn = sample_top_p(torch.tensor([LOGITS]).expand(DRAWS, -1), temperature, top_p, seeds, step=5)
    assert_drawn_from(expected, np.bincount(drawn, minlength=len(LOGITS)))


def test_a_nucleus_is_full_when_its_mass_is_exactly_p():
    probability = torch.tensor(LOGITS).softmax(-1).sort(descending=True)[0]
    first, two = probability[0], probability[:2].sum()
    for mass, tokens in ((first, 1), (first.nextafter(two), 2)):
        drawn = sample_top_p(torch.tensor([LOGITS]).expand(500, -1), 1.0, mass.item(), row_seeds(0, 500, 1)[:, 0], 0)
        assert len(drawn.unique()) == tokens


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_the_draws_of_two_steps_are_independent(top_p):
    # At 0.6 many a first attempt misses the nucleus: the second must not use the next step's number.
    logits, seeds = [1.0, 0.6, 0.3, 0.0], row_seeds(4, 1, DRAWS)[0]
    first, second = (sample_top_p(torch.tensor([logits]).expand(DRAWS, -1), 1.0, top_p, seeds, step)
                     for step in (0, 1))
    single = nucleus(logits, 1.0, top_p)
    assert_drawn_from(np.outer(single, single).flatten(), np.bincount(first * 4 + second, minlength=16))


@pytest.mark.parametrize("temperature, top_p", [
    (0.0, 0.9), (1e-6, 1.0), (1e-6, 0.9), (1e-30, 1.0), (1e-50, 1.0), (1.0, 1e-6), (1.0, 0.0)])
def test_no_temperature_or_no_nucleus_is_argmax(temperature, top_p):
    logits = 50 * torch.randn(500, 40, generator=torch.Generator().manual_seed(0))
    drawn = sample_top_p(logits, temperature, top_p, row_seeds(0, 500, 1)[:, 0], 0)
    assert torch.equal(drawn, logits.argmax(-1))
