"""bfloat16 on a CPU: logits and losses are those of transformers and of float64 up to rounding, and training works."""

import math

import pytest
import torch
from tiny import PAIRS, as_folder, random_llama, tiny_lm, tiny_model, with_log

from minisr.dpo import DPOConfig, encode_pairs, train_dpo
from minisr.fast import forward
from minisr.fast.cache import PrefixCache
from minisr.fast.decode_step import DecodeStep
from minisr.fast.sampler import extend
from minisr.interop.source import load_source
from minisr.lm import ResponseConfig
from minisr.sft import encode_examples

LONG_PAIRS = [{"prompt": "Write a story.", "chosen": "Once there was a fox. " * 9, "rejected": "The end. " * 20}]


def as_examples(pairs):
    return [{"prompt": pair["prompt"], "response": pair["chosen"] + pair["rejected"]} for pair in pairs]


LONG_EXAMPLES = as_examples(LONG_PAIRS + PAIRS)


def error(logits, exact):
    return (logits.float() - exact).square().mean().sqrt().item()


@torch.no_grad()
def test_logits_are_as_near_to_float32_as_those_of_transformers(tmp_path):
    llama = random_llama()
    model, _ = load_source(str(as_folder(llama, tmp_path)))
    ids = torch.randint(60, (3, 40), generator=torch.Generator().manual_seed(1))
    exact = llama(ids).logits
    theirs, model = llama.bfloat16()(ids).logits, model.bfloat16()
    cache = PrefixCache(model.config, 3, 40, model.embed.weight)
    last = torch.arange(3) * 20 + 19
    logits = [model.head(extend(model, ids[:, :20], cache, select=last))]
    step = DecodeStep(model, 40)
    logits = torch.stack([*logits, *(step(token, cache) for token in ids[:, 20:].unbind(1))], 1)  # (3, 21, V)
    assert logits.dtype == torch.bfloat16 and exact.std() > 1
    bound = error(theirs[:, 19:], exact[:, 19:])
    assert 0 < error(logits, exact[:, 19:]) < 1.3 * bound < 0.05 * exact.std()


@pytest.mark.parametrize("max_len", [0, 320], ids=["fused kernel", "matrix products"])
def test_log_probabilities_and_gradients_are_those_of_float64_up_to_rounding(monkeypatch, max_len):
    monkeypatch.setattr(forward, "EAGER_MAX_LEN_BFLOAT16", max_len)
    found = []
    for dtype in (torch.float64, torch.bfloat16):
        lm = tiny_lm("fast", context=320)
        lm.model.to(torch.bfloat16).to(dtype)  # the same weights
        chosen, rejected = lm.pair_logps(encode_pairs(lm, PAIRS + LONG_PAIRS))
        loss = lm.target_loss(encode_examples(lm, LONG_EXAMPLES))
        ((chosen - rejected).sum() + loss).backward()
        values = torch.stack([*chosen, *rejected, loss]).double()
        found.append((values, lm.model.blocks[0].attention.qkv_proj.weight.grad))
    (exact, wanted), (values, gradient) = found
    torch.testing.assert_close(values, exact, rtol=0.01, atol=0.05)
    assert torch.corrcoef(torch.stack([gradient.double().flatten(), wanted.flatten()]))[0, 1] > 0.99


@pytest.mark.parametrize("what", ["pairs", "examples"])
def test_attention_is_matrix_products_where_these_are_faster(monkeypatch, what):
    used = []
    eager = forward.MaskedAttention.eager
    monkeypatch.setattr(forward.MaskedAttention, "eager", lambda *args: used.append(1) or eager(*args))

    def is_eager(dtype, pairs):
        used.clear()
        lm = tiny_lm("fast", context=800)
        lm.model.to(dtype)
        if what == "pairs":
            lm.pair_logps(encode_pairs(lm, pairs))
        else:
            lm.target_loss(encode_examples(lm, as_examples(pairs)))
        return bool(used)
    longest = max(len(example.ids) for example in encode_examples(tiny_lm(context=800), LONG_EXAMPLES))
    assert forward.EAGER_MAX_LEN < longest <= forward.EAGER_MAX_LEN_BFLOAT16
    assert is_eager(torch.bfloat16, LONG_PAIRS) and not is_eager(torch.float32, LONG_PAIRS)
    assert is_eager(torch.float32, PAIRS) == (what == "pairs")
    assert not is_eager(torch.bfloat16, [LONG_PAIRS[0] | {"rejected": "The end. " * 150}])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_sampled_token_is_one_of_the_vocabulary_and_the_same_seed_gives_the_same(temperature):
    lm = tiny_lm("fast")
    lm.model.bfloat16()
    vocab_size = lm.model.config.vocab_size
    config = ResponseConfig(temperature=temperature, top_p=0.9, max_new_tokens=40)
    rows = lm.sample([[5, 6, 7], [8, 9]], 6, config, 0, (2,))
    ids = [token for completions in rows for completion in completions for token in completion.ids]
    assert len(ids) > 12 and all(0 <= token < vocab_size for token in ids)
    assert rows == lm.sample([[5, 6, 7], [8, 9]], 6, config, 0, (2,))


def test_the_first_dpo_loss_is_log_2_and_training_reduces_it():
    lm = with_log(tiny_lm("fast"))
    lm.model.bfloat16()
    config = DPOConfig(learning_rate=1e-2, epochs=5, batch_size=3, nll_weight=0.0)
    log = train_dpo(lm, PAIRS, [], config, seed=0).log
    assert log[0]["dpo_loss"] == pytest.approx(math.log(2), abs=1e-6) and log[-1]["dpo_loss"] < 0.3


def test_the_weights_stay_bfloat16():
    lm = tiny_lm("fast")
    lm.model.bfloat16()
    trained = train_dpo(lm, PAIRS, [], DPOConfig(learning_rate=1e-2, batch_size=3), seed=0)
    assert {p.dtype for p in trained.model.parameters()} == {torch.bfloat16}
    assert not torch.equal(trained.model.embed.weight, tiny_model().bfloat16().embed.weight)
