"""The Frechet distance of schedules with its intervals: the one place here that knows what `evaluate` returns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from varcompress.data.sources import NAMED, own_source
from varcompress.errors import InputError
from varcompress.evaluation import evaluate
from varcompress.metrics import METRICS
from varcompress.models.elastic import ElasticVAR
from varcompress.progress import Progress
from varcompress.results import Scored
from varcompress.schedule import Schedule

KEY = "fd"  # the Frechet distance


def check_scoring(model: ElasticVAR, reference: str | Path | None, scored_images: int | None) -> None:
    """For before the work. Raises InputError for a number of images without a reference, and for a reference that is
    a name of another model's images."""
    if reference is None and scored_images is not None:
        raise InputError("--scored-images needs a --reference, which images are scored against: give both or neither")
    if _is_named(reference) and own_source(model) is not NAMED[str(reference)]:
        raise InputError(
            f"reference {reference}: a name for the images of the embedded model alone, which {model.provenance.name} "
            "was not made with: give a folder of images or an .npz as --reference"
        )


def _is_named(reference: str | Path | None) -> bool:
    """Whether a reference is a source by its name; what lies here under it goes first."""
    return str(reference) in NAMED and not Path(str(reference)).exists()


def scores_of(
    model: ElasticVAR,
    schedules: Sequence[Schedule],
    *,
    reference: str | Path,
    num_images: int | None,
    batch_size: int,
    progress: Progress,
    seed: int = 0,
) -> Scored:
    """Score schedules on the same labels and random streams, the first being what the others are compared with.

    reference: as `check_scoring` lets it pass: what `evaluate` takes, or the model's own source by its name.
    Raises InputError as `evaluate` does.
    """
    own = None if _is_named(reference) else reference
    options = {"num_images": num_images, "batch_size": batch_size, "progress": progress, "seeds": [seed]}
    result = evaluate(model, schedules, reference=own, **options)
    return {
        "metric": METRICS[KEY].name(result["features"]["name"]),
        "images": result["settings"]["images"],
        "reference": result["reference"],
        "scores": {row["schedule"]: row["scores"][KEY] for row in result["schedules"]},
    }
