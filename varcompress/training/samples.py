"""What a run draws as it goes: images of the same classes and random streams each time, so that grids compare."""

from __future__ import annotations

from pathlib import Path

import torch

from varcompress.images import save_images, to_uint8
from varcompress.models.elastic import ElasticVAR
from varcompress.models.linear import unpack
from varcompress.training.recipe import FULL

COLUMNS = 8


def draw_grid(model: ElasticVAR, path: Path) -> None:
    """Write a PNG: a row for the full network and each depth, a column for each of eight classes over all of them.

    An image is drawn alone, which takes less memory than any pass of training. Raises InputError where images are not
    finite, where memory or disk are full.
    """
    labels = torch.linspace(0, model.var.config.classes - 1, COLUMNS).round().long().tolist()
    runtime = model.runtime.eager()  # a graph would hold its memory for the rest of the run
    schedules = [model.schedule(depth) for depth in (FULL, *(f"d{depth}" for depth in model.depths))]
    try:
        images = [
            model.generate([label], schedule, first_index=column, runtime=runtime)
            for schedule in schedules
            for column, label in enumerate(labels)
        ]
    finally:
        unpack(model.var)  # copies of weights that are about to change
    save_images(path, to_uint8(torch.cat(images)).cpu(), labels * len(schedules), columns=COLUMNS)
