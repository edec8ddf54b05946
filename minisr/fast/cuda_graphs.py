"""Decoding on a GPU: static shapes, and each decode step replayed as one CUDA graph.

Replaces fast.sampler.decode. A decode step of a small model launches a thousand short kernels, and the host
takes longer to launch them than the GPU takes to run them. A CUDA graph launches all of them at once. In
return its shapes and addresses are fixed, and the host cannot read a value inside it. Therefore

- the rows of a batch, the columns of their own KV cache and the lengths of shared prefixes are rounded up
  to buckets; a bias of -inf hides the columns that hold no token;
- the state of the rows (token, sequence length, random seed, ...) lies in static tensors, updated in place;
- sampling is part of the step, with a fixed number of tries for top-p;
- the host reads which rows are alive once every 16 steps, and moves them into the next smaller bucket.

The tokens are those of `sampler.decode`, and the log-probabilities equal up to rounding. On a CPU the same
steps run without graphs, which is how they are tested.

Shared-prefix attention is Hydragen's (arXiv 2402.05099). One graph for each batch size, with dummy rows,
is known from vLLM and nano-vllm; capturing at first use, from Kyutai's moshi.
"""

import gc
import math
import warnings
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from minisr.fast.cache import PrefixCache, SharedPrefix, attend_to_parts
from minisr.fast.decode_step import DecodeStep
from minisr.fast.rng import uniforms
from minisr.fast.sampler import Decoding, inverse_cdf, outside_nucleus
from minisr.model import Decoder

CHECK_EVERY = 16  # decode steps between two checks of which rows are alive
ROWS = sorted([2**k for k in range(3, 16)] + [3 * 2**k for k in range(4, 15)])  # 8, 16, 32, 48, 64, 96, ...
COLUMNS = [2**k for k in range(5, 21)]  # 32, 64, 128, ...
PREFIX_COLUMNS = sorted([2**k for k in range(4, 21)] + [3 * 2**k for k in range(3, 20)])  # 16, 24, 32, ...
MAX_TRIES = 64  # of top-p sampling, as in sampler.draw


def bucket(size: int, sizes: list[int]) -> int:
    """The smallest of these sizes that is large enough."""
    return next(s for s in sizes if s >= size)


class GraphDecoder:
    """Decodes batches of one model with one config. Graphs are captured at first use and serve all batches
    of the same buckets, so make one GraphDecoder for all batches of a stage.

    The model's weights may change in place; its dtype and device may not."""

    def __init__(self, model: Decoder, max_new_tokens: int, how: Decoding):
        self.how = how
        max_seq_len = model.config.max_seq_len
        self.columns = bucket(min(max_new_tokens, max_seq_len), COLUMNS)
        self.step = DecodeStep(model, max_seq_len + self.columns)  # finished rows may pass max_seq_len
        self.is_stop = how.is_stop(model.config.vocab_size, model.device)
        self.tries = torch.arange(number_of_tries(how.top_p), device=model.device)
        self.state: DecodeState | None = None
        self.graphs: dict[tuple[int, int], CudaGraph] = {}
        self.side = CaptureSide() if model.embed.weight.is_cuda else None

    @torch.inference_mode()
    def __call__(self, logits: Tensor, cache: PrefixCache, seeds: Tensor, max_new: int) -> tuple[Tensor, Tensor]:
        """Up to max_new tokens for each row (B, max_new), and their log p up to the stop token (B,), after the logits
        (B, V) and the cache that sampler.prefill returns. The cache is consumed.

        A row's tokens after its stop token are arbitrary."""
        state, rows = self._load(cache, seeds), bucket(len(seeds), ROWS)
        padded = F.pad(logits, (0, 0, 0, rows - len(seeds)))
        self._sample(padded, StaticBatch(state, rows, 0))
        done = 1
        while done < max_new:
            living = int(state.alive[:rows].sum())  # here alone the host waits for the GPU
            if living == 0:
                break
            if (fewer := bucket(living, ROWS)) < rows:
                state.compact(rows, fewer, done - 1)
                rows = fewer
            steps = min(CHECK_EVERY, max_new - done)
            advance = self._graph(rows, bucket(done + steps - 1, COLUMNS))
            for _ in range(steps):
                advance()
            done += steps
        return state.tokens[:max_new, :len(seeds)].t().clone(), state.logps[:len(seeds)].clone()

    def _load(self, cache: PrefixCache, seeds: Tensor) -> "DecodeState":
        """The batch in static tensors: those of the last batch if it fits, so that graphs can be reused."""
        if cache.n_columns:  # one sample a prompt: the prompts become a shared prefix like any other
            cache.fan_out(1, 0)
        rows = bucket(len(seeds), ROWS)
        if self.state is None or not self.state.fits(cache, rows):
            self.graphs, self.state = {}, None  # free their memory before more is allocated
            if self.side:
                self.side.new_pool()
            self.state = DecodeState(cache, rows, self.columns)
        self.state.load(cache, seeds)
        return self.state

    def _graph(self, rows: int, columns: int) -> "CudaGraph":
        if (rows, columns) not in self.graphs:
            run = partial(self._advance, StaticBatch(self.state, rows, columns))
            self.graphs[rows, columns] = CudaGraph(run, self.side)
        return self.graphs[rows, columns]

    def _advance(self, batch: "StaticBatch") -> None:
        """One decode step: read the last token of each row, draw the next."""
        self._sample(self.step(batch.token, batch), batch)

    def _sample(self, logits: Tensor, batch: "StaticBatch") -> None:
        """Draw a token for each row of logits (rows, V) and record it."""
        if self.how.temperature == 0:
            drawn = logits.argmax(-1)
        else:
            numbers = uniforms(batch.seed, batch.n_columns * MAX_TRIES + self.tries)  # (tries, rows)
            drawn = sample_top_p(logits, self.how, numbers)
        batch.token.copy_(drawn)
        batch.tokens.view(-1).index_copy_(0, batch.n_columns * batch.tokens.shape[1] + batch.row, drawn)
        if self.how.options.record_logps:
            logp = logits.log_softmax(-1, dtype=torch.float32).gather(1, drawn[:, None])[:, 0]
            batch.logps.index_add_(0, batch.row, logp.masked_fill(batch.alive.logical_not(), 0.0))
        batch.alive.logical_and_(self.is_stop[drawn].logical_not())


def number_of_tries(top_p: float) -> int:
    """So many that they all miss the nucleus once in a million tokens; each misses it by 1 - top_p."""
    if top_p >= 1:
        return 1
    digits = -math.log10(1 - max(top_p, 0.0))  # of one try
    return MAX_TRIES if digits * MAX_TRIES < 6 else math.ceil(6 / digits)


def sample_top_p(logits: Tensor, how: Decoding, numbers: Tensor) -> Tensor:
    """sampler.sample_top_p with the random numbers of all tries (tries, rows) and no value read by the host.

    Only as many rows get a second try as can have missed the nucleus: 1 - top_p of them, and 8 standard
    deviations more."""
    temperature = torch.full((1,), max(how.temperature, 1e-30), device=logits.device)
    probs = (logits / temperature).softmax(-1)  # (rows, V), float32 as the temperature is
    cdf = probs.cumsum(-1)
    drawn = inverse_cdf(cdf, numbers[0])
    if how.top_p >= 1:
        return drawn
    outside = outside_nucleus(probs, drawn, how.top_p)
    mean = len(probs) * (1 - how.top_p)
    retried = min(len(probs), math.ceil(mean + 8 * math.sqrt(mean * how.top_p) + 8))
    rows = outside.int().topk(retried, sorted=False).indices  # all that are outside, and some that are not
    probs, cdf, numbers, missing, again = probs[rows], cdf[rows], numbers[:, rows], outside[rows], drawn[rows]
    for number in numbers[1:]:
        again = torch.where(missing, inverse_cdf(cdf, number), again)
        missing = outside_nucleus(probs, again, how.top_p)
    again = torch.where(missing, probs.argmax(-1), again)
    return drawn.index_copy(0, rows, again)


class DecodeState:
    """The static tensors of a batch of up to `rows` rows: own keys and values (L, rows, G, columns, D), the
    shared parts, and one number a row of all that a step needs to know."""

    def __init__(self, cache: PrefixCache, rows: int, columns: int):
        layers, _, groups, _, width = cache.k.shape
        shape = (layers, rows, groups, columns, width)
        self.k, self.v = cache.k.new_zeros(shape), cache.k.new_zeros(shape)  # hidden values must be finite
        self.bias = cache.k.new_zeros(columns + 1)  # of own columns: -inf where no token is yet
        self.token, self.seq_lens, self.seed, self.row = cache.seq_lens.new_zeros(4, rows).unbind()
        self.alive = torch.zeros_like(self.row, dtype=torch.bool)
        self.n_columns = cache.seq_lens.new_zeros(1)  # own columns in use, which is the index of the next token
        self.tokens = cache.seq_lens.new_zeros(columns + 1, rows + 1)  # dummy rows write to the last place
        self.logps = torch.zeros(rows + 1, device=cache.seq_lens.device)
        self.parts = [StaticPart(part, rows) for part in cache.prefixes]

    def fits(self, cache: PrefixCache, rows: int) -> bool:
        return (rows <= len(self.row) and len(cache.prefixes) == len(self.parts)
                and all(mine.fits(part) for mine, part in zip(self.parts, cache.prefixes)))

    def load(self, cache: PrefixCache, seeds: Tensor) -> None:
        """Begin a batch; its dummy rows are finished from the start."""
        B = len(seeds)
        self.bias.fill_(-torch.inf)[0] = 0.0
        for x in (self.n_columns, self.logps, self.token, self.seq_lens, self.seed, self.alive):
            x.zero_()
        self.seq_lens[:B], self.seed[:B], self.alive[:B] = cache.seq_lens, seeds, True
        self.row.fill_(len(self.row))
        self.row[:B] = torch.arange(B, device=seeds.device)
        for mine, part in zip(self.parts, cache.prefixes):
            mine.load(part)
        cache.prefixes.clear()  # frees the prompts' first copy

    def compact(self, rows: int, fewer: int, columns: int) -> None:
        """Of `rows` rows and `columns` own columns in use, move the living rows to the first `fewer` places,
        with as many finished ones as there is room for."""
        order = self.alive[:rows].logical_not().int().argsort(stable=True)[:fewer].sort().values
        for x in (self.token, self.seq_lens, self.seed, self.row, self.alive):
            x[:fewer] = x[order]
        for layer in (*self.k, *self.v):
            layer[:fewer, :, :columns] = layer[order, :, :columns]
        for part in self.parts:
            part.compact(order)


class StaticPart:
    """A shared part (cache.SharedPrefix) in memory of a fixed size. Prefixes that no row has and columns without
    a token are hidden."""

    def __init__(self, part: SharedPrefix, rows: int):
        layers, prefixes, groups, columns, width = part.k.shape
        self.for_all = prefixes == 1  # one prefix for all rows, however many
        self.width = part.slots_per_prefix  # rows that share a prefix
        size = 1 if self.for_all else -(-rows // part.slots_per_prefix)
        shape = (layers, size, groups, bucket(columns, PREFIX_COLUMNS), width)
        self.k, self.v = part.k.new_zeros(shape), part.k.new_zeros(shape)
        self.bias = part.k.new_zeros(size, groups, 1, shape[3])
        self.slot = torch.arange(rows, device=part.k.device)  # as in SharedPrefix

    def fits(self, part: SharedPrefix) -> bool:
        same = part.k.shape[1] == 1 if self.for_all else part.slots_per_prefix == self.width
        return same and part.k.shape[3] <= self.k.shape[3]

    def load(self, part: SharedPrefix) -> None:
        _, prefixes, _, columns, _ = part.k.shape
        self.k[:, :prefixes, :, :columns], self.v[:, :prefixes, :, :columns] = part.k, part.v
        self.bias.fill_(-torch.inf)[:prefixes, :, :, :columns] = part.bias
        torch.arange(len(self.slot), out=self.slot)

    def view(self, rows: int) -> SharedPrefix:
        """The part as the first `rows` rows see it: no more prefixes than rows."""
        size = min(self.k.shape[1], rows)
        return SharedPrefix(self.k[:, :size], self.v[:, :size], self.bias[:size], self.slot[:rows],
                      rows if self.for_all else self.width)

    def compact(self, order: Tensor) -> None:
        """Only the rows in `order` (ascending) continue; their prefixes move to the front."""
        rows = len(order)
        slot = self.slot[order]
        if not self.for_all and rows < self.k.shape[1]:
            used, prefix = (slot // self.width).unique(return_inverse=True)
            for layer in (*self.k, *self.v):
                layer[:len(used)] = layer[used]
            self.bias[:len(used)] = self.bias[used]
            slot = prefix * self.width + slot % self.width
        self.slot[:rows] = slot


class StaticBatch:
    """The first `rows` rows and `columns` own columns of a state, as DecodeStep takes a cache."""

    def __init__(self, state: DecodeState, rows: int, columns: int):
        self.k, self.v = (x[:, :rows, :, :columns] for x in (state.k, state.v))
        self.bias, self.all_bias = state.bias[:columns].view(1, 1, -1), state.bias
        self.token, self.seq_lens, self.seed = state.token[:rows], state.seq_lens[:rows], state.seed[:rows]
        self.row, self.alive = state.row[:rows], state.alive[:rows]
        self.n_columns, self.tokens, self.logps = state.n_columns, state.tokens, state.logps
        self.prefixes = [part.view(rows) for part in state.parts]

    def attend_one(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """PrefixCache.attend_one, over all columns of the bucket."""
        keys, values = self.k[layer], self.v[layer]  # (rows, G, columns, D)
        keys.index_copy_(2, self.n_columns, k[:, :, None])
        values.index_copy_(2, self.n_columns, v[:, :, None])
        return attend_to_parts(layer, q, (keys.flatten(0, 1), values.flatten(0, 1), self.bias), self.prefixes)

    def advance(self, T: int) -> None:
        """All layers have stored one column; the next one is visible from now on."""
        self.seq_lens.add_(T)
        self.n_columns.add_(T)
        self.all_bias.index_fill_(0, self.n_columns, 0.0)


class CaptureSide:
    """The stream on which graphs are captured, and the memory that all graphs share."""

    def __init__(self):
        self.stream = torch.cuda.Stream()
        self.new_pool()

    def new_pool(self) -> None:
        """Begin a new memory pool. A pool cannot be used again once the last of its graphs is gone."""
        self.pool = torch.cuda.graph_pool_handle()


class CudaGraph:
    """A function that works in place on static tensors, as a CUDA graph; without a side, just the function.

    Each call does the function's work once: the first by running it, so that libraries set themselves up,
    the second by capturing and replaying it, the others by replaying it."""

    def __init__(self, run, side: CaptureSide | None):
        self.run, self.side = run, side
        self.warm, self.graph = False, None

    def __call__(self) -> None:
        if self.graph is None and self.side and self.warm:
            self._try_to_capture()
        if self.graph is not None:
            self.graph.replay()
        elif self.side and not self.warm:
            self._warm_up()
        else:
            self.run()

    def _warm_up(self) -> None:
        self.side.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side.stream):
            self.run()
        torch.cuda.current_stream().wait_stream(self.side.stream)
        self.warm = True

    def _try_to_capture(self) -> None:
        """Where capturing fails, the function goes on running as it is."""
        collecting = gc.isenabled()
        gc.disable()  # what it frees during a capture would invalidate it
        try:
            self.graph = self._capture()
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            warnings.warn(f"a CUDA graph was not captured, decoding is slower: {error}", stacklevel=2)
            self.side = None
        finally:
            if collecting:
                gc.enable()

    def _capture(self) -> "torch.cuda.CUDAGraph":
        """By hand: torch.cuda.graph would also empty the memory cache each time."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(self.side.stream):
            graph.capture_begin(self.side.pool, capture_error_mode="thread_local")
            try:
                self.run()
            finally:
                graph.capture_end()
        return graph
