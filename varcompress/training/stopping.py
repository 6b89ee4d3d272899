"""Signals during a run: at SIGTERM and Ctrl-C the step is finished and its state saved before the process ends."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType

AGAIN_S = 1.0  # a launcher may pass on a signal that a process has had already


class Stopper:
    """A block in which SIGTERM and Ctrl-C are only noted, in `signal`; a Ctrl-C after either ends the step as well.

    The end of a child process is no event in it.
    Outside the main thread, where no handler can be set, signals do what they did.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._received_s = 0.0
        self._before: dict = {}

    def __enter__(self) -> Stopper:
        if threading.current_thread() is threading.main_thread():
            handlers = {signal.SIGTERM: self._receive, signal.SIGINT: self._receive}
            # torch's raises as soon as a process that reads has died, also while the weights move: see `next_batch`
            handlers |= {signal.SIGCHLD: signal.SIG_DFL} if hasattr(signal, "SIGCHLD") else {}
            self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if self.signal and number == signal.SIGINT and now_s - self._received_s > AGAIN_S:
            raise KeyboardInterrupt
        self.signal, self._received_s = self.signal or number, now_s


def leave_signals(worker: int) -> None:
    """For a process that reads batches: signals, which launchers send to it too, are for the run to handle."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
