"""Scores of every schedule of a model, all from one run: quality by torch-fidelity, latency, memory, cache."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from varcompress.cost import cache_bytes
from varcompress.data.sources import own_source
from varcompress.drawing import draw_batches
from varcompress.errors import InputError
from varcompress.evaluation.features import Extractor, Features, choose_network
from varcompress.evaluation.network import FeatureNetwork
from varcompress.evaluation.reference import MIN_IMAGES, Reference, read_reference
from varcompress.images import ROUND, check_rounding
from varcompress.memory import PeakMemory, fitting_batch
from varcompress.metrics import KID_SUBSET_SIZE, Compared, score
from varcompress.models.elastic import ElasticVAR
from varcompress.profiling import conditions
from varcompress.progress import Progress, silent
from varcompress.results import EVAL, EvalResult, EvalRow
from varcompress.sampling import DEFAULT, PUBLISHED, Sampling
from varcompress.schedule import Schedule


def evaluate(
    model: ElasticVAR,
    schedules: Sequence[str | Schedule] | None = None,
    *,
    reference: str | Path | None = None,
    num_images: int | None = None,
    batch_size: int = 64,
    sampling: Sampling = DEFAULT,
    rounding: str = ROUND,
    features: str | None = None,
    feature_weights: str | Path | None = None,
    resamples: int = 0,
    progress: Progress = silent,
) -> EvalResult:
    """Generate `num_images` class-balanced images under each schedule and score them against `reference`.

    num_images: by default the 50,000 of published figures, 2,000 with the features of the embedded digits.
    reference: a folder of images, an .npz of images, or one of statistics (ADM layout); may be left
    out for the embedded digits. features: "inception" or "digits", by default what fits the model;
    feature_weights: a file of Inception weights, where there is no network; sampling: by default VAR's
    published settings, but for a cfg that the model was distilled for; rounding: how images become bytes, "round" to
    the nearest or "truncate". Image i has class i * classes // num_images and random stream (seed, i), so the scores do
    not depend on batch_size. resamples: of the images, two at least, for the spread of the Frechet distance; 0 leaves
    it out, which saves time.

    Returns a dict that JSON can hold, whose fields `results.EvalResult` names; latency is the median per batch, and a
    score that the reference cannot give is None.
    Raises InputError for a reference, feature weights, schedule or setting that cannot be used.
    """
    chosen = model.default_schedules() if schedules is None else [model.schedule(schedule) for schedule in schedules]
    check_rounding(rounding)
    sampling = model.sampling(sampling)
    guided = model.guided(sampling)
    network = choose_network(features, model)
    num_images = num_images or network.num_images
    if num_images < MIN_IMAGES or batch_size < 1:
        raise InputError(f"{num_images} images in batches of {batch_size}: scores need at least {MIN_IMAGES} and 1")
    if resamples == 1 or resamples < 0:
        raise InputError(f"resamples {resamples}: a spread needs at least 2, and 0 asks for none")
    own = own_source(model)
    if reference is None and own is None:
        raise InputError("a reference is needed: --reference with a folder of images or an .npz")
    extractor = Extractor(network, Path(feature_weights) if feature_weights else None, model.device)
    size = model.tokenizer.config.image_size
    batch_size = min(batch_size, num_images)
    with fitting_batch(model, chosen, batch_size, guided=guided):
        compared = own() if reference is None else reference
        known = read_reference(compared, extractor, size=size, batch_size=batch_size, progress=progress)
        options = {"num_images": num_images, "batch_size": batch_size, "sampling": sampling, "rounding": rounding}
        rows = [
            _evaluate_schedule(model, schedule, known, extractor, resamples=resamples, progress=progress, **options)
            for schedule in chosen
        ]
    return {
        "kind": EVAL,
        **conditions(model, sampling),
        "batch_size": batch_size,
        "reference": known.name,
        "reference_details": known.details,
        "features": network.printed,
        "settings": {**asdict(sampling), "images": num_images, "rounding": rounding},
        "notes": known.notes + _notes(network, known, num_images, sampling, guided=guided, resamples=resamples),
        "schedules": rows,
    }


def balanced_labels(num_images: int, classes: int) -> Tensor:
    """Class of every image (num_images,) int64, ascending; no class has two images more than another."""
    return torch.arange(num_images) * classes // num_images


def compare(generated: Features, labels: Tensor, reference: Reference, device: torch.device) -> Compared:
    """What scores are computed from. labels: (N,) int64; device: where distances between images are."""
    return Compared(*generated, reference.statistics, reference.vectors, device, labels)


# -- one schedule -------------------------------------------------------------------------------


def _evaluate_schedule(
    model: ElasticVAR,
    schedule: Schedule,
    reference: Reference,
    extractor: Extractor,
    *,
    num_images: int,
    batch_size: int,
    sampling: Sampling,
    rounding: str,
    resamples: int,
    progress: Progress,
) -> EvalRow:
    """One schedule's line of the result. The first batch runs once more, before the others, for memory and warm-up."""
    labels = balanced_labels(num_images, model.var.config.classes)
    with PeakMemory(model, schedule) as memory:
        model.generate(labels[:batch_size], schedule, sampling, runtime=model.runtime.eager())
    if model.device.type == "cuda":
        model.generate(labels[:batch_size], schedule, sampling)  # records the graph that the others replay
    parts: list[Features] = []  # only features are kept: 50,000 images of 256 pixels would fill 9 GiB
    times_ms: list[float] = []
    options = {"batch_size": batch_size, "rounding": rounding, "progress": progress}
    for batch in draw_batches(model, labels, schedule, sampling, **options):
        parts.append(extractor(batch.images))
        if len(batch.images) == batch_size:
            times_ms.append(batch.elapsed_ms)
    latency_ms = statistics.median(times_ms)
    compared = compare(Features.join(parts), labels, reference, extractor.device)
    return {
        "schedule": str(schedule),
        **score(compared, extractor.spec.name, resamples=resamples),
        "latency_ms": latency_ms,
        "images_per_second": batch_size / latency_ms * 1e3,
        "peak_bytes": memory.bytes,
        "cache_bytes": cache_bytes(model, schedule, batch_size, model.runtime, guided=model.guided(sampling)),
    }


# -- what goes with the scores ------------------------------------------------------------------


def _notes(
    network: FeatureNetwork,
    reference: Reference,
    num_images: int,
    sampling: Sampling,
    *,
    guided: bool,
    resamples: int = 0,
) -> list[str]:
    """What a reader must know before setting these scores beside others."""
    notes = [network.note] if network.note else []
    if network.published and num_images != network.num_images:
        usual = f"the published figures at {network.num_images:,}"
        notes.append(f"FID at {num_images:,} images is not comparable with {usual}")
    published = asdict(replace(PUBLISHED, seed=sampling.seed))
    changed = [f"{name} {value}" for name, value in asdict(sampling).items() if value != published[name]]
    if changed:
        notes.append(f"not the published sampling settings: {', '.join(changed)}")
    if sampling.cfg and not guided:
        notes.append(f"guidance with cfg {sampling.cfg} is distilled into the weights: nothing ran unconditionally")
    if reference.vectors is None:
        notes.append("the reference holds statistics only: no KID, precision or recall")
    elif (size := min(num_images, len(reference.vectors))) < KID_SUBSET_SIZE:
        notes.append(f"KID in subsets of {size} images instead of {KID_SUBSET_SIZE:,}")
    if resamples:
        notes.append(f"± of the Frechet distance: standard deviation over {resamples} resamples of the images")
    return notes
