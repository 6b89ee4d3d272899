"""What a schedule costs: time, memory, weights read and FLOPs, each beside what arithmetic predicts.

Every quantity has a pass of its own, so that observing one does not disturb another: latency is
timed end to end with nothing attached; the split into phases, the peak of memory, and the counts of
FLOPs, weights and cache are taken in further passes.
"""

from __future__ import annotations

import gc
import itertools
import random
import time
import weakref
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from varcompress.cache import KVCache
from varcompress.checkpoint import fingerprint
from varcompress.errors import InputError
from varcompress.hardware import device_name, fitting_memory
from varcompress.models.elastic import ElasticVAR
from varcompress.models.tokenizer import TokenizerConfig, decoder_flops
from varcompress.schedule import Schedule

PHASES = ("transformer", "sampling", "decoder")
# Bytes that `sampling.draw` holds per logit of the image at its fullest, inside top-p: conditional, unconditional and
# guided logits, the sorted values, three stages of probabilities (4 each), the sorted tokens (8) and one mask (1).
SAMPLING_BYTES = 7 * 4 + 8 + 1

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
    (median, end to end), latency_spread_ms (quartiles), images_per_second, transformer_ms, sampling_ms and decoder_ms
    (medians of split calls), peak_bytes, cache_bytes, weight_bytes and flops per call, each also as *_predicted;
    speedup and speedup_without_decoder over `full`, measured from time and predicted from FLOPs; memory_ratio and
    cache_ratio.
    Raises InputError for a schedule that does not fit, a count below one, or a batch too large for the memory.
    """
    if batch_size < 1 or runs < 1 or warmup < 0:
        raise InputError(f"batch size {batch_size}, runs {runs}, warm-up {warmup}: at least 1, 1 and 0 are needed")
    schedules = [model.schedule(s) for s in schedules] if schedules else model.default_schedules()
    schedules = list(dict.fromkeys((model.schedule("full"), *schedules)))
    labels = torch.arange(batch_size) % model.var.config.classes
    total, done = len(schedules) * (warmup + 2 + 2 * runs), 0

    def call(schedule: Schedule) -> Tensor:
        nonlocal done
        images = model.generate(labels, schedule, seed=seed, **sampling)
        done += 1
        if progress:
            progress(done, total, f"profile: {schedule}")
        return images

    times = {schedule: [] for schedule in schedules}
    splits = {schedule: [] for schedule in schedules}
    order = random.Random(seed)
    with fitting_memory(model.device, batch_size):
        for _ in range(warmup):
            for schedule in schedules:
                call(schedule)
        counts = {schedule: _counts(model, call, schedule) for schedule in schedules}
        for _ in range(runs):
            for schedule in order.sample(schedules, len(schedules)):
                times[schedule].append(timed(model.device, lambda s=schedule: call(s))[1])
                splits[schedule].append(_phases_ms(model, lambda s=schedule: call(s)))
    rows = [_row(model, s, batch_size, times[s], splits[s], counts[s]) for s in schedules]
    return {
        "kind": "profile",
        "model": model.provenance.name,
        "weights": fingerprint(model),
        "device": device_name(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "torch": torch.__version__,
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
        "flops": transformer + batch_size * decoder_flops(model.tokenizer.config),
        "flops_without_decoder": transformer,
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
    """Peak memory of a block that uses `model`: the bytes of its weights plus the most that was allocated on top.

    On a GPU the block's growth is what torch's allocator reports. On a CPU, where torch keeps no such count, every
    tensor made in the block is followed from its birth to its end; scratch inside an operator (a sort, a convolution's
    packing) is not seen. Following slows small operators down on a CPU: never time inside. `bytes` holds the result
    after the block.
    """

    def __init__(self, model: ElasticVAR) -> None:
        self.device = model.device
        self.weight_bytes = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
        self.bytes = self.weight_bytes
        self._tensors = _LiveTensors()

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


class _LiveTensors(TorchDispatchMode):
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
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in given | self._alive.keys():
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


class _WeightReads(TorchFunctionMode):
    """Bytes of the given weights that linear layers read, once for every time they do."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.bytes, self._counted = 0, {id(w): w.nbytes for w in weights}

    def __torch_function__(self, func, types, args=(), kwargs=None) -> object:  # noqa: ANN001
        if func is F.linear:
            self.bytes += self._counted.get(id(args[1]), 0)
        return func(*args, **(kwargs or {}))


def _counts(model: ElasticVAR, call: Callable[[Schedule], Tensor], schedule: Schedule) -> dict[str, int]:
    """Peak and cache bytes, weights read and FLOPs of one call, from two passes."""
    with PeakMemory(model) as memory:
        call(schedule)
    cache_bytes = 0

    def look(*_: object) -> None:
        nonlocal cache_bytes
        cache_bytes = max(cache_bytes, sum(o.nbytes for o in gc.get_objects() if type(o) is KVCache))

    matrices = [
        weight
        for block in model.var.blocks
        for weight in (block.attn.mat_qkv.weight, block.attn.proj.weight, block.ffn.fc1.weight, block.ffn.fc2.weight)
    ]
    hook = model.var.head.register_forward_hook(look)  # the head runs once per scale, while the cache lives
    try:
        with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as flops, _WeightReads(matrices) as reads:
            call(schedule)
    finally:
        hook.remove()
    return {
        "peak_bytes": memory.bytes,
        "cache_bytes": cache_bytes,
        "weight_bytes": reads.bytes,
        "flops": flops.get_total_flops(),
    }


# The one attention kernel that torch's counter does not know.
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *_, out_shape=None, **__: sdpa_flop_count(q, k, v)
    )
}


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
    """One call split into PHASES by the device's own clock.

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
        model.var.head.register_forward_hook(begins("sampling")),
        model.tokenizer.quantize.embedding.register_forward_pre_hook(begins("transformer")),
        model.tokenizer.post_quant_conv.register_forward_pre_hook(begins("decoder")),
    ]
    try:
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
    times: list[float],
    splits: list[dict[str, float]],
    counts: dict[str, int],
) -> dict:
    """What was measured of one schedule, each figure followed by its prediction."""
    first, median, third = (float(q) for q in np.percentile(times, (25, 50, 75)))
    predicted = predict(model, schedule, batch_size)
    row = {
        "schedule": str(schedule),
        "latency_ms": median,
        "latency_spread_ms": [first, third],
        "images_per_second": batch_size / median * 1e3,
        **{f"{phase}_ms": float(np.median([split[phase] for split in splits])) for phase in PHASES},
    }
    for name, value in counts.items():
        row |= {name: value, f"{name}_predicted": predicted[name]}
    return row | {"flops_without_decoder_predicted": predicted["flops_without_decoder"]}


def _beside_full(row: dict, full: dict) -> dict:
    """The row with its ratios to `full`."""

    def without_decoder_ms(row: dict) -> float:
        return row["transformer_ms"] + row["sampling_ms"]

    work = "flops_without_decoder_predicted"
    return row | {
        "speedup": full["latency_ms"] / row["latency_ms"],
        "speedup_predicted": full["flops_predicted"] / row["flops_predicted"],
        "speedup_without_decoder": without_decoder_ms(full) / without_decoder_ms(row),
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

    Transformer, over the scales: cache + AdaLN vectors of the layers still to run + position embeddings + f_hat
    + the larger of the MLP (its input twice, its hidden layer twice) and `SAMPLING_BYTES` per logit of the image.
    Decoder: f_hat + `_decoder_elements`. What a kernel needs inside is not in it.
    """
    config, tokenizer, element_bytes = model.var.config, model.tokenizer.config, model.dtype.itemsize
    rows = 2 * batch_size
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    cache = schedule.cache_bytes(batch=batch_size, token_bytes=model.cache_token_bytes)
    f_hat = batch_size * config.z_channels * config.patch_nums[-1] ** 2 * 4
    fullest = 0
    for side, layers in zip(config.patch_nums, schedule.layers, strict=True):
        vectors = rows * len(layers) * 6 * config.width * element_bytes
        mlp = rows * side**2 * 2 * (config.width + config.hidden) * element_bytes
        sampling = batch_size * side**2 * (SAMPLING_BYTES * config.vocab + 2 * config.width * element_bytes)
        fullest = max(fullest, vectors + max(mlp, sampling))
    transformer = cache + fullest + config.tokens * config.width * element_bytes
    return weights + f_hat + max(transformer, batch_size * _decoder_elements(tokenizer) * element_bytes)


def _decoder_elements(config: TokenizerConfig) -> int:
    """Elements of the decoder's feature maps at their fullest, for one image.

    That is the last convolution of a residual block: the level's input, the block's input, and three maps of its own.
    """
    widths = [config.channels * m for m in config.channel_multipliers]
    inputs = [*widths[1:], widths[-1]]
    sides = [config.image_size // 2**level for level in range(len(widths))]
    return max(side**2 * (given + 4 * width) for side, given, width in zip(sides, inputs, widths, strict=True))
