"""Losses that compute only what is scored, against the core: the same values and the same gradients."""

from random import Random

import pytest
import torch
import torch.nn.functional as F
from generated import for_all, one_of
from hypothesis import strategies as st
from tiny import EXAMPLES, PAIRS, tiny_lm

from minisr.dpo import EncodedPair, encode_pairs
from minisr.fast import FastLM, forward, losses
from minisr.fast.forward import causal_attention, final_hidden, grouped_attention
from minisr.fast.losses import PackedPairs
from minisr.lm import LM
from minisr.runner.config import TrainConfig
from minisr.sft import Example, encode_examples

SHAPES = [dict(), dict(n_kv_heads=1), dict(n_kv_heads=4), dict(n_layers=1), dict(n_layers=0), dict(head_dim=6),
          dict(tie_embeddings=True), dict(rope_theta=300.0, norm_eps=1e-2)]
# Of values, relative to the largest gradient of a weight for gradients.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


def random_pairs(lengths, seed=0, vocab_size=60):
    rng = Random(seed)
    return [EncodedPair(*([rng.randrange(vocab_size) for _ in range(length)] for length in parts)) for parts in lengths]


def random_examples(lengths, seed=0, vocab_size=60):
    """Examples whose targets are the tokens after the prompt."""
    rng = Random(seed)
    return [Example([rng.randrange(vocab_size) for _ in range(prompt + response)],
                    [False] * prompt + [True] * response) for prompt, response in lengths]


def values_and_gradients(lm, compute):
    """compute(lm) is a tuple of tensors; gradients are those of a sum in which every value has its own weight."""
    lm.model.zero_grad()
    values = torch.cat([x.flatten() for x in compute(lm)])
    (values * torch.linspace(0.3, -0.7, len(values), dtype=values.dtype)).sum().backward()
    return values.detach(), {name: p.grad for name, p in lm.model.named_parameters()}


def assert_same(model, compute, tolerance):
    """The fast engine computes the values and gradients of the plain one."""
    (values, gradients), (expected, wanted) = (values_and_gradients(LM(model, None), compute)
                                               for LM in (FastLM, LM))
    torch.testing.assert_close(values, expected, atol=tolerance, rtol=tolerance)
    for name, gradient in wanted.items():
        scale = gradient.abs().max() + 1e-30
        torch.testing.assert_close(gradients[name] / scale, gradient / scale, atol=tolerance, rtol=tolerance,
                                   msg=lambda text, name=name: f"{name}: {text}")


def pair_logps(pairs):
    return lambda lm: lm.pair_logps(pairs)


def target_loss(examples):
    return lambda lm: (lm.target_loss(examples),)


UNEQUAL_PAIRS = random_pairs([(5, 3, 9), (1, 1, 1), (12, 20, 2), (7, 4, 4)])
UNEQUAL_EXAMPLES = random_examples([(5, 3), (1, 1), (12, 20), (0, 4)])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_pair_logps_and_target_loss_are_the_cores(random_decoder, shape, dtype):
    model = random_decoder(std=0.2, **shape).to(dtype)
    assert_same(model, pair_logps(UNEQUAL_PAIRS), TOLERANCE[dtype])
    assert_same(model, target_loss(UNEQUAL_EXAMPLES), TOLERANCE[dtype])


@for_all(slow=1_000, lengths=st.lists(st.tuples(*[st.integers(1, 9)] * 3), min_size=1, max_size=4),
         seed=st.integers(0, 2**31), logits=one_of(1, 40, 2**25), eager=one_of(0, 12, 128))
def test_pair_logps_are_the_cores_on_generated_pairs(lengths, seed, logits, eager):
    model = tiny_lm(vocab_size=20, seed=seed).model.double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "MAX_LOGITS", logits)
        patch.setattr(forward, "EAGER_MAX_LEN", eager)
        assert_same(model, pair_logps(random_pairs(lengths, seed, vocab_size=20)), 1e-9)


@for_all(slow=1_000, masks=st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=4),
         seed=st.integers(0, 2**31), logits=one_of(1, 40, 2**25))
def test_target_loss_is_the_cores_on_generated_masks(masks, seed, logits):
    model, rng = tiny_lm(vocab_size=20, seed=seed).model.double(), Random(seed)
    examples = [Example([rng.randrange(20) for _ in mask], mask) for mask in masks]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "MAX_LOGITS", logits)
        assert_same(model, target_loss(examples), 1e-9)


@pytest.mark.parametrize("max_logits", [1, 7 * 500, 2**24])  # one token at a time, seven, all together
@pytest.mark.parametrize("what", ["pairs", "examples"])
def test_chunks_of_logits_change_neither_values_nor_gradients(monkeypatch, max_logits, what):
    monkeypatch.setattr(losses, "MAX_LOGITS", max_logits)
    lm = tiny_lm()
    compute = pair_logps(encode_pairs(lm, PAIRS)) if what == "pairs" else target_loss(encode_examples(lm, EXAMPLES))
    assert_same(lm.model, compute, 1e-4)
    assert_same(lm.model.double(), compute, 1e-10)


def test_never_more_logits_than_allowed_are_computed_at_once(monkeypatch):
    lm, rows = tiny_lm("fast"), []
    lm.model.head.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    examples = encode_examples(lm, EXAMPLES)
    targets = sum(sum(example.mask) for example in examples)
    lm.target_loss(examples)
    assert rows == [targets]  # nothing but the targets
    monkeypatch.setattr(losses, "MAX_LOGITS", 7 * 500)
    lm.target_loss(examples)
    assert max(rows[1:]) == 7 and sum(rows[1:]) == targets


@pytest.mark.parametrize("max_len", [0, 128])
def test_attention_written_out_is_that_of_the_fused_kernel(random_decoder, monkeypatch, max_len):
    monkeypatch.setattr(forward, "EAGER_MAX_LEN", max_len)
    for n_kv_heads in (1, 2, 4):
        model = random_decoder(std=0.2, n_kv_heads=n_kv_heads).double()
        assert_same(model, pair_logps(UNEQUAL_PAIRS), 1e-10)


# Gradient checkpointing.


@pytest.mark.parametrize("what", ["pairs", "examples"])
@pytest.mark.parametrize("eager_max_len", [0, 128])
def test_gradient_checkpointing_gives_the_same_values_and_gradients(random_decoder, monkeypatch, what, eager_max_len):
    monkeypatch.setattr(forward, "EAGER_MAX_LEN", eager_max_len)
    lm = FastLM(random_decoder(std=0.2), None)
    compute = pair_logps(UNEQUAL_PAIRS) if what == "pairs" else target_loss(UNEQUAL_EXAMPLES)
    (expected, wanted), blocks_run = values_and_gradients(lm, compute), []
    lm.prepare_training(TrainConfig(gradient_checkpointing=True))
    lm.model.blocks[0].attention.qkv_proj.register_forward_hook(lambda *_: blocks_run.append(1))
    values, gradients = values_and_gradients(lm, compute)
    assert len(blocks_run) == 2  # forward, and once more in the backward pass
    assert torch.equal(values, expected)
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-6, rtol=1e-5)


def test_gradient_checkpointing_repeats_the_same_dropout(random_decoder):
    gradients = []
    for checkpointing in (False, True):
        lm = FastLM(random_decoder(std=0.2), None)
        lm.prepare_training(TrainConfig(gradient_checkpointing=checkpointing, dropout=0.3))
        torch.manual_seed(1)
        gradients.append(values_and_gradients(lm, pair_logps(UNEQUAL_PAIRS)))
    (values, first), (other_values, second) = gradients
    assert torch.equal(values, other_values)
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-6, rtol=1e-5)


# Packed pairs.


def test_pairs_are_packed_without_padding():
    packed = PackedPairs([EncodedPair([1, 2], [3], [4, 5]), EncodedPair([6], [7, 8], [9])], "cpu")
    assert packed.ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9]]
    assert packed.positions.tolist() == [[0, 1, 2, 2, 3, 0, 1, 2, 1]]
    assert packed.targets.tolist() == [2, 3, 4, 6, 7, 8]  # 3, 4, 5, 7, 8, 9
    assert packed.sources.tolist() == [1, 1, 3, 5, 6, 5]  # 2, 2, 4, 6, 7, 6
    assert packed.response_lengths.tolist() == [1, 2, 2, 1]
    visible = [[key for key in range(5) if packed.attention.mask[0, 0, query, key]] for query in range(5)]
    assert visible == [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 1, 3, 4]]


def test_a_prompt_is_computed_once_for_both_responses():
    lm, tokens = tiny_lm("fast"), []
    lm.model.embed.register_forward_hook(lambda module, inputs, output: tokens.append(inputs[0].numel()))
    pairs = encode_pairs(lm, PAIRS)
    lm.pair_logps(pairs)
    assert tokens == [sum(len(part) for pair in pairs for part in pair)]


def stored_numbers(run, *known):
    """How many numbers autograd stores for the backward pass of run(), without tensors that exist anyway."""
    sizes = {}
    existing = {x.untyped_storage().data_ptr() for x in known}

    def note(x):
        if x.untyped_storage().data_ptr() not in existing:
            sizes[x.untyped_storage().data_ptr()] = (x, x.untyped_storage().nbytes() // x.element_size())
        return x
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        run()
    return sum(size for _, size in sizes.values())


def test_moving_tokens_to_the_grid_stores_nothing_for_the_backward_pass():
    packed = PackedPairs([EncodedPair([1, 2], [3], [4, 5]), EncodedPair([6], [7, 8], [9])], "cpu")
    heads = torch.randn(len(packed.grid_index), 2, 4, requires_grad=True)
    assert stored_numbers(lambda: packed._to_grid(heads * 1.0), packed.grid_index) == 0


# The forward pass.


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_selected_hidden_states_are_those_of_the_decoder(random_decoder, shape):
    model = random_decoder(std=0.2, **shape).double()
    ids = torch.randint(60, (3, 11), generator=torch.Generator().manual_seed(1))
    expected, positions = model.hidden_states(ids), torch.arange(11)[None]
    whole = final_hidden(model, ids, positions, causal_attention)
    torch.testing.assert_close(whole, expected, atol=1e-10, rtol=1e-10)
    for select in (torch.tensor([0, 10, 11, 32]), torch.tensor([5, 5, 2]), torch.zeros(0, dtype=torch.long)):
        selected = final_hidden(model, ids, positions, causal_attention, select)
        torch.testing.assert_close(selected, expected.flatten(0, 1)[select], atol=1e-10, rtol=1e-10)


def test_attention_of_grouped_heads_is_that_of_the_kernel():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 6, 5, 8, generator=generator)
    k, v = torch.randn(2, 2, 2, 9, 8, generator=generator)
    mask = torch.rand(2, 1, 5, 9, generator=generator) < 0.5
    mask[..., 0] = True
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(grouped_attention(q, k, v, mask), expected)
