"""What a schedule costs: time, memory, weights read and FLOPs, each beside what arithmetic predicts.

Every quantity has a pass of its own, so that observing one does not disturb another: latency is
timed end to end with nothing attached; the split into phases, the peak of memory, and the counts of
FLOPs, weights and cache are taken in further passes.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from varcompress import __version__
from varcompress.cost import predict, ratios
from varcompress.errors import InputError
from varcompress.fingerprint import fingerprint
from varcompress.hardware import device_name, synchronize, timed
from varcompress.kernels.backend import TRITON
from varcompress.memory import PeakMemory, fitting_batch
from varcompress.models.elastic import ElasticVAR
from varcompress.models.generation import PHASES, Observer
from varcompress.models.linear import packed_flops
from varcompress.models.runtime import Runtime
from varcompress.models.transformer import Block
from varcompress.progress import Progress, Steps, silent
from varcompress.results import PROFILE, SCHEMA, Conditions, ProfileResult
from varcompress.sampling import DEFAULT, Sampling
from varcompress.schedule import Schedule

EFFECT_LOGITS = 1 << 25  # that are compared, at most, when a cache has eight bits
Measured = TypeVar("Measured")


def profile(
    model: ElasticVAR,
    schedules: Sequence[str | Schedule] | None = None,
    *,
    batch_size: int = 8,
    runs: int = 5,
    warmup: int = 2,
    sampling: Sampling = DEFAULT,
    progress: Progress = silent,
) -> ProfileResult:
    """Measure schedules side by side. Each run times every schedule once, in an order shuffled anew.

    schedules: `full` is the baseline, always measured and shown first; default model.default_schedules().
    batch_size: images per call (guidance doubles the rows); runs: timed calls per schedule, after `warmup` more;
    sampling: by default as published, but for a cfg that the model was distilled for; its seed shuffles the order too.
    Ratios are to `full` under the same sampling. Where that is unguided (cfg 0, or distilled guidance), "beside_guided"
    says by arithmetic what is saved beside guided calls of `full`.

    Returns a dict that JSON can hold, whose fields `results.ProfileResult` names: latency_ms is the median, end to end,
    without_decoder_ms that of the same runs without the tokenizer's decoder, transformer_ms, sampling_ms and decoder_ms
    are medians of calls of their own.
    Raises InputError for a schedule that does not fit, a count below one, or a batch too large for the memory.
    """
    if batch_size < 1 or runs < 1 or warmup < 0:
        raise InputError(f"batch size {batch_size}, runs {runs}, warm-up {warmup}: at least 1, 1 and 0 are needed")
    schedules = [model.schedule(s) for s in schedules] if schedules else model.default_schedules()
    schedules = list(dict.fromkeys((model.schedule("full"), *schedules)))
    sampling = model.sampling(sampling)
    guided = model.guided(sampling)
    with fitting_batch(model, schedules, batch_size, guided=guided):
        batch = _Batch(model, batch_size, sampling, Steps(progress, len(schedules) * (warmup + 2 + 2 * runs)))
        if model.device.type == "cuda":  # libraries take their workspace at the first call, which is no schedule's
            model.generate(batch.labels, schedules[0], sampling, runtime=model.runtime.eager())
        effects = {schedule: cache_effect(model, schedule, batch.labels, sampling) for schedule in schedules}
        counts = {schedule: batch.counts(schedule) for schedule in schedules}
        for _ in range(warmup):
            for schedule in schedules:
                batch.run(schedule)
        order = random.Random(sampling.seed)
        times = _in_turns(batch.times_ms, schedules, runs, order)
        splits = _in_turns(batch.phases_ms, schedules, runs, order)
    rows = [_row(model, s, batch_size, guided, times[s], splits[s], counts[s]) | effects[s] for s in schedules]
    return {
        "kind": PROFILE,
        **conditions(model, sampling),
        "batch_size": batch_size,
        "settings": asdict(sampling),
        "runs": runs,
        "schedules": [_beside_full(row, rows[0]) for row in rows],
    }


def conditions(model: ElasticVAR, sampling: Sampling = DEFAULT, runtime: Runtime | None = None) -> Conditions:
    """Under what a result was had: model, weights (their fingerprint), hardware, versions, dtype, how it generates.

    That is the kernels (torch or triton), whether weights are packed, the cache's dtype, what is offloaded, and whether
    calls are guided. The command is for the command line to fill in.
    """
    runtime, dtype = runtime or model.runtime, str(model.dtype).removeprefix("torch.")
    return {
        "schema": SCHEMA,
        "command": None,
        "model": model.provenance.name,
        "weights": fingerprint(model),
        "device": device_name(model.device),
        "torch": torch.__version__,
        "varcompress": __version__,
        "dtype": dtype,
        "kernels": "triton" if runtime.operations is TRITON else "torch",
        "packed_weights": model.packs(runtime),
        "cache_dtype": runtime.cache_dtype or dtype,
        "offload": runtime.offload,
        "guided": model.guided(sampling),
    }


@torch.inference_mode()
def cache_effect(model: ElasticVAR, schedule: Schedule, labels: Tensor, sampling: Sampling) -> dict[str, float]:
    """What storing keys and values in eight bits does to the logits of the same tokens; empty where they are not.

    sampling: how the tokens are drawn. Of a large model only the first labels are looked at.
    logit_error: root mean square of the difference over that of the logits; same_top_token: share of tokens whose
    largest logit stays the largest.
    """
    stored = model.runtime.eager()
    if stored.cache_dtype is None:
        return {}
    config, plain = model.var.config, replace(stored, cache_dtype=None)
    labels = labels[: max(1, EFFECT_LOGITS // (config.tokens * config.vocab))]
    tokens, _ = model.generate_tokens(labels, schedule, sampling, runtime=stored)
    exact, rounded = (_logits(model, schedule, labels, sampling, tokens, runtime) for runtime in (plain, stored))
    return {
        "logit_error": ((rounded - exact).norm() / exact.norm()).item(),
        "same_top_token": (rounded.argmax(dim=-1) == exact.argmax(dim=-1)).float().mean().item(),
    }


def _logits(
    model: ElasticVAR, schedule: Schedule, labels: Tensor, sampling: Sampling, tokens: Tensor, runtime: Runtime
) -> Tensor:
    """Logits (B, L, V) of given tokens by cached generation."""
    logits: list[Tensor] = []
    # a plain cache is larger than one in eight bits
    with fitting_batch(model, [schedule], len(labels), runtime, guided=model.guided(sampling)):
        model.generate_tokens(labels, schedule, sampling, runtime=runtime, forced=tokens, logits_out=logits)
        return torch.cat(logits, dim=1)


# -- measuring ----------------------------------------------------------------------------------


class _Batch:
    """Calls of one batch, each of which counts as a step of progress."""

    def __init__(self, model: ElasticVAR, num_images: int, sampling: Sampling, steps: Steps) -> None:
        self.model, self.sampling, self.steps = model, sampling, steps
        self.labels = torch.arange(num_images) % model.var.config.classes

    def run(self, schedule: Schedule, **how: object) -> None:
        """One whole call."""
        self.model.generate(self.labels, schedule, self.sampling, **how)
        self.steps.step(f"profile: {schedule}")

    def counts(self, schedule: Schedule) -> dict[str, int]:
        """Peak and cache bytes, weights read and FLOPs of one call, from two passes."""
        runtime, counter = self.model.runtime.eager(), _Counter()
        with PeakMemory(self.model, schedule) as memory:
            self.run(schedule, runtime=runtime)
        with FlopCounterMode(display=False, custom_mapping=_UNCOUNTED) as flops:
            self.run(schedule, runtime=runtime, observer=counter)
        return {
            "peak_bytes": memory.bytes,
            "cache_bytes": counter.cache_bytes,
            "weight_bytes": counter.weight_bytes,
            "flops": flops.get_total_flops(),
        }

    def times_ms(self, schedule: Schedule) -> tuple[float, float]:
        """Until the tokens are there, and until the images are."""
        device = self.model.device
        draw = partial(self.model.generate_tokens, self.labels, schedule, self.sampling)
        (_, f_hat), tokens_ms = timed(device, draw)
        _, decoder_ms = timed(device, partial(self.model.decode_features, f_hat))
        self.steps.step(f"profile: {schedule}")
        return tokens_ms, tokens_ms + decoder_ms

    def phases_ms(self, schedule: Schedule) -> dict[str, float]:
        """One call split into PHASES; on a GPU a call without graphs, which a small batch slows."""
        clock = PhaseClock(self.model.device)
        synchronize(self.model.device)
        clock.phase("transformer")
        self.run(schedule, runtime=self.model.runtime.eager(), observer=clock)
        return clock.spent_ms()


def _in_turns(
    measure: Callable[[Schedule], Measured], schedules: list[Schedule], runs: int, order: random.Random
) -> dict[Schedule, list[Measured]]:
    """What `measure` gives in each run, the schedules in an order shuffled anew each time."""
    measured: dict[Schedule, list[Measured]] = {schedule: [] for schedule in schedules}
    for _ in range(runs):
        for schedule in order.sample(schedules, len(schedules)):
            measured[schedule].append(measure(schedule))
    return measured


class _Counter(Observer):
    """The cache's bytes, and those of the matrices that the layers read."""

    cache_bytes = weight_bytes = 0

    def cache(self, held_bytes: int) -> None:
        self.cache_bytes = max(self.cache_bytes, held_bytes)

    def ran(self, block: Block) -> None:
        self.weight_bytes += block.matrix_bytes


class PhaseClock(Observer):
    """Times the phases of one call by the device's own clock.

    Sampling (guidance, top-k, top-p, draw) begins after the head, the decoder with its first convolution, and the rest
    is the transformer, the quantiser's small sums included.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []

    def phase(self, name: str) -> None:
        self._marks.append((name, self._now()))

    def _now(self) -> float | torch.cuda.Event:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def spent_ms(self) -> dict[str, float]:
        """Milliseconds of each phase, once the call is over: waits for the device."""
        self.phase("end")
        synchronize(self.device)
        spent = dict.fromkeys(PHASES, 0.0)
        for (phase, start), (_, end) in itertools.pairwise(self._marks):
            spent[phase] += start.elapsed_time(end) if self.device.type == "cuda" else (end - start) * 1e3
        return spent


# Kernels that torch's counter does not know: attention on a CPU, and a packed product.
_UNCOUNTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *_, out_shape=None, **__: sdpa_flop_count(q, k, v)
    ),
    **packed_flops(),
}


# -- putting together ---------------------------------------------------------------------------


def _row(
    model: ElasticVAR,
    schedule: Schedule,
    batch_size: int,
    guided: bool,
    times: list[tuple[float, float]],
    splits: list[dict[str, float]],
    counts: dict[str, int],
) -> dict:
    """What was measured of one schedule, each figure followed by its prediction."""
    without_decoder, whole = zip(*times, strict=True)
    first, median, third = (float(q) for q in np.percentile(whole, (25, 50, 75)))
    runtime = model.runtime.eager()  # as the peak was measured
    predicted = predict(model, schedule, batch_size, runtime, guided=guided)
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
    row["flops_without_decoder_predicted"] = predicted["flops_without_decoder"]
    if not guided:
        full = predict(model, model.schedule("full"), batch_size, runtime, guided=True)
        row["beside_guided"] = ratios(predicted, full)
    return row


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
