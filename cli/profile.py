"""varcompress profile"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from varcompress.cli.options import Json, Loading, Model, Schedules, grouped
from varcompress.cli.output import deliver, progress_bar
from varcompress.sampling import Sampling


@grouped
def profile(
    model: Model,
    *,
    schedules: Schedules = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per call.")] = 8,
    runs: Annotated[int, typer.Option(min=1, help="Timed calls per schedule.")] = 5,
    sampling: Sampling,
    directory: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Directory for profile.json and profile.png.",
            show_default="MODEL where it is an elastic directory, else nothing is written",
        ),
    ] = None,
    loading: Loading,
    as_json: Json = False,
) -> None:
    """Measure time, memory, weights and FLOPs of schedules, each beside what arithmetic predicts."""
    from varcompress.checkpoint import is_elastic
    from varcompress.profiling import profile
    from varcompress.report.tables import profile_table
    from varcompress.results import PROFILE, check_folder

    if directory is None and is_elastic(model):
        directory = Path(model)  # where push looks for results
    if directory is not None:
        check_folder(directory, PROFILE)
    loaded = loading.open(model)
    with progress_bar() as progress:
        result = profile(
            loaded,
            schedules,
            batch_size=batch_size,
            runs=runs,
            sampling=sampling,
            progress=progress,
        )
    deliver(result, profile_table, directory, as_json=as_json)
