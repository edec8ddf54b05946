"""Supervised fine-tuning: the loss on target tokens only, against hand arithmetic, and whole trainings."""

from math import log

import pytest
import torch
from tiny import ENGINES, EXAMPLES, bigram, tiny_lm, tiny_tokenizer, with_log

from minisr import InputError
from minisr.sft import Example, encode_examples, make_target_loss_fns, right_pad, train_sft
from minisr.train import TrainConfig, learning_rate


def test_the_loss_is_the_cross_entropy_of_the_targets_by_hand(engine):
    # What follows token 0, 1 and 2, as weights: after 0, token 1 has probability 3/8.
    weights = torch.tensor([[1.0, 3.0, 4.0], [1.0, 1.0, 1.0], [1.0, 2.0, 3.0]])
    lm = ENGINES[engine](bigram(weights.log()), tokenizer=None)
    examples = [Example([0, 1, 0, 2], [False, False, True, True]),  # 0 after 1, 2 after 0
                Example([2, 1, 0], [False, True, False])]  # 1 after 2
    by_hand = -(log(1 / 3) + log(4 / 8) + log(2 / 6))
    assert lm.target_loss(examples).item() == pytest.approx(by_hand, abs=1e-5)
    [mean] = loss_values(lm, examples, TrainConfig())
    assert mean == pytest.approx(by_hand / 3, abs=1e-5)
    [weighted] = loss_values(lm, examples, TrainConfig(), 0.25)
    assert weighted == pytest.approx(by_hand / 12, abs=1e-5)
    parts = loss_values(lm, examples, TrainConfig(micro_batch=1))
    assert parts == pytest.approx([-(log(1 / 3) + log(4 / 8)) / 3, -log(2 / 6) / 3], abs=1e-5)


def test_the_first_token_is_never_a_target(engine):
    lm = tiny_lm(engine)
    first_too, without = Example([1, 2, 3], [True, True, True]), Example([1, 2, 3], [False, True, True])
    assert lm.target_loss([first_too]).item() == lm.target_loss([without]).item()
    assert loss_values(lm, [first_too], TrainConfig()) == loss_values(lm, [without], TrainConfig())


def loss_values(*arguments):
    return [compute()[0].item() for compute in make_target_loss_fns(*arguments)]


def test_prompt_and_padding_bear_no_loss_and_the_end_token_does(engine):
    # Without blocks, the logits at t depend on the embedding at t alone, so its gradient shows where the loss is.
    tokenizer, embedded = tiny_tokenizer(), []
    lm = ENGINES[engine](bigram(torch.randn(500, 500, generator=torch.Generator().manual_seed(0))), tokenizer)
    lm.model.embed.register_forward_hook(lambda module, inputs, x: (x.retain_grad(), embedded.append(x))[0])
    encoded = encode_examples(lm, EXAMPLES)
    lm.target_loss(encoded).backward()
    bears_loss = embedded[0].grad.abs().sum(-1) > 0  # (B, T)
    for row, example in enumerate(EXAMPLES):
        prompt = len(tokenizer.encode_prompt(example["prompt"]))
        response = len(tokenizer.encode(example["response"])) + 1
        expected = [prompt - 1 <= t < prompt - 1 + response for t in range(bears_loss.shape[1])]
        assert bears_loss[row].tolist() == expected
        last = prompt + response - 1
        assert encoded[row].ids[last] == tokenizer.eos_id and len(encoded[row].ids) == last + 1
        end_alone = Example(encoded[row].ids, [t == last for t in range(last + 1)])
        before_end = encoded[row].ids[last - 1]
        lm.model.zero_grad()
        lm.target_loss([end_alone]).backward()
        # A step makes the end token more probable.
        assert lm.model.head.weight.grad[tokenizer.eos_id, before_end] < 0


def test_padding_does_not_change_the_loss(engine):
    lm = tiny_lm(engine)
    encoded = encode_examples(lm, EXAMPLES)
    assert len({len(example.ids) for example in encoded}) > 1  # else nothing would be padded
    alone = sum(lm.target_loss([example]).item() for example in encoded)
    assert lm.target_loss(encoded).item() == pytest.approx(alone, rel=1e-6)


def test_padding_is_zeros_on_the_right_and_no_target():
    ids, mask = right_pad([Example([5, 6, 7], [False, True, True]), Example([8], [True])], "cpu")
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[False, True, True], [True, False, False]]


def test_the_loss_and_its_gradients_are_those_of_torchs_cross_entropy(engine):
    lm, plain = tiny_lm(engine), tiny_lm()
    examples = encode_examples(lm, EXAMPLES)
    loss = lm.target_loss(examples)
    loss.backward()
    ids, mask = right_pad(examples, "cpu")
    logits, targets = plain.model(ids)[:, :-1][mask[:, 1:]], ids[:, 1:][mask[:, 1:]]
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for weight, other in zip(lm.model.parameters(), plain.model.parameters()):
        torch.testing.assert_close(weight.grad, other.grad, atol=1e-4, rtol=1e-4)


def test_an_example_longer_than_max_seq_len_is_rejected_by_its_number():
    tokenizer = tiny_tokenizer()
    longest = max(len(tokenizer.encode_chat(e["prompt"], e["response"])[0]) for e in EXAMPLES)
    lm = tiny_lm(context=longest)
    assert len(encode_examples(lm, EXAMPLES)) == 3
    long = {"prompt": "Long.", "response": "\n" * longest}
    with pytest.raises(InputError, match=rf"training example 3 .*max_seq_len is {longest}"):
        encode_examples(lm, [*EXAMPLES[:2], long, EXAMPLES[2]])


def test_training_lowers_the_loss(engine):
    config = TrainConfig(learning_rate=1e-2, batch_size=2, epochs=10)
    log = train_sft(with_log(tiny_lm(engine)), EXAMPLES, config, seed=0).log
    assert [record["step"] for record in log] == list(range(20))
    assert [record["learning_rate"] for record in log] == [learning_rate(k, 20, config) for k in range(20)]
    assert max(record["loss"] for record in log[-2:]) < 0.8 * min(record["loss"] for record in log[:2])


def test_training_leaves_the_model_it_began_from_unchanged(engine):
    lm = tiny_lm(engine)
    before = {name: weight.clone() for name, weight in lm.model.state_dict().items()}
    trained = train_sft(lm, EXAMPLES, TrainConfig(learning_rate=1e-2), seed=0)
    assert type(trained) is type(lm) and trained.tokenizer is lm.tokenizer
    for name, weight in lm.model.state_dict().items():
        assert torch.equal(weight, before[name])
        assert not torch.equal(weight, trained.model.state_dict()[name])
