"""Decoding on a GPU: static shapes, and every decode step replayed as one CUDA graph.

Replaces the decoding loop of the core's sampler.generate, as fast/sampler.decode does on a CPU; on an H100 it is 2.3 to
7.1 times as fast as that (benchmarks/README.md). A decode step of a small model launches a thousand short kernels, and
the host takes longer to launch them than the GPU takes to run them. A CUDA graph launches all of them at once. In
return its shapes and addresses are fixed, and the host cannot read a value inside it. Therefore

- the number of rows, of columns of their own, and of columns of shared prefixes is rounded up to a bucket; a bias of
  -inf hides the columns that hold no token;
- the state of the rows (token, sequence length, random seed, ...) lies in static tensors, updated in place;
- sampling is part of the step, with a fixed number of attempts for top-p;
- the host reads which rows are alive once every 16 steps, and moves them into the next smaller bucket.

The tokens are the same, except where all attempts miss the nucleus: then the most probable token is taken. With a top_p
of 0.2 or more this happens to at most one token in a million. On a CPU the same steps run without graphs, which is how
they are tested. vLLM and nano-vllm also use one graph per batch size with dummy rows, and Kyutai's moshi also captures
at first use. Legend as in model.py.
"""

import gc
import math
import warnings
from functools import partial

import torch
from torch import Tensor

from minisr.fast.cache import PrefixCache, SharedPrefix, attend_to_parts
from minisr.fast.decode_step import DecodeStep
from minisr.fast.rng import uniforms
from minisr.fast.sampler import DecodingConfig, inverse_cdf, outside_nucleus
from minisr.model import Decoder, upcast
from minisr.sampler import MAX_ATTEMPTS

CHECK_EVERY = 16  # decode steps between two checks of which rows are alive
ROWS = sorted([2**k for k in range(3, 16)] + [3 * 2**k for k in range(4, 15)])  # 8, 16, 32, 48, 64, 96, ...
COLUMNS = [2**k for k in range(5, 21)]  # 32, 64, 128, ...
PREFIX_COLUMNS = sorted([2**k for k in range(4, 21)] + [3 * 2**k for k in range(3, 20)])  # 16, 24, 32, 48, ...


def bucket(size: int, sizes: list[int]) -> int:
    """The smallest of these sizes that is large enough."""
    return next(s for s in sizes if s >= size)


class GraphDecoder:
    """decoder(logits, cache, seeds, max_new) is sampler.decode(model, logits, cache, seeds, max_new, config).

    Graphs are captured at first use and serve all later batches of the same buckets, so one GraphDecoder should decode
    all batches of a step of the loop. Make a new one when the weights have changed."""

    def __init__(self, model: Decoder, max_new_tokens: int, config: DecodingConfig):
        """For batches of up to max_new_tokens new tokens."""
        max_seq_len = model.config.max_seq_len
        self.columns = bucket(min(max_new_tokens, max_seq_len), COLUMNS)
        self.step = SamplingStep(model, max_seq_len + self.columns, config)  # finished rows may pass max_seq_len
        self.drops_rows = "row-dropping" not in config.options.without
        self.state: DecodeState | None = None
        self.graphs: dict[tuple[int, int], CudaGraph] = {}
        self.capturing = Capturing() if model.embed.weight.is_cuda else None

    @torch.inference_mode()
    def __call__(self, logits: Tensor, cache: PrefixCache, seeds: Tensor, max_new: int) -> tuple[Tensor, Tensor]:
        """The cache is consumed."""
        try:
            return self._decode(logits, self._load(cache, seeds), len(seeds), max_new)
        except torch.OutOfMemoryError:
            self._free()  # the caller may try again with fewer rows
            raise

    def _decode(self, logits: Tensor, state: "DecodeState", B: int, max_new: int) -> tuple[Tensor, Tensor]:
        rows = bucket(B, ROWS)
        padded = torch.cat([logits, logits.new_zeros(rows - B, logits.shape[1])])
        self.step.sample(padded, StaticBatch(state, rows, 0))
        done = 1  # tokens drawn
        while done < max_new:
            n_alive = int(state.alive[:rows].sum())  # the only place where the host waits for the GPU
            if n_alive == 0:
                break
            fewer = bucket(n_alive, ROWS)
            if fewer < rows and self.drops_rows:
                state.compact(rows, fewer, done - 1)
                rows = fewer
            steps = min(CHECK_EVERY, max_new - done)
            advance = self._graph(rows, bucket(done + steps - 1, COLUMNS))
            for _ in range(steps):
                advance()
            done += steps
        return state.tokens[:max_new, :B].t().clone(), state.logps[:B].clone()

    def _load(self, cache: PrefixCache, seeds: Tensor) -> "DecodeState":
        """Put the batch into the static tensors of the last one if it fits, so that graphs are reused."""
        if cache.n_columns:  # one sample a prompt: the prompts become shared prefixes like any others
            cache.fan_out(1, 0)
        rows = bucket(len(seeds), ROWS)
        if self.state is None or not self.state.fits(cache, rows):
            self._free()
            self.state = DecodeState(cache, rows, self.columns)
            if self.capturing:
                self.capturing.pool = torch.cuda.graph_pool_handle()  # a pool cannot be used after its last graph
        self.state.load(cache, seeds)
        return self.state

    def _free(self) -> None:
        self.state, self.graphs = None, {}

    def _graph(self, rows: int, columns: int) -> "CudaGraph":
        if (rows, columns) not in self.graphs:
            run = partial(self.step, StaticBatch(self.state, rows, columns))
            self.graphs[rows, columns] = CudaGraph(run, self.capturing)
        return self.graphs[rows, columns]


class SamplingStep:
    """step(batch) is one decode step, in place on static tensors: read the last token of each row, draw the next.

    It does not refer to the GraphDecoder. A cycle would keep the memory of a decoder that is no longer used."""

    def __init__(self, model: Decoder, max_len: int, config: DecodingConfig):
        """For rows of up to max_len tokens."""
        self.config, self.forward = config, DecodeStep(model, max_len)
        self.is_stop = config.stop_table(model.config.vocab_size, model.device)
        self.attempts = torch.arange(number_of_attempts(config.top_p), device=model.device)

    def __call__(self, batch: "StaticBatch") -> None:
        self.sample(self.forward(batch.token, batch), batch)

    def sample(self, logits: Tensor, batch: "StaticBatch") -> None:
        """Draw a token for each row of logits (rows, V) and record it."""
        numbers = uniforms(batch.seed, batch.n_columns * MAX_ATTEMPTS + self.attempts)  # (attempts, rows)
        drawn = sample_top_p(logits, self.config.temperature, self.config.top_p, numbers, batch.alive)
        batch.token.copy_(drawn)
        batch.tokens.view(-1).index_copy_(0, batch.n_columns * batch.tokens.shape[1] + batch.row, drawn)
        if self.config.options.record_logps:
            logps = logits.log_softmax(-1, dtype=batch.logps.dtype).gather(1, drawn[:, None])[:, 0]
            batch.logps.index_add_(0, batch.row, logps.masked_fill(batch.alive.logical_not(), 0.0))
        batch.alive.logical_and_(self.is_stop[drawn].logical_not())


def number_of_attempts(top_p: float) -> int:
    """The number of attempts after which at most one token in a million has missed the nucleus, for top_p >= 0.2."""
    if top_p >= 1:
        return 1
    digits = -math.log10(1 - max(top_p, 0.0))  # of the probability that one attempt misses
    return MAX_ATTEMPTS if digits * MAX_ATTEMPTS < 6 else math.ceil(6 / digits)


def sample_top_p(logits: Tensor, temperature: float, top_p: float, numbers: Tensor, alive: Tensor) -> Tensor:
    """sampler.sample_top_p with the uniform numbers (attempts, B) given, and without reading a value on the host.

    Only as many rows get a second attempt as can have missed the nucleus: 1 - top_p of them, and 8 standard deviations
    more. This holds for rows with seeds of their own. Rows that are not alive (B,), such as dummies, which all draw
    the same token, get no second attempt."""
    if temperature == 0:
        return logits.argmax(-1)
    divisor = torch.full((1,), max(temperature, 1e-30), dtype=upcast(logits[:0]).dtype, device=logits.device)
    probs = (logits / divisor).softmax(-1)  # (B, V), of the divisor's dtype
    cdf = probs.cumsum(-1)
    drawn = inverse_cdf(cdf, numbers[0])
    if top_p >= 1:
        return drawn
    outside = outside_nucleus(probs, drawn, top_p) & alive
    mean = len(probs) * (1 - top_p)
    retried = min(len(probs), math.ceil(mean + 8 * math.sqrt(mean * top_p) + 8))
    rows = outside.int().topk(retried, sorted=False).indices  # all that are outside, and some that are not
    probs, cdf, numbers, missing, again = probs[rows], cdf[rows], numbers[:, rows], outside[rows], drawn[rows]
    for number in numbers[1:]:
        again = torch.where(missing, inverse_cdf(cdf, number), again)
        missing = outside_nucleus(probs, again, top_p)
    again = torch.where(missing, probs.argmax(-1), again)
    return drawn.index_copy(0, rows, again)


class DecodeState:
    """The static tensors of a batch: own keys and values (L, rows, G, columns, D), the shared prefixes, and for each
    row all that a step needs to know. Rows beyond the batch's own are dummies, finished from the start."""

    def __init__(self, cache: PrefixCache, rows: int, columns: int):
        L, _, G, _, D = cache.k.shape
        self.k, self.v = (cache.k.new_zeros(L, rows, G, columns, D) for _ in range(2))  # hidden values must be finite
        self.bias = cache.k.new_zeros(columns + 1)  # of own columns: -inf where there is no token yet
        self.n_columns = cache.seq_lens.new_zeros(1)  # own columns in use, which is the number of the next token
        self.token, self.seq_lens, self.seed, self.row = cache.seq_lens.new_zeros(4, rows).unbind()
        self.alive = torch.zeros_like(self.row, dtype=torch.bool)
        self.tokens = cache.seq_lens.new_zeros(columns + 1, rows + 1)  # dummies write to the last place
        self.logps = upcast(cache.k.new_zeros(rows + 1))
        self.prefixes = [StaticPrefix(prefix, rows) for prefix in cache.prefixes]

    def fits(self, cache: PrefixCache, rows: int) -> bool:
        return (rows <= self.k.shape[1] and len(cache.prefixes) == len(self.prefixes)
                and all(mine.fits(prefix) for mine, prefix in zip(self.prefixes, cache.prefixes)))

    def load(self, cache: PrefixCache, seeds: Tensor) -> None:
        B = len(seeds)
        for x in (self.n_columns, self.logps, self.token, self.seq_lens, self.seed, self.alive):
            x.zero_()
        self.bias.fill_(-torch.inf)[0] = 0.0
        self.seq_lens[:B], self.seed[:B], self.alive[:B] = cache.seq_lens, seeds, True
        self.row.fill_(len(self.row))
        self.row[:B] = torch.arange(B, device=seeds.device)
        for mine, prefix in zip(self.prefixes, cache.prefixes):
            mine.load(prefix)
        cache.prefixes.clear()  # frees the first copy

    def compact(self, rows: int, fewer: int, columns: int) -> None:
        """Of `rows` rows and `columns` columns in use, move the living rows to the first `fewer` places, with as many
        finished ones as there is room for."""
        order = self.alive[:rows].logical_not().int().argsort(stable=True)[:fewer].sort().values
        for x in (self.token, self.seq_lens, self.seed, self.row, self.alive):
            x[:fewer] = x[order]
        for layer in (*self.k, *self.v):
            layer[:fewer, :, :columns] = layer[order, :, :columns]
        for prefix in self.prefixes:
            prefix.compact(order)


class StaticPrefix:
    """A cache.SharedPrefix in memory of a fixed size. Prefixes without a row and columns without a token are hidden."""

    def __init__(self, prefix: SharedPrefix, rows: int):
        L, A, G, S, D = prefix.k.shape
        self.for_all = A == 1  # one prefix for all rows, however many
        self.rows_per_prefix = prefix.slots_per_prefix
        A, S = 1 if self.for_all else -(-rows // self.rows_per_prefix), bucket(S, PREFIX_COLUMNS)
        self.k, self.v = (prefix.k.new_zeros(L, A, G, S, D) for _ in range(2))
        self.bias = prefix.k.new_zeros(A, G, 1, S)
        self.slot = torch.arange(rows, device=prefix.k.device)  # as in SharedPrefix

    def fits(self, prefix: SharedPrefix) -> bool:
        _, A, _, S, _ = prefix.k.shape
        same_kind = A == 1 if self.for_all else prefix.slots_per_prefix == self.rows_per_prefix
        return same_kind and S <= self.k.shape[3]

    def load(self, prefix: SharedPrefix) -> None:
        _, A, _, S, _ = prefix.k.shape
        self.k[:, :A, :, :S], self.v[:, :A, :, :S] = prefix.k, prefix.v
        self.bias.fill_(-torch.inf)[:A, :, :, :S] = prefix.bias
        torch.arange(len(self.slot), out=self.slot)

    def view(self, rows: int) -> SharedPrefix:
        """The prefix as the first `rows` rows see it: no more prefixes than rows."""
        A = min(self.k.shape[1], rows)
        return SharedPrefix(self.k[:, :A], self.v[:, :A], self.bias[:A], self.slot[:rows],
                            rows if self.for_all else self.rows_per_prefix)

    def compact(self, order: Tensor) -> None:
        """Only the rows in `order` (ascending) continue. If they are fewer than prefixes, theirs move to the front."""
        slot = self.slot[order]
        if not self.for_all and len(order) < self.k.shape[1]:
            used, prefix = (slot // self.rows_per_prefix).unique(return_inverse=True)
            for layer in (*self.k, *self.v):
                layer[:len(used)] = layer[used]
            self.bias[:len(used)] = self.bias[used]
            slot = prefix * self.rows_per_prefix + slot % self.rows_per_prefix
        self.slot[:len(order)] = slot


class StaticBatch:
    """The first `rows` rows and `columns` own columns of a state. To a DecodeStep it is a PrefixCache."""

    def __init__(self, state: DecodeState, rows: int, columns: int):
        self.k, self.v = (x[:, :rows, :, :columns] for x in (state.k, state.v))
        self.bias, self.all_bias = state.bias[:columns].view(1, 1, -1), state.bias
        self.token, self.seq_lens, self.seed = state.token[:rows], state.seq_lens[:rows], state.seed[:rows]
        self.row, self.alive = state.row[:rows], state.alive[:rows]
        self.n_columns, self.tokens, self.logps = state.n_columns, state.tokens, state.logps
        self.prefixes = [prefix.view(rows) for prefix in state.prefixes]

    def attend_one(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """PrefixCache.attend_one, over all columns of the bucket."""
        keys, values = self.k[layer], self.v[layer]  # (rows, G, columns, D)
        keys.index_copy_(2, self.n_columns, k[:, :, None])
        values.index_copy_(2, self.n_columns, v[:, :, None])
        return attend_to_parts(layer, q, (keys.flatten(0, 1), values.flatten(0, 1), self.bias), self.prefixes)

    def advance(self, T: int) -> None:
        """All layers have stored a column. The next one is visible from now on."""
        self.seq_lens.add_(T)
        self.n_columns.add_(T)
        self.all_bias.index_fill_(0, self.n_columns, 0.0)


class Capturing:
    """The stream on which graphs are captured, and the memory pool that all of them share."""

    def __init__(self):
        self.stream, self.pool = torch.cuda.Stream(), None


class CudaGraph:
    """A function that works in place on static tensors, as a CUDA graph; with capturing=None, just the function.

    Every call does the function's work once: the first by running it, so that libraries initialize themselves, the
    second by capturing and replaying it, later ones by replaying it."""

    def __init__(self, run, capturing: Capturing | None):
        self.run, self.capturing = run, capturing
        self.is_warm, self.graph = False, None

    def __call__(self) -> None:
        if self.capturing and self.is_warm and self.graph is None:
            self._try_to_capture()
        if self.graph is not None:
            self.graph.replay()
        elif self.capturing and not self.is_warm:
            self._warm_up()
        else:
            self.run()

    def _warm_up(self) -> None:
        stream = self.capturing.stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.run()
        torch.cuda.current_stream().wait_stream(stream)
        self.is_warm = True

    def _try_to_capture(self) -> None:
        """Where capturing fails, the function continues to run as it is."""
        collecting = gc.isenabled()
        gc.disable()  # what it frees during a capture would invalidate it
        try:
            self.graph = self._capture()
        except torch.OutOfMemoryError:  # a RuntimeError, too
            raise
        except RuntimeError as error:
            warnings.warn(f"a CUDA graph could not be captured, so decoding is slower: {error}", stacklevel=2)
            self.capturing = None
        finally:
            if collecting:
                gc.enable()

    def _capture(self) -> "torch.cuda.CUDAGraph":
        """As torch.cuda.graph does, without emptying the memory cache each time."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(self.capturing.stream):
            graph.capture_begin(self.capturing.pool, capture_error_mode="thread_local")
            try:
                self.run()
            finally:
                graph.capture_end()
        return graph
