"""On Ctrl-C, SIGTERM, or SIGHUP (a closed terminal), finish and save the current batch or optimizer step, then stop.

Imported before anything heavy, so that a signal during start-up is handled too.
"""

import contextlib
import math
import signal
import sys
import time

from minisr.runner import processes


class Stop:
    """Whether a signal asked the process to stop. Long loops call check() at points where everything is saved."""

    requested = False
    at_once = False  # a second signal came
    requested_at = -math.inf

    @classmethod
    def on_signals(cls) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, cls._request)
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
            signal.signal(signal.SIGHUP, cls._request)

    @classmethod
    def _request(cls, *_) -> None:
        # torchrun passes on a Ctrl-C that the terminal has sent to all processes already.
        is_repeated = processes.size() > 1 and time.monotonic() - cls.requested_at < 1
        if cls.requested and not is_repeated:
            cls.at_once = True
            raise KeyboardInterrupt
        cls.requested, cls.requested_at = True, time.monotonic()
        if is_repeated:
            return
        if processes.is_main():
            with contextlib.suppress(OSError):  # the terminal may be gone
                print("\nminisr: stopping after this step; send the signal again to stop at once", file=sys.stderr)

    @classmethod
    def check(cls) -> None:
        """Raise KeyboardInterrupt in all processes of the run if one of them was asked to stop."""
        if processes.any_true(cls.requested):
            raise KeyboardInterrupt
