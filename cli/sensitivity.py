"""varcompress sensitivity"""

from __future__ import annotations

from typing import Annotated

import typer

from varcompress.cli.options import Data, Depths, Json, Loading, Model, Reference, ResultsIn, ScoredImages, grouped
from varcompress.cli.output import deliver, note, progress_bar


@grouped
def sensitivity(
    model: Model,
    *,
    data: Data = None,
    depths: Depths = None,
    images: Annotated[int, typer.Option(min=2, help="Images whose loss is measured.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 64,
    reference: Reference = None,
    scored_images: ScoredImages = None,
    directory: ResultsIn = None,
    loading: Loading,
    as_json: Json = False,
) -> None:
    """Say where depth hurts, without training: the loss at each scale and depth, and without each layer.

    The loss is teacher-forced, on the tokens of real images; --reference adds the Frechet distance of images drawn.
    """
    from varcompress.depth import sensitivity as run
    from varcompress.report.tables import sensitivity_table
    from varcompress.results import SENSITIVITY, check_folder

    if directory is not None:
        check_folder(directory, SENSITIVITY)
    loaded = loading.open(model)
    with progress_bar() as progress:
        result = run(
            loaded,
            data,
            depths=depths,
            num_images=images,
            batch_size=batch_size,
            reference=reference,
            scored_images=scored_images,
            progress=progress,
            note=note,
        )
    deliver(result, sensitivity_table, directory, as_json=as_json, plot="heat map")
