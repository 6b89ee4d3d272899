"""CUDA graphs: a call recorded once and replayed whole, so that a small batch does not wait for a thousand launches."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor

LIMIT = 32  # graphs kept; one more, and all begin anew: dropping a single one would leave the others its workspace
WARMUPS = 2  # runs before the recording: kernels compile, libraries choose and allocate

Body = Callable[..., tuple[Tensor, ...]]

_capturing = threading.Lock()  # torch allows one capture at a time in a process


class _Recorded(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


class Graphs:
    """Recorded calls by key, all on one device, which is the current one in every call. Safe for threads and streams.

    The graphs share one pool of memory, which never shrinks and which a larger call extends rather than reuses: it is
    smallest when the largest is recorded first. So two of them must never run at once: a lock keeps threads apart, and
    an event after each call keeps streams apart. All are captured on one stream, since libraries keep a workspace for
    every stream that they have seen, and replayed on the caller's.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._weights: Hashable = None
        self._unrecordable: set[Hashable] = set()
        self.clear()

    def __reduce__(self) -> tuple:
        return Graphs, ()  # a copy of a model records its own

    @torch.no_grad()
    def run(self, key: Hashable, body: Body, *inputs: Tensor, weights: Hashable = None) -> tuple[Tensor, ...]:
        """body(*inputs), recorded the first time and replayed from then on. No gradients.

        key: must tell apart whatever the body depends on beside its inputs and the weights; weights: where these are,
        such as their addresses; all recordings are forgotten when it differs from the last call's. The body must be
        free of reads from the device, and of shapes that depend on values. One that cannot be recorded runs operator
        by operator, after one warning. Raises torch.OutOfMemoryError where there is no memory to record it.
        """
        if torch.cuda.is_current_stream_capturing():
            return body(*inputs)  # becomes part of the caller's own graph
        with self._lock:
            if weights != self._weights:
                self.clear()
                self._weights = weights
            if key in self._recorded or self._record(key, body, inputs):
                return self._replay(self._recorded[key], inputs)
        return body(*inputs)

    def clear(self) -> None:
        """Forget all recordings, and let go of their memory."""
        with self._lock:
            self._recorded: dict[Hashable, _Recorded] = {}
            self._pool: tuple[int, int] | None = None
            self._stream: torch.cuda.Stream | None = None
            self._last_call: torch.cuda.Event | None = None

    @property
    def pool_bytes(self) -> int:
        """Device memory that the recordings hold, whether they run or not, and that nothing else can use.

        Most of it is in no count of allocated memory: it is what their intermediate results need at each replay.
        """
        with self._lock:
            if self._pool is None:
                return 0
            segments = torch.cuda.memory_snapshot()
            return sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) == tuple(self._pool))

    def _replay(self, recorded: _Recorded, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        stream = torch.cuda.current_stream()
        stream.wait_event(self._last_call)  # which may still be running on another stream
        try:
            for static, value in zip(recorded.inputs, inputs, strict=True):
                static.copy_(value)
                static.record_stream(stream)  # else its memory could be given away while this stream still reads it
            recorded.graph.replay()
            return tuple(output.clone() for output in recorded.outputs)  # the next replay writes over them
        finally:
            self._last_call.record(stream)

    def _record(self, key: Hashable, body: Body, inputs: tuple[Tensor, ...]) -> bool:
        """Whether there is a recording of the key now."""
        if key in self._unrecordable:
            return False
        if len(self._recorded) == LIMIT:
            self.clear()
        if self._pool is None:
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
            self._last_call = torch.cuda.Event()
        try:
            self._recorded[key] = _record(body, inputs, self._pool, self._stream)
        except _CaptureError as error:
            self._unrecordable.add(key)
            self.clear()  # what the failure left in the pool goes with it
            warnings.warn(f"a call cannot be recorded as a CUDA graph and runs slower: {error}", stacklevel=3)
            return False
        except BaseException:
            self.clear()
            raise
        return True


class _CaptureError(Exception):
    """A body that runs, but not while it is captured."""


def _record(body: Body, inputs: tuple[Tensor, ...], pool: tuple[int, int], stream: torch.cuda.Stream) -> _Recorded:
    """Capture body(*inputs) on `stream`, into `pool`.

    Outside inference mode: before torch 2.11 a capture within it turns the state of the default generator into
    inference tensors, and no capture outside it works any more. And within a stream context of ours, because
    torch.cuda.graph does not restore the current stream where a capture fails.
    """
    caller = torch.cuda.current_stream()
    stream.wait_stream(caller)
    with _capturing, torch.inference_mode(False), torch.no_grad(), torch.cuda.stream(stream):
        static = tuple(value.clone() for value in inputs)
        for _ in range(WARMUPS):
            body(*static)
        graph, why = torch.cuda.CUDAGraph(), None
        try:
            # frees what the warm-up left before it begins; other threads, such as a data loader's, may go on
            with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
                try:
                    outputs = body(*static)
                except Exception as error:  # noted, because ending the capture may fail next and hide it
                    why = _failure(error)
                    raise
        except Exception as error:
            _end_failed_capture(pool, static[0])
            kind, message = why or _failure(error)
            raise kind(message) from None
    caller.wait_stream(stream)
    return _Recorded(graph, static, outputs)


def _failure(error: Exception) -> tuple[type[Exception], str]:
    """What a failed capture raises, and its message: not the error, which holds the tensors of its frames."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in text:
        return torch.OutOfMemoryError, f"no memory to record a CUDA graph: {text}"
    return _CaptureError, " ".join([type(error).__name__, *text.splitlines()[:1]])


def _end_failed_capture(pool: tuple[int, int], tensor: Tensor) -> None:
    """Close what torch before 2.12 leaves open where ending a capture fails. To be called on the capture's stream.

    Its allocator would think that the capture goes on, and give no cached memory back any more; before 2.11 so would
    its default generator, and refuse to draw.
    """
    if torch.__version__ >= (2, 12):
        return
    with contextlib.suppress(RuntimeError):  # the capture ended, its body had failed: nothing is open
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(capture_error_mode="thread_local")
    tensor.clone()  # any work at all: torch warns of a graph without
    graph.capture_end()  # closes the generator's part
