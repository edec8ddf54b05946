import itertools
from random import Random

import numpy as np
import pytest
import torch
from minisr.fast.step import Step

from minisr import InputError, sampler
from minisr.rng import key, row_key, uniform
from minisr.sampler import Sample, SampleConfig, alike, common_prefix, draw, prefill, sample

LOGITS = [2.0, -1.0, 0.5, 1.7, 0.1, -3.0, 1.0, 0.4]
DRAWS = 20_000


def greedy(length, **other):
    return SampleConfig(temperature=0.0, max_new_tokens=length, **other)


def random_prompts(lengths, seed=0):
    rng = Random(seed)
    return [[rng.randrange(5, 400) for _ in range(length)] for length in lengths]


@torch.no_grad()
def without_cache(model, prompt, length, stop, keys=None):
    ids = list(prompt)
    for step in range(length):
        logits = model(torch.tensor([ids]))[:, -1]
        ids.append(int(logits.argmax() if keys is None else draw(logits, 1.0, 0.9, keys, step)))
        if ids[-1] in stop:
            break
    return ids[len(prompt):]


def nucleus(logits, temperature, top_p):
    # Brute force in float64: tokens by probability, as long as those before hold less than top_p.
    p = np.exp(np.array(logits, dtype=np.float64) / temperature)
    order = np.argsort(-p)
    before = (p[order].cumsum() - p[order]) / p.sum()
    p[order[before >= top_p]] = 0
    return p / p.sum()


def assert_drawn_from(expected, counts):
    expected, counts = np.asarray(expected), np.asarray(counts)
    assert counts[expected == 0].sum() == 0
    wanted = expected[expected > 0] * counts.sum()
    chi_square, freedom = ((counts[expected > 0] - wanted) ** 2 / wanted).sum(), len(wanted) - 1
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5  # mean and 5 deviations of chi-square


def test_greedy_successors_are_the_numbers_that_follow(SuccessorLM):
    # No token of the prompt, the stop token at the end; one in the prompt stops nothing.
    answers = {(3, 4): (5, 20), (7,): (8, 20), (9, 1, 2, 3, 12): (13, 20), (20, 5): (6, 20), (21,): (22, 25)}
    samples = sample(SuccessorLM(), list(map(list, answers)), 1, greedy(30), key=0, stop=(25, 20))
    expected = [list(range(first, last + 1)) for first, last in answers.values()]
    assert samples == [[Sample(ids, finished=True)] for ids in expected]


@pytest.mark.parametrize("length, finished", [(4, False), (5, True), (6, True)])
def test_finished_says_whether_the_stop_token_came(SuccessorLM, length, finished):
    [[answer]] = sample(SuccessorLM(), [[5]], 1, greedy(length), key=0, stop=(10,))
    assert answer == Sample([6, 7, 8, 9, 10][:length], finished)


def test_a_response_is_cut_where_its_own_prompt_and_it_fill_the_context(SuccessorLM):
    prompts = [[0] * 14 + [3], [3], [0] * 9 + [3]]  # beside a long one, a short one keeps its room
    rows = sample(SuccessorLM(context=16), prompts, 1, greedy(12), key=0, stop=(31,))
    assert rows == [[Sample(list(range(4, 4 + n)), finished=False)] for n in (1, 12, 6)]


@pytest.mark.parametrize("shared", [0, 11, 16, 30])
def test_greedy_with_cache_equals_greedy_without_for_every_prompt_length(decoder, shared):
    [header] = random_prompts([shared], seed=5)
    prompts = [header + rest for rest in random_prompts(range(1, 21))]
    expected = [without_cache(decoder, p, 24, stop=(2,)) for p in prompts]
    assert len({token for ids in expected for token in ids}) > 50  # outputs that vary
    alone = [sample(decoder, [p], 1, greedy(24), key=0, stop=(2,))[0][0].ids for p in prompts]
    together = [row[0].ids for row in sample(decoder, prompts, 1, greedy(24), key=0, stop=(2,))]
    assert alone == together == expected


def test_samples_equal_one_row_at_a_time_without_cache(random_decoder):
    # Few words, so that rows end at many different steps and leave the batch.
    model, key, n = random_decoder(vocab_size=12, std=0.2), 77, 6
    prompts = [[i % 12 for i in p] for p in random_prompts([3, 8, 1, 8, 5])]
    rows = sample(model, prompts, n, SampleConfig(1.0, 0.9, 20), key=key, stop=(2, 7))
    for i, j in itertools.product(range(len(prompts)), range(n)):
        expected = without_cache(model, prompts[i], 20, (2, 7), torch.tensor([row_key(key, i, j)]))
        assert rows[i][j] == Sample(expected, finished=expected[-1] in (2, 7))
    assert len({len(s.ids) for row in rows for s in row}) > 8


def warm(model, prompts, rows=512, key=1):
    drawn = sample(model, prompts, 3, SampleConfig(1.0, 0.95, 12, rows), key=key, stop=(2,))
    return [[s.ids for s in row] for row in drawn]


def test_batch_size_and_other_prompts_do_not_change_what_is_drawn(decoder):
    prompts, others = (random_prompts(lengths) for lengths in ([4, 9, 2, 9, 6, 1], [30, 2, 2, 17, 1, 5]))
    expected = warm(decoder, prompts)
    for rows in (1, 3, 4, 7, 9):
        assert warm(decoder, prompts, rows=rows) == expected
    for i, prompt in enumerate(prompts):
        assert warm(decoder, [*others[:i], prompt, *others[i + 1:]])[i] == expected[i]


def test_samples_differ_among_themselves_and_with_the_key(decoder):
    twice = [[7, 8, 9]] * 2
    a, b = warm(decoder, twice)
    assert len(set(map(tuple, a + b))) == 6  # neither n nor the prompt's number is lost
    assert warm(decoder, twice) == [a, b]
    assert all(one != other for one, other in zip([a, b], warm(decoder, twice, key=2)))


@pytest.mark.parametrize("temperature, top_p", [
    (1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (0.7, 0.9), (0.5, 0.9), (2.0, 0.6), (1.0, 0.5), (1.0, 0.99)])
def test_draws_follow_temperature_and_then_top_p(temperature, top_p):
    expected = nucleus(LOGITS, temperature, top_p)
    keys = torch.tensor([row_key(3, i, 0) for i in range(DRAWS)])
    drawn = draw(torch.tensor([LOGITS]).expand(DRAWS, -1), temperature, top_p, keys, step=5)
    assert_drawn_from(expected, np.bincount(drawn, minlength=len(LOGITS)))


def test_a_nucleus_is_full_when_its_mass_is_exactly_p():
    probability = torch.tensor(LOGITS).softmax(-1).sort(descending=True)[0]
    first, two = probability[0], probability[:2].sum()
    for mass, kept in ((first, 1), (first.nextafter(two), 2)):
        drawn = draw(torch.tensor([LOGITS]).expand(500, -1), 1.0, mass.item(), torch.arange(500) * 7919, 0)
        assert len(drawn.unique()) == kept


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_a_draw_tells_nothing_about_the_next(top_p):
    # At 0.6 many a first draw is refused: its second may not be the next token's first.
    logits, temperature = [1.0, 0.6, 0.3, 0.0], 1.0
    keys = torch.tensor([row_key(4, 0, j) for j in range(DRAWS)])
    first, second = (draw(torch.tensor([logits]).expand(DRAWS, -1), temperature, top_p, keys, step)
                     for step in (0, 1))
    single = nucleus(logits, temperature, top_p)
    assert_drawn_from(np.outer(single, single).flatten(), np.bincount(first * 4 + second, minlength=16))


@pytest.mark.parametrize("temperature, top_p", [
    (0.0, 0.9), (1e-6, 1.0), (1e-6, 0.9), (1e-30, 1.0), (1e-50, 1.0), (1.0, 1e-6), (1.0, 0.0)])
def test_no_temperature_or_no_nucleus_is_argmax(temperature, top_p):
    logits = 50 * torch.randn(500, 40, generator=torch.Generator().manual_seed(0))
    drawn = draw(logits, temperature, top_p, torch.arange(500) * 7919, 0)
    assert torch.equal(drawn, logits.argmax(-1))


def test_uniform_numbers_are_uniform_and_below_one():
    many_keys = uniform(torch.tensor([row_key(0, i, j) for i in range(25_000) for j in range(4)]), 0)
    one_key = torch.cat([uniform(torch.tensor([key("any")]), counter) for counter in range(20_000)])
    for u in (many_keys.double(), one_key.double()):
        assert 0 <= u.min() and u.max() < 1
        assert u.mean().item() == pytest.approx(1 / 2, abs=5 / (12 * len(u)) ** 0.5)
        assert u.var().item() == pytest.approx(1 / 12, abs=5 / (180 * len(u)) ** 0.5)
        assert_drawn_from(np.full(100, 0.01), np.histogram(u, bins=100, range=(0, 1))[0])


def splitmix64(state, counter):  # Steele, Lea & Flood (2014), on integers of any size
    z = (state + (counter + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_uniform_is_the_upper_bits_of_splitmix64():
    assert splitmix64(1234567, 0) == 6457827717110365317  # the published test vector
    keys = [0, 1, 2**63 - 1, *(Random(0).randrange(2**63) for _ in range(200))]
    for counter in (0, 1, 63, 64, 64 * 319):
        expected = [(splitmix64(k, counter) >> 40) / 2**24 for k in keys]
        assert uniform(torch.tensor(keys), counter).tolist() == expected


@pytest.mark.parametrize("seed", [0, key(0, "responses")])
def test_no_two_samples_share_their_random_numbers_at_any_shift(seed):
    # Runs of three numbers, so that equality by chance is out of the question.
    keys = torch.tensor([row_key(seed, i, j) for i in range(300) for j in range(4)])
    numbers = np.stack([uniform(keys, step * 64) for step in range(40)], axis=1)  # first tries of 40 tokens
    runs = np.lib.stride_tricks.sliding_window_view(numbers, 3, axis=1).reshape(-1, 3)
    assert len(np.unique(runs, axis=0)) == len(runs)


def test_key_tells_coordinates_apart_and_stays_the_same_between_processes():
    alike = [(0, 1), (1, 0), (0, "1"), ("0", 1), (0, 1, 0), (1,), (10,), ((0, 1),)]
    assert len({key(*coordinates) for coordinates in alike}) == len(alike)
    assert all(0 <= key(i) < 2**63 for i in range(1000))
    assert key(0, "M1", "responses") == 7846638067072308839  # b2sum -l 64, little-endian, >> 1


def test_common_prefix_is_what_brute_force_finds():
    rng = Random(0)
    for _ in range(2000):
        prompts = [[rng.randrange(2) for _ in range(rng.randint(1, 6))] for _ in range(rng.randint(1, 4))]
        fits = [k for k in range(min(map(len, prompts))) if len({tuple(p[:k]) for p in prompts}) == 1]
        assert common_prefix(prompts) == max(fits)


def test_a_prefill_in_groups_is_the_prefill_of_each_prompt_alone(decoder):
    # Enough tokens for several groups, with a header for all and without.
    for header in random_prompts([0, 20], seed=6):
        prompts = [header + rest for rest in random_prompts(range(10, 70, 2))]
        groups = alike([len(prompt) - len(header) for prompt in prompts], 512)
        assert len(groups) > 1 and [i for s in groups for i in range(s.start, s.stop)] == list(range(30))
        for n in (1, 2):
            with torch.no_grad():
                logits, cache = prefill(decoder, prompts, n, 4)
                step = Step(decoder, max(map(len, prompts)) + 1)
                assert cache.seen.tolist() == [len(prompt) for prompt in prompts for _ in range(n)]
                stepped = step(torch.full((30 * n,), 7), cache)
                for prompt, row, then in zip(prompts, logits, stepped.view(30, n, -1)):
                    expected = decoder(torch.tensor([[*prompt, 7]]))[0]
                    torch.testing.assert_close(row, expected[-2], atol=3e-5, rtol=1e-5)
                    torch.testing.assert_close(then, expected[-1].expand(n, -1), atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("wrong", [[], [1] * 16, [1] * 40])
def test_a_prompt_that_is_empty_or_fills_the_context_is_named(SuccessorLM, wrong):
    with pytest.raises(InputError, match=rf"tasks: prompt 2 has {len(wrong)} tokens.* 16, so 1 to 15 fit"):
        sample(SuccessorLM(context=16), [[1], [2], wrong, [3]], 1, greedy(4), key=0, stop=(9,), title="tasks")
    [[answer]] = sample(SuccessorLM(context=16), [[1] * 15], 1, greedy(4), key=0, stop=(9,))
    assert answer.ids == [2]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_without_memory_for_a_wave_its_halves_are_drawn_with_the_same_result(decoder, monkeypatch, error):
    prompts, sizes = random_prompts([9, 3, 5, 7, 4]), []
    config = SampleConfig(1.0, 1.0, 12, rows=10)
    whole = sample(decoder, prompts, 2, config, key=5, stop=(0,))

    def wave(model, prompts, numbers, *how, made=sampler._wave):
        sizes.append(len(prompts))
        if len(prompts) > limit:
            raise error
        return made(model, prompts, numbers, *how)
    monkeypatch.setattr(sampler, "_wave", wave)
    limit = 2
    halves = sample(decoder, prompts, 2, config, key=5, stop=(0,))
    assert sizes == [5, 2, 3, 1, 2] and [[s.ids for s in row] for row in halves] == [
        [s.ids for s in row] for row in whole]
    limit = 0
    with pytest.raises(InputError, match="not enough memory for the responses to one prompt"):
        sample(decoder, prompts, 2, config, key=5, stop=(0,))
    error = RuntimeError("shapes do not match")
    with pytest.raises(RuntimeError, match="shapes"):
        sample(decoder, prompts, 2, config, key=5, stop=(0,))


def test_log_probabilities_told_are_the_models_own_whatever_the_temperature(random_decoder):
    model = random_decoder(vocab_size=12, std=0.2)
    prompts = [[i % 12 for i in p] for p in random_prompts([3, 8, 1, 8, 5])]
    rows = sample(model, prompts, 4, SampleConfig(0.6, 0.9, 100), key=3, stop=(2, 7), with_logps=True)
    assert sum(s.finished for row in rows for s in row) > 15
    for prompt, samples in zip(prompts, rows):
        for s in samples:
            if not s.finished:
                assert s.logp == 0.0  # of what was cut off none is told
                continue
            with torch.no_grad():
                logps = model(torch.tensor([prompt + s.ids]))[0, len(prompt) - 1:-1].double().log_softmax(-1)
            expected = logps[range(len(s.ids)), s.ids].sum().item()
            assert s.logp == pytest.approx(expected, abs=1e-4) and s.logp < -0.5
    assert len({len(s.ids) for row in rows for s in row}) > 6  # rows leave at different steps
