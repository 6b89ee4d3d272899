"""Which layers the late scales miss least: subnets by greedy backward elimination, before any training.

The equidistant subnets of VARiant choose layers by their place alone. Here all layers run at the late scales first,
and the one whose removal raises a loss least is taken out, again and again: each subnet holds all smaller ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

from varcompress.errors import InputError
from varcompress.progress import Progress, Steps, silent
from varcompress.schedule import Schedule

SENSITIVITY_IMAGES = 64  # that decide


def kept(depth: int) -> tuple[int, int]:
    """The layers of a model that all subnets of a recipe keep: the first and the last."""
    return 0, depth - 1


def losses_of(depth: int, last: int, keep: int) -> dict[int, int]:
    """How many losses `eliminate` takes from a model of `depth` layers to `last`: {layers that run late: losses}."""
    return {layers: layers + 1 - keep for layers in range(last, depth)}


def eliminate(
    loss_of: Callable[[Schedule], float],
    full: Schedule,
    bridge: int,
    depths: Collection[int],
    *,
    keep: Collection[int] = (),
    progress: Progress = silent,
) -> dict[int, tuple[int, ...]]:
    """Subnets of the given depths for the scales after the bridge: {depth: layers}, from large to small.

    loss_of: the loss of a schedule, such as `Objective.loss_of` gives; full: the model's schedule of all layers; keep:
    layers that are never removed. Of equal losses the lowest layer goes, so that the same losses always give the same
    subnets. From 30 layers to 2, which are kept, it takes 406 losses. Raises InputError for depths that cannot be
    reached, and for a loss that is not a number.
    """
    layers, last = tuple(range(full.depth)), min(depths)
    if not max(len(keep), 1) <= last <= max(depths) < full.depth or not set(keep) <= set(layers):
        raise InputError(
            f"subnets of {list(depths)} layers that keep {list(keep)} cannot be chosen from a model of {full.depth}: "
            "a subnet has fewer layers than the model, and at least those it keeps"
        )
    steps, subnets = Steps(progress, full.depth - last), {}
    while len(layers) > last:
        losses = {}
        for removed in sorted({*layers} - {*keep}):
            rest = tuple(layer for layer in layers if layer != removed)
            losses[rest] = loss_of(
                Schedule.after_bridge(rest, depth=full.depth, patch_nums=full.patch_nums, bridge=bridge)
            )
            if math.isnan(losses[rest]):
                raise InputError(f"the loss without layer {removed} is not a number: the weights, or the data, are bad")
        layers = min(losses, key=losses.get)  # the first of equals
        if len(layers) in depths:
            subnets[len(layers)] = layers
        steps.step(f"choose layers: {len(layers)} left")
    return subnets
