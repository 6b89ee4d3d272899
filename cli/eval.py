"""varcompress eval"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from varcompress.cli.options import Json, Loading, Model, Rounding, Schedules, grouped
from varcompress.cli.output import note, out, print_json, progress_bar
from varcompress.sampling import Sampling


@grouped
def evaluate(
    model: Model,
    *,
    schedules: Schedules = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="A folder of images, an .npz of images, or an .npz of statistics (mu, sigma). "
            "Optional for the embedded digits.",
            show_default=False,
        ),
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(
            min=10,
            help="Images per schedule, all classes equally often.",
            show_default="50000; 2000 with the digits features",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images generated at a time; latency is per batch.")] = 64,
    sampling: Sampling,
    rounding: Rounding = "round",
    features: Annotated[
        str | None, typer.Option(help="inception or digits.", show_default="what fits the model")
    ] = None,
    feature_weights: Annotated[
        Path | None,
        typer.Option(help="torch-fidelity's Inception weights, where there is no network.", show_default=False),
    ] = None,
    resamples: Annotated[
        int,
        typer.Option(
            min=0,
            help="Resamples of the images, for the spread of FID: 50 are enough, seconds each on Inception.",
        ),
    ] = 0,
    directory: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Directory for eval.json and eval.png.",
            show_default="MODEL where it is an elastic directory, else nothing is written",
        ),
    ] = None,
    loading: Loading,
    as_json: Json = False,
) -> None:
    """Score the images of each schedule, and measure what they cost, in one run.

    FID, Inception Score, KID, precision and recall are torch-fidelity's.
    The defaults are VAR's published settings, but for the cfg that MODEL was distilled for.
    Labels are balanced over classes.
    Images become 8 bits before they are scored, as --rounding says.
    """
    from varcompress.checkpoint import is_elastic
    from varcompress.evaluation import evaluate as run
    from varcompress.publish import record
    from varcompress.report.tables import eval_table
    from varcompress.results import EVAL, check_folder

    if directory is None and is_elastic(model):
        directory = Path(model)  # where push looks for results
    if directory is not None:
        check_folder(directory, EVAL)
    loaded = loading.open(model)
    with progress_bar() as progress:
        result = run(
            loaded,
            schedules,
            reference=reference,
            num_images=images,
            batch_size=batch_size,
            sampling=sampling,
            rounding=rounding,
            features=features,
            feature_weights=feature_weights,
            resamples=resamples,
            progress=progress,
        )
    if as_json:
        print_json(result)
    else:
        out.print(eval_table(result))
    if directory is None:
        note("Nothing was written: --out DIR keeps this result and its plot.")
    else:
        note(f"Written: {', '.join(map(str, record(result, directory)))}")
