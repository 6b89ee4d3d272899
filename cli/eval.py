"""varcompress eval"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from varcompress.cli.options import Json, Loading, Model, Schedules, grouped, whole_numbers
from varcompress.cli.output import deliver, progress_bar
from varcompress.sampling import Sampling


@grouped
def evaluate(
    model: Model,
    *,
    schedules: Schedules = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            help="What is done where nothing else is said: see `varcompress protocols list`.",
            show_default="the one made for such a model",
        ),
    ] = None,
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
            min=10, help="Images per schedule, all classes equally often.", show_default="as the protocol says"
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images generated at a time; latency is per batch.")] = 64,
    sampling: Sampling,
    seeds: Annotated[
        str | None,
        typer.Option(help="Several seeds, such as 0,1,2: intervals are over them then.", show_default="--seed"),
    ] = None,
    rounding: Annotated[
        str | None,
        typer.Option(help="round or truncate: how images become 8 bits.", show_default="as the protocol says"),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            help="The network whose features are compared: inception, dinov2, efficientnet-lite0, digits, or a file in "
            "timm's format.",
            show_default="as the protocol says",
        ),
    ] = None,
    feature_weights: Annotated[
        Path | None, typer.Option(help="A file of its weights, where there is no network.", show_default=False)
    ] = None,
    distances: Annotated[
        str | None,
        typer.Option(
            help="exact, or adm (float16): behind precision, recall, density and coverage.",
            show_default="as the protocol says",
        ),
    ] = None,
    resize_reference: Annotated[
        bool,
        typer.Option(
            "--resize-reference",
            help="Take an .npz of images of another size, and compute everything from them resized.",
        ),
    ] = False,
    beside: Annotated[
        list[str] | None,
        typer.Option(
            help="Another model whose full is scored and timed in the same run, such as var-d24; may be given several "
            "times.",
            show_default=False,
        ),
    ] = None,
    save_images: Annotated[
        Path | None,
        typer.Option(
            help="FILE.npz in the layout of ADM's evaluator, or a folder for PNG files: what was scored.",
            show_default=False,
        ),
    ] = None,
    directory: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Directory for eval.json and eval.png; called again after a kill, the same command goes on there.",
            show_default="MODEL where it is an elastic directory, else nothing is written",
        ),
    ] = None,
    loading: Loading,
    as_json: Json = False,
) -> None:
    """Score the images of each schedule by a protocol, with intervals, and measure what they cost, in one run.

    FID, sFID, Inception Score, KID, precision, recall, density and coverage; what departs from the protocol is listed.
    Labels are balanced over classes. Images become 8 bits before they are scored.
    On several GPUs: torchrun --nproc-per-node 8 -m varcompress eval …
    """
    from varcompress.checkpoint import is_elastic
    from varcompress.distributed import is_rank_zero, local_device
    from varcompress.evaluation import evaluate as run
    from varcompress.evaluation.parts import forget
    from varcompress.report.tables import eval_table
    from varcompress.results import EVAL, check_folder

    if directory is None and is_elastic(model):
        directory = Path(model)  # where push looks for results
    if directory is not None:
        check_folder(directory, EVAL)
    loading = replace(loading, device=str(local_device(loading.device)))
    only_beside = any(map(_is_pth, beside or ())) and not _is_pth(model)
    loaded = (replace(loading, vae=None) if only_beside else loading).open(model)
    with progress_bar() as progress:
        result = run(
            loaded,
            schedules,
            protocol=protocol,
            reference=reference,
            num_images=images,
            batch_size=batch_size,
            sampling=sampling,
            seeds=None if seeds is None else whole_numbers("seeds", seeds),
            rounding=rounding,
            features=features,
            feature_weights=feature_weights,
            distances=distances,
            resize_reference=resize_reference,
            beside=[partial(_loading_of(other, loading).open, other) for other in beside or ()],
            save_images=save_images,
            folder=directory,
            progress=progress,
        )
    if not is_rank_zero():
        return
    deliver(result, eval_table, directory, as_json=as_json)
    if directory is not None:
        forget(directory)


def _is_pth(model: str) -> bool:
    return model.endswith(".pth")


def _loading_of(model: str, loading: Loading) -> Loading:
    """How a model beside is opened: --vae goes with .pth files, and --revision is MODEL's alone."""
    return replace(loading, vae=loading.vae if _is_pth(model) else None, revision=None)
