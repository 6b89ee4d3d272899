"""Scores of every schedule of a model, all from one run: quality by torch-fidelity, latency, memory, cache."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from varcompress.cost import cache_bytes
from varcompress.data import digits
from varcompress.errors import InputError
from varcompress.evaluation.features import DIGITS, EXTRACTORS, INCEPTION, Extractor, Features
from varcompress.evaluation.reference import MIN_IMAGES, Reference, read_reference
from varcompress.hardware import timed
from varcompress.images import check_finite, to_uint8
from varcompress.memory import PeakMemory, fitting_batch
from varcompress.models.elastic import ElasticVAR
from varcompress.profiling import conditions
from varcompress.progress import Progress, silent
from varcompress.sampling import PUBLISHED, Sampling
from varcompress.schedule import Schedule

PUBLISHED_IMAGES = 50_000
DIGITS_IMAGES = 2_000  # about as many as the data set has
FEATURE_NAMES = {INCEPTION: "inception-v3", DIGITS: "digits"}
METRICS = {
    INCEPTION: ("fid", "is", "is_std", "kid", "kid_std", "precision", "recall"),
    # Frechet distance, not FID: the "I" is for Inception
    DIGITS: (
        "digits_fd", "digits_is", "digits_is_std", "digits_kid", "digits_kid_std", "digits_precision", "digits_recall",
    ),
}  # fmt: skip
# torch-fidelity's defaults, written out because they are part of what a score means
SEED = 2020
IS_SPLITS = 10
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
PRC_NEIGHBOURS = 3
PRC_ROWS = 2_500  # of the distance matrix at a time; changes memory, not the score


def evaluate(
    model: ElasticVAR,
    schedules: Sequence[str | Schedule] | None = None,
    *,
    reference: str | Path | None = None,
    images: int | None = None,
    batch_size: int = 64,
    sampling: Sampling = PUBLISHED,
    features: str | None = None,
    feature_weights: str | Path | None = None,
    progress: Progress = silent,
) -> dict:
    """Generate `images` class-balanced images under each schedule and score them against `reference`.

    images: by default the 50,000 of published figures, 2,000 with the features of the embedded digits.
    reference: a folder of images, an .npz of images, or one of statistics (ADM layout); may be left
    out for the embedded digits. features: "inception" or "digits", by default what fits the model;
    feature_weights: a file of Inception weights, where there is no network; sampling: by default VAR's
    published settings. Image i has class i * classes // images and random stream (seed, i), so the
    scores do not depend on batch_size.

    Returns a dict that JSON can hold: kind, model, weights (their fingerprint), device, dtype, batch_size,
    reference, features, settings, notes, and for each schedule its scores, latency_ms (median per batch),
    images_per_second, peak_bytes and cache_bytes. A score that the reference cannot give is None.
    Raises InputError for a reference, feature weights, schedule or setting that cannot be used.
    """
    chosen = model.default_schedules() if schedules is None else [model.schedule(schedule) for schedule in schedules]
    kind = _feature_kind(model, features, feature_weights)
    images = images or (DIGITS_IMAGES if kind == DIGITS else PUBLISHED_IMAGES)
    if images < MIN_IMAGES or batch_size < 1:
        raise InputError(f"{images} images in batches of {batch_size}: scores need at least {MIN_IMAGES} and 1")
    if reference is None and not _is_digits(model):
        raise InputError("a reference is needed: --reference with a folder of images or an .npz")
    extractor = Extractor(kind, Path(feature_weights) if feature_weights else None, model.device)
    size = model.tokenizer.config.image_size
    batch_size = min(batch_size, images)
    with fitting_batch(model, chosen, batch_size):
        known = read_reference(reference, extractor, size=size, batch_size=batch_size, progress=progress)
        rows = [
            _evaluate_schedule(model, schedule, known, extractor, images, batch_size, sampling, progress)
            for schedule in chosen
        ]
    return {
        "kind": "eval",
        **conditions(model),
        "batch_size": batch_size,
        "reference": known.name,
        "features": FEATURE_NAMES[kind],
        "settings": {**asdict(sampling), "images": images, "rounding": "8 bits"},
        "notes": known.notes + _notes(kind, known, images, sampling),
        "schedules": rows,
    }


def balanced_labels(images: int, classes: int) -> Tensor:
    """Class of every image (images,) int64, ascending; no class has two images more than another."""
    return torch.arange(images) * classes // images


def score(generated: Features, reference: Reference, kind: str) -> dict[str, float | None]:
    """The metrics of METRICS[kind] by torch-fidelity, None where the reference has statistics only."""
    vectors = generated.vectors
    frechet = fid_statistics_to_metric(fid_features_to_statistics(vectors), reference.statistics, verbose=False)
    inception = isc_features_to_metric(generated.logits, splits=IS_SPLITS, shuffle=True, rng_seed=SEED)
    values: list[float | None] = [
        frechet[KEY_METRIC_FID],
        inception[KEY_METRIC_ISC_MEAN],
        inception[KEY_METRIC_ISC_STD],
    ]
    if reference.vectors is None:
        values += [None] * 4
    else:
        kernel = kid_features_to_metric(
            vectors,
            reference.vectors,
            kid_subsets=KID_SUBSETS,
            kid_subset_size=_kid_subset_size(len(vectors), reference),
            kid_kernel="poly",
            kid_kernel_poly_degree=3,
            kid_kernel_poly_gamma=None,
            kid_kernel_poly_coef0=1,
            rng_seed=SEED,
            verbose=False,
        )
        manifold = prc_features_to_metric(
            vectors,
            reference.vectors,
            prc_neighborhood=PRC_NEIGHBOURS,
            prc_batch_size=PRC_ROWS,
            save_cpu_ram=True,
            verbose=False,
        )
        values += [kernel[KEY_METRIC_KID_MEAN], kernel[KEY_METRIC_KID_STD]]
        values += [manifold[KEY_METRIC_PRECISION], manifold[KEY_METRIC_RECALL]]
    return dict(zip(METRICS[kind], values, strict=True))


# -- one schedule -------------------------------------------------------------------------------


def _evaluate_schedule(
    model: ElasticVAR,
    schedule: Schedule,
    reference: Reference,
    extractor: Extractor,
    images: int,
    batch_size: int,
    sampling: Sampling,
    progress: Progress,
) -> dict:
    """One schedule's line of the result. The first batch runs once more, before the others, for memory and warm-up."""
    labels = balanced_labels(images, model.var.config.classes)
    with PeakMemory(model, schedule) as memory:
        model.generate(labels[:batch_size], schedule, sampling, runtime=model.runtime.eager())
    if model.device.type == "cuda":
        model.generate(labels[:batch_size], schedule, sampling)  # records the graph that the others replay
    parts: list[Features] = []  # only features are kept: 50,000 images of 256 pixels would fill 9 GiB
    times_ms: list[float] = []
    for first in range(0, images, batch_size):
        batch = labels[first : first + batch_size]
        call = partial(model.generate, batch, schedule, sampling, first_index=first)
        drawn, elapsed_ms = timed(model.device, call)
        check_finite(drawn, schedule, model.dtype)
        parts.append(extractor(to_uint8(drawn)))
        if len(batch) == batch_size:
            times_ms.append(elapsed_ms)
        progress(first + len(batch), images, f"{schedule}: images")
    latency_ms = statistics.median(times_ms)
    return {
        "schedule": str(schedule),
        **score(Features.join(parts), reference, extractor.kind),
        "latency_ms": latency_ms,
        "images_per_second": batch_size / latency_ms * 1e3,
        "peak_bytes": memory.bytes,
        "cache_bytes": cache_bytes(model, schedule, batch_size, model.runtime),
    }


# -- what goes with the scores ------------------------------------------------------------------


def _is_digits(model: ElasticVAR) -> bool:
    named = "digits" in (model.provenance.name, model.provenance.base_model)
    return named and model.tokenizer.config.image_size == digits.SIZE


def _feature_kind(model: ElasticVAR, features: str | None, weights: str | Path | None) -> str:
    kind = features or (DIGITS if _is_digits(model) else INCEPTION)
    if kind not in EXTRACTORS:
        raise InputError(f"features {kind!r} are unknown: choose {INCEPTION} or {DIGITS}")
    if kind == DIGITS and model.tokenizer.config.image_size != digits.SIZE:
        raise InputError(f"the digits features are for images of {digits.SIZE} pixels: use --features {INCEPTION}")
    if kind == DIGITS and weights:
        raise InputError(f"--feature-weights holds Inception's weights: add --features {INCEPTION}")
    return kind


def _kid_subset_size(images: int, reference: Reference) -> int:
    return min(KID_SUBSET_SIZE, images, len(reference.vectors))


def _notes(kind: str, reference: Reference, images: int, sampling: Sampling) -> list[str]:
    """What a reader must know before setting these scores beside others."""
    notes = []
    if kind == DIGITS:
        notes.append("scores on the digits features: not FID, and not comparable with scores on Inception")
    elif images != PUBLISHED_IMAGES:
        notes.append(f"FID at {images:,} images is not comparable with the published figures at {PUBLISHED_IMAGES:,}")
    published = asdict(replace(PUBLISHED, seed=sampling.seed))
    changed = [f"{name} {value}" for name, value in asdict(sampling).items() if value != published[name]]
    if changed:
        notes.append(f"not the published sampling settings: {', '.join(changed)}")
    if reference.vectors is None:
        notes.append("the reference holds statistics only: no KID, precision or recall")
    elif _kid_subset_size(images, reference) < KID_SUBSET_SIZE:
        notes.append(f"KID in subsets of {_kid_subset_size(images, reference)} images instead of {KID_SUBSET_SIZE:,}")
    return notes
