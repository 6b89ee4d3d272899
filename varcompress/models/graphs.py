"""CUDA graphs: a call recorded once and replayed whole, so that a small batch does not wait for a thousand launches."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor

LIMIT = 32  # graphs kept, the least recently used dropped first
WARMUPS = 2  # runs before the recording: kernels compile, libraries choose and allocate


class _Recorded(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


class Graphs:
    """Recorded calls by key. They take turns in one pool of memory, which is as large as the largest needs."""

    def __init__(self) -> None:
        self._recorded: OrderedDict[Hashable, _Recorded] = OrderedDict()
        self._pool: tuple[int, int] | None = None

    def __reduce__(self) -> tuple:
        return Graphs, ()  # a copy of a model records its own

    def run(self, key: Hashable, body: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor, ...]:
        """body(*inputs), recorded the first time. The key must tell apart whatever else the body depends on.

        The body must be free of reads from the device, and of shapes that depend on values.
        """
        if key not in self._recorded:
            self._recorded[key] = self._record(body, inputs)
            if len(self._recorded) > LIMIT:
                self._recorded.popitem(last=False)
        self._recorded.move_to_end(key)
        recorded = self._recorded[key]
        for static, value in zip(recorded.inputs, inputs, strict=True):
            static.copy_(value)
        recorded.graph.replay()
        return tuple(output.clone() for output in recorded.outputs)  # the next replay writes over them

    def clear(self) -> None:
        """Forget all recordings and their memory: the weights have moved."""
        self._recorded.clear()
        self._pool = None

    def _record(self, body: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...]) -> _Recorded:
        static = tuple(value.clone() for value in inputs)
        here, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            for _ in range(WARMUPS):
                body(*static)
        here.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):  # frees what the warm-up left before it begins
            outputs = body(*static)
        self._pool = self._pool or graph.pool()
        return _Recorded(graph, static, outputs)
