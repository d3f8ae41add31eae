"""Stopping a run by Ctrl-C or SIGTERM: after the current step, and with a checkpoint."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from rosd_fast.report.progress import Progress

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Set by the first Ctrl-C or SIGTERM; the loop checks it after each step.

    A second Ctrl-C raises KeyboardInterrupt in the step that runs. No signal ends the wait for the
    last checkpoint.
    """

    def __init__(self) -> None:
        self.requested = False
        self._finishing = False

    @contextmanager
    def listening(self, progress: Progress, finish: Callable[[], None]) -> Iterator[None]:
        """Handle the signals during the block and during `finish`, which is called at its end.

        finish: waits for the checkpoint that is being written; called even if the block raises.
        """

        def handle(number: int, _frame: FrameType | None) -> None:
            if self._finishing:
                progress.note("the last checkpoint is being written; the run ends after that")
                return
            if self.requested and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.requested = True
            progress.note("stopping after this step with a checkpoint; Ctrl-C again stops at once")

        before = {number: signal.signal(number, handle) for number in SIGNALS}
        try:
            try:
                yield
            finally:
                self._finishing = True
                finish()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def interruptible() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C during the block, so that what is open is closed."""

    def handle(_number: int, frame: FrameType | None) -> None:
        interrupt = signal.getsignal(signal.SIGINT)  # that of the event loop, while one runs
        if not callable(interrupt):  # ignored, as in the background of a script
            interrupt = signal.default_int_handler
        interrupt(signal.SIGINT, frame)

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
