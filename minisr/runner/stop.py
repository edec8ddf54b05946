"""Ctrl-C and SIGTERM wait for the end of the current batch or optimizer step, which is saved first.

Imported before anything heavy, so that a signal during start-up is handled too.
"""

import signal
import sys

from minisr.runner import processes


class Stop:
    """Whether a signal asked the process to stop. Long loops call check() at points where everything is saved."""

    requested = False

    @classmethod
    def on_signals(cls) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, cls._request)

    @classmethod
    def _request(cls, *_) -> None:
        if cls.requested:
            raise KeyboardInterrupt
        cls.requested = True
        if processes.is_main():
            print("\nminisr: stopping after this step; send the signal again to stop at once", file=sys.stderr)

    @classmethod
    def check(cls) -> None:
        """Raise KeyboardInterrupt in all processes of the run if one of them was asked to stop."""
        if processes.any_true(cls.requested):
            raise KeyboardInterrupt
