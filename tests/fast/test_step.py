"""The decode step beside the decoder of model.py: the same logits, whatever way a product takes."""

import pytest
import torch
from minisr.fast.step import Product, Step

from minisr.fast import step as module
from minisr.fast.cache import KVCache


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("large", [0, 2**18])  # every matrix a large one, none
@pytest.mark.parametrize("threads", [1, 2, 3])  # three do not divide the rows of these matrices
@torch.no_grad()
def test_steps_give_the_logits_of_the_whole_sequence(random_decoder, monkeypatch, rows, large, threads):
    monkeypatch.setattr(module, "LARGE", large)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    model = random_decoder(std=0.2, norm_eps=1e-2)
    ids = torch.randint(60, (rows, 12), generator=torch.Generator().manual_seed(1))
    expected = model(ids)
    cache, step = KVCache(model.config, rows, 12, model.embed.weight), Step(model, 12)
    model.hidden(ids[:, :5], cache)
    found = torch.stack([step(token, cache) for token in ids[:, 5:].unbind(1)], 1)
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected[:, 5:], atol=2e-5, rtol=1e-5)
    assert cache.length == 12 and cache.seen.tolist() == [12] * rows


@pytest.mark.parametrize("large", [0, 2**18])
@pytest.mark.parametrize("rows", [1, 4])
def test_a_product_is_the_layers_and_adds_to_what_it_is_told(monkeypatch, large, rows):
    monkeypatch.setattr(module, "LARGE", large)
    torch.manual_seed(0)
    layer, x, onto = torch.nn.Linear(6, 8, bias=False), torch.randn(rows, 6), torch.randn(rows, 8)
    product = Product(layer)
    torch.testing.assert_close(product(x), x @ layer.weight.detach().T)
    torch.testing.assert_close(product(x, onto), onto + x @ layer.weight.detach().T)


@torch.no_grad()
def test_a_model_in_bfloat16_steps_as_it_runs(random_decoder):
    model = random_decoder(std=0.2).to(torch.bfloat16)
    ids = torch.randint(60, (3, 9), generator=torch.Generator().manual_seed(3))
    cache, step = KVCache(model.config, 3, 9, model.embed.weight), Step(model, 9)
    model.hidden(ids[:, :6], cache)
    found = torch.stack([step(token, cache) for token in ids[:, 6:].unbind(1)], 1)
    expected = model(ids)[:, 6:]
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().max() < 0.05 * expected.float().std() + 0.1
