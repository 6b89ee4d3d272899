"""SIGTERM and Ctrl-C during a run: the step is finished and its state saved before the process ends."""

from __future__ import annotations

import signal
import threading
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopper:
    """A block in which a first signal is only noted. A second one ends the process at once.

    Outside the main thread, where no handler can be set, signals do what they did.
    """

    def __init__(self) -> None:
        self.signal = 0  # that was received
        self._before: dict = {}

    def __enter__(self) -> Stopper:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
