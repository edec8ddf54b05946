"""minisr bench: what it counts is right by hand, and doing without a trick changes no number."""

import json
from unittest.mock import patch

import pytest
import torch
from minisr.fast.step import Step
from tiny import PAIRS, tiny_model, tiny_tokenizer

from minisr import bench, dpo
from minisr.cli import main
from minisr.sampler import Sample, SampleConfig, sample
from minisr.train import OptimConfig

# Of tiny_model: per block q, out 16 x 16, k, v 16 x 8, three matrices 16 x 24, two norms of 16.
BLOCKS = 2 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24 + 2 * 16)
LAST = 3 * 16 * 24  # the last feed-forward
HEAD = 16 * len(tiny_tokenizer())
WEIGHT_BYTES = 4 * (BLOCKS + HEAD + 16)
HEADER = list(range(30, 46))  # as much as is worth sharing
PROMPTS = [[*HEADER, *rest] for rest in ([5, 6, 7, 8], [5, 6, 9, 10], [5, 6, 7, 11])]


def drawn(*lengths):
    return [[Sample([9] * n, True) for n in row] for row in lengths]


def test_sampling_is_counted_as_by_hand():
    cost = bench.sampling_cost(tiny_model(), [[*HEADER, 3], [*HEADER, 4, 5]], drawn([2, 1], [3, 3]))
    assert cost.tokens == 9
    # The shared header once; 3 and 4, 5 once; all tokens but each row's last.
    # The last feed-forward and the head: at the end of 2 prompts, and for the 9 - 4 tokens that were read.
    assert cost.flops == 2 * ((BLOCKS - LAST) * (16 + 1 + 2 + 9 - 4) + (LAST + HEAD) * (2 + 9 - 4))
    # Two steps after the prefill read keys: the shared 16; 3 in one step, 4 and 5 in both; the rows' own.
    keys = 16 * 2 + 1 * 1 + 2 * 2 + (1 + 0 + 1 + 2 + 1 + 2)
    assert cost.bytes == 3 * WEIGHT_BYTES + keys * 2 * 2 * 8 * 4  # k and v, layers, width of a head, float32


def test_scoring_and_training_are_counted_as_by_hand():
    forward = bench.scoring_cost(tiny_model(), computed=10, predicted=4, batches=2, training=False)
    assert forward == (10, 2 * ((BLOCKS - LAST) * 10 + (LAST + HEAD) * 4), 2 * WEIGHT_BYTES)
    assert bench.scoring_cost(tiny_model(), 10, 4, 2, training=True).flops == 3 * forward.flops


def test_the_sampler_computes_what_is_counted(monkeypatch):
    model, computed, predicted = tiny_model(), [], []
    model.blocks[0].register_forward_pre_hook(lambda _, args: computed.append(args[0].shape[:2].numel()))
    for part in (model.blocks[1].feed_forward, model.head):
        part.register_forward_pre_hook(lambda _, args: predicted.append(args[0].shape[:-1].numel()))

    def counted(step, ids, cache):
        computed.append(len(ids))
        predicted.extend([len(ids)] * 2)
        return forward(step, ids, cache)
    forward = Step.__call__
    monkeypatch.setattr(Step, "__call__", counted)
    made = sample(model, PROMPTS, 2, SampleConfig(max_new_tokens=5), key=1, stop=(-1,))
    cost = bench.sampling_cost(model, PROMPTS, made)
    assert cost.tokens == 30
    assert 2 * cost.flops == 2 * (2 * (BLOCKS - LAST) * sum(computed) + (LAST + HEAD) * sum(predicted))
    assert cost.bytes >= WEIGHT_BYTES * 5


@pytest.mark.parametrize("trick", ["prefix-sharing", "dropping"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_without_a_trick_the_samples_are_the_same(decoder, trick, temperature):
    prompts = [*PROMPTS, [*HEADER, 5, 6, 7, 8, 9, 10, 11]]

    def draw():
        return sample(decoder, prompts, 3, SampleConfig(temperature, 0.9, 24), key=3,
                      stop=tuple(range(0, 500, 20)), with_logps=True)
    with patch.object(*bench.PLAIN[trick]):
        plain = draw()
    made = draw()
    assert [[s.ids for s in row] for row in plain] == [[s.ids for s in row] for row in made]
    assert len({len(s.ids) for row in made for s in row}) > 1  # else no row would have left early
    for row, other in zip(plain, made):
        assert [s.logp for s in row] == pytest.approx([s.logp for s in other], abs=1e-4)


def test_without_prompt_sharing_the_log_probabilities_and_gradients_are_the_same():
    def made():
        model = tiny_model()
        chosen, rejected, nll = dpo.pair_logps(model, pairs)
        losses, *_ = dpo.dpo_loss(chosen, rejected, chosen.detach() + 1, rejected.detach(), 0.1)
        (losses + nll).sum().backward()
        return chosen, rejected, nll, model.blocks[0].attention.qkv_proj.weight.grad
    pairs = dpo.encode_pairs(tiny_tokenizer(), PAIRS, 96)
    shared = made()
    with patch.object(*bench.PLAIN["prompt-sharing"]):
        torch.testing.assert_close(made(), shared, atol=1e-5, rtol=1e-5)


def test_a_training_step_leaves_the_weights_and_gives_the_loss():
    model, pairs = tiny_model(), dpo.encode_pairs(tiny_tokenizer(), PAIRS, 96)
    before, trainer = model.head.weight.clone(), bench.Trainer(model, OptimConfig())
    losses = [trainer.step(part * dpo.pair_logps(model, pairs)[2].mean() for part in (0.25, 0.75))
              for _ in range(2)]
    assert losses[0] == losses[1] > 0 and torch.equal(model.head.weight, before)
    assert not model.training and trainer.chosen[0].state  # it has made its step


def test_the_last_line_is_json_with_every_field(monkeypatch, capsys):
    monkeypatch.setitem(bench.SIZES, "world", bench.Size(4, 2, 2, 6, 2))
    assert main("bench --model tiny --repeats 2 --threads 1 --without dropping".split()) == 0
    table = capsys.readouterr().out.splitlines()
    document = json.loads(table[-1])
    assert document["machine"].keys() >= {"cpu", "cores", "threads", "memory_gb", "python", "torch", "minisr",
                                          "commit", "bandwidth_gb_s", "matmul_gflop_s"}
    assert document["without"] == ["dropping"]
    assert [result["work"] for result in document["results"]] == list(bench.WORKS)
    for result, line in zip(document["results"], table[1:]):
        assert line.split()[:2] == [result["work"], "tiny"]
        assert result["model"] == "tiny" and result["unit"] == "tokens/s" and len(result["runs"]) == 2
        assert result["peer"] is result["ratio"] is result["theirs"] is None
        assert min(result["runs"]) <= result["ours"] <= max(result["runs"])
        assert 0 < result["seconds_min"] <= result["seconds_median"] <= result["seconds_max"]
        assert 0 < result["share_of_limit"] < 1 and result["peak_mb"] > 10


@pytest.mark.parametrize("options, told", [
    ("--only dreaming", "dreaming"), ("--without luck", "luck"), ("--model nowhere/M1", "nowhere/M1"),
    ("--repeats 0", "--repeats"), ("--threads -1", "--threads"), ("--threads 1025", "1024"),
    ("--model=", "has neither"), ("--repeats x", "'x'")])
def test_a_wrong_option_is_one_line_and_code_2(options, told, capsys):
    try:
        code = main(["bench", *options.split()])
    except SystemExit as end:  # of argparse
        code = end.code
    printed = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and len(printed) == 1 and told in printed[0]
