"""Memory of a generation call: what arithmetic predicts, what is measured, and a refusal where it would not fit."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from varcompress.errors import InputError
from varcompress.hardware import fitting_memory, free_bytes
from varcompress.kernels import draw
from varcompress.kernels.backend import TRITON, choose
from varcompress.models import strips
from varcompress.models.elastic import ElasticVAR
from varcompress.models.generation import images_at_a_time, parts
from varcompress.schedule import Schedule


@contextlib.contextmanager
def fitting_batch(model: ElasticVAR, schedules: Sequence[Schedule], images: int) -> Iterator[None]:
    """`fitting_memory` for calls of `images` each, which on a CPU are refused by arithmetic before they begin."""
    free = free_bytes() if model.device.type == "cpu" else None
    needed = max(predicted_peak_bytes(model, schedule, images) for schedule in schedules) - held_bytes(model)
    remedy = "choose a smaller one" if images > 1 else "free some memory"
    if free is not None and needed > free:
        packed = sum(layer.weight.nbytes for layer in model.packed_layers())
        if needed - packed <= free:
            remedy = "use kernels torch, which packs no weights"
        raise InputError(
            f"a batch of {images:,} image{'' if images == 1 else 's'} needs {math.ceil(needed / 2**20):,} MiB more "
            f"than the model, by arithmetic, and {free // 2**20:,} are free: {remedy}"
        )
    with fitting_memory(model.device, images, remedy):
        yield


# -- predicted ----------------------------------------------------------------------------------


def predicted_peak_bytes(model: ElasticVAR, schedule: Schedule, batch_size: int) -> int:
    """Weights, plus the larger of the transformer's and the decoder's fullest moment.

    Transformer, over the scales: cache + what layers compute once per call + f_hat + the fullest of attention, MLP
    and sampling. Decoder: f_hat + images + `_decoder_elements`. What a kernel needs inside is not in it.
    """
    config, element_bytes = model.var.config, model.dtype.itemsize
    width, rows = config.width, 2 * batch_size
    cache = schedule.cache_bytes(batch=batch_size, token_bytes=model.cache_token_bytes)
    f_hat = batch_size * config.z_channels * config.patch_nums[-1] ** 2 * 4
    fused = choose(model.kernels, model.device) is TRITON
    fullest = 0
    for scale, (side, end, layers) in enumerate(zip(config.patch_nums, schedule.ends, schedule.layers, strict=True)):
        following = schedule.layers[scale + 1] if end < schedule.ends[-1] else ()
        once, after = ((rows * 6 + 3) * len(read) * width + rows * 3 * width for read in (layers, following))
        batch = parts(schedule, scale, rows, streamed=model.offloaded)[0].stop
        tokens, token = rows * side**2, batch * side**2
        # the stream, queries, keys and values side by side, and the queries again; the others are in the cache
        attention = token * (1 + 3 + 1) * width
        if model.cache_dtype:  # or beside it; and the stream, the queries, the layer's keys and values, three results
            attention = max(attention + token * 2 * width, token * (1 + 1 + 3) * width + batch * 2 * end * width)
        # the stream, what was read from it or the result, the hidden layer
        mlp = token * (1 + 1) * width + token * config.hidden
        waiting = (tokens - token) * width  # the stream of the other parts of the batch
        doubling = tokens * width * 3 // 2  # the input, and its copy for the unguided half beside it
        few = min(batch_size, images_at_a_time(side**2, config.vocab, element_bytes))
        logits = 2 * few * side**2 * config.vocab
        sampling = tokens * width + logits
        drawing = 0 if fused else draw.BYTES_PER_LOGIT * min(logits // 2, draw.chunk(model.device))
        running = max(waiting + max(attention, mlp), doubling)
        fullest = max(fullest, (once + running) * element_bytes, (after + sampling) * element_bytes + drawing)
    few = min(batch_size, model.tokenizer.images_at_a_time)
    images = batch_size * 3 * model.tokenizer.config.image_size**2 * 4
    joining = images if few < batch_size else 0
    decoder = images + max(_decoder_elements(model, few) * element_bytes, joining)
    return model.held_weight_bytes(schedule) + f_hat + max(cache + fullest, decoder)


def _decoder_elements(model: ElasticVAR, images: int) -> int:
    """Elements of the decoder's feature maps at their fullest, for the images that it decodes together.

    On a GPU that is the last convolution of a residual block: the level's input, the block's input, and two maps of
    its own, three where plain torch has normalised it into another layout.
    """
    config = model.tokenizer.config
    if model.device.type == "cpu":
        return strips.peak_elements(model.tokenizer.decoder, images, config.patch_nums[-1], model.dtype.itemsize)
    widths = [config.channels * m for m in config.channel_multipliers]
    inputs = [*widths[1:], widths[-1]]
    sides = [config.image_size // 2**level for level in range(len(widths))]
    own = 3 if choose(model.kernels, model.device) is TRITON else 4
    return images * max(
        side**2 * (given + own * width) for side, given, width in zip(sides, inputs, widths, strict=True)
    )


# -- measured -----------------------------------------------------------------------------------


class PeakMemory:
    """Peak memory of a block that calls `model` under `schedule`: what the model holds, and the most allocated on top.

    What it holds is counted tensor by tensor once it is ready for the call, in `held_bytes`. On a GPU the block's
    growth is what torch's allocator reports. On a CPU, where torch keeps no such count, every tensor made in the block
    is followed from its birth to its end; scratch inside an operator (a sort, a convolution's packing) is not seen.
    Following slows small operators down on a CPU: never time inside. `bytes` holds the result after the block.
    """

    def __init__(self, model: ElasticVAR, schedule: Schedule) -> None:
        model.prepare(schedule)  # packed copies and streamed layers are held, not growth
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
    return sum(torch.ops.mkldnn._nbytes(v) if v.is_mkldnn else v.untyped_storage().nbytes() for v in found.values())


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
        if func not in self._elementary:
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
