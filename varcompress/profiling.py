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
from collections.abc import Callable, Sequence
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from varcompress.errors import InputError
from varcompress.fingerprint import fingerprint
from varcompress.hardware import device_name
from varcompress.kernels.backend import TRITON, choose
from varcompress.memory import PeakMemory, fitting_batch, predicted_peak_bytes
from varcompress.models.cache import KVCache
from varcompress.models.elastic import CACHE_DTYPES, ElasticVAR
from varcompress.models.linear import Linear
from varcompress.models.tokenizer import decoder_flops
from varcompress.progress import Progress, silent
from varcompress.sampling import PUBLISHED, Sampling
from varcompress.schedule import Schedule

PHASES = ("transformer", "sampling", "decoder")
EFFECT_LOGITS = 1 << 25  # that are compared, at most, when a cache has eight bits


def profile(
    model: ElasticVAR,
    schedules: Sequence[str | Schedule] | None = None,
    *,
    batch_size: int = 8,
    runs: int = 5,
    warmup: int = 2,
    sampling: Sampling = PUBLISHED,
    progress: Progress = silent,
) -> dict:
    """Measure schedules side by side. Each run times every schedule once, in an order shuffled anew.

    schedules: `full` is the baseline, always measured and shown first; default model.default_schedules().
    batch_size: images per call (guidance doubles the rows); runs: timed calls per schedule, after `warmup` more;
    sampling: by default as published; its seed shuffles the order too.

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
    total, done = len(schedules) * (warmup + 2 + 2 * runs), 0

    def step(schedule: Schedule) -> None:
        nonlocal done
        done += 1
        progress(done, total, f"profile: {schedule}")

    def call(schedule: Schedule) -> Tensor:
        images = model.generate(labels, schedule, sampling)
        step(schedule)
        return images

    def time_ms(schedule: Schedule) -> tuple[float, float]:
        """Until the tokens are there, and until the images are."""
        tokens = lambda: model.generate_tokens(labels, schedule, sampling)  # noqa: E731
        (_, f_hat), tokens_ms = timed(model.device, tokens)
        decoder_ms = timed(model.device, lambda: model.decode_features(f_hat))[1]
        step(schedule)
        return tokens_ms, tokens_ms + decoder_ms

    times = {schedule: [] for schedule in schedules}
    splits = {schedule: [] for schedule in schedules}
    order = random.Random(sampling.seed)
    with fitting_batch(model, schedules, batch_size):
        labels = torch.arange(batch_size) % model.var.config.classes
        if model.device.type == "cuda":
            with model.eager():  # libraries take their workspace at the first call, which belongs to no schedule
                model.generate(labels, schedules[0], sampling)
        effects = {schedule: cache_effect(model, schedule, labels, sampling) for schedule in schedules}
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
    rows = [_row(model, s, batch_size, times[s], splits[s], counts[s]) | effects[s] for s in schedules]
    return {
        "kind": "profile",
        **conditions(model),
        "batch_size": batch_size,
        "settings": asdict(sampling),
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
        "peak_bytes": predicted_peak_bytes(model, schedule, batch_size),
        "flops": transformer + batch_size * decoder_flops(model.tokenizer.config, in_strips=model.device.type == "cpu"),
        "flops_without_decoder": transformer,
    }


def conditions(model: ElasticVAR) -> dict[str, str | bool | None]:
    """Under what a result was had: model, weights (their fingerprint), hardware, torch, dtype, and how it generates.

    That is the kernels (torch or triton), whether weights are packed, the cache's dtype, and what is offloaded.
    """
    dtype = str(model.dtype).removeprefix("torch.")
    stored = {dtype: name for name, dtype in CACHE_DTYPES.items()}
    return {
        "model": model.provenance.name,
        "weights": fingerprint(model),
        "device": device_name(model.device),
        "torch": torch.__version__,
        "dtype": dtype,
        "kernels": "triton" if choose(model.kernels, model.device) is TRITON else "torch",
        "packed_weights": bool(model.packed_layers()),
        "cache_dtype": stored.get(model.cache_dtype, dtype),
        "offload": "bridge" if model.offloaded else None,
    }


@torch.inference_mode()
def cache_effect(model: ElasticVAR, schedule: str | Schedule, labels: Tensor, sampling: Sampling) -> dict[str, float]:
    """What storing keys and values in eight bits does to the logits of the same tokens; empty where they are not.

    sampling: how the tokens are drawn. Of a large model only the first labels are looked at.
    logit_error: root mean square of the difference over that of the logits; same_top_token: share of tokens whose
    largest logit stays the largest.
    """
    if model.cache_dtype is None:
        return {}
    config, stored, collected = model.var.config, model.cache_dtype, []
    labels = labels[: max(1, EFFECT_LOGITS // (config.tokens * config.vocab))]
    try:
        with model.eager():
            tokens, _ = model.generate_tokens(labels, schedule, sampling)
            for dtype in (None, stored):
                model.cache_dtype, logits = dtype, []
                with fitting_batch(model, [model.schedule(schedule)], len(labels)):  # the plain cache is the larger
                    model.generate_tokens(labels, schedule, forced=tokens, logits_out=logits)
                collected.append(torch.cat(logits, dim=1))
                del logits
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
