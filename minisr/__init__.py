"""minisr: Self-Rewarding Language Models (Yuan et al., arXiv 2401.10020) in pure PyTorch.

Read loop.py first: it is Figure 1 of the paper. Then model, tokenizer, sampler, lm, prompts, judge, pairs, sft, dpo,
train, evaluate and rng, in this order. The folders hold what the algorithm does not need: fast/ (the same functions,
faster), runner/ (files, resuming, experiments), worlds/ (data), interop/ (other people's formats), report/ (pictures).
"""

__version__ = "0.2.0"


class InputError(ValueError):
    """Something the user provided is wrong. The message is one line: what is wrong, where, and how to fix it."""
