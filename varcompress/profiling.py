"""What a schedule costs: time, memory, weights read and FLOPs, each beside what arithmetic predicts.

Every quantity has a pass of its own, so that observing one does not disturb another: latency is
timed end to end with nothing attached; the split into phases, the peak of memory, and the counts of
FLOPs, weights and cache are taken in further passes.
"""

from __future__ import annotations

import gc
import itertools
import math
import random
import time
import weakref
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from varcompress.cache import KVCache
from varcompress.checkpoint import fingerprint
from varcompress.errors import InputError
from varcompress.hardware import device_name, fitting_memory
from varcompress.kernels import draw
from varcompress.kernels.backend import TRITON, choose
from varcompress.models.elastic import ElasticVAR
from varcompress.models.linear import Linear
from varcompress.models.strips import STRIP_ELEMENTS, largest_map
from varcompress.models.tokenizer import decoder_flops
from varcompress.sampling import images_at_a_time
from varcompress.schedule import Schedule

PHASES = ("transformer", "sampling", "decoder")

Progress = Callable[[int, int, str], None]


def profile(
    model: ElasticVAR,
    schedules: Sequence[str | Schedule] | None = None,
    *,
    batch_size: int = 8,
    runs: int = 5,
    warmup: int = 2,
    seed: int = 0,
    progress: Progress | None = None,
    **sampling: float,
) -> dict:
    """Measure schedules side by side. Each run times every schedule once, in an order shuffled anew.

    schedules: `full` is the baseline, always measured and shown first; default model.default_schedules().
    batch_size: images per call (guidance doubles the rows); runs: timed calls per schedule, after `warmup` more;
    sampling: cfg, top_k, top_p of `ElasticVAR.generate`.

    Returns a JSON-able dict with kind "profile", the weights' fingerprint, the hardware, and per schedule: latency_ms
    (median, end to end), latency_spread_ms (quartiles), without_decoder_ms (median of the same runs without the
    tokenizer's decoder), images_per_second, transformer_ms, sampling_ms and decoder_ms
    (medians of split calls), peak_bytes, cache_bytes, weight_bytes and flops per call, each also as *_predicted;
    speedup and speedup_without_decoder over `full`, measured from time and predicted from FLOPs; memory_ratio and
    cache_ratio.
    Raises InputError for a schedule that does not fit, a count below one, or a batch too large for the memory.
    """
    if batch_size < 1 or runs < 1 or warmup < 0:
        raise InputError(f"batch size {batch_size}, runs {runs}, warm-up {warmup}: at least 1, 1 and 0 are needed")
    schedules = [model.schedule(s) for s in schedules] if schedules else model.default_schedules()
    schedules = list(dict.fromkeys((model.schedule("full"), *schedules)))
    with fitting_memory(model.device, batch_size):
        labels = torch.arange(batch_size) % model.var.config.classes
    total, done = len(schedules) * (warmup + 2 + 2 * runs), 0

    def step(schedule: Schedule) -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total, f"profile: {schedule}")

    def call(schedule: Schedule) -> Tensor:
        images = model.generate(labels, schedule, seed=seed, **sampling)
        step(schedule)
        return images

    def time_ms(schedule: Schedule) -> tuple[float, float]:
        """Until the tokens are there, and until the images are."""
        tokens = lambda: model.generate_tokens(labels, schedule, seed=seed, **sampling)  # noqa: E731
        (_, f_hat), tokens_ms = timed(model.device, tokens)
        decoder_ms = timed(model.device, lambda: model.decode_features(f_hat))[1]
        step(schedule)
        return tokens_ms, tokens_ms + decoder_ms

    times = {schedule: [] for schedule in schedules}
    splits = {schedule: [] for schedule in schedules}
    order = random.Random(seed)
    with fitting_memory(model.device, batch_size):
        if model.device.type == "cuda":
            with model.eager():  # libraries take their workspace at the first call, which belongs to no schedule
                model.generate(labels, schedules[0], seed=seed, **sampling)
        counts = {schedule: _counts(model, call, schedule) for schedule in schedules}
        for _ in range(warmup):
            for schedule in schedules:
                call(schedule)
        for _ in range(runs):
            for schedule in order.sample(schedules, len(schedules)):
                times[schedule].append(time_ms(schedule))
        for _ in range(runs):
            for schedule in order.sample(schedules, len(schedules)):
                splits[schedule].append(_phases_ms(model, lambda s=schedule: call(s)))
        effects = {schedule: cache_effect(model, schedule, labels) for schedule in schedules}
    rows = [_row(model, s, batch_size, times[s], splits[s], counts[s]) | effects[s] for s in schedules]
    return {
        "kind": "profile",
        "model": model.provenance.name,
        "weights": fingerprint(model),
        "device": device_name(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        **runtime(model),
        "batch_size": batch_size,
        "runs": runs,
        "schedules": [_beside_full(row, rows[0]) for row in rows],
    }


def predict(model: ElasticVAR, schedule: str | Schedule, batch_size: int = 1) -> dict[str, int]:
    """Arithmetic for one call: cache_bytes, weight_bytes, peak_bytes, flops, flops_without_decoder.

    weight_bytes are the matrices of the blocks, summed over the scales that read them. flops are those of the
    linear layers, attention, head and decoder; AdaLN (once per image), the word embedding and phi are left out.
    """
    schedule, config = model.schedule(schedule), model.var.config
    element_bytes, shape = model.dtype.itemsize, {"width": config.width, "mlp_ratio": config.mlp_ratio}
    transformer = batch_size * schedule.flops(vocab=config.vocab, **shape)
    return {
        "cache_bytes": schedule.cache_bytes(batch=batch_size, token_bytes=model.cache_token_bytes),
        "weight_bytes": sum(schedule.weights(**shape)) * element_bytes,
        "peak_bytes": _predicted_peak_bytes(model, schedule, batch_size),
        "flops": transformer + batch_size * decoder_flops(model.tokenizer.config, in_strips=model.device.type == "cpu"),
        "flops_without_decoder": transformer,
    }


def runtime(model: ElasticVAR) -> dict[str, str | None]:
    """How a model generates: kernels, the dtype of its cache, and what is offloaded."""
    stored = model.cache_dtype or model.dtype
    return {
        "kernels": model.kernels,
        "cache_dtype": str(stored).removeprefix("torch."),
        "offload": "bridge" if model.offloaded else None,
    }


@torch.inference_mode()
def cache_effect(model: ElasticVAR, schedule: str | Schedule, labels: Tensor) -> dict[str, float]:
    """What storing keys and values in eight bits does to the logits of the same tokens; empty where they are not.

    logit_error: root mean square of the difference over that of the logits; same_top_token: share of tokens whose
    largest logit stays the largest.
    """
    if model.cache_dtype is None:
        return {}
    stored, collected = model.cache_dtype, []
    try:
        with model.eager():
            tokens, _ = model.generate_tokens(labels, schedule)
            for model.cache_dtype in (None, stored):
                logits: list[Tensor] = []
                model.generate_tokens(labels, schedule, forced=tokens, logits_out=logits)
                collected.append(torch.cat(logits, dim=1))
    finally:
        model.cache_dtype = stored
    exact, rounded = collected
    return {
        "logit_error": ((rounded - exact).norm() / exact.norm()).item(),
        "same_top_token": (rounded.argmax(dim=-1) == exact.argmax(dim=-1)).float().mean().item(),
    }


def describe(model: ElasticVAR, schedules: Sequence[str | Schedule] | None = None) -> dict:
    """What a model is, and what its schedules run and cost for one guided image, by arithmetic alone.

    Returns a JSON-able dict with kind "inspect". Raises InputError for a schedule that does not fit.
    """
    config, tokenizer = model.var.config, model.tokenizer.config
    schedules = [model.schedule(s) for s in schedules] if schedules else model.default_schedules()
    full = predict(model, "full")
    return {
        "kind": "inspect",
        "model": model.provenance.name,
        "checkpoint": "elastic" if model.depths else "official",
        "base_model": model.provenance.base_model,
        "license": model.provenance.license,
        "dtype": str(model.dtype).removeprefix("torch."),
        "depth": config.depth,
        "width": config.width,
        "heads": config.heads,
        "shared_aln": config.shared_aln,
        "parameters": {
            "transformer": sum(p.numel() for p in model.var.parameters()),
            "tokenizer": sum(p.numel() for p in model.tokenizer.parameters()),
        },
        "patch_nums": list(config.patch_nums),
        "tokens": config.tokens,
        "classes": config.classes,
        "codebook": [config.vocab, config.z_channels],
        "image_size": tokenizer.image_size,
        "bridge": model.bridge,
        "depths": list(model.depths),
        "recipe": model.provenance.recipe,
        "schedules": [_description(model, schedule, full) for schedule in schedules],
    }


# -- measuring ----------------------------------------------------------------------------------


class PeakMemory:
    """Peak memory of a block that calls `model` under `schedule`: its weights and the most that was allocated on top.

    On a GPU the block's growth is what torch's allocator reports. On a CPU, where torch keeps no such count, every
    tensor made in the block is followed from its birth to its end; scratch inside an operator (a sort, a convolution's
    packing) is not seen. Following slows small operators down on a CPU: never time inside. `bytes` holds the result
    after the block.
    """

    def __init__(self, model: ElasticVAR, schedule: Schedule) -> None:
        model.prepare(schedule)  # packed copies are weights, not growth
        self.device = model.device
        self.bytes = self.weight_bytes = model.weight_bytes(schedule)
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
        self.bytes = self.weight_bytes + growth


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


def _counts(model: ElasticVAR, call: Callable[[Schedule], Tensor], schedule: Schedule) -> dict[str, int]:
    """Peak and cache bytes, weights read and FLOPs of one call, from two passes."""
    with model.eager():
        with PeakMemory(model, schedule) as memory:
            call(schedule)
        cache_bytes = weight_bytes = 0

        def look(module: torch.nn.Module, *_: object) -> None:
            nonlocal cache_bytes, weight_bytes
            if module is model.var.head:  # it runs at every scale, while the cache lives
                cache_bytes = max(cache_bytes, sum(o.nbytes for o in gc.get_objects() if type(o) is KVCache))
            elif isinstance(module, Linear):
                weight_bytes += module.weight.nbytes

        hook = register_module_forward_pre_hook(look)
        try:
            with FlopCounterMode(display=False, custom_mapping=_UNCOUNTED) as flops:
                call(schedule)
        finally:
            hook.remove()
    return {
        "peak_bytes": memory.bytes,
        "cache_bytes": cache_bytes,
        "weight_bytes": weight_bytes,
        "flops": flops.get_total_flops(),
    }


# Kernels that torch's counter does not know: attention on a CPU, and a packed product.
_UNCOUNTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *_, out_shape=None, **__: sdpa_flop_count(q, k, v)
    ),
}
if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    _UNCOUNTED[torch.ops.mkldnn._linear_pointwise] = lambda x, weight, *_, out_shape=None, **__: (
        2 * math.prod(x) * weight[0]
    )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device: torch.device, call: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """What `call` returns, and the milliseconds until the device has finished it."""
    _synchronize(device)
    start = time.perf_counter()
    result = call()
    _synchronize(device)
    return result, (time.perf_counter() - start) * 1e3


def _phases_ms(model: ElasticVAR, call: Callable[[], Tensor]) -> dict[str, float]:
    """One call split into PHASES by the device's own clock; on a GPU a call without graphs, which a small batch slows.

    Sampling (guidance, top-k, top-p, draw) lies between the head and the codebook's look-up, the decoder begins with
    its first convolution, and the rest is the transformer, the quantiser's small sums included.
    """
    device, marks = model.device, []

    def now() -> float | torch.cuda.Event:
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event

    def begins(phase: str) -> Callable[..., None]:
        return lambda *_: marks.append((phase, now()))

    hooks = [
        model.var.head.register_forward_pre_hook(begins("transformer")),
        model.var.head.register_forward_hook(begins("sampling")),
        model.tokenizer.quantize.embedding.register_forward_pre_hook(begins("transformer")),
        model.tokenizer.post_quant_conv.register_forward_pre_hook(begins("decoder")),
    ]
    try:
        with model.eager():
            _synchronize(device)
            begins("transformer")()
            call()
            begins("end")()
            _synchronize(device)
    finally:
        for hook in hooks:
            hook.remove()
    spent = dict.fromkeys(PHASES, 0.0)
    for (phase, start), (_, end) in itertools.pairwise(marks):
        spent[phase] += start.elapsed_time(end) if device.type == "cuda" else (end - start) * 1e3
    return spent


# -- putting together ---------------------------------------------------------------------------


def _row(
    model: ElasticVAR,
    schedule: Schedule,
    batch_size: int,
    times: list[tuple[float, float]],
    splits: list[dict[str, float]],
    counts: dict[str, int],
) -> dict:
    """What was measured of one schedule, each figure followed by its prediction."""
    without_decoder, whole = zip(*times, strict=True)
    first, median, third = (float(q) for q in np.percentile(whole, (25, 50, 75)))
    predicted = predict(model, schedule, batch_size)
    row = {
        "schedule": str(schedule),
        "latency_ms": median,
        "latency_spread_ms": [first, third],
        "without_decoder_ms": float(np.median(without_decoder)),
        "images_per_second": batch_size / median * 1e3,
        **{f"{phase}_ms": float(np.median([split[phase] for split in splits])) for phase in PHASES},
    }
    for name, value in counts.items():
        row |= {name: value, f"{name}_predicted": predicted[name]}
    return row | {"flops_without_decoder_predicted": predicted["flops_without_decoder"]}


def _beside_full(row: dict, full: dict) -> dict:
    """The row with its ratios to `full`."""
    work = "flops_without_decoder_predicted"
    return row | {
        "speedup": full["latency_ms"] / row["latency_ms"],
        "speedup_predicted": full["flops_predicted"] / row["flops_predicted"],
        "speedup_without_decoder": full["without_decoder_ms"] / row["without_decoder_ms"],
        "speedup_without_decoder_predicted": full[work] / row[work],
        "memory_ratio": row["peak_bytes"] / full["peak_bytes"],
        "cache_ratio": row["cache_bytes"] / full["cache_bytes"],
    }


def _description(model: ElasticVAR, schedule: Schedule, full: dict[str, int]) -> dict:
    """A schedule's layers, and its cost for one image beside `full`."""
    cost = predict(model, schedule)
    return {
        "schedule": str(schedule),
        "segments": [
            {"scales": [s.scales[0] + 1, s.scales[-1] + 1], "layers": list(s.layers)} for s in schedule.segments
        ],
        **cost,
        "cache_ratio": cost["cache_bytes"] / full["cache_bytes"],
        "speedup_predicted": full["flops"] / cost["flops"],
        "speedup_without_decoder_predicted": full["flops_without_decoder"] / cost["flops_without_decoder"],
    }


def _predicted_peak_bytes(model: ElasticVAR, schedule: Schedule, batch_size: int) -> int:
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
    for side, end, layers in zip(config.patch_nums, schedule.ends, schedule.layers, strict=True):
        once = (rows * 6 + 3) * len(layers) * width + rows * 3 * width
        token = rows * side**2
        # the stream, what was read from it, queries, keys and values, the queries and what attends
        attention = token * (1 + 1 + 3 + 1 + 1) * width
        if model.cache_dtype:  # this scale's keys and values, and the layer's turned back
            attention += token * 2 * width + rows * 2 * end * width
        # the stream, what was read from it, the hidden layer, the result
        mlp = token * (3 * width + config.hidden)
        few = min(batch_size, images_at_a_time(side**2, config.vocab, element_bytes))
        logits = 2 * few * side**2 * config.vocab
        sampling = token * 2 * width + logits
        drawing = 0 if fused else draw.BYTES_PER_LOGIT * min(logits // 2, draw.chunk(model.device))
        fullest = max(
            fullest,
            once * element_bytes
            + max(attention * element_bytes, mlp * element_bytes, sampling * element_bytes + drawing),
        )
    few = min(batch_size, model.tokenizer.images_at_a_time)
    images = batch_size * 3 * model.tokenizer.config.image_size**2 * 4 * (1 if few == batch_size else 2)
    decoder = images + _decoder_elements(model, few) * element_bytes
    return model.weight_bytes(schedule) + f_hat + max(cache + fullest, decoder)


def _decoder_elements(model: ElasticVAR, images: int) -> int:
    """Elements of the decoder's feature maps at their fullest, for the images that it decodes together.

    On a GPU that is the last convolution of a residual block: the level's input, the block's input, and two maps of
    its own, three where plain torch has normalised it into another layout. On a CPU it is two buffers of the largest
    map, two strips, twice the map before the last doubling, and in half precision a copy of the map in float32, for its
    mean and variance.
    """
    config = model.tokenizer.config
    widths = [config.channels * m for m in config.channel_multipliers]
    inputs = [*widths[1:], widths[-1]]
    sides = [config.image_size // 2**level for level in range(len(widths))]
    if model.device.type == "cpu":
        largest = images * largest_map(model.tokenizer.decoder, config.patch_nums[-1])
        exact = 0 if model.dtype is torch.float32 else 2 * largest
        return 2 * largest + 2 * min(largest, STRIP_ELEMENTS) + 2 * (largest // 4) + exact
    own = 3 if choose(model.kernels, model.device) is TRITON else 4
    return images * max(
        side**2 * (given + own * width) for side, given, width in zip(sides, inputs, widths, strict=True)
    )
