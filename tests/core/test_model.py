import cmath

import pytest
import torch
from minisr.fast.step import Step
from tiny import as_llama

from minisr.fast.cache import KVCache
from minisr.model import Decoder, ModelConfig, init_weights, rotary, rotate

SHAPES = {
    "MHA": dict(n_kv_heads=4),
    "GQA": dict(n_kv_heads=2),
    "MQA": dict(n_kv_heads=1),
    "tied": dict(tie_embeddings=True),
    "deep": dict(n_layers=5, dim=24, n_heads=6, n_kv_heads=3, ffn_dim=40),
    "other constants": dict(rope_theta=300.0, norm_eps=1e-2),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@torch.no_grad()
def test_logits_equal_those_of_llama_on_the_same_weights(random_decoder, shape):
    model = random_decoder(std=0.2, **shape)
    ids = torch.randint(60, (3, 40), generator=torch.Generator().manual_seed(1))
    expected = as_llama(model)(ids).logits
    assert expected.std() > 0.5  # else the bound below would say little
    torch.testing.assert_close(model(ids), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@torch.no_grad()
def test_forward_with_cache_equals_forward_without_for_every_split(random_decoder, kv_heads):
    model = random_decoder(n_kv_heads=kv_heads)
    ids = torch.randint(60, (2, 9), generator=torch.Generator().manual_seed(2))
    expected = model(ids)
    every_token_alone = [1] * 9
    for parts in [[split, 9 - split] for split in range(1, 9)] + [[9], every_token_alone, [3, 1, 4, 1]]:
        cache = KVCache(model.config, 2, 9, model.embed.weight)
        cached = torch.cat([model(part, cache) for part in ids.split(parts, dim=1)], dim=1)
        torch.testing.assert_close(cached, expected, atol=2e-5, rtol=1e-5)
        if parts[0] < 9:
            cache, step = KVCache(model.config, 2, 9, model.embed.weight), Step(model, 9)
            model(ids[:, :parts[0]], cache)
            stepped = torch.stack([step(token, cache) for token in ids[:, parts[0]:].unbind(1)], dim=1)
            torch.testing.assert_close(stepped, expected[:, parts[0]:], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("shared", [0, 1, 4])
@torch.no_grad()
def test_padding_and_a_shared_prefix_leave_no_trace_in_the_logits(random_decoder, shared):
    model, lengths = random_decoder(), [1, 3, 6, 6]  # tokens of each row after the prefix
    rest, answer = max(lengths), 3
    text = torch.randint(60, (4, shared + rest + answer), generator=torch.Generator().manual_seed(3))
    text[:, :shared] = text[0, :shared]
    cache = KVCache(model.config, 1 if shared else 4, text.shape[1], model.embed.weight)
    if shared:
        model(text[:1, :shared], cache)
        cache.share(4, rest + answer)
    cache.set_padding(torch.tensor([rest - length for length in lengths]))
    parts = text[:, shared:].split([rest, 1, 1, 1], dim=1)  # what is in a padding column is junk
    step = Step(model, shared + rest + answer)
    padded = torch.cat([model(parts[0], cache), *(step(part[:, 0], cache)[:, None] for part in parts[1:])], 1)
    for row, pad in enumerate(cache.pad.tolist()):
        alone = torch.cat([text[row, :shared], text[row, shared + pad:]])
        expected = model(alone[None])[0, shared:]
        torch.testing.assert_close(padded[row, pad:], expected, atol=2e-5, rtol=1e-5)


def test_a_loss_reaches_its_own_and_earlier_tokens_and_no_later_one(random_decoder):
    model, kept = random_decoder(), []
    model.embed.register_forward_hook(lambda module, inputs, x: (x.retain_grad(), kept.append(x))[0])
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
    for t in range(6):
        model(ids)[0, t].log_softmax(-1)[ids[0, t + 1]].backward()
        reached = kept.pop().grad[0].abs().amax(-1)  # (T,)
        assert (reached[:t + 1] > 0).all()
        assert (reached[t + 1:] == 0).all()


def test_rope_makes_a_dot_product_depend_on_the_distance_alone():
    config, generator = ModelConfig(dim=32, n_heads=4), torch.Generator().manual_seed(4)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=generator).expand(2, 1, 1, 60, 8)
    q, k = (rotate(x, rotary(torch.arange(60)[None], config))[0, 0] for x in (q, k))
    dots = q @ k.T  # [m, n]
    for distance in range(-59, 60):
        same = dots.diagonal(distance)
        assert same.max() - same.min() < 1e-4
    by_distance = torch.stack([dots.diagonal(d)[0] for d in range(-59, 60)])
    assert by_distance.std() > 0.1


def test_rope_turns_each_pair_by_position_times_its_own_frequency():
    config, x = ModelConfig(dim=12, n_heads=2, rope_theta=100.0), torch.arange(1.0, 7.0)
    for position in (0, 1, 17):
        got = rotate(x.view(1, 1, 1, 6), rotary(torch.tensor([[position]]), config)).flatten()
        for i in range(3):  # (x_i, x_{i+3}) as a complex number, turned by position * 100^(-2i/6)
            turned = complex(x[i], x[i + 3]) * cmath.exp(1j * position * 100.0 ** (-2 * i / 6))
            assert complex(got[i], got[i + 3]) == pytest.approx(turned, abs=1e-5)


@pytest.mark.parametrize("layers", [2, 8])
def test_initial_std_is_002_and_what_writes_to_the_stream_is_scaled_by_depth(layers):
    model = Decoder(ModelConfig(n_layers=layers, tie_embeddings=False))
    init_weights(model, torch.Generator().manual_seed(0))
    smaller = {2: 0.01, 8: 0.005}[layers]  # 0.02 / sqrt(2 * layers)
    writers = 0
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            assert (weight == 1).all(), name
            continue
        writes = "out_proj" in name or "down_proj" in name
        writers += writes
        assert weight.std().item() == pytest.approx(smaller if writes else 0.02, rel=0.03), name
        assert abs(weight.mean().item()) < 0.001, name
    assert writers == 2 * layers


@pytest.mark.parametrize("rows, new", [(1, 1), (1, 5), (3, 1), (3, 5)])
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_forward_always_returns_logits_of_shape_B_T_V(random_decoder, rows, new, tied):
    model = random_decoder(tie_embeddings=tied, vocab_size=41)
    ids = torch.zeros(rows, new, dtype=torch.long)
    cache = KVCache(model.config, rows, 2 * new, model.embed.weight)
    for logits in (model(ids), model(ids, cache), model(ids, cache)):
        assert logits.shape == (rows, new, 41)
    assert cache.length == 2 * new


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("shared, n", [(0, 3), (5, 3), (5, 1), (0, 1), (1, 2)])
@torch.no_grad()
def test_rows_that_share_and_leave_see_what_they_would_see_alone(random_decoder, shared, n, kv_heads):
    # A prefix for all, 6 prompts of unlike length, n rows each; after every second token rows leave.
    model, lengths = random_decoder(n_kv_heads=kv_heads), [1, 3, 6, 6, 2, 4]
    generator, rest = torch.Generator().manual_seed(4), max(lengths)
    prefix = torch.randint(60, (1, shared), generator=generator)
    prompts = [torch.randint(60, (1, length), generator=generator) for length in lengths]
    answers = torch.randint(60, (6 * n, 8), generator=generator)
    cache = KVCache(model.config, 1 if shared else 6, shared or rest + 8, model.embed.weight)
    if shared:
        model(prefix, cache)
        cache.share(6, rest + 8)
    cache.set_padding(torch.tensor([rest - length for length in lengths]))
    model(torch.cat([torch.nn.functional.pad(p, (rest - p.shape[1], 0)) for p in prompts]), cache)
    if n > 1:
        cache.share(n, 8)
    rows, order = torch.arange(6 * n), torch.randperm(6 * n, generator=generator)
    forward = Step(model, shared + rest + 8)
    for step in range(8):
        logits = forward(answers[rows, step], cache)
        for row, found in zip(rows.tolist(), logits):
            alone = torch.cat([prefix, prompts[row // n], answers[row:row + 1, :step + 1]], 1)
            torch.testing.assert_close(found, model(alone)[0, -1], atol=3e-5, rtol=1e-5)
        if step % 2:
            kept = torch.isin(rows, order[:(6 * n * (7 - step)) // 8 + 1]).nonzero()[:, 0]
            cache.keep(kept)
            rows = rows[kept]
    assert len(rows) < 2 * n


@torch.no_grad()
def test_what_rows_share_is_in_memory_once(random_decoder):
    model = random_decoder()
    cache = KVCache(model.config, 1, 50, model.embed.weight)
    model(torch.ones(1, 50, dtype=torch.long), cache)
    cache.share(10, 20)
    model(torch.ones(10, 20, dtype=torch.long), cache)
    cache.share(4, 3)
    assert [part.k.shape[1] for part in cache.shared] == [1, 10] and cache.k.shape[1:4:2] == (40, 3)
    cache.keep(torch.arange(0, 8))  # of the first two prompts
    assert [part.k.shape[1] for part in cache.shared] == [1, 2] and cache.k.shape[1] == 8


@torch.no_grad()
def test_several_tokens_at_once_do_not_see_the_padding_of_what_they_share(random_decoder):
    model, lengths = random_decoder(), [1, 4, 6]
    text = torch.randint(60, (6, 9), generator=torch.Generator().manual_seed(5))
    text[1::2, :6] = text[::2, :6]  # two rows a prompt
    cache = KVCache(model.config, 3, 6, model.embed.weight)
    cache.set_padding(torch.tensor([6 - length for length in lengths]))
    model(text[::2, :6], cache)
    cache.share(2, 3)
    found = model(text[:, 6:], cache)
    for row, logits in enumerate(found):
        alone = text[row:row + 1, 6 - lengths[row // 2]:]
        torch.testing.assert_close(logits, model(alone)[0, -3:], atol=2e-5, rtol=1e-5)
