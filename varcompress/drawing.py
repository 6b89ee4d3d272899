"""Images of a long list of labels, drawn batch by batch: the loop behind sampling, scores and the demo."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from varcompress.errors import InputError
from varcompress.hardware import timed
from varcompress.images import ROUND, check_rounding, to_uint8
from varcompress.memory import fitting_batch
from varcompress.models import inputs
from varcompress.models.elastic import ElasticVAR
from varcompress.progress import Progress, silent
from varcompress.sampling import DEFAULT, Sampling
from varcompress.schedule import Schedule

HOST = torch.device("cpu")


class Batch(NamedTuple):
    """Images first to first + B - 1 of a list: (B, 3, H, W) uint8 on the model's device, and the time they took."""

    first: int
    images: Tensor
    elapsed_ms: float


def draw_batches(
    model: ElasticVAR,
    labels: Tensor,
    schedule: Schedule,
    sampling: Sampling,
    *,
    batch_size: int,
    rounding: str,
    progress: Progress = silent,
    wanted: range | None = None,
) -> Iterator[Batch]:
    """Images of labels (N,) int64, batch_size at a time. Image i has the random stream (seed, i), as in one call.

    wanted: those to draw, by default all. Each batch is reported when the caller asks for the next. Raises InputError
    for images that are not finite.
    """
    wanted = wanted or range(len(labels))
    for first in range(wanted.start, wanted.stop, batch_size):
        batch = labels[first : min(first + batch_size, wanted.stop)]
        images, elapsed_ms = timed(
            model.device, lambda batch=batch, first=first: model.generate(batch, schedule, sampling, first_index=first)
        )
        _check_finite(images, schedule, model.dtype, first)
        yield Batch(first, to_uint8(images, rounding), elapsed_ms)
        progress(first + len(batch), len(labels), f"{schedule}: images")


def draw_images(
    model: ElasticVAR,
    labels: Sequence[int],
    schedule: str | Schedule = "full",
    *,
    batch_size: int = 16,
    sampling: Sampling = DEFAULT,
    rounding: str = ROUND,
    progress: Progress = silent,
) -> Tensor:
    """Images of any number of labels, (N, 3, H, W) uint8 on the CPU, generated batch_size at a time.

    rounding: how they become bytes, "round" or "truncate". Raises InputError for an unknown class before any image is
    drawn, for a batch that the memory does not hold, and for images that are not finite.
    """
    check_rounding(rounding)
    labels = inputs.labels(labels, model.var.config, HOST)  # on the host, where checking waits for nothing
    schedule = model.schedule(schedule)
    options = {"batch_size": batch_size, "rounding": rounding, "progress": progress}
    with fitting_batch(model, [schedule], min(batch_size, len(labels)), guided=model.guided(sampling)):
        return torch.cat([batch.images.cpu() for batch in draw_batches(model, labels, schedule, sampling, **options)])


def _check_finite(images: Tensor, schedule: Schedule, dtype: torch.dtype, first: int) -> None:
    """Raises InputError when images (B, 3, H, W) are not finite: their numbers grew beyond what `dtype` holds.

    first: the number of the first of them; all before it that this process drew were finite.
    """
    rejected = int((~torch.isfinite(images).flatten(1).all(dim=1)).sum())
    if rejected:
        remedy = "are these trained weights?" if dtype is torch.float32 else "use float32"
        raise InputError(
            f"schedule {schedule} draws images that are not finite in {dtype}, {rejected:,} of {first:,} to "
            f"{first + len(images) - 1:,}: {remedy}"
        )
