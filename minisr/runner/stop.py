"""Ctrl-C and SIGTERM wait for the end of the wave or step, which is kept. Imported before heavy things."""

import signal
import sys


class Stop:
    """Whether a signal asked to stop. Long loops call check() where everything so far is kept."""

    asked = False

    @classmethod
    def on_signals(cls) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, cls._ask)

    @classmethod
    def _ask(cls, *_) -> None:
        if cls.asked:
            raise KeyboardInterrupt
        cls.asked = True
        print("\nminisr: stopping after this step (once more: at once)", file=sys.stderr)

    @classmethod
    def check(cls) -> None:
        if cls.asked:
            raise KeyboardInterrupt
