"""CUDA's streams, events and graphs, emulated on tensors of the CPU.

What runs on a stream is computed at once, so that the program goes on, and queued. `Device.run` computes the queues
again, from their first operation, in an order drawn at random among all that streams and events allow: a result that
some order would spoil comes out spoilt. A graph is the queue of its capture, operations on tensors where they were, and
nothing of the body that made it.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import deque

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

FAILED = "CUDA error: operation failed due to a previous error during capture"


class Event:
    def __init__(self, device):
        self.device, self.recorded, self.completed = device, 0, 0

    def record(self, stream=None):
        self.recorded += 1
        (stream or self.device.current_stream()).queue.append(("record", self, self.recorded))

    def wait(self, stream):
        stream.queue.append(("wait", self, self.recorded))


class Stream:
    def __init__(self, device):
        self.device, self.queue, self.capture, self.invalid = device, deque(), None, False
        device.streams.append(self)

    def wait_event(self, event):
        event.wait(self)

    def wait_stream(self, other):
        event = Event(self.device)
        event.record(other)
        event.wait(self)

    def add(self, operation):
        (self.queue if self.capture is None else self.capture).append(operation)


class Graph:
    """Stands in for torch.cuda.CUDAGraph; torch.cuda.graph, which drives it, is torch's own."""

    def __init__(self, device):
        self.device, self.operations = device, []

    def capture_begin(self, *pool, **_):
        self.device.seed_generator()
        self.stream = self.device.current_stream()
        self.stream.capture, self.stream.invalid = self.operations, False

    def capture_end(self):
        self.stream.capture = None
        if self.stream.invalid:
            raise RuntimeError(FAILED)

    def replay(self):
        time.sleep(1e-4)  # other threads come in
        self.device.current_stream().queue.extend(self.operations)


class Device:
    """One GPU, and what torch.cuda says of it to the current thread."""

    def __init__(self):
        self.streams, self._local, self._generator = [], threading.local(), None
        self.default = Stream(self)
        self.random = random.Random(0)

    def install(self, patch):
        """Put this device in the place of torch.cuda's."""
        stands_in = {
            "CUDAGraph": lambda: Graph(self),
            "Event": lambda: Event(self),
            "Stream": lambda device=None: Stream(self),
            "current_stream": self.current_stream,
            "stream": self.stream,
            "device": lambda device: contextlib.nullcontext(),
            "is_current_stream_capturing": lambda: self.current_stream().capture is not None,
            "graph_pool_handle": lambda: (0, 1),
            "synchronize": lambda: None,
            "empty_cache": lambda: None,
        }
        for name, value in stands_in.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
        patch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
        return self

    def current_stream(self, device=None):
        return getattr(self._local, "stream", self.default)

    def set_stream(self, stream):
        self._local.stream = stream

    def stream(self, stream):
        return _StreamContext(self, stream)

    def queueing(self):
        """A context in which the current thread works on this device."""
        return _Queueing(self)

    def seed_generator(self):
        """As torch before 2.11 does when a capture begins, with tensors that it makes at the first one."""
        if self._generator is None:
            self._generator = torch.zeros(())
        self._generator.fill_(0)

    def run(self):
        """Compute all that is queued."""
        stream = self.default
        with torch.inference_mode(), _disable_current_modes():
            while waiting := [stream for stream in self.streams if stream.queue]:
                ready = [stream for stream in waiting if _is_ready(stream.queue[0])]
                assert ready, "streams wait for each other"
                if stream not in ready or self.random.random() < 0.05:  # else one goes on, and others fall behind
                    stream = self.random.choice(ready)
                _compute(stream.queue.popleft())


class _StreamContext:
    def __init__(self, device, stream):
        self.device, self.stream = device, stream

    def __enter__(self):
        self.before = self.device.current_stream()
        self.device.set_stream(self.stream)

    def __exit__(self, *_):  # which torch.cuda.graph does not call where ending a capture fails
        self.device.set_stream(self.before)


class _Queueing(TorchDispatchMode):
    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        stream = self.device.current_stream()
        if function is torch.ops.aten._local_scalar_dense.default and stream.capture is not None:
            stream.invalid = True
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        result = function(*args, **(kwargs or {}))
        tensors = [value for value in tree_leaves(result) if isinstance(value, torch.Tensor)]
        if "empty" in function.overloadpacket.__name__ or any(tensor.is_meta for tensor in tensors):
            return result  # memory alone, or not even that, and no work
        stream.add((function, args, kwargs or {}, result))
        return result


def _is_ready(operation):
    return operation[0] != "wait" or operation[1].completed >= operation[2]


def _compute(operation):
    function, *rest = operation
    if function == "record":
        rest[0].completed = max(rest[0].completed, rest[1])
    elif function != "wait":
        args, kwargs, result = rest
        for old, new in zip(tree_leaves(result), tree_leaves(function(*args, **kwargs)), strict=True):
            if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                old.copy_(new)
