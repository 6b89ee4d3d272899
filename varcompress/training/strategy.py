"""Which depths run at which step: the progressive strategy of VARiant, or several depths in every step.

Progressive (arXiv 2511.16546, section 3): every step trains the full network with probability 1 - p, and otherwise one
subnet. In the first phase p is small and the full network keeps its quality while the subnets wake up; in the second p
rises linearly; in the third it stays at its end, where the subnets get all the attention.

With `depth_probability` each depth takes part in a step with a probability of its own, whatever the others do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from varcompress.data.streams import DEPTH, fractions, words
from varcompress.models.elastic import ElasticVAR
from varcompress.schedule import Schedule
from varcompress.training.recipe import FULL, Recipe

PHASES = ("full", "ramp", "subnet")


@dataclass(frozen=True)
class Step:
    """What one optimiser step does."""

    number: int  # from 1
    epoch: int  # from 0
    place: int  # the step's place in its epoch, from 0
    depths: tuple[str | int, ...]  # "full" first, then subnets from large to small
    phase: str | None = None  # of the progressive strategy
    p: float | None = None  # probability of a subnet
    ends_phase: bool = False


def plan(recipe: Recipe, steps_per_epoch: int) -> list[Step]:
    """All steps of a run, in order: a function of the recipe and the size of the data alone."""
    strategy = _progressive if recipe.depth_probability is None else _independent
    return [
        Step(index + 1, *divmod(index, steps_per_epoch), **chosen)
        for index, chosen in enumerate(strategy(recipe, steps_per_epoch))
    ]


def is_saved(step: Step, recipe: Recipe) -> bool:
    """Whether the state after a step is to be saved."""
    return step.number % recipe.checkpoint_every == 0 or step.ends_phase


def schedules_of(model: ElasticVAR, depths: Iterable[str | int]) -> dict[str, Schedule]:
    """The schedules of these depths, by their texts."""
    chosen = [model.schedule(depth if depth == FULL else f"d{depth}") for depth in depths]
    return {str(schedule): schedule for schedule in chosen}


def _progressive(recipe: Recipe, steps_per_epoch: int) -> Iterator[dict]:
    lengths = [epochs * steps_per_epoch for epochs in (recipe.epochs_full, recipe.epochs_ramp, recipe.epochs_subnet)]
    drawn = zip(*(fractions(word).tolist() for word in words(recipe.seed, DEPTH, 0, sum(lengths))[:2]), strict=True)
    for phase, length in zip(PHASES, lengths, strict=True):
        for i in range(length):
            done = {"full": 0.0, "ramp": i / length, "subnet": 1.0}[phase]
            p = recipe.p_start + (recipe.p_end - recipe.p_start) * done
            subnet, which = next(drawn)
            depth = recipe.depths[int(which * len(recipe.depths))] if subnet < p else FULL
            yield {"depths": (depth,), "phase": phase, "p": p, "ends_phase": i == length - 1}


def _independent(recipe: Recipe, steps_per_epoch: int) -> Iterator[dict]:
    steps = recipe.epochs * steps_per_epoch
    probability = {depth: recipe.depth_probability.get(str(depth), 0.0) for depth in (FULL, *recipe.depths)}
    depths = [depth for depth in probability if probability[depth]]
    # one stream for each depth, which adding another one leaves as it is
    drawn = {
        depth: fractions(words(recipe.seed, DEPTH, 0 if depth == FULL else depth, steps)[0]).tolist()
        for depth in depths
    }
    for i in range(steps):
        chosen = tuple(depth for depth in depths if drawn[depth][i] < probability[depth])
        # a step trains something: where chance leaves out all, the one that came closest
        chosen = chosen or (min(depths, key=lambda depth: drawn[depth][i] / probability[depth]),)
        yield {"depths": chosen, "ends_phase": i == steps - 1}
