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

KEY = "fd"  # the Frechet distance


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
    own = None if str(reference) in NAMED else reference
    options = {"num_images": num_images, "batch_size": batch_size, "progress": progress}
    result = evaluate(model, schedules, reference=own, **options)
    return {
        "metric": METRICS[KEY].name(result["features"]["name"]),
        "images": result["settings"]["images"],
        "reference": result["reference"],
        "scores": {row["schedule"]: row["scores"][KEY] for row in result["schedules"]},
    }
