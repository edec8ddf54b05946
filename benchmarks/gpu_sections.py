"""The sections of gpu.py: what each of them checks or measures on the device."""

import math
import statistics
import tempfile
import time
import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from random import Random
from unittest.mock import patch

import torch
from sides import NEVER, Side
from torch.nn.attention import SDPBackend, sdpa_kernel

from minisr import bench
from minisr.dpo import DPOConfig, EncodedPair, dpo_loss, fit_dpo
from minisr.fast import FastLM, sampler
from minisr.fast.cuda_graphs import CudaGraph
from minisr.fast.sampler import Options
from minisr.interop.names import config_to_hf, weights_to_hf
from minisr.interop.source import load_source
from minisr.lm import LM, ResponseConfig
from minisr.model import Decoder, ModelConfig
from minisr.report.table import line
from minisr.runner.config import load_config
from minisr.runner.engine import RunLM
from minisr.runner.files import read_json
from minisr.runner.pretrain import init_weights
from minisr.runner.run import Run, avoid_cudnn_attention
from minisr.runner.steps import finished_models, run_loop
from minisr.sampler import Completion, SamplingConfig
from minisr.sft import make_target_loss_fns
from minisr.train import TrainConfig, make_batches

CONFIGS = Path(__file__).parents[1] / "tiny_configs"
SMOLLM2 = ModelConfig(vocab_size=49152, dim=576, n_layers=30, n_heads=9, n_kv_heads=3, ffn_dim=1536, max_seq_len=2048,
                      rope_theta=100000.0)
SMALL = replace(SMOLLM2, vocab_size=512, dim=144, n_layers=2, ffn_dim=128, max_seq_len=512, head_dim=16)
# How much work: rows decoded side by side; new tokens of a response and of a judgement; pairs of an optimizer step;
# timed turns; prompts and longest response of the iteration.
SIZES = {"full": {"rows": (64, 256, 512), "new_tokens": 128, "judged_tokens": 64, "batch": 16, "repeats": 3,
                  "prompts": 256, "longest": 512},
         "quick": {"rows": (512,), "new_tokens": 64, "judged_tokens": 32, "batch": 16, "repeats": 1,
                   "prompts": 32, "longest": 128},
         "quick cpu": {"rows": (24,), "new_tokens": 20, "judged_tokens": 20, "batch": 4, "repeats": 1,
                       "prompts": 6, "longest": 24}}


class GraphLM(FastLM):
    """FastLM, which uses graph decoders on a GPU. Here also on a CPU, where they run without graphs."""

    def sample_batch(self, prompts, seeds, config, stop_ids):
        if self.model.embed.weight.is_cuda or "cuda-graphs" in self.without:
            return super().sample_batch(prompts, seeds, config, stop_ids)
        options = Options(record_logps=isinstance(config, ResponseConfig))
        options = replace(options, decoder=self.graph_decoder(config, stop_ids, options))
        return sampler.generate(self.model, prompts, seeds, config, stop_ids, options)


class GraphRunLM(RunLM, GraphLM):
    """GraphLM as the engine of a run."""


def make_lm(model: Decoder, engine: str = "graph") -> GraphLM:
    """An LM that decodes by "graph" or "eager". It has no tokenizer."""
    lm = GraphLM(model, None)
    lm.without = frozenset(["cuda-graphs"] if engine == "eager" else [])
    return lm


@contextmanager
def timed_captures():
    """Yields a list; the seconds of each capture of a graph are appended to it."""
    def timed(graph):
        start = time.perf_counter()
        captured = capture(graph)
        captures.append(time.perf_counter() - start)
        return captured
    capture, captures = CudaGraph._capture, []
    with patch.object(CudaGraph, "_capture", timed):
        yield captures


class Sections(Side):
    """Each section is a method and returns {"lines": what to print, "results": rows of the table, ...}."""

    def __init__(self, device: str, quick: bool, source: str | None):
        super().__init__(16 if device == "cuda" else 1)
        self.device, self.quick, self.source = device, quick, source
        self.size = SIZES["full" if not quick else "quick" if device == "cuda" else "quick cpu"]
        self.is_small = quick and device == "cpu"
        avoid_cudnn_attention()

    # The model and its data.

    @cached_property
    def model(self) -> Decoder:
        if self.source:
            return load_source(self.source)[0].to(self.device, bench.default_dtype(self.device))
        return self.random_model(SMALL if self.is_small else SMOLLM2)

    @property
    def shape(self) -> ModelConfig:
        return self.model.config

    def random_model(self, shape: ModelConfig, std: float | None = None, dtype=None) -> Decoder:
        """Random weights: as at initialization, or all of one standard deviation, which makes the logits vary."""
        with torch.device(self.device):
            model = Decoder(shape)
        generator = torch.Generator(self.device).manual_seed(0)
        init_weights(model, generator)
        if std:
            for weight in model.parameters():
                noise = torch.randn(weight.shape, generator=generator, device=self.device)
                weight.data = float(weight.dim() == 1) + std * noise
        dtype = dtype or (torch.bfloat16 if self.device == "cuda" else torch.float32)
        return model.to(dtype).eval()

    def random_ids(self, rng: Random, least: int, most: int) -> list[int]:
        return [rng.randrange(5, self.shape.vocab_size) for _ in range(rng.randint(least, most))]

    def prompts(self, count: int, common: int = 0, least: int = 24, most: int = 96) -> list[list[int]]:
        """Random ids, after `common` ids that all prompts have."""
        rng = Random(0)
        header = self.random_ids(rng, common, common)
        return [header + self.random_ids(rng, least, most) for _ in range(count)]

    def judge_prompts(self, count: int) -> list[list[int]]:
        """As long as the judge prompt in English, of which 220 tokens are common to all."""
        return self.prompts(count, 40, 20, 60) if self.is_small else self.prompts(count, 220, 80, 300)

    def pairs(self, count: int, least: int, most: int) -> list[EncodedPair]:
        rng = Random(0)
        return [EncodedPair(self.random_ids(rng, 16, 64), self.random_ids(rng, least, most),
                            self.random_ids(rng, least, most)) for _ in range(count)]

    def stop_ids(self, mean: int) -> tuple[int, ...]:
        """Random weights draw any token about as often as any other: of these, one in `mean` tokens."""
        return tuple(range(0, self.shape.vocab_size, max(2, mean)))

    @cached_property
    def machine_limits(self) -> dict:
        return bench.machine(self.device, torch.get_num_threads())

    def result(self, work: str, engine: str, rows: int, cost: bench.Cost, times: list[float], **more) -> dict:
        """One line of the table: tokens/s, and shares of the measured bandwidth and matrix rate."""
        able, median = self.machine_limits, statistics.median(times)
        return {"work": work, "engine": engine, "rows": rows, "tokens_per_s": cost.tokens / median,
                "seconds": times, "share_of_bandwidth": cost.bytes / median / able["bandwidth_gb_s"] / 1e9,
                "share_of_matrix_rate": cost.flops / median / able["matmul_gflop_s"] / 1e9} | more

    # Sections.

    def usable(self) -> bool:
        """Whether the device still computes, after a section has failed."""
        return torch.ones(2, device=self.device).sum().item() == 2

    def machine(self) -> dict:
        able, model = self.machine_limits, self.model
        size = sum(p.numel() for p in model.parameters()) / 1e6
        return {"machine": able, "lines": [
            f"{able['gpu'] or able['cpu']}, PyTorch {able['torch']}: {able['bandwidth_gb_s']:,.0f} GB/s, "
            f"{able['matmul_gflop_s']:,.0f} GFLOP/s",
            f"{self.source or 'random weights'}, {size:.0f} M parameters, {model.embed.weight.dtype}"]}

    def tokens(self) -> dict:
        """Graph against eager: the same tokens in float32, where rounding rarely tips a row over."""
        model = self.random_model(replace(SMALL, n_layers=4), std=0.15, dtype=torch.float32)
        lines, failed = [], False
        for temperature, top_p, n, common in ((0.0, 1.0, 4, 0), (0.7, 0.9, 4, 40), (1.0, 1.0, 1, 40), (1.0, 0.9, 3, 0)):
            share, gap, captured = self.compare_tokens(model, ResponseConfig(temperature, top_p, 80, 96), n, common)
            wrong = share < 0.97 or gap > 0.01
            failed |= wrong
            lines.append(f"T = {temperature}, top-p = {top_p}, n = {n}, {common} tokens in common: {share:.1%} of rows "
                         f"equal, log p differs by {gap:.1e}; {captured}{' FAILED' * wrong}")
        if self.device == "cuda":
            share, _, captured = self.compare_tokens(self.model, ResponseConfig(0.7, 0.9, 48, 256), 4, 40)
            lines.append(f"in bfloat16, where equality is not expected: {share:.1%} of rows equal; {captured}")
        return {"lines": lines, "failed": failed}

    def compare_tokens(self, model: Decoder, config: ResponseConfig, n: int, common: int) -> tuple[float, float, str]:
        """The share of rows with the same tokens, the largest difference of their log p, and what was captured."""
        vocab, rng = model.config.vocab_size, Random(1)
        header = [rng.randrange(vocab) for _ in range(common)]
        prompts = [header + [rng.randrange(vocab) for _ in range(rng.randint(1, 60))]
                   for _ in range(64 if self.device == "cuda" else 24)]
        drawn, stop_ids = {}, tuple(range(0, vocab, vocab // 12))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for engine in ("eager", "graph"):
                with timed_captures() as captures:
                    drawn[engine] = make_lm(model, engine).sample(prompts, n, config, 3, stop_ids)
        rows = [pair for rows in zip(drawn["graph"], drawn["eager"]) for pair in zip(*rows)]
        equal = [(a, b) for a, b in rows if a.ids == b.ids]
        gap = max((abs(a.logp - b.logp) for a, b in equal if a.logp is not None), default=math.nan)
        failures = "".join(f"; WARNING {w.message}" for w in caught if "CUDA graph" in str(w.message))
        return len(equal) / len(rows), gap, f"{len(captures)} graphs captured{failures}"

    def responses(self) -> dict:
        """N = 4 responses a prompt of a fixed length; then of lengths that vary, so that rows leave the batch."""
        config = ResponseConfig(0.7, 0.9, self.size["new_tokens"])
        results = [self.sampling("responses", self.prompts(rows // 4), 4, config, engine)
                   for rows in self.size["rows"] for engine in ("eager", "graph")]
        rows, longest = self.size["rows"][-1], self.size["longest"]
        config = ResponseConfig(0.7, 0.9, longest)
        return {"results": results + [
            self.sampling("ragged", self.prompts(rows // 4), 4, config, engine, self.stop_ids(longest // 3))
            for engine in ("eager", "graph")]}

    def judging(self) -> dict:
        """J = 3 judgements of a fixed length."""
        config = SamplingConfig(0.7, 0.9, self.size["judged_tokens"])
        return {"results": [self.sampling("judging", self.judge_prompts(rows // 3), 3, config, engine)
                            for rows in self.size["rows"] for engine in ("eager", "graph")]}

    def sampling(self, work: str, prompts, n: int, config, engine: str, stop_ids=NEVER) -> dict:
        """All rows side by side. The first call, which captures the graphs, is timed apart."""
        lm, rows, drawn = make_lm(self.model, engine), len(prompts) * n, []
        config = replace(config, rows=rows)

        def run():
            drawn[:] = lm.sample(prompts, n, config, 1, stop_ids)
        bench.reset_peak()
        with timed_captures() as captures:
            first = bench.seconds(run)
            times = bench.take_turns({work: run}, self.size["repeats"] if engine == "graph" else 1)[work]
        steps = max(len(completion.ids) for row in drawn for completion in row)
        return self.result(work, engine, rows, bench.sampling_cost(lm.model, prompts, drawn), times,
                           first_seconds=first, peak_mb=bench.peak_mb(), graphs=len(captures),
                           capture_seconds=sum(captures), ms_per_step=1000 * statistics.median(times) / steps)

    @torch.inference_mode()
    def profile(self) -> dict:
        """One decode step: its milliseconds by rows and columns, and the kernels that take them."""
        lm, rows = make_lm(self.model), self.size["rows"][-1]
        config = SamplingConfig(0.7, 0.9, self.size["new_tokens"], rows)
        lm.sample(self.prompts(rows // 4), 4, config, 1, NEVER)
        decoder, times = lm.graphs[1], {}
        for (count, columns), step in decoder.graphs.items():
            decoder.state.n_columns.fill_(columns // 2)
            times[f"{count} rows, {columns} columns"] = 1000 * min(
                bench.seconds(lambda step=step: [step() for _ in range(4)]) / 4 for _ in range(2))
        decoder.state.n_columns.fill_(columns // 2)
        taken, counts = kernels(step, self.device, 4)
        lines = [f"{name}: {ms:.2f} ms a step" for name, ms in times.items()]
        lines.append(f"{sum(counts.values()):.0f} kernels a step, {sum(taken.values()) / 1000:.2f} ms in all:")
        lines += [f"{us:9.1f} us {counts[name]:6.1f} x  {name}" for name, us in taken.most_common(25)]
        return {"lines": lines, "step_ms": times, "kernels_us": dict(taken.most_common(40))}

    def training(self) -> dict:
        """An optimizer step of DPO and of SFT, in two micro-batches."""
        lm, size = make_lm(self.model).copy(), self.size["batch"]
        config = TrainConfig(micro_batch=size // 2)
        trainer, pairs = bench.Trainer(lm, config), self.pairs(size, *((8, 24) if self.is_small else (100, 300)))
        examples = [pair.example(pair.chosen) for pair in pairs]

        def pair_loss(part):
            chosen, rejected = lm.pair_logps(part)
            return dpo_loss(chosen, rejected, chosen.detach(), rejected.detach(), 0.1)[0].sum() / size, {}

        def dpo_losses():
            return [partial(pair_loss, part) for part in (pairs[:size // 2], pairs[size // 2:])]
        prompts, chosen, rejected = (sum(map(len, side)) for side in zip(*pairs))
        works = {"dpo": (dpo_losses, prompts, chosen + rejected),
                 "sft": (lambda: make_target_loss_fns(lm, examples, config), prompts, chosen)}
        results = []
        for work, (losses, prompted, predicted) in works.items():
            def run(losses=losses):
                trainer.step(losses())
            bench.reset_peak()
            first = bench.seconds(run)
            times = bench.take_turns({work: run}, 2 * self.size["repeats"])[work]
            cost = bench.scoring_cost(lm.model, prompted + predicted, predicted, batches=2, training=True)
            results.append(self.result(work, "fast", size, cost, times, first_seconds=first, peak_mb=bench.peak_mb()))
        return {"results": results}

    def attention(self) -> dict:
        """Prefill, SFT and DPO with PyTorch's slow attention forbidden, and the kernels that were used instead."""
        lm, pairs = make_lm(self.random_model(replace(self.shape, n_layers=2))), self.pairs(4, 60, 90)
        examples, prompts = [pair.example(pair.chosen) for pair in pairs], self.prompts(8, 20)
        works = {"prefill": lambda: torch.inference_mode()(sampler.prefill)(lm.model, prompts, 4, 8),
                 "SFT": lambda: lm.target_loss(examples).backward(),
                 "DPO": lambda: sum(lm.pair_logps(pairs)).sum().backward()}
        lines, failed = [], False
        for name, run in works.items():
            try:
                with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
                    run()
                    used = kernels(run, self.device, 1)[0]
                found = [kernel[:70] for kernel in used if any(x in kernel.lower() for x in ("flash", "fmha"))]
                lines.append(f"{name}: {', '.join(found) or 'a fused kernel'}")
            except RuntimeError as error:
                failed = True
                lines.append(f"{name}: FAILED, {str(error).splitlines()[0]}")
        return {"lines": lines, "failed": failed}

    def float32(self) -> dict:
        """Logits, DPO loss and its gradients in float32: the fast engine on the device, the plain one on the CPU."""
        shape = replace(self.shape, n_layers=min(self.shape.n_layers, 6))
        engines = [make_lm(self.random_model(shape, dtype=torch.float32)), LM(Decoder(shape).eval(), None)]
        engines[1].model.load_state_dict(engines[0].model.state_dict())
        ids, pairs = torch.tensor(self.prompts(4, 0, 48, 48)), self.pairs(4, 20, 60)
        logits, losses = [], []
        for lm in engines:
            with torch.no_grad():
                logits.append(lm.model(ids.to(lm.model.device)))
            chosen, rejected = lm.pair_logps(pairs)
            reference = torch.full_like(chosen, -300.0)
            losses.append(dpo_loss(chosen, rejected, reference, reference, 0.1)[0].mean())
            losses[-1].backward()
        gradients = zip(*(lm.model.parameters() for lm in engines))
        found = {"logits": difference(*logits), "DPO loss": difference(*losses),
                 "DPO gradients": max(difference(a.grad, b.grad) for a, b in gradients)}
        wrong = {name for name, value in found.items() if not value < 1e-3}
        lines = [f"{name}: relative difference {value:.1e}{' FAILED' * (name in wrong)}"
                 for name, value in found.items()]
        return {"lines": lines, "float32": found, "failed": bool(wrong)}

    def transformers(self) -> dict:
        """The same sampling by transformers.generate, with the same weights and dtype."""
        if not find_spec("transformers"):
            return {"lines": ["transformers is not installed"]}
        import transformers
        transformers.utils.logging.set_verbosity_error()
        model = self.model
        llama = transformers.AutoModelForCausalLM.from_config(
            transformers.LlamaConfig(**config_to_hf(model.config)), dtype=model.embed.weight.dtype,
            attn_implementation="sdpa").to(self.device).eval()
        wrong = llama.load_state_dict(weights_to_hf(model.config, model.state_dict()), strict=False)
        if wrong.unexpected_keys or set(wrong.missing_keys) - {"lm_head.weight"}:
            raise RuntimeError(f"the weights do not fit: {wrong}")
        llama.tie_weights()
        llama.generation_config = transformers.GenerationConfig()
        results, responses, judged = [], self.size["new_tokens"], self.size["judged_tokens"]
        for rows in reversed(self.size["rows"]):
            results.append(self.generate(llama, "responses", self.prompts(rows // 4), 4, responses))
            results.append(self.generate(llama, "judging", self.judge_prompts(rows // 3), 3, judged))
        return {"results": results}

    def generate(self, llama, work: str, prompts: list[list[int]], n: int, new_tokens: int) -> dict:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=self.device)
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts],
                            device=self.device)

        @torch.inference_mode()
        def run():
            out = llama.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, num_return_sequences=n,
                do_sample=True, temperature=0.7, top_p=0.9, top_k=0, pad_token_id=0, eos_token_id=None)
            assert out.shape == (len(prompts) * n, longest + new_tokens)
        bench.reset_peak()
        first = bench.seconds(run)
        times = bench.take_turns({work: run}, 1)[work]
        drawn = [[Completion([0] * new_tokens, False)] * n for _ in prompts]
        cost = bench.sampling_cost(self.model, prompts, drawn)
        return self.result(work, "transformers", len(prompts) * n, cost, times, first_seconds=first,
                           peak_mb=bench.peak_mb(), ms_per_step=1000 * statistics.median(times) / new_tokens)

    def iteration(self) -> dict:
        """One iteration with the settings of smollm2_gpu.toml and fewer prompts: every step once, captures included.

        Random weights write no scores, so the first two responses to every prompt become a pair; replay is left out."""
        config, count = load_config(CONFIGS / "smollm2_gpu.toml"), self.size["prompts"]
        lm, taken, tokens, captures = make_lm(self.model), {}, {}, {}

        def sample(step: str, prompts: list[list[int]], n: int, mean_length: int) -> list[list[Completion]]:
            settings, longest = getattr(config, step), self.size["longest"]
            settings = replace(settings, max_new_tokens=min(settings.max_new_tokens, longest))
            stop_ids, drawn = self.stop_ids(min(mean_length, longest // 2)), []
            with timed_captures() as captures[step]:
                taken[step] = bench.seconds(lambda: drawn.extend(lm.sample(prompts, n, settings, 1, stop_ids)))
            tokens[step] = sum(len(completion.ids) for row in drawn for completion in row)
            return drawn

        sample("prompts", self.prompts(count, 0, *((20, 60) if self.is_small else (150, 300))), 1, 25)
        x = self.prompts(count)
        y = sample("responses", x, config.responses.candidates, 200)
        header = self.prompts(1, 40 if self.is_small else 220, 0, 0)[0]
        judged = [header + prompt + completion.ids for prompt, row in zip(x, y) for completion in row]
        sample("judge", judged, config.judge.judgements, 80)
        pairs = [EncodedPair(prompt, row[0].ids, row[1].ids) for prompt, row in zip(x, y)]
        taken["dpo"] = bench.seconds(lambda: train_dpo(lm, pairs, replace(config.dpo, replay_weight=0.0)))
        tokens["dpo"] = config.dpo.epochs * sum(len(ids) for pair in pairs for ids in pair)
        lines = [f"{count} prompts; the config has {config.prompts.count:,}"]
        for step, seconds in taken.items():
            made = captures.get(step, [])
            lines.append(f"{step:10}{tokens[step]:10,} tokens {seconds:8.2f} s {tokens[step] / seconds:10,.0f} tokens/s"
                         f", {sum(made):.2f} s for {len(made)} captures")
        return {"lines": lines, "seconds": taken, "tokens": tokens}

    def smoke(self) -> dict:
        """tiny_configs/smoke.toml through M2 with graphs; with --quick, a shorter training and fewer prompts."""
        less = ["seed_data.judge_evaluation=4", "seed_data.evaluation=4", "seed_data.ift=96",
                "seed_data.ranked=32", "sft.epochs=1", "prompts.count=8"]
        changes = ["iterations=1", f"device={self.device}", f"threads={torch.get_num_threads()}"]
        config = load_config(CONFIGS / "smoke.toml", overrides=(*changes, *(less if self.quick else [])))
        lines = []
        with tempfile.TemporaryDirectory() as folder, timed_captures() as captures:
            run = Run.open(Path(folder) / "smoke", config)
            run.lm_class = GraphRunLM
            run_loop(run, on_evaluated=lambda metrics: lines.append(line(metrics)))
            seconds = {model.name: read_json(model.folder / "timing.json", "timing") for model in finished_models(run)}
        for name, timing in seconds.items():
            lines.append(f"{name}: " + ", ".join(f"{step} {taken:.1f} s" for step, taken in timing.items()))
        lines.append(f"weights in {run.dtype}; {sum(captures):.2f} s for {len(captures)} captures")
        return {"lines": lines, "seconds": seconds}


def train_dpo(lm: FastLM, pairs: list[EncodedPair], config: DPOConfig) -> None:
    """dpo.train_dpo, on pairs of token ids."""
    policy, reference = lm.copy(), lm.frozen_copy()
    batches = make_batches([sum(map(len, pair)) for pair in pairs], config, seed=0)
    fit_dpo(policy, reference, [([pairs[i] for i in batch], []) for batch in batches], config)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The norm of a - b, relative to b's."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return float((a - b).norm() / b.norm().clamp(min=1e-12))


def kernels(run, device: str, times: int) -> tuple[Counter, Counter]:
    """Microseconds and calls of each kernel (on a CPU: operator), for one of `times` runs."""
    from torch.profiler import ProfilerActivity, profile
    on_gpu = device == "cuda"
    run()
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu,
                 acc_events=True) as profiler:
        for _ in range(times):
            run()
        if on_gpu:
            torch.cuda.synchronize()
    taken, counts = Counter(), Counter()
    for event in profiler.key_averages():
        if (event.device_type == torch.autograd.DeviceType.CUDA) == on_gpu:
            name = event.key.removeprefix("void ").replace("at::native::", "")[:160]
            taken[name] += (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / times
            counts[name] += event.count / times
    return taken, counts
