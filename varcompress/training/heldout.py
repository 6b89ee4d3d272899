"""Images that are never trained on: their losses under every depth, by the same fields as those of a step."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from varcompress.data.tokens import Samples, TokenData
from varcompress.distributed import Ranks
from varcompress.schedule import Schedule
from varcompress.training.objective import Objective
from varcompress.training.recipe import FULL
from varcompress.training.strategy import schedules_of


@torch.no_grad()
def measure_heldout(objective: Objective, heldout: TokenData, ranks: Ranks) -> dict:
    """The losses of images that are never trained on, under the full network and every depth.

    Each image in its first view and with its label, so that the figures of all steps and runs compare.
    """
    recipe = objective.recipe
    schedules = schedules_of(objective.model, (FULL, *recipe.depths))
    losses = objective.zeros(len(schedules))
    parts = in_first_view(heldout, recipe.pass_size(ranks.count))
    for first in range(0, len(parts), ranks.count):  # all run equally many passes, in which they gather weights
        mine = first + ranks.rank
        samples = parts[min(mine, len(parts) - 1)]
        images = len(samples.labels) if mine < len(parts) else 0
        losses += objective.evaluate(samples, list(schedules.values())) * images
    losses = ranks.sum_(losses) / len(heldout)
    return {"loss": objective.total(losses).item(), **loss_fields(objective, losses, schedules)}


def loss_fields(objective: Objective, losses: Tensor, schedules: dict[str, Schedule]) -> dict:
    """What the log says of losses (N, S, L): of each schedule the loss, and each kind of it scale by scale."""
    counts = [side * side for side in objective.model.var.config.patch_nums]
    per_scale = torch.stack([part.mean(-1) for part in losses.split(counts, dim=-1)], dim=-1)  # (N, S, K)
    kinds, of_schedules = per_scale.tolist(), objective.of_schedules(losses).tolist()
    return {
        "losses": dict(zip(schedules, of_schedules, strict=True)),
        **{
            kind: dict(zip(schedules, values, strict=True))
            for kind, values in zip(objective.losses, kinds, strict=True)
        },
    }


def in_first_view(data: TokenData, size: int, count: int | None = None) -> list[Samples]:
    """The first `count` images, or all, in their first view and with their labels, `size` at a time."""
    places = np.arange(len(data))[:count]
    return [data.samples(part, np.zeros_like(part)) for part in np.split(places, range(size, len(places), size))]
