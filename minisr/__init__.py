"""minisr: Self-Rewarding Language Models (Yuan et al., arXiv 2401.10020) in pure PyTorch.

Read loop.py first: it is figure 1 of the paper.
"""

__version__ = "0.1.0"


class InputError(ValueError):
    """Something the user gave is wrong. Its text is one line that says what, where and how to fix it."""
