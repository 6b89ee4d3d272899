"""How a long call tells how far it is, and what it wants to remark: the two callables that a caller may give."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""Called with (done, total, what); `what` begins with the name of the task and a colon."""

Note = Callable[[str], None]
"""Called with a remark for a person."""


def silent(*_: object) -> None:
    """The Progress, or the Note, of a caller who wants none."""


class Steps:
    """Progress of a known number of steps, counted as they are taken."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def step(self, what: str) -> None:
        """One more step is done."""
        self._done += 1
        self._progress(self._done, self._total, what)
