"""The cache with shared prefixes: every row sees its own tokens and those before them, and nothing else."""

import pytest
import torch
import torch.nn.functional as F
from tiny import SPLITS_OF_NINE, random_ids

from minisr.fast.cache import PrefixCache
from minisr.fast.decode_step import DecodeStep
from minisr.fast.sampler import extend


def append(model, ids, cache):
    """Append ids (B, T) to the cache; return their logits (B, T, V)."""
    everything = torch.arange(ids.numel())
    return model.head(extend(model, ids, cache, everything)).view(*ids.shape, -1)


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@torch.no_grad()
def test_forward_with_cache_equals_forward_without_for_every_split(random_decoder, n_kv_heads):
    model, ids = random_decoder(n_kv_heads=n_kv_heads), random_ids(2, 9, seed=2)
    expected = model(ids)
    for parts in SPLITS_OF_NINE:
        cache = PrefixCache(model.config, 2, 9, model.embed.weight)
        cached = torch.cat([append(model, part, cache) for part in ids.split(parts, dim=1)], dim=1)
        torch.testing.assert_close(cached, expected, atol=2e-5, rtol=1e-5)
        if parts[0] < 9:
            cache, step = PrefixCache(model.config, 2, 9, model.embed.weight), DecodeStep(model, 9)
            append(model, ids[:, :parts[0]], cache)
            stepped = torch.stack([step(token, cache) for token in ids[:, parts[0]:].unbind(1)], dim=1)
            torch.testing.assert_close(stepped, expected[:, parts[0]:], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("shared", [0, 1, 4])
@torch.no_grad()
def test_padding_and_a_shared_prefix_leave_no_trace_in_the_logits(random_decoder, shared):
    model, lengths = random_decoder(), [1, 3, 6, 6]  # tokens of each row after the prefix
    T, steps = max(lengths), 3
    text = random_ids(4, shared + T + steps, seed=3)  # the ids in padding columns are arbitrary
    text[:, :shared] = text[0, :shared]
    cache = PrefixCache(model.config, 1 if shared else 4, shared or T + steps, model.embed.weight)
    if shared:
        append(model, text[:1, :shared], cache)
        cache.fan_out(4, T + steps)
    cache.set_left_pad(torch.tensor([T - length for length in lengths]))
    step = DecodeStep(model, shared + T + steps)
    padded = [append(model, text[:, shared:shared + T], cache)]
    padded = torch.cat(padded + [step(token, cache)[:, None] for token in text[:, shared + T:].unbind(1)], dim=1)
    for row, pad in enumerate(cache.left_pad.tolist()):
        alone = torch.cat([text[row, :shared], text[row, shared + pad:]])
        expected = model(alone[None])[0, shared:]
        torch.testing.assert_close(padded[row, pad:], expected, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_padding_can_be_prefilled_in_several_parts(random_decoder):
    model, lengths, T = random_decoder(), [1, 3, 6, 7], 7
    text = random_ids(4, T, seed=8)
    for parts in ([2, 5], [4, 1, 2], [1] * 7):
        cache = PrefixCache(model.config, 4, T, model.embed.weight)
        cache.set_left_pad(torch.tensor([T - length for length in lengths]))
        logits = torch.cat([append(model, part, cache) for part in text.split(parts, dim=1)], dim=1)
        assert cache.seq_lens.tolist() == lengths
        for row, length in enumerate(lengths):
            expected = model(text[row:row + 1, T - length:])[0]
            torch.testing.assert_close(logits[row, T - length:], expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("shared, n", [(0, 3), (5, 3), (5, 1), (0, 1), (1, 2)])
@torch.no_grad()
def test_rows_that_share_prefixes_and_leave_see_what_they_would_see_alone(random_decoder, shared, n, n_kv_heads):
    # A prefix for all, 6 prompts of unequal length, n rows each; rows leave after every second token.
    model, lengths = random_decoder(n_kv_heads=n_kv_heads), [1, 3, 6, 6, 2, 4]
    generator, T = torch.Generator().manual_seed(4), max(lengths)
    prefix = torch.randint(60, (1, shared), generator=generator)
    prompts = [torch.randint(60, (1, length), generator=generator) for length in lengths]
    responses = torch.randint(60, (6 * n, 8), generator=generator)
    cache = PrefixCache(model.config, 1 if shared else 6, shared or T + 8, model.embed.weight)
    if shared:
        append(model, prefix, cache)
        cache.fan_out(6, T + 8)
    cache.set_left_pad(torch.tensor([T - length for length in lengths]))
    append(model, torch.cat([F.pad(prompt, (T - prompt.shape[1], 0)) for prompt in prompts]), cache)
    if n > 1:
        cache.fan_out(n, 8)
    rows, order = torch.arange(6 * n), torch.randperm(6 * n, generator=generator)
    forward = DecodeStep(model, shared + T + 8)
    for step in range(8):
        logits = forward(responses[rows, step], cache)
        for row, found in zip(rows.tolist(), logits):
            alone = torch.cat([prefix, prompts[row // n], responses[row:row + 1, :step + 1]], 1)
            torch.testing.assert_close(found, model(alone)[0, -1], atol=3e-5, rtol=1e-5)
        if step % 2:
            staying = torch.isin(rows, order[:(6 * n * (7 - step)) // 8 + 1]).nonzero()[:, 0]
            cache.select_rows(staying)
            rows = rows[staying]
    assert len(rows) < 2 * n


@torch.no_grad()
def test_what_rows_share_is_in_memory_once(random_decoder):
    model = random_decoder()
    cache = PrefixCache(model.config, 1, 50, model.embed.weight)
    append(model, torch.ones(1, 50, dtype=torch.long), cache)
    cache.fan_out(10, 20)
    append(model, torch.ones(10, 20, dtype=torch.long), cache)
    cache.fan_out(4, 3)
    assert [prefix.k.shape[1] for prefix in cache.prefixes] == [1, 10] and cache.k.shape[1:4:2] == (40, 3)
    cache.select_rows(torch.arange(8))  # of the first two prompts
    assert [prefix.k.shape[1] for prefix in cache.prefixes] == [1, 2] and cache.k.shape[1] == 8


@torch.no_grad()
def test_several_tokens_at_once_do_not_see_the_padding_of_what_they_share(random_decoder):
    model, lengths = random_decoder(), [1, 4, 6]
    text = random_ids(6, 9, seed=5)
    text[1::2, :6] = text[::2, :6]  # two rows a prompt
    cache = PrefixCache(model.config, 3, 6, model.embed.weight)
    cache.set_left_pad(torch.tensor([6 - length for length in lengths]))
    append(model, text[::2, :6], cache)
    cache.fan_out(2, 3)
    for row, logits in enumerate(append(model, text[:, 6:], cache)):
        alone = text[row:row + 1, 6 - lengths[row // 2]:]
        torch.testing.assert_close(logits, model(alone)[0, -3:], atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_memory_that_was_never_written_does_not_matter(random_decoder, monkeypatch):
    # Memory that is allocated but not initialized may contain NaN.
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, shape: self.new_full(shape, torch.nan))
    model, text = random_decoder(), random_ids(2, 6, seed=7)
    cache = PrefixCache(model.config, 2, 6, model.embed.weight)
    cache.set_left_pad(torch.tensor([0, 2]))
    view = cache.row_view(slice(1, 2), skip_columns=2)  # the first two columns of row 1 are never computed
    append(model, text[:1, :4], cache.row_view(slice(0, 1), skip_columns=0))
    append(model, text[1:, 2:4], view)
    cache.advance(4)
    step = DecodeStep(model, 6)
    logits = torch.stack([step(token, cache) for token in text[:, 4:].unbind(1)], dim=1)
    torch.testing.assert_close(logits[0], model(text[:1])[0, 4:], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(logits[1], model(text[1:, 2:])[0, 2:], atol=2e-5, rtol=1e-5)
