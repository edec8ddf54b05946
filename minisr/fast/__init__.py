"""Drop-in replacements of core functions, faster. Nothing in the core needs them: delete this folder, set
``engine = "plain"``, and everything still runs.

    lm.py              FastLM, the engine: which core operation is replaced by what
    sampler.py         generate: shared prefixes, grouped prefill, finished rows leave, top-p without sorting
    cache.py           the KV cache in which rows share prefixes (Hydragen)
    decode_step.py     one decode step in fewer operations
    forward.py         the forward pass with a choice of attention, computed to the end only where needed
    losses.py          SFT loss at the targets only; packed preference pairs
    master_weights.py  float32 copies for training bfloat16 weights
    rng.py             random numbers on the GPU
"""

from minisr.fast.lm import FastLM

__all__ = ["FastLM"]
