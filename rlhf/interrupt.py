"""SIGTERM and SIGINT (Ctrl-C) end a run of the command after the step that it is in, with a checkpoint.

The command switches it on (`enabled`); a trainer notes signals while it trains (`deferred`), and looks between two
steps. In a program of somebody else's nothing is switched on, and no handler is touched.
"""

import contextlib
import os
import signal
import threading

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_enabled = False


class Interrupted(Exception):
    """A run was ended by a signal, `number`, after it had written the checkpoint that is named."""

    def __init__(self, number: int, checkpoint: str):
        super().__init__(f"stopped by {signal.Signals(number).name}; {checkpoint} is written")
        self.number = number


class Noted:
    """The first signal that came, 0 before; `active`: whether signals are noted at all."""

    def __init__(self, active: bool = False):
        self.active, self.number, self.process = active, 0, os.getpid()

    def __call__(self, number, frame) -> None:
        if os.getpid() != self.process:  # a forked helper: Ctrl-C is for its parent, SIGTERM ends it as ever
            if number == signal.SIGTERM:
                _end(number)
        elif self.number:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            _end(number)
        else:
            self.number = number
            name = signal.Signals(number).name
            text = f"\nrlhf: {name}: ends after this step, with a checkpoint; at once if it comes again\n"
            with contextlib.suppress(OSError):
                os.write(2, text.encode())


def _end(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


@contextlib.contextmanager
def enabled():
    """Let the runs inside the block end with a checkpoint when a signal comes."""
    global _enabled
    before, _enabled = _enabled, True
    try:
        yield
    finally:
        _enabled = before


@contextlib.contextmanager
def deferred():
    """Note signals inside the block where that is enabled and Python allows it (in the main thread)."""
    noted = Noted(active=_enabled)
    if not _enabled or threading.current_thread() is not threading.main_thread():
        yield noted
        return
    before = {number: signal.signal(number, noted) for number in SIGNALS}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
