"""The decode step against the decoder's modules: the same logits, whichever way a product is computed."""

import pytest
import torch
from tiny import random_ids

from minisr.fast import decode_step
from minisr.fast.cache import PrefixCache
from minisr.fast.decode_step import DecodeStep, FastLinear
from minisr.fast.sampler import decode_with_modules, extend
from minisr.model import KVCache


def decode(model, ids, prefill, forward):
    """Logits (B, T - prefill, V) of the tokens after the first `prefill`, one step each, and the cache."""
    cache = PrefixCache(model.config, len(ids), ids.shape[1], model.embed.weight)
    extend(model, ids[:, :prefill], cache, select=torch.zeros(0, dtype=torch.long))
    return torch.stack([forward(token, cache) for token in ids[:, prefill:].unbind(1)], dim=1), cache


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("min_split_numel", [0, 2**18])  # every matrix is split, none is
@pytest.mark.parametrize("threads", [1, 2, 3])  # three do not divide the rows of these matrices
@torch.no_grad()
def test_steps_give_the_logits_of_the_whole_sequence(random_decoder, monkeypatch, rows, min_split_numel, threads):
    monkeypatch.setattr(decode_step, "MIN_SPLIT_NUMEL", min_split_numel)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    model, ids = random_decoder(std=0.2, norm_eps=1e-2), random_ids(rows, 12, seed=1)
    expected = model(ids)
    logits, cache = decode(model, ids, 5, DecodeStep(model, 12))
    assert expected.std() > 0.5
    torch.testing.assert_close(logits, expected[:, 5:], atol=2e-5, rtol=1e-5)
    assert cache.n_columns == 12 and cache.seq_lens.tolist() == [12] * rows


SHAPES = [dict(n_kv_heads=1), dict(n_kv_heads=4), dict(n_layers=1), dict(n_layers=0), dict(tie_embeddings=True),
          dict(head_dim=6), dict(rope_theta=300.0, rope_scaling=(4.0,)), dict(norm_eps=0.3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_in_float64_a_step_is_the_modules_step(random_decoder, shape):
    model, ids = random_decoder(std=0.2, **shape).double(), random_ids(3, 9, seed=2)
    expected, cache = model(ids)[:, 4:], KVCache(model, 3, 9)
    model(ids[:, :4], cache)
    with_modules = torch.cat([model(token, cache) for token in ids[:, 4:].split(1, dim=1)], dim=1)
    torch.testing.assert_close(with_modules, expected, atol=1e-10, rtol=1e-10)
    for forward in (DecodeStep(model, 9), lambda token, cache: decode_with_modules(model, token, cache)):
        logits, _ = decode(model, ids, 4, forward)
        assert logits.dtype == torch.float64
        torch.testing.assert_close(logits, expected, atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_a_bfloat16_model_gives_the_same_logits_up_to_rounding(random_decoder):
    model, ids = random_decoder(std=0.2).to(torch.bfloat16), random_ids(3, 9, seed=3)
    logits, _ = decode(model, ids, 6, DecodeStep(model, 9))
    expected = model(ids)[:, 6:]
    assert logits.dtype == torch.bfloat16
    assert (logits - expected).abs().max() < 0.05 * expected.float().std() + 0.1


@pytest.mark.parametrize("min_split_numel", [0, 2**18])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 4])
def test_a_product_is_the_layers_and_is_added_to_the_residual(monkeypatch, min_split_numel, threads, rows):
    monkeypatch.setattr(decode_step, "MIN_SPLIT_NUMEL", min_split_numel)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.manual_seed(0)
    layer, x, residual = torch.nn.Linear(6, 8, bias=False), torch.randn(rows, 6), torch.randn(rows, 8)
    product = FastLinear(layer)
    torch.testing.assert_close(product(x), x @ layer.weight.detach().T)
    torch.testing.assert_close(product(x, residual), residual + x @ layer.weight.detach().T)
