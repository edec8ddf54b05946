"""Log-probabilities of responses and the DPO loss, against hand arithmetic, enumeration and TRL."""

from itertools import product
from math import log

import numpy as np
import pytest
import torch
from tiny import PAIRS, as_llama, bigram, llama_weights, tiny_model, tiny_tokenizer

from minisr import InputError, dpo, sft
from minisr.dpo import dpo_loss, encode_pairs, pair_logps, reference_logps, sequence_logprobs
from minisr.sft import collate


def logprobs(model, rows: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """Of (prompt, response) ids, in one padded batch."""
    ids, mask = collate([(x + y, [False] * len(x) + [True] * len(y)) for x, y in rows], "cpu")
    return sequence_logprobs(model(ids), ids, mask)


def encoded() -> list[tuple]:
    return encode_pairs(tiny_tokenizer(), PAIRS, context=96)


def test_logits_before_a_token_predict_it():
    model = bigram({k: k + 1 for k in range(11)}, vocab_size=12)
    right, wrong = logprobs(model, [([2, 3], [4, 5, 6, 7]), ([2, 3], [3, 4, 5, 6])]).tolist()
    assert right == pytest.approx(0, abs=1e-6) and wrong < -50


@pytest.mark.parametrize("prompt", [[0], [2, 1, 1]])
def test_probabilities_of_all_responses_of_one_length_sum_to_1(prompt):
    every = [(prompt, list(response)) for response in product(range(3), repeat=4)]
    with torch.no_grad():
        logps = logprobs(tiny_model(vocab_size=3), every)
    assert logps.exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert logps.exp().max() < 0.9  # or one string alone would do


def test_a_pair_longer_than_the_context_is_refused_by_its_number():
    longest = max(len(prompt) + max(map(len, sides)) for prompt, *sides in encoded())
    assert len(encode_pairs(tiny_tokenizer(), PAIRS, longest)) == 3
    long = {**PAIRS[0], "rejected": "\n" * longest}
    with pytest.raises(InputError, match=rf"pair 3 .*context is {longest}"):
        encode_pairs(tiny_tokenizer(), [*PAIRS[:2], long], longest)


def test_log_probabilities_are_summed_not_averaged():
    logits = torch.zeros(2, 9, 4)  # every token has probability 1/4
    ids = torch.ones(2, 9, dtype=torch.long)
    mask = torch.tensor([[t in (5, 6) for t in range(9)], [t in (5, 6, 7, 8) for t in range(9)]])
    assert sequence_logprobs(logits, ids, mask).tolist() == pytest.approx([2 * log(1 / 4), 4 * log(1 / 4)])


def test_prompt_and_padding_bear_no_gradient():
    [[prompt, _, rejected], *_] = encoded()
    row, mask = prompt + rejected, [False] * len(prompt) + [True] * len(rejected)
    ids, mask = collate([(row, mask), (row + [5] * 4, [*mask, *[False] * 4])], "cpu")
    torch.manual_seed(0)
    logits = torch.randn(*ids.shape, len(tiny_tokenizer()), requires_grad=True)
    sequence_logprobs(logits, ids, mask).sum().backward()
    assert torch.equal(logits.grad.abs().sum(-1)[:, :-1] > 0, mask[:, 1:])
    assert not logits.grad[:, -1].any()  # it predicts what lies beyond


def plain_logps(model, pairs):
    """log p of each chosen and rejected response, as a row of its own without padding."""
    return [logprobs(model, [(prompt, side)]) for prompt, *sides in pairs for side in sides]


@pytest.mark.parametrize("logits", [1, 4000, 2**24])
def test_packed_pairs_have_the_log_probabilities_and_gradients_of_plain_rows(monkeypatch, logits):
    monkeypatch.setattr(sft, "LOGITS", logits)
    model, plain, pairs = tiny_model(), tiny_model(), encoded()
    assert len({len(ids) for pair in pairs for ids in pair}) > 3  # or nothing would be padded
    chosen, rejected, a_token = pair_logps(model, pairs)
    wanted = torch.cat(plain_logps(plain, pairs)).view(-1, 2)
    torch.testing.assert_close(torch.stack([chosen, rejected], 1), wanted, atol=1e-4, rtol=1e-5)
    lengths = torch.tensor([len(side) for _, side, _ in pairs])
    torch.testing.assert_close(a_token, -wanted[:, 0] / lengths, atol=1e-5, rtol=1e-5)
    (chosen * 0.7 - rejected * 0.3).sum().backward()
    (wanted * torch.tensor([0.7, -0.3])).sum().backward()
    for weight, other in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(weight.grad, other.grad, atol=1e-4, rtol=1e-4)


def test_neither_response_sees_the_other():
    model, [(prompt, chosen, rejected), *_] = tiny_model(), encoded()
    first = pair_logps(model, [(prompt, chosen, rejected)])
    other = pair_logps(model, [(prompt, chosen, rejected[::-1])])
    shorter = pair_logps(model, [(prompt, chosen[:2], rejected)])
    assert first[0].item() == pytest.approx(other[0].item(), abs=1e-5)
    assert first[1].item() == pytest.approx(shorter[1].item(), abs=1e-5)
    assert first[1].item() != pytest.approx(other[1].item(), abs=1e-2)


def loss_by_hand(pc, pr, rc, rr, beta):
    """float64 numpy, after Rafailov et al. (2023), equation 7 and its gradient."""
    margin = beta * ((np.float64(pc) - rc) - (np.float64(pr) - rr))
    slope = -beta / (1 + np.exp(margin))  # d loss / d pc
    return np.logaddexp(0, -margin), [slope, -slope, -slope, slope]


def test_policy_equal_to_reference_loses_log_2_and_earns_nothing():
    chosen, rejected = torch.tensor([-3.0, -40.0]), torch.tensor([-9.0, -1.0])
    loss, r_w, r_l = dpo_loss(chosen, rejected, chosen, rejected, beta=0.1)
    assert loss.tolist() == pytest.approx([log(2)] * 2) and r_w.tolist() == r_l.tolist() == [0, 0]


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
    four = [torch.tensor([x], requires_grad=True) for x in (-2.0, -7.0, -4.0, -3.0)]
    _, r_w, r_l = dpo_loss(*four, beta=0.5)
    assert (r_w.item(), r_l.item()) == (1.0, -2.0) and not r_w.requires_grad and not r_l.requires_grad


def test_loss_and_gradient_equal_a_float64_implementation():
    rng = np.random.default_rng(0)
    for beta in (0.01, 0.1, 1.0):
        numbers = rng.normal(-30, 8, size=(4, 50))
        four = [torch.tensor(x, requires_grad=True) for x in numbers]  # float64 too
        loss, _, _ = dpo_loss(*four, beta)
        loss.sum().backward()
        expected, slopes = loss_by_hand(*numbers, beta)
        assert loss.tolist() == pytest.approx(expected.tolist(), abs=1e-10)
        for side, slope in zip(four, slopes):
            assert side.grad.tolist() == pytest.approx(slope.tolist(), abs=1e-10)
        assert (four[0].grad < 0).all() and (four[1].grad > 0).all()  # a step raises chosen, lowers rejected


def test_attention_written_out_is_the_kernels(monkeypatch):
    made = []
    for short in (0, 128):
        monkeypatch.setattr(dpo, "SHORT", short)
        model = tiny_model()
        chosen, rejected, nll = pair_logps(model, encoded())
        (chosen - 2 * rejected + nll).sum().backward()
        made.append((chosen, rejected, nll, *(weight.grad for weight in model.parameters())))
    torch.testing.assert_close(made[0], made[1], atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of names that trl uses inside transformers
def test_loss_and_every_weights_gradient_equal_trls(tmp_path):
    trl, transformers = pytest.importorskip("trl"), pytest.importorskip("transformers")
    datasets, tokenizers = pytest.importorskip("datasets"), pytest.importorskip("tokenizers")
    # Each a prompt, a chosen and a rejected response.
    pairs = [([1, 3, 4], [5, 6, 2], [7, 2]), ([1, 9], [8, 8, 2], [7, 3, 3, 10, 2])]
    policy, reference = tiny_model(vocab_size=11, seed=1), tiny_model(vocab_size=11, seed=2)

    loss = dpo_loss(*pair_logps(policy, pairs)[:2], *reference_logps(reference, pairs, 2), beta=0.3)[0].mean()
    loss.backward()

    # A trainer wants a tokenizer and some text; the batch is then made of ids, by trl's own collator.
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(11)}, unk_token="w0"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", pad_token="w0")
    text = datasets.Dataset.from_list([{"prompt": "w3", "chosen": "w4", "rejected": "w5"}])
    config = trl.DPOConfig(str(tmp_path), beta=0.3, use_cpu=True, bf16=False, report_to=[])
    trainer = trl.DPOTrainer(as_llama(policy), as_llama(reference), config, train_dataset=text,
                             processing_class=tokenizer)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    batch = trainer.data_collator([dict(zip(names, pair)) for pair in pairs])
    theirs = trainer.compute_loss(trainer.model, batch)
    theirs.backward()

    assert theirs.item() == pytest.approx(loss.item(), abs=1e-6) and abs(loss.item() - log(2)) > 0.01
    ours = llama_weights(policy.config, {name: weight.grad for name, weight in policy.named_parameters()})
    for name, weight in trainer.model.named_parameters():
        assert torch.allclose(weight.grad, ours[name], atol=1e-6), name
