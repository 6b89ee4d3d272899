"""varcompress search"""

from __future__ import annotations

from typing import Annotated

import typer

from varcompress.cli.options import Data, Depths, Json, Loading, Model, Reference, ResultsIn, ScoredImages, grouped
from varcompress.cli.output import deliver, note, progress_bar


@grouped
def search(
    model: Model,
    *,
    budgets: Annotated[
        list[str],
        typer.Option(
            "--budget",
            metavar="COST=SHARE",
            show_default=False,
            help="latency=0.5, cache=0.3 or flops=0.4: a share of what full costs. Given several times, all must hold.",
        ),
    ],
    data: Data = None,
    depths: Depths = None,
    choose_layers: Annotated[
        bool, typer.Option("--choose-layers", help="Also choose which layers, by backward elimination: takes longer.")
    ] = False,
    images: Annotated[
        int, typer.Option(min=2, help="Images to search by; as many others compare what was found.")
    ] = 256,
    finalists: Annotated[int, typer.Option(min=1, help="Schedules measured, the best by prediction.")] = 8,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 64,
    timed_batch: Annotated[
        int | None, typer.Option(min=1, help="Images per call whose latency is a budget.", show_default="8")
    ] = None,
    reference: Reference = None,
    scored_images: ScoredImages = None,
    directory: ResultsIn = None,
    loading: Loading,
    as_json: Json = False,
) -> None:
    """Find the schedule of least loss within a budget, without training, and compare it with the equidistant ones.

    flops and cache are arithmetic; latency is predicted by a fit to measured schedules.
    """
    from varcompress.depth import search as run
    from varcompress.report.tables import search_table
    from varcompress.results import SEARCH, check_folder

    if directory is not None:
        check_folder(directory, SEARCH)
    loaded = loading.open(model)
    with progress_bar() as progress:
        result = run(
            loaded,
            budgets,
            data,
            depths=depths,
            choose_layers=choose_layers,
            num_images=images,
            batch_size=batch_size,
            timed_batch=timed_batch,
            finalists=finalists,
            reference=reference,
            scored_images=scored_images,
            progress=progress,
            note=note,
        )
    deliver(result, search_table, directory, as_json=as_json)
