"""varcompress sample"""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Annotated

import typer

from varcompress.cli.options import Json, Loading, Model, Rounding, grouped
from varcompress.cli.output import out as stdout
from varcompress.cli.output import print_json, progress_bar
from varcompress.errors import InputError
from varcompress.sampling import Sampling


@grouped
def sample(
    model: Model,
    *,
    classes: Annotated[str, typer.Option(help="Class indices, such as 207,88 or 0-9.", show_default=False)],
    out: Annotated[
        Path,
        typer.Option(help="FILE.png for a grid; FILE.npz for arr_0 (N, H, W, 3) and arr_1 labels.", show_default=False),
    ],
    schedule: Annotated[str, typer.Option("--schedule", "-s", help="full, d8, d8@6 or 30x6,8x4.")] = "full",
    count: Annotated[int, typer.Option(min=1, help="Images per class.")] = 1,
    sampling: Sampling,
    rounding: Rounding = "round",
    batch_size: Annotated[int, typer.Option(min=1, help="Images generated at a time.")] = 16,
    loading: Loading,
    as_json: Json = False,
) -> None:
    """Draw images of given classes under one schedule: a grid to look at, or arrays to score."""
    from varcompress.drawing import draw_images
    from varcompress.images import check_image_output, check_rounding, save_images
    from varcompress.profiling import conditions

    check_image_output(out)
    check_rounding(rounding)
    loaded = loading.open(model)
    sampling = loaded.sampling(sampling)
    labels = [label for label in parse_classes(classes, loaded.var.config.classes) for _ in range(count)]
    with progress_bar() as progress:
        images = draw_images(
            loaded, labels, schedule, batch_size=batch_size, sampling=sampling, rounding=rounding, progress=progress
        )
    save_images(out, images, labels, columns=count if count > 1 else math.ceil(len(labels) ** 0.5))
    chosen = str(loaded.schedule(schedule))
    if as_json:
        print_json(
            {
                "kind": "sample",
                **conditions(loaded, sampling),
                "schedule": chosen,
                **dataclasses.asdict(sampling),
                "rounding": rounding,
                "labels": labels,
                "out": str(out),
            }
        )
        return
    plural = "" if len(labels) == 1 else "s"
    stdout.print(f"{len(labels)} image{plural} under {chosen} in {out}", highlight=False, markup=False, soft_wrap=True)


def parse_classes(text: str, known: int) -> list[int]:
    """Class indices from 207,88 or 0-9,20. Raises InputError when malformed, or not below `known`."""
    labels: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise InputError(f"classes {text!r} are not understood: write indices such as 207,88 or 0-9")
        first, last = int(match[1]), int(match[2] or match[1])
        if last >= known:
            raise InputError(f"class {last} is unknown: this model has classes 0 to {known - 1}")
        labels += range(first, last + 1)
    return labels
