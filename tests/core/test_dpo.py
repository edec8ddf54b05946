"""Log-probabilities of responses and the DPO loss, against hand arithmetic, enumeration and TRL."""

from itertools import product
from math import log

import numpy as np
import pytest
import torch
from tiny import ENGINES, PAIRS, as_llama, chain, llama_weights, tiny_lm, tiny_model, tiny_tokenizer

from minisr import InputError
from minisr.dpo import EncodedPair, dpo_loss, encode_pairs, sequence_logprobs
from minisr.runner.variants import smoothed_dpo_loss
from minisr.sft import right_pad


def logprobs(model, rows: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """Of (prompt, response) ids, in one padded batch."""
    ids, mask = right_pad([EncodedPair(prompt, response, []).example(response) for prompt, response in rows], "cpu")
    return sequence_logprobs(model(ids), ids, mask)


# Log-probabilities.


def test_logits_before_a_token_predict_it():
    model = chain({k: k + 1 for k in range(11)}, vocab_size=12)
    right, wrong = logprobs(model, [([2, 3], [4, 5, 6, 7]), ([2, 3], [3, 4, 5, 6])]).tolist()
    assert right == pytest.approx(0, abs=1e-6) and wrong < -50


@pytest.mark.parametrize("prompt", [[0], [2, 1, 1]])
def test_probabilities_of_all_responses_of_one_length_sum_to_1(prompt):
    responses = [(prompt, list(response)) for response in product(range(3), repeat=4)]
    with torch.no_grad():
        logps = logprobs(tiny_model(vocab_size=3), responses)
    assert logps.exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert logps.exp().max() < 0.9  # else one response alone would do


def test_log_probabilities_are_summed_not_averaged():
    logits = torch.zeros(2, 9, 4)  # every token has probability 1/4
    ids = torch.ones(2, 9, dtype=torch.long)
    mask = torch.tensor([[t in (5, 6) for t in range(9)], [t in (5, 6, 7, 8) for t in range(9)]])
    assert sequence_logprobs(logits, ids, mask).tolist() == pytest.approx([2 * log(1 / 4), 4 * log(1 / 4)])


def test_prompt_and_padding_bear_no_gradient():
    [pair, *_] = encode_pairs(tiny_lm(), PAIRS)
    ids, mask = right_pad([pair.example(pair.rejected), pair.example(pair.rejected + [5] * 4)], "cpu")
    mask[1, -4:] = False
    torch.manual_seed(0)
    logits = torch.randn(*ids.shape, len(tiny_tokenizer()), requires_grad=True)
    sequence_logprobs(logits, ids, mask).sum().backward()
    assert torch.equal(logits.grad.abs().sum(-1)[:, :-1] > 0, mask[:, 1:])
    assert not logits.grad[:, -1].any()  # it predicts what lies beyond


def test_a_pair_longer_than_max_seq_len_is_rejected_by_its_number():
    pairs = encode_pairs(tiny_lm(), PAIRS)
    longest = max(len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) for pair in pairs)
    lm = tiny_lm(context=longest)
    assert encode_pairs(lm, PAIRS) == pairs
    for side in ("chosen", "rejected"):
        long = {**PAIRS[0], side: "\n" * longest}
        with pytest.raises(InputError, match=rf"pair 3 .*max_seq_len is {longest}"):
            encode_pairs(lm, [*PAIRS[:2], long])


def test_encoded_responses_end_with_the_end_token():
    tokenizer = tiny_tokenizer()
    for pair, encoded in zip(PAIRS, encode_pairs(tiny_lm(), PAIRS)):
        for side in ("chosen", "rejected"):
            ids, mask = tokenizer.encode_chat(pair["prompt"], pair[side])
            assert encoded.example(getattr(encoded, side)) == (ids, mask) and ids[-1] == tokenizer.eos_id


def test_pairs_have_the_log_probabilities_and_gradients_of_single_rows(engine):
    lm, plain, pairs = tiny_lm(engine), tiny_model(), encode_pairs(tiny_lm(), PAIRS)
    assert len({len(ids) for pair in pairs for ids in pair}) > 3  # else nothing would be padded
    chosen, rejected = lm.pair_logps(pairs)
    rows = [logprobs(plain, [(pair.prompt, side)]) for pair in pairs for side in (pair.chosen, pair.rejected)]
    expected = torch.cat(rows).view(-1, 2)
    torch.testing.assert_close(torch.stack([chosen, rejected], 1), expected, atol=1e-4, rtol=1e-5)
    (chosen * 0.7 - rejected * 0.3).sum().backward()
    (expected * torch.tensor([0.7, -0.3])).sum().backward()
    for weight, other in zip(lm.model.parameters(), plain.parameters()):
        torch.testing.assert_close(weight.grad, other.grad, atol=1e-4, rtol=1e-4)


def test_neither_response_sees_the_other(engine):
    lm, [pair, *_] = tiny_lm(engine), encode_pairs(tiny_lm(), PAIRS)
    first = lm.pair_logps([pair])
    other = lm.pair_logps([pair._replace(rejected=pair.rejected[::-1])])
    shorter = lm.pair_logps([pair._replace(chosen=pair.chosen[:2])])
    assert first[0].item() == pytest.approx(other[0].item(), abs=1e-5)
    assert first[1].item() == pytest.approx(shorter[1].item(), abs=1e-5)
    assert first[1].item() != pytest.approx(other[1].item(), abs=1e-2)


# The loss.


def loss_by_hand(pc, pr, rc, rr, beta):
    """float64 numpy, after Rafailov et al. (2023), equation 7 and its gradient."""
    margin = beta * ((np.float64(pc) - rc) - (np.float64(pr) - rr))
    slope = -beta / (1 + np.exp(margin))  # d loss / d pc
    return np.logaddexp(0, -margin), [slope, -slope, -slope, slope]


def test_a_policy_equal_to_the_reference_has_loss_log_2_and_no_reward():
    chosen, rejected = torch.tensor([-3.0, -40.0]), torch.tensor([-9.0, -1.0])
    loss, chosen_reward, rejected_reward = dpo_loss(chosen, rejected, chosen, rejected, beta=0.1)
    assert loss.tolist() == pytest.approx([log(2)] * 2)
    assert chosen_reward.tolist() == rejected_reward.tolist() == [0, 0]


@pytest.mark.parametrize("difference, loss", [
    (0, 0.693147), (10, 0.313262), (20, 0.126928), (-10, 1.313262), (-20, 2.126928), (-5000, 500), (5000, 0),
])
def test_the_loss_by_hand(difference, loss):  # log(1 + exp(-0.1 * difference))
    zero = torch.zeros(1)
    assert dpo_loss(zero + difference, zero, zero, zero, 0.1)[0].item() == pytest.approx(loss, abs=1e-6)
    assert dpo_loss(zero, zero - difference, zero, zero, 0.1)[0].item() == pytest.approx(loss, abs=1e-6)
    assert dpo_loss(zero, zero, zero - difference, zero, 0.1)[0].item() == pytest.approx(loss, abs=1e-6)
    assert dpo_loss(zero, zero, zero, zero + difference, 0.1)[0].item() == pytest.approx(loss, abs=1e-6)


def test_rewards_are_beta_times_the_log_ratio_and_carry_no_gradient():
    logps = [torch.tensor([x], requires_grad=True) for x in (-2.0, -7.0, -4.0, -3.0)]
    _, chosen_reward, rejected_reward = dpo_loss(*logps, beta=0.5)
    assert (chosen_reward.item(), rejected_reward.item()) == (1.0, -2.0)
    assert not chosen_reward.requires_grad and not rejected_reward.requires_grad


def test_loss_and_gradient_equal_a_float64_implementation():
    rng = np.random.default_rng(0)
    for beta in (0.01, 0.1, 1.0):
        numbers = rng.normal(-30, 8, size=(4, 50))
        logps = [torch.tensor(x, requires_grad=True) for x in numbers]  # float64 too
        loss, _, _ = dpo_loss(*logps, beta)
        loss.sum().backward()
        expected, slopes = loss_by_hand(*numbers, beta)
        assert loss.tolist() == pytest.approx(expected.tolist(), abs=1e-10)
        for side, slope in zip(logps, slopes):
            assert side.grad.tolist() == pytest.approx(slope.tolist(), abs=1e-10)
        assert (logps[0].grad < 0).all() and (logps[1].grad > 0).all()  # a step raises chosen, lowers rejected


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of names that trl uses inside transformers
# For one pair, TRL's "aot" is the sigmoid loss with smoothed labels. (Its "sigmoid" ignores label_smoothing.)
@pytest.mark.parametrize("smoothing, loss_type, n_pairs", [(0.0, "sigmoid", 2), (0.15, "aot", 1)])
def test_loss_and_every_weights_gradient_equal_trls(smoothing, loss_type, n_pairs, engine, tmp_path):
    trl, transformers = pytest.importorskip("trl"), pytest.importorskip("transformers")
    datasets, tokenizers = pytest.importorskip("datasets"), pytest.importorskip("tokenizers")
    pairs = [EncodedPair([1, 3, 4], [5, 6, 2], [7, 2]), EncodedPair([1, 9], [8, 8, 2], [7, 3, 3, 10, 2])][:n_pairs]
    policy, reference = (ENGINES[engine](tiny_model(vocab_size=11, seed=seed), tokenizer=None) for seed in (1, 2))

    with torch.no_grad():
        reference_logps = reference.frozen_copy().pair_logps(pairs)
    loss_fn = smoothed_dpo_loss(smoothing) if smoothing else dpo_loss
    loss = loss_fn(*policy.pair_logps(pairs), *reference_logps, beta=0.3)[0].mean()
    loss.backward()

    # A trainer wants a tokenizer and some text; the batch is then made of ids, by trl's own collator.
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(11)}, unk_token="w0"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", pad_token="w0")
    text = datasets.Dataset.from_list([{"prompt": "w3", "chosen": "w4", "rejected": "w5"}])
    config = trl.DPOConfig(str(tmp_path), beta=0.3, loss_type=[loss_type], label_smoothing=smoothing, use_cpu=True,
                           bf16=False, report_to=[])
    trainer = trl.DPOTrainer(as_llama(policy.model), as_llama(reference.model), config, train_dataset=text,
                             processing_class=tokenizer)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    batch = trainer.data_collator([dict(zip(names, pair)) for pair in pairs])
    theirs = trainer.compute_loss(trainer.model, batch)
    theirs.backward()

    assert theirs.item() == pytest.approx(loss.item(), abs=1e-6) and abs(loss.item() - log(2)) > 0.01
    ours = llama_weights(policy.model.config, {name: p.grad for name, p in policy.model.named_parameters()})
    for name, weight in trainer.model.named_parameters():
        assert torch.allclose(weight.grad, ours[name], atol=1e-6), name
