"""The Frechet distance of schedules with its intervals: the one place here that knows what `evaluate` returns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from varcompress.data.sources import NAMED
from varcompress.evaluation import evaluate
from varcompress.metrics import METRICS
from varcompress.models.elastic import ElasticVAR
from varcompress.progress import Progress
from varcompress.results import Scored
from varcompress.schedule import Schedule

RESAMPLES = 50  # of the images, for an interval


def scores_of(
    model: ElasticVAR,
    schedules: Sequence[Schedule],
    *,
    reference: str | Path,
    num_images: int | None,
    batch_size: int,
    progress: Progress,
) -> Scored:
    """Score schedules on the same labels and seeds, the first being what the others are compared with.

    reference: as `evaluate` takes it, or a source by its name. Raises InputError as `evaluate` does.
    """
    result = evaluate(
        model,
        schedules,
        reference=None if str(reference) in NAMED else reference,
        num_images=num_images,
        batch_size=batch_size,
        resamples=RESAMPLES,
        progress=progress,
    )
    key = next(key for key in METRICS if key in result["schedules"][0])  # of a Frechet distance: it stands first
    found = {}
    for row in result["schedules"]:
        value, error = row[key], row[f"{key}_std"]
        found[row["schedule"]] = {"value": value, "interval": [value - 1.96 * error, value + 1.96 * error]}
    return {
        "metric": METRICS[key].name,
        "images": result["settings"]["images"],
        "reference": result["reference"],
        "scores": found,
    }
