"""The progressive strategy of VARiant (arXiv 2511.16546, section 3): which depth runs at which step.

Every step trains the full network with probability 1 - p, and otherwise one subnet. In the first
phase p is small and the full network keeps its quality while the subnets wake up; in the second p
rises linearly; in the third it stays at its end, where the subnets get all the attention.
"""

from __future__ import annotations

from dataclasses import dataclass

from varcompress.data.streams import DEPTH, fractions, words
from varcompress.training.recipe import Recipe

PHASES = ("full", "ramp", "subnet")


@dataclass(frozen=True)
class Step:
    """What one optimiser step does."""

    number: int  # from 1
    epoch: int  # from 0
    place: int  # the step's place in its epoch, from 0
    phase: str
    p: float  # probability of a subnet
    depth: int | None  # None: the full network
    ends_phase: bool


def plan(recipe: Recipe, steps_per_epoch: int) -> list[Step]:
    """All steps of a run, in order: a function of the recipe and the size of the data alone."""
    lengths = [epochs * steps_per_epoch for epochs in (recipe.epochs_full, recipe.epochs_ramp, recipe.epochs_subnet)]
    subnet, which, *_ = (fractions(word).tolist() for word in words(recipe.seed, DEPTH, 0, sum(lengths)))
    steps: list[Step] = []
    for phase, length in zip(PHASES, lengths, strict=True):
        for i in range(length):
            done = {"full": 0.0, "ramp": i / length, "subnet": 1.0}[phase]
            p = recipe.p_start + (recipe.p_end - recipe.p_start) * done
            index = len(steps)
            depth = recipe.depths[int(which[index] * len(recipe.depths))] if subnet[index] < p else None
            epoch, place = divmod(index, steps_per_epoch)
            steps.append(Step(index + 1, epoch, place, phase, p, depth, i == length - 1))
    return steps
