"""Decoding with static shapes, without graphs: the tokens of fast.sampler.decode, whatever the buckets."""

import gc
import weakref
from dataclasses import replace
from random import Random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from minisr.fast import FastLM, cuda_graphs
from minisr.fast import lm as fast_lm
from minisr.fast import sampler as fast_sampler
from minisr.fast.cuda_graphs import COLUMNS, ROWS, CudaGraph, GraphDecoder, bucket, number_of_attempts, sample_top_p
from minisr.fast.forward import grouped_attention
from minisr.fast.rng import seeds_to_tensor, uniform, uniforms
from minisr.fast.sampler import Options
from minisr.lm import ResponseConfig
from minisr.rng import row_seeds
from minisr.sampler import SamplingConfig
from minisr.train import TrainConfig

STOP = (3, 7)
NEVER = (-1,)
ALIVE = torch.ones(300, dtype=torch.bool)


class GraphLM(FastLM):
    """FastLM with graph decoders on a CPU too, where they run without graphs."""

    def sample_batch(self, prompts, seeds, config, stop_ids):
        options = Options(isinstance(config, ResponseConfig), self.without)
        options = replace(options, decoder=self.graph_decoder(config, stop_ids, options))
        return fast_sampler.generate(self.model, prompts, seeds, config, stop_ids, options)

    @property
    def decoder(self):
        return self.graphs[1]


def prompts_of(count, common=0, longest=40):
    """Prompts of unequal lengths that begin with the same `common` tokens."""
    rng = Random(common)
    header = [rng.randrange(60) for _ in range(common)]
    return [header + [rng.randrange(60) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def assert_same_samples(model, prompts, n, config, stop_ids=STOP, lm=None):
    """In float64 rounding tips no row over. Returns the samples."""
    expected = FastLM(model, None).sample(prompts, n, config, 5, stop_ids)
    lm = lm or GraphLM(model, None)
    found = lm.sample(prompts, n, config, 5, stop_ids)
    assert isinstance(lm.decoder, GraphDecoder)
    for row, other in zip(found, expected, strict=True):
        for a, b in zip(row, other, strict=True):
            assert a.ids == b.ids and a.finished == b.finished
            assert a.logp == (None if b.logp is None else pytest.approx(b.logp, abs=1e-9))
            assert (b.logp is not None) == (b.finished and isinstance(config, ResponseConfig))
    return found


@pytest.fixture
def model(random_decoder):
    return random_decoder(std=0.15).double()


@pytest.mark.parametrize("temperature, top_p", [(0.0, 1.0), (0.7, 0.9), (1.0, 1.0), (1.0, 0.3)])
@pytest.mark.parametrize("n, common", [(1, 0), (1, 20), (3, 20), (4, 0)])
def test_samples_are_those_of_the_eager_decoder(model, temperature, top_p, n, common):
    config = ResponseConfig(temperature, top_p, max_new_tokens=70, rows=50)  # more than one batch
    found = assert_same_samples(model, prompts_of(26, common), n, config)
    lengths = {len(completion.ids) for row in found for completion in row}
    assert max(lengths) > 33 and len(lengths) > 1  # more than one bucket of columns, and rows that leave


def test_rows_move_into_smaller_buckets_and_their_prompts_with_them(model, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "CHECK_EVERY", 5)
    lm = GraphLM(model, None)
    assert_same_samples(model, prompts_of(100, 16), 3, ResponseConfig(1.0, 1.0, 70, rows=300), lm=lm)
    rows = [rows for rows, _ in lm.decoder.graphs]
    assert rows == sorted(rows, reverse=True) and len(set(rows)) > 4 and rows[0] == 384
    prefix, prompt = lm.decoder.state.prefixes
    assert prefix.for_all and not prompt.for_all
    assert rows[-1] < prompt.k.shape[1] == 128  # so prompts have moved too


def test_dummy_rows_do_not_take_the_attempts_of_others(random_decoder):
    """300 rows and 84 dummies, which all draw the same tokens. Flat logits: a tenth of the draws misses the nucleus."""
    model = random_decoder(std=0.01).double()
    assert_same_samples(model, prompts_of(257), 1, ResponseConfig(1.0, 0.9, 40, rows=257), NEVER)


@pytest.mark.parametrize("prompts, n, max_new", [([[5]], 1, 1), ([[5]], 1, 2), ([[5, 6, 9]], 4, 17),
                                                 ([[5], [6, 9]], 1, 33), ([[5, 6], [5, 6]], 9, 40)])
def test_few_rows_and_any_number_of_new_tokens(model, prompts, n, max_new):
    found = assert_same_samples(model, prompts, n, ResponseConfig(1.0, 0.9, max_new), NEVER)
    assert {len(completion.ids) for row in found for completion in row} == {max_new}


def test_a_row_ends_at_max_seq_len(random_decoder):
    model, prompts = random_decoder(std=0.15, max_seq_len=48).double(), [[9] * 47, [8] * 3, [10] * 30]
    found = assert_same_samples(model, prompts, 2, ResponseConfig(1.0, 1.0, 200), NEVER)
    assert [len(row[0].ids) for row in found] == [1, 45, 18]


@pytest.mark.parametrize("name", ["prefix-sharing", "row-dropping"])
def test_without_another_replacement(model, name):
    lm = GraphLM(model, None)
    lm.without = frozenset([name])
    assert_same_samples(model, prompts_of(12, 20), 4, ResponseConfig(1.0, 0.9, 60), lm=lm)
    assert (len({rows for rows, _ in lm.decoder.graphs}) > 1) == (name == "prefix-sharing")


def test_bfloat16(random_decoder):
    model, prompts = random_decoder(std=0.15).to(torch.bfloat16), prompts_of(5)
    stop_ids = tuple(range(0, 60, 3))
    for row in GraphLM(model, None).sample(prompts, 2, ResponseConfig(1.0, 0.9, 60), 5, stop_ids):
        for completion in row:
            assert completion.finished and not set(completion.ids[:-1]) & set(stop_ids)


def test_tensors_are_static_and_serve_the_next_batch(model):
    config, prompts = ResponseConfig(1.0, 1.0, 40, rows=32), prompts_of(32, longest=12)
    lm = GraphLM(model, None)
    lm.sample(prompts[:8], 4, config, 5, STOP)
    decoder, state = lm.decoder, lm.decoder.state
    graphs, before = dict(decoder.graphs), addresses(state)
    lm.sample(prompts[8:29], 4, config, 5, STOP)  # three batches, the last one smaller
    assert lm.decoder is decoder and decoder.state is state and addresses(state) == before
    assert all(decoder.graphs[key] is graph for key, graph in graphs.items())
    lm.sample(prompts_of(8), 4, config, 5, STOP)
    assert decoder.state is not state  # longer prompts need more room
    for other in (config, ResponseConfig(0.5, 1.0, 40, rows=32), ResponseConfig(0.5, 1.0, 70, rows=32)):
        assert_same_samples(model, prompts, 4, other, lm=lm)


def addresses(state):
    tensors = [x for x in vars(state).values() if isinstance(x, torch.Tensor)]
    tensors += [x for prefix in state.prefixes for x in vars(prefix).values() if isinstance(x, torch.Tensor)]
    return [x.data_ptr() for x in tensors]


class NoSynchronization(TorchDispatchMode):
    """Raises where the host of a GPU would wait for a value."""

    FORBIDDEN = ("item", "_local_scalar_dense", "nonzero", "unique", "unique_dim", "_unique2", "masked_select",
                 "is_nonzero", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").partition(".")[0]
        assert name not in self.FORBIDDEN, name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("temperature, top_p", [(0.0, 1.0), (0.7, 0.9)])
def test_a_step_never_waits_for_a_value(model, temperature, top_p):
    lm = GraphLM(model, None)
    lm.sample(prompts_of(12, 20), 4, ResponseConfig(temperature, top_p, 60), 5, NEVER)
    state, step = lm.decoder.state, lm.decoder.graphs[48, 32]
    with torch.inference_mode():
        state.n_columns.fill_(8)
        with NoSynchronization():
            step()
        for wait in (state.alive.nonzero, state.token.unique, state.n_columns.item):
            with pytest.raises(AssertionError), NoSynchronization():
                wait()
    assert state.n_columns == 9


# Memory, and what FastLM does with its graph decoder.


def test_where_memory_runs_out_a_smaller_batch_is_decoded(model, monkeypatch):
    lm, prompts, config = GraphLM(model, None), prompts_of(40), ResponseConfig(1.0, 0.9, 40, rows=40)
    lm.sample(prompts[:8], 1, config, 5, STOP)
    with monkeypatch.context() as patched:
        patched.setattr(cuda_graphs, "StaticBatch", fail_with_out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            lm.sample(prompts, 1, config, 5, STOP)
    assert lm.decoder.state is None and lm.decoder.graphs == {}
    assert_same_samples(model, prompts[:20], 1, config, lm=lm)


def test_a_dropped_graph_decoder_frees_its_memory_at_once(lm):
    state = weakref.ref(lm.decoder.state)
    gc.disable()
    try:
        lm.graphs = None
        assert state() is None
    finally:
        gc.enable()


def fail_with_out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory")


CONFIG = ResponseConfig(max_new_tokens=20)


@pytest.fixture
def lm(model):
    """An LM that has sampled, so that it has a graph decoder."""
    lm = GraphLM(model, None)
    lm.sample(prompts_of(4), 2, CONFIG, 5, STOP)
    assert isinstance(lm.decoder, GraphDecoder)
    return lm


def test_all_batches_of_a_step_share_a_graph_decoder(lm):
    decoder = lm.decoder
    lm.sample(prompts_of(9), 3, CONFIG, 6, STOP)
    assert lm.decoder is decoder


@pytest.mark.parametrize("config, stop_ids", [
    (replace(CONFIG, temperature=0.5), STOP), (replace(CONFIG, top_p=0.5), STOP),
    (replace(CONFIG, max_new_tokens=60), STOP), (SamplingConfig(max_new_tokens=20), STOP), (CONFIG, (3,))])
def test_another_config_or_other_stop_ids_make_a_new_graph_decoder(lm, config, stop_ids):
    decoder = lm.decoder
    assert_same_samples(lm.model, prompts_of(4), 2, config, stop_ids, lm)
    assert lm.decoder is not decoder


def test_a_copy_has_no_graph_decoder_of_another_model(lm):
    twin = lm.copy()
    assert twin.graphs is None
    with torch.no_grad():
        for p in twin.model.parameters():
            p.mul_(1.5)
    assert_same_samples(twin.model, prompts_of(4), 2, CONFIG, lm=twin)


def test_a_frozen_copy_does_not_share_the_graph_decoder(lm):
    assert lm.frozen_copy().graphs is None


def test_training_drops_the_graph_decoder(lm):
    lm.prepare_training(TrainConfig())
    assert lm.graphs is None


@pytest.mark.parametrize("is_cuda, without, expected", [
    (True, (), True), (True, ("row-dropping",), True), (True, ("cuda-graphs",), False), (False, (), False)])
def test_a_graph_decoder_is_used_on_a_gpu_only(monkeypatch, is_cuda, without, expected):
    decoders = []
    monkeypatch.setattr(fast_lm, "GraphDecoder", lambda model, max_new_tokens, how: "a graph decoder")
    monkeypatch.setattr(fast_sampler, "generate", lambda *arguments: decoders.append(arguments[-1].decoder) or [])
    weight = SimpleNamespace(is_cuda=is_cuda, dtype=torch.float32)
    lm = FastLM(SimpleNamespace(embed=SimpleNamespace(weight=weight)), None)
    lm.without = frozenset(without)
    lm.sample_batch([[1, 2]], row_seeds(5, 1, 1), CONFIG, STOP)
    assert decoders == ["a graph decoder" if expected else None]


# The parts.


def test_buckets():
    assert ROWS[:11] == [8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512]
    assert [bucket(n, ROWS) for n in (1, 8, 9, 49, 512, 513)] == [8, 8, 16, 64, 512, 768]
    assert [bucket(n, COLUMNS) for n in (1, 32, 33, 511)] == [32, 32, 64, 512]


def test_so_many_attempts_that_one_token_in_a_million_misses_the_nucleus():
    assert [number_of_attempts(p) for p in (0.9, 0.5, 0.05, 0.0, 1.0, 2.0)] == [6, 20, 64, 64, 1, 1]
    for top_p in (0.3, 0.6, 0.8, 0.95, 0.999):
        assert (1 - top_p)**number_of_attempts(top_p) < 1.01e-6


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("top_p", [0.0, 0.05, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_draws_are_those_of_the_sampler(rows, top_p, temperature):
    logits = 2 * torch.randn(rows, 50, generator=torch.Generator().manual_seed(rows), dtype=torch.float64)
    seeds = seeds_to_tensor(row_seeds(1, rows, 1)[:, 0], "cpu")
    how = SimpleNamespace(temperature=temperature, top_p=top_p)
    for step in range(5):
        numbers = uniforms(seeds, torch.arange(number_of_attempts(top_p)) + 64 * step)
        expected = fast_sampler.sample_top_p(logits, how, seeds, step, uniform(seeds, 64 * step))
        assert torch.equal(sample_top_p(logits, temperature, top_p, numbers, ALIVE[:rows]), expected)


def test_after_the_last_attempt_the_most_probable_token_is_taken():
    logits = torch.tensor([[0.0, 5.0, 1.0]])
    zeros = torch.zeros(3, 1)  # every attempt draws token 0, outside the nucleus
    assert sample_top_p(logits, 1.0, 0.5, zeros, ALIVE[:1]) == 1


def test_uniforms_are_those_of_each_counter():
    seeds = seeds_to_tensor(row_seeds(9, 4, 1)[:, 0], "cpu")
    expected = torch.stack([uniform(seeds, counter) for counter in (0, 3, 64_000)])
    assert torch.equal(uniforms(seeds, torch.tensor([0, 3, 64_000])), expected)


def test_grouped_heads_side_by_side_are_attention_with_a_mask():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 5, 8, generator=generator, requires_grad=True) for heads in (6, 2, 2))
    mask = torch.rand(2, 1, 5, 5, generator=generator).lt(0.5) | torch.eye(5, dtype=torch.bool)
    found = grouped_attention(q, k, v, mask)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found.square().sum(), (q, k, v)),
                    torch.autograd.grad(expected.square().sum(), (q, k, v))):
        torch.testing.assert_close(a, b)


# Capturing, with a stand-in for the GPU.


@pytest.fixture
def calls(monkeypatch):
    """What graphs do, in order. Capturing returns an object that notes its replays."""
    calls = []

    def warm_up(graph):
        graph.run()
        graph.is_warm = True

    def capture(graph):
        calls.append("capture")
        return SimpleNamespace(replay=lambda: calls.append("replay"))
    monkeypatch.setattr(CudaGraph, "_warm_up", warm_up)
    monkeypatch.setattr(CudaGraph, "_capture", capture)
    return calls


def fail_to_capture(monkeypatch, error):
    def capture(graph):
        raise error
    monkeypatch.setattr(CudaGraph, "_capture", capture)


def test_a_graph_runs_once_and_is_captured_once(calls):
    graph = CudaGraph(lambda: calls.append("run"), capturing=object())
    for _ in range(4):
        graph()
    assert calls == ["run", "capture", "replay", "replay", "replay"]


def test_without_a_gpu_there_is_no_graph(calls):
    graph = CudaGraph(lambda: calls.append("run"), capturing=None)
    for _ in range(3):
        graph()
    assert calls == ["run"] * 3


def test_where_capturing_fails_the_step_continues_as_it_is(calls, monkeypatch):
    fail_to_capture(monkeypatch, RuntimeError("operation not permitted when stream is capturing"))
    graph = CudaGraph(lambda: calls.append("run"), capturing=object())
    graph()
    with pytest.warns(UserWarning, match="could not be captured.*not permitted"):
        graph()
    graph()
    assert calls == ["run"] * 3


def test_where_memory_runs_out_the_caller_decides(calls, monkeypatch):
    fail_to_capture(monkeypatch, torch.OutOfMemoryError("CUDA out of memory"))
    graph = CudaGraph(lambda: calls.append("run"), capturing=object())
    graph()
    with pytest.raises(torch.OutOfMemoryError):
        graph()
