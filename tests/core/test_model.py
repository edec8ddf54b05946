"""The decoder against transformers' Llama and against formulas, and its KV cache against whole sequences."""

import cmath

import pytest
import torch
import torch.nn.functional as F
from tiny import SPLITS_OF_NINE, as_llama, llama_weights, random_ids

from minisr.model import FeedForward, KVCache, ModelConfig, RMSNorm, apply_rope, rope_cos_sin

SHAPES = {
    "MHA": dict(n_kv_heads=4),
    "GQA": dict(n_kv_heads=2),
    "MQA": dict(n_kv_heads=1),
    "tied": dict(tie_embeddings=True),
    "deep": dict(n_layers=5, dim=24, n_heads=6, n_kv_heads=3, ffn_dim=40),
    "other constants": dict(rope_theta=300.0, norm_eps=1e-2),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_logits_and_gradients_equal_those_of_llama_with_the_same_weights(random_decoder, shape):
    model = random_decoder(std=0.2, **shape)
    llama, ids = as_llama(model), random_ids(3, 40, seed=1)
    logits, expected = model(ids), llama(ids).logits
    assert expected.std() > 0.5  # else the bound below would say little
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)

    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    for values in (logits, expected):
        (values * direction).sum().backward()
    gradients = llama_weights(model.config, {name: p.grad for name, p in model.named_parameters()})
    for name, weight in llama.named_parameters():
        scale = weight.grad.abs().max()
        assert scale > 0.1
        torch.testing.assert_close(gradients[name] / scale, weight.grad / scale, atol=1e-5, rtol=1e-4)


# Single operations, written as formulas in float64.

SMALL = ModelConfig(dim=8, ffn_dim=6, n_heads=1, norm_eps=0.3)  # an eps that matters
ANGLES = torch.arange(12.0, dtype=torch.float64).view(4, 3) / 5  # (T, D/2)


def norm(x, weight):
    module = RMSNorm(SMALL)
    return torch.func.functional_call(module, {"weight": weight}, (x,))


def norm_formula(x, weight):
    return F.rms_norm(x, weight.shape, weight, 0.3)


def swiglu(x, gate_up, down):
    weights = {"gate_up_proj.weight": gate_up, "down_proj.weight": down}
    return torch.func.functional_call(FeedForward(SMALL), weights, (x,))


def swiglu_formula(x, gate_up, down):
    gate, up = (x @ gate_up.T).chunk(2, -1)
    return (gate * gate.sigmoid() * up) @ down.T


def rope(x):
    cos, sin = ANGLES.cos().to(x.dtype), ANGLES.sin().to(x.dtype)
    return apply_rope(x, torch.cat([cos, cos], -1), torch.cat([sin, sin], -1))


def rope_formula(x):
    """Each pair (x_i, x_{i + D/2}) is a complex number, rotated by its angle."""
    rotated = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(ANGLES), ANGLES)
    return torch.cat([rotated.real, rotated.imag], -1)


OPERATIONS = {"RMSNorm": (norm, norm_formula, (2, 3, 8), (8,)),
              "SwiGLU": (swiglu, swiglu_formula, (2, 3, 8), (12, 8), (8, 6)),
              "RoPE": (rope, rope_formula, (2, 3, 4, 6))}


def operation_and_inputs(name, dtype):
    operation, formula, *shapes = OPERATIONS[name]
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return operation, formula, [x.requires_grad_() for x in inputs]


@pytest.mark.parametrize("name", OPERATIONS)
def test_values_and_gradients_are_those_of_the_formula(name):
    operation, formula, inputs = operation_and_inputs(name, torch.float64)
    values, expected = operation(*inputs), formula(*inputs)
    torch.testing.assert_close(values, expected, atol=1e-12, rtol=1e-12)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad(values, inputs, direction)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, inputs, direction)):
        torch.testing.assert_close(gradient, wanted, atol=1e-12, rtol=1e-12)
        assert wanted.abs().max() > 0.1


@pytest.mark.parametrize("name", OPERATIONS)
def test_bfloat16_stays_bfloat16(name):
    operation, formula, inputs = operation_and_inputs(name, torch.bfloat16)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    values, expected = operation(*inputs), formula(*wide)
    assert values.dtype == torch.bfloat16
    torch.testing.assert_close(values.double(), expected, atol=0.05, rtol=0.05)
    gradients = torch.autograd.grad(values.sum(), inputs)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected.sum(), wide)):
        assert gradient.dtype == torch.bfloat16
        torch.testing.assert_close(gradient.double(), wanted, atol=0.1, rtol=0.1)


def test_norm_feed_forward_and_rope_are_those_of_transformers():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    generator = torch.Generator().manual_seed(5)
    x, weight = torch.randn(2, 3, 8, generator=generator), torch.randn(8, generator=generator)
    theirs = llama.LlamaRMSNorm(8, eps=0.3)
    theirs.weight.data = weight
    torch.testing.assert_close(norm(x, weight), theirs(x))

    gate_up, down = torch.randn(12, 8, generator=generator), torch.randn(8, 6, generator=generator)
    theirs = llama.LlamaMLP(llama.LlamaConfig(hidden_size=8, intermediate_size=6, num_attention_heads=1))
    for layer, matrix in zip((theirs.gate_proj, theirs.up_proj, theirs.down_proj), (*gate_up.chunk(2), down)):
        layer.weight.data = matrix
    torch.testing.assert_close(swiglu(x, gate_up, down), theirs(x))

    q, k = torch.randn(2, 2, 3, 4, 6, generator=generator)  # (B, H, T, D) each
    cos, sin = rope_cos_sin(torch.arange(4)[None], ModelConfig(dim=6, n_heads=1))  # (1, 1, T, D)
    expected = llama.apply_rotary_pos_emb(q, k, cos[:, 0], sin[:, 0])
    torch.testing.assert_close((apply_rope(q, cos, sin), apply_rope(k, cos, sin)), expected)


def test_rope_makes_a_dot_product_depend_on_the_distance_alone():
    config, generator = ModelConfig(dim=32, n_heads=4), torch.Generator().manual_seed(4)
    cos, sin = rope_cos_sin(torch.arange(60)[None], config)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=generator).expand(2, 1, 1, 60, 8)
    q, k = (apply_rope(x, cos, sin)[0, 0] for x in (q, k))
    dots = q @ k.T  # [m, n]
    for distance in range(-59, 60):
        same = dots.diagonal(distance)
        assert same.max() - same.min() < 1e-4
    by_distance = torch.stack([dots.diagonal(d)[0] for d in range(-59, 60)])
    assert by_distance.std() > 0.1


def test_rope_rotates_each_pair_by_position_times_its_own_frequency():
    config, x = ModelConfig(dim=12, n_heads=2, rope_theta=100.0), torch.arange(1.0, 7.0)
    for position in (0, 1, 17):
        cos, sin = rope_cos_sin(torch.tensor([[position]]), config)
        rotated = apply_rope(x.view(1, 1, 1, 6), cos, sin).flatten()
        for i in range(3):  # (x_i, x_{i+3}) as a complex number, rotated by position * 100^(-2i/6)
            expected = complex(x[i], x[i + 3]) * cmath.exp(1j * position * 100.0 ** (-2 * i / 6))
            assert complex(rotated[i], rotated[i + 3]) == pytest.approx(expected, abs=1e-5)


# Sequences.


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@torch.no_grad()
def test_forward_with_cache_equals_forward_without_for_every_split(random_decoder, n_kv_heads):
    model, ids = random_decoder(n_kv_heads=n_kv_heads), random_ids(2, 9, seed=2)
    expected = model(ids)
    for parts in SPLITS_OF_NINE:
        cache = KVCache(model, batch_size=2, max_len=9)
        cached = torch.cat([model(part, cache) for part in ids.split(parts, dim=1)], dim=1)
        torch.testing.assert_close(cached, expected, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_padding_on_the_left_leaves_no_trace_in_the_logits(random_decoder):
    model, lengths, T, steps = random_decoder(), [1, 3, 6, 6], 6, 3
    text = random_ids(4, T + steps, seed=3)  # the ids in padding columns are arbitrary
    attention_mask = torch.arange(T + steps) >= torch.tensor([T - length for length in lengths])[:, None]  # (B, S)
    whole = model(text, None, attention_mask)
    cache = KVCache(model, batch_size=4, max_len=T + steps)
    parts = [model(text[:, :T], cache, attention_mask[:, :T])]
    parts += [model(text[:, end - 1:end], cache, attention_mask[:, :end]) for end in range(T + 1, T + steps + 1)]
    for padded in (whole, torch.cat(parts, dim=1)):
        for row, length in enumerate(lengths):
            expected = model(text[row:row + 1, T - length:])[0]
            torch.testing.assert_close(padded[row, T - length:], expected, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_padding_on_the_right_needs_no_mask(random_decoder):
    model, text = random_decoder(), random_ids(1, 9, seed=6)
    other = torch.cat([text[:, :5], torch.zeros(1, 4, dtype=torch.long)], dim=1)
    torch.testing.assert_close(model(other)[:, :5], model(text[:, :5]), atol=2e-5, rtol=1e-5)


def test_a_loss_reaches_its_own_and_earlier_tokens_and_no_later_one(random_decoder):
    model, embedded = random_decoder(), []
    hook = model.embed.register_forward_hook(lambda module, inputs, x: (x.retain_grad(), embedded.append(x))[0])
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
    for t in range(6):
        model(ids)[0, t].log_softmax(-1)[ids[0, t + 1]].backward()
        gradient = embedded.pop().grad[0].abs().amax(-1)  # (T,)
        assert (gradient[:t + 1] > 0).all()
        assert (gradient[t + 1:] == 0).all()
    hook.remove()


@pytest.mark.parametrize("rows, new", [(1, 1), (1, 5), (3, 1), (3, 5)])
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_forward_always_returns_logits_of_shape_B_T_V(random_decoder, rows, new, tied):
    model = random_decoder(tie_embeddings=tied, vocab_size=41)
    ids = torch.zeros(rows, new, dtype=torch.long)
    cache = KVCache(model, rows, 2 * new)
    for logits in (model(ids), model(ids, cache), model(ids, cache)):
        assert logits.shape == (rows, new, 41)
    assert cache.length == 2 * new
