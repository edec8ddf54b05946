"""Faster drop-in replacements of core functions. Nothing in the core needs them: without this folder, every run with
``engine = "plain"`` still works. LoRA, sharding, gradient checkpointing and bfloat16 need the fast engine.

    lm.py              FastLM, the engine: which core operation is replaced by what
    sampler.py         generate: shared prefixes, grouped prefill, finished rows leave, top-p without sorting
    cache.py           the KV cache in which rows share prefixes (Hydragen)
    decode_step.py     one decode step in fewer operations
    forward.py         the forward pass with a choice of attention, computed to the end only where needed
    losses.py          SFT loss at the targets only; packed preference pairs
    master_weights.py  float32 copies for training bfloat16 weights
    rng.py             random numbers on the GPU
    cuda_graphs.py     the decode loop on a GPU with static shapes and CUDA graphs
"""

from minisr.fast.lm import FastLM

__all__ = ["FastLM"]
