"""minisr bench: its counts equal those made by hand, and no optimization changes a result."""

import json
import sys

import pytest
import torch
from tiny import ENGINES, PAIRS, tiny_lm, tiny_model, tiny_tokenizer

from minisr import bench
from minisr.cli import main
from minisr.dpo import dpo_loss, encode_pairs
from minisr.lm import ResponseConfig
from minisr.sampler import Completion, SamplingConfig
from minisr.sft import encode_examples, make_target_loss_fns
from minisr.train import TrainConfig

# Of tiny_model: per block q, out 16 x 16, k, v 16 x 8, three matrices 16 x 24, two norms of 16.
BLOCKS = 2 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24 + 2 * 16)
LAST = 3 * 16 * 24  # the last feed-forward
HEAD = 16 * len(tiny_tokenizer())
WEIGHT_BYTES = 4 * (BLOCKS + HEAD + 16)
HEADER = list(range(30, 46))  # as many tokens as are worth sharing
PROMPTS = [[*HEADER, *rest] for rest in ([5, 6, 7, 8], [5, 6, 9, 10], [5, 6, 7, 11])]


def drawn(*lengths):
    return [[Completion([9] * n, True) for n in row] for row in lengths]


def test_sampling_is_counted_as_by_hand():
    cost = bench.sampling_cost(tiny_model(), [[*HEADER, 3], [*HEADER, 4, 5]], drawn([2, 1], [3, 3]))
    assert cost.tokens == 9
    # The shared header once; 3 and 4, 5 once; all tokens but each row's last.
    # The last feed-forward and the head: at the end of 2 prompts, and for the 9 - 4 tokens that were computed.
    assert cost.flops == 2 * ((BLOCKS - LAST) * (16 + 1 + 2 + 9 - 4) + (LAST + HEAD) * (2 + 9 - 4))
    # Two steps after the prefill read keys: the shared 16; 3 in one step, 4 and 5 in both; the rows' own.
    keys = 16 * 2 + 1 * 1 + 2 * 2 + (1 + 0 + 1 + 2 + 1 + 2)
    assert cost.bytes == 3 * WEIGHT_BYTES + keys * 2 * 2 * 8 * 4  # k and v, layers, width of a head, float32


def test_of_an_embedding_that_is_not_the_head_no_bytes_are_counted(random_decoder):
    untied, tied = (random_decoder(tie_embeddings=tie) for tie in (False, True))
    assert bench.weight_bytes(untied) == bench.weight_bytes(tied)
    assert bench.weight_bytes(tied) == sum(4 * p.numel() for p in tied.parameters())


def test_scoring_and_training_are_counted_as_by_hand():
    forward = bench.scoring_cost(tiny_model(), computed=10, predicted=4, batches=2, training=False)
    assert forward == (10, 2 * ((BLOCKS - LAST) * 10 + (LAST + HEAD) * 4), 2 * WEIGHT_BYTES)
    assert bench.scoring_cost(tiny_model(), 10, 4, 2, training=True).flops == 3 * forward.flops


needs_fast = pytest.mark.skipif("fast" not in ENGINES, reason="minisr/fast is not installed")


@needs_fast
def test_the_fast_sampler_computes_what_is_counted(monkeypatch):
    from minisr.fast.decode_step import DecodeStep
    lm, computed, predicted = tiny_lm("fast"), [], []
    first, last = lm.model.blocks
    first.attention.qkv_proj.register_forward_pre_hook(lambda _, args: computed.append(args[0].shape[:2].numel()))
    for part in (last.feed_forward, lm.model.head):
        part.register_forward_pre_hook(lambda _, args: predicted.append(args[0].shape[:-1].numel()))

    def counted(step, ids, cache, forward=DecodeStep.__call__):
        computed.append(len(ids))
        predicted.extend([len(ids)] * 2)
        return forward(step, ids, cache)
    monkeypatch.setattr(DecodeStep, "__call__", counted)
    made = lm.sample(PROMPTS, 2, SamplingConfig(max_new_tokens=5), 1, (-1,))
    cost = bench.sampling_cost(lm.model, PROMPTS, made)
    assert cost.tokens == 30
    assert 2 * cost.flops == 2 * (2 * (BLOCKS - LAST) * sum(computed) + (LAST + HEAD) * sum(predicted))
    assert cost.bytes >= WEIGHT_BYTES * 5


def fast_lm_without(optimization, model):
    lm = ENGINES["fast"](model, tiny_tokenizer())
    lm.without = frozenset({optimization} - {None})
    return lm


@needs_fast
@pytest.mark.parametrize("optimization", ["prefix-sharing", "row-dropping", "decode-step", "prefill-groups",
                                          "unsorted-top-p"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_without_an_optimization_of_sampling_the_completions_are_the_same(decoder, optimization, temperature):
    prompts = [*PROMPTS, [*HEADER, 5, 6, 7, 8, 9, 10, 11]]
    config, stop_ids = ResponseConfig(temperature, 0.9, 24), tuple(range(0, 500, 20))
    without, made = (fast_lm_without(name, decoder).sample(prompts, 3, config, 3, stop_ids)
                     for name in (optimization, None))
    assert [[c.ids for c in row] for row in without] == [[c.ids for c in row] for row in made]
    assert len({len(c.ids) for row in made for c in row}) > 1  # else no row would have left early
    for row, other in zip(without, made):
        assert [c.logp for c in row] == [c.logp if c.logp is None else pytest.approx(c.logp, abs=1e-4) for c in other]
    assert any(c.logp for row in made for c in row)


def loss_of(lm, optimization):
    """The loss that an optimization of training concerns."""
    if optimization == "target-selection":
        records = [{"prompt": pair["prompt"], "response": pair["chosen"]} for pair in PAIRS]
        return lm.target_loss(encode_examples(lm, records))
    chosen, rejected = lm.pair_logps(encode_pairs(lm, PAIRS))
    losses, *_ = dpo_loss(chosen, rejected, chosen.detach() + 1, rejected.detach(), 0.1)
    return (losses - chosen / 10).sum()


@needs_fast
@pytest.mark.parametrize("optimization", ["target-selection", "packed-pairs"])
def test_without_an_optimization_of_training_loss_and_gradients_are_the_same(optimization):
    results = []
    for name in (optimization, None):
        lm = fast_lm_without(name, tiny_model())
        loss = loss_of(lm, optimization)
        loss.backward()
        results.append((loss, *(p.grad for p in lm.model.parameters())))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


def test_every_optimization_is_tested_or_needs_a_gpu():
    replacements = pytest.importorskip("minisr.fast.lm").REPLACEMENTS
    assert set(replacements) == {"prefix-sharing", "row-dropping", "decode-step", "prefill-groups", "unsorted-top-p",
                                 "target-selection", "packed-pairs", "cuda-graphs"}


def test_a_training_step_leaves_the_weights_and_gives_the_loss(engine):
    lm = tiny_lm(engine)
    before, trainer = lm.model.head.weight.clone(), bench.Trainer(lm, TrainConfig(micro_batch=2))
    examples = encode_examples(lm, [{"prompt": pair["prompt"], "response": pair["chosen"]} for pair in PAIRS])
    losses = [trainer.step(make_target_loss_fns(lm, examples, trainer.config)) for _ in range(2)]
    assert losses[0] == losses[1] > 0 and torch.equal(lm.model.head.weight, before)
    assert not lm.model.training and trainer.optimizer.state  # it has made its step


def bench_tiny(monkeypatch, capsys, *options):
    """The lines that a benchmark of little work prints, and its document."""
    monkeypatch.setitem(bench.SIZES, "world", bench.Size(4, 2, 2, 6, 2))
    monkeypatch.setattr(bench, "MEASUREMENTS", 2)
    assert main(["bench", "--model", "tiny", "--repeats", "2", "--threads", "1", *options]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""  # no progress bar where stderr is not a terminal
    lines = printed.out.splitlines()
    return lines, json.loads(lines[-1])


def assert_complete(result, line):
    assert line.split()[:2] == [result["work"], "tiny"]
    assert result["model"] == "tiny" and result["unit"] == "tokens/s" and len(result["runs"]) == 2
    assert min(result["runs"]) <= result["ours"] <= max(result["runs"])
    assert 0 < result["seconds_min"] <= result["seconds_median"] <= result["seconds_max"]
    assert 0 < result["share_of_limit"] < 1 and result["peak_mb"] > 10


@needs_fast
def test_the_last_line_is_json_with_every_field_of_both_engines(monkeypatch, capsys):
    table, document = bench_tiny(monkeypatch, capsys)
    assert document["machine"].keys() >= {"cpu", "cores", "threads", "memory_gb", "python", "torch", "minisr",
                                          "commit", "bandwidth_gb_s", "matmul_gflop_s"}
    assert document["without"] == []
    assert [result["work"] for result in document["results"]] == list(bench.WORKS)
    for result, line in zip(document["results"], table[1:]):
        assert_complete(result, line)
        assert (result["engine"], result["peer"]) == ("fast", "plain")
        assert len(result["their_runs"]) == 2 and result["their_peak_mb"] > 10
        assert min(result["their_runs"]) <= result["theirs"] <= max(result["their_runs"])
        assert result["ratio_min"] <= result["ratio"] <= result["ratio_max"]
        assert result["ratio_max"] == max(a / b for a, b in zip(result["runs"], result["their_runs"]))


@needs_fast
def test_the_peer_of_the_fast_engine_may_be_itself_without_a_replacement(monkeypatch, capsys):
    engines = []
    monkeypatch.setattr(bench, "works", lambda lm, works=bench.works: engines.append(lm) or works(lm))
    table, document = bench_tiny(monkeypatch, capsys, "--only", "responses", "--without", "row-dropping")
    assert [lm.without for lm in engines] == [{"row-dropping"}, frozenset()]
    assert document["without"] == ["row-dropping"] and table[0].split()[2:4] == ["without", "fast"]
    [result] = document["results"]
    assert (result["engine"], result["peer"]) == ("fast", "without") and len(result["their_runs"]) == 2


def test_without_minisr_fast_the_plain_engine_is_measured_alone(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "minisr.fast", None)
    monkeypatch.setitem(sys.modules, "minisr.fast.lm", None)
    table, document = bench_tiny(monkeypatch, capsys, "--only", "responses", "sft")
    assert [result["work"] for result in document["results"]] == ["responses", "sft"]
    for result, line in zip(document["results"], table[1:]):
        assert_complete(result, line)
        assert result["engine"] == "plain" and result["peer"] is result["ratio"] is result["theirs"] is None


@pytest.mark.parametrize("options, message", [
    ("--only dreaming", "dreaming"), ("--without luck", "luck"), ("--model nowhere/M1", "nowhere/M1"),
    ("--repeats 0", "--repeats"), ("--threads -1", "--threads"), ("--threads 1025", "1024"),
    ("--model=", "has neither"), ("--repeats x", "'x'")])
def test_a_wrong_option_is_one_line_and_code_2(options, message, monkeypatch, capsys):
    monkeypatch.setattr(bench, "machine", lambda *_: pytest.fail("measured the machine first"))
    try:
        code = main(["bench", *options.split()])
    except SystemExit as end:  # of argparse
        code = end.code
    printed = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and len(printed) == 1 and message in printed[0]


def test_both_engines_are_measured_in_the_dtype_asked_for(monkeypatch, capsys):
    dtypes = []
    monkeypatch.setattr(bench, "works", lambda lm, works=bench.works: (dtypes.append(lm.model.embed.weight.dtype)
                                                                       or works(lm)))
    monkeypatch.setattr("minisr.runner.run.has_native_bfloat16", lambda: True)
    for dtype in ("bfloat16", "float32"):
        _, document = bench_tiny(monkeypatch, capsys, "--only", "responses", "dpo", "--dtype", dtype)
        assert document["machine"]["dtype"] == dtype and len(document["results"]) == 2
    assert dtypes == [torch.bfloat16] * len(ENGINES) + [torch.float32] * len(ENGINES)


@pytest.mark.skipif("fast" not in ENGINES, reason="minisr/fast is not installed")
def test_in_bfloat16_each_engine_takes_its_own_gradients(monkeypatch, capsys):
    monkeypatch.setattr("minisr.runner.run.has_native_bfloat16", lambda: True)
    norms = []
    step = bench.optimizer_step
    monkeypatch.setattr(bench, "optimizer_step", lambda *arguments: norms.append(step(*arguments)))
    bench_tiny(monkeypatch, capsys, "--only", "dpo", "--dtype", "bfloat16")
    assert len(norms) > 2 and min(norms) > 0.9 * max(norms)
    bench_tiny(monkeypatch, capsys, "--only", "dpo", "--dtype", "bfloat16", "--without", "packed-pairs")


def test_bfloat16_on_a_cpu_without_instructions_for_it_is_one_line_of_warning(monkeypatch, capsys):
    monkeypatch.setattr("minisr.runner.run.has_native_bfloat16", lambda: False)
    monkeypatch.setattr(bench, "measure", lambda *_: [])
    monkeypatch.setattr(bench, "MEASUREMENTS", 2)
    assert main(["bench", "--model", "tiny", "--threads", "1", "--dtype", "bfloat16"]) == 0
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "bfloat16 is slow" in err
