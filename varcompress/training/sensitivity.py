"""Which layers the late scales miss least: subnets by greedy backward elimination, before any training.

The equidistant subnets of VARiant choose layers by their place alone. Here all layers run at the late scales first,
and the one whose removal raises a loss least is taken out, again and again: each subnet holds all smaller ones.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection

import torch
import torch.nn.functional as F
from torch import Tensor

from varcompress.errors import InputError
from varcompress.models.elastic import ElasticVAR
from varcompress.progress import Progress, Steps, silent
from varcompress.schedule import Schedule

IMAGES_AT_A_TIME = 16


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

    loss_of: the loss of a schedule, such as `late_kl`; full: the model's schedule of all layers; keep: layers that are
    never removed. Of equal losses the lowest layer goes, so that the same losses always give the same subnets.
    From 30 layers to 2 it takes 462 losses. Raises InputError for depths that cannot be reached, and for a loss that
    is not a number.
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


@torch.no_grad()
def late_kl(model: ElasticVAR, labels: Tensor, tokens: Tensor) -> Callable[[Schedule], float]:
    """The loss KL(full || schedule) of the teacher-forced pass, in nats, the mean over all tokens of some images.

    labels: (B,) int64, the null class included; tokens: (B, L) int64; both may be on the host. The log-probabilities
    of `full` are held on the device, (B, L, V) float32: 11 MB for an image of 256 pixels, 37 MB for one of 512.
    """
    # not the packed copies of the weights, which are used where a trial of the moment finds them faster
    plain = dataclasses.replace(model.runtime, kernels="torch")
    images = labels.to(model.device), model.tokenizer.teacher_input(tokens.to(model.device))
    chunks = list(zip(*(part.split(IMAGES_AT_A_TIME) for part in images), strict=True))

    def log_probs(labels: Tensor, teacher_input: Tensor, schedule: Schedule) -> Tensor:
        model.prepare(schedule, plain)
        return model.var(labels, teacher_input, schedule).log_softmax(dim=-1)

    full = [log_probs(*chunk, model.schedule("full")) for chunk in chunks]

    @torch.no_grad()
    def loss_of(schedule: Schedule) -> float:
        found = (log_probs(*chunk, schedule) for chunk in chunks)
        pairs = zip(found, full, strict=True)
        return sum(F.kl_div(q, p, reduction="sum", log_target=True).item() for q, p in pairs) / tokens.numel()

    return loss_of
