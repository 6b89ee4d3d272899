"""CUDA graphs: a call recorded once and replayed whole, so that a small batch does not wait for a thousand launches."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor

LIMIT = 32  # graphs kept; one more, and all begin anew: dropping a single one would leave the others its workspace
WARMUPS = 2  # runs before the recording: kernels compile, libraries choose and allocate


class _Recorded(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


class Graphs:
    """Recorded calls by key, all on the current device.

    They take turns in one pool of memory, which never shrinks and which a larger call extends rather than reuses: it is
    smallest when the largest is recorded first. And on one stream, since libraries keep a workspace for every stream
    that they have seen.
    """

    def __init__(self) -> None:
        self._weights: Hashable = None
        self.clear()

    def __reduce__(self) -> tuple:
        return Graphs, ()  # a copy of a model records its own

    def run(self, key: Hashable, body: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor, ...]:
        """body(*inputs), recorded the first time. The key must tell apart whatever else the body depends on.

        The body must be free of reads from the device, and of shapes that depend on values.
        """
        if key not in self._recorded:
            if len(self._recorded) == LIMIT:
                self.clear()
            self._recorded[key] = self._record(body, inputs)
        recorded = self._recorded[key]
        for static, value in zip(recorded.inputs, inputs, strict=True):
            static.copy_(value)
        recorded.graph.replay()
        return tuple(output.clone() for output in recorded.outputs)  # the next replay writes over them

    def keep_if(self, weights: Hashable) -> None:
        """Forget all recordings unless `weights`, the addresses of what they read, are those of the last call."""
        if self._weights != weights:
            self._weights = weights
            self.clear()

    def clear(self) -> None:
        """Forget all recordings, and let go of their memory."""
        self._recorded: dict[Hashable, _Recorded] = {}
        self._pool: tuple[int, int] | None = None
        self._stream: torch.cuda.Stream | None = None

    def _record(self, body: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...]) -> _Recorded:
        static = tuple(value.clone() for value in inputs)
        self._stream = self._stream or torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(WARMUPS):
                body(*static)
        graph = torch.cuda.CUDAGraph()
        # frees what the warm-up left before it begins; other threads, such as a data loader's, may go on
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            outputs = body(*static)
        torch.cuda.current_stream().wait_stream(self._stream)
        self._pool = self._pool or graph.pool()
        return _Recorded(graph, static, outputs)
