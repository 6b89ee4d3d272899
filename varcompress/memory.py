"""Memory of a generation call, measured; and a refusal of a batch that by arithmetic would not fit."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from varcompress import cost
from varcompress.errors import InputError
from varcompress.hardware import fitting_memory, free_bytes
from varcompress.models.elastic import ElasticVAR
from varcompress.models.linear import tensor_bytes
from varcompress.models.runtime import Runtime
from varcompress.schedule import Schedule


@contextlib.contextmanager
def fitting_batch(
    model: ElasticVAR,
    schedules: Sequence[Schedule],
    num_images: int,
    runtime: Runtime | None = None,
    *,
    guided: bool | None = None,
) -> Iterator[None]:
    """`fitting_memory` for calls of `num_images`, which on a CPU are refused by arithmetic before they begin.

    guided: as the model draws, by default.
    """
    runtime = runtime or model.runtime
    free = free_bytes() if model.device.type == "cpu" else None
    peaks = [cost.peak_bytes(model, schedule, num_images, runtime, guided=guided) for schedule in schedules]
    needed = max(peaks) - held_bytes(model)
    remedy = "choose a smaller one" if num_images > 1 else "free some memory"
    if free is not None and needed > free:
        if needed - cost.packed_bytes(model, runtime) <= free:
            remedy = "use kernels torch, which packs no weights"
        raise InputError(
            f"a batch of {num_images:,} image{'' if num_images == 1 else 's'} needs {math.ceil(needed / 2**20):,} MiB "
            f"more than the model, by arithmetic, and {free // 2**20:,} are free: {remedy}"
        )
    with fitting_memory(model.device, num_images, remedy):
        yield


class PeakMemory:
    """Peak memory of a block that calls `model` under `schedule`: what the model holds, and the most allocated on top.

    What it holds is counted tensor by tensor once it is ready for the call, in `held_bytes`. On a GPU the block's
    growth is what torch's allocator reports. On a CPU, where torch keeps no such count, every tensor made in the block
    is followed from its birth to its end; scratch inside an operator (a sort, a convolution's packing) is not seen.
    Following slows small operators down on a CPU: never time inside. `bytes` holds the result after the block.
    """

    def __init__(self, model: ElasticVAR, schedule: Schedule, runtime: Runtime | None = None) -> None:
        model.prepare(schedule, runtime)  # packed copies and streamed layers are held, not growth
        self.device = model.device
        self.bytes = self.held_bytes = held_bytes(model)
        self._tensors = LiveTensors()

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            self._tensors.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            growth = torch.cuda.max_memory_allocated(self.device) - self._before
        else:
            self._tensors.__exit__(*error)
            growth = self._tensors.peak_bytes
        self.bytes = self.held_bytes + growth


def held_bytes(model: ElasticVAR) -> int:
    """Bytes of the tensors on its device that a model holds, wherever in it they are.

    Found by following its attributes, so that what it should have let go counts too. Offloaded blocks are in host
    memory, and do not count on a CPU either, which stands in for a device then.
    """
    host = set(map(id, model.var.blocks.parameters())) if model.offloaded else set()
    found: dict[int, Tensor] = {}
    seen, queue = set(), [model]
    while queue:
        value = queue.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            if value.device == model.device and id(value) not in host:
                found[_address(value)] = value
        elif isinstance(value, dict):
            queue += value.values()
        elif isinstance(value, (list, tuple, set)):
            queue += value
        elif isinstance(value, torch.nn.Module) or type(value).__module__.startswith("varcompress."):
            queue += getattr(value, "__dict__", {}).values()
    return sum(map(tensor_bytes, found.values()))


def _address(tensor: Tensor) -> int:
    """What tensors share that are views of one."""
    return id(tensor) if tensor.is_mkldnn else tensor.untyped_storage().data_ptr()


class LiveTensors(TorchDispatchMode):
    """Bytes of the storages that operators made and nobody has dropped yet."""

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = self._now = 0
        self._alive: dict[int, weakref.ref] = {}
        self._elementary = set()  # operators known to have no parts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> object:  # noqa: ANN001
        kwargs = kwargs or {}
        if func not in self._elementary and func.namespace != "prim":  # questions about a tensor, not operators
            with self:  # inference mode hands composite operators over whole: follow their parts instead
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
            self._elementary.add(func)
        result = func(*args, **kwargs)
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if _has_storage(t)}
        for tensor in tree_leaves(result):
            if _has_storage(tensor) and id(tensor.untyped_storage()) not in given | self._alive.keys():
                self._born(tensor.untyped_storage())
        return result

    def _born(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()

        def dropped(_: weakref.ref) -> None:
            del self._alive[key]
            self._now -= size

        self._alive[key] = weakref.ref(storage, dropped)
        self._now += size
        self.peak_bytes = max(self.peak_bytes, self._now)


def _has_storage(value: object) -> bool:
    """Whether it is a tensor, and not one in a layout of oneDNN's."""
    return isinstance(value, Tensor) and value.layout is torch.strided
