"""The schedule of least loss under a budget: all candidates by prediction, the best of them by measurement."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, combinations_with_replacement
from pathlib import Path

import numpy as np

from varcompress.cost import predict
from varcompress.data.tokens import Samples
from varcompress.depth.losses import ImageLosses, interval, mean_and_error, read_tokens, whole
from varcompress.depth.scoring import check_scoring, scores_of
from varcompress.depth.sensitivity import candidate_depths, schedules_by_scale
from varcompress.errors import InputError
from varcompress.models.elastic import ElasticVAR
from varcompress.profiling import conditions, profile
from varcompress.progress import Note, Progress, silent
from varcompress.results import SCHEMA, SEARCH, Candidate, ProfileRow, Score, SearchResult
from varcompress.schedule import Schedule, equidistant
from varcompress.training.sensitivity import SENSITIVITY_IMAGES, eliminate, kept

COSTS = ("latency", "cache", "flops")
MOST_CANDIDATES = 20_000  # all are looked at: five depths at ten scales are 1,001, eight are 19,448
TIMED_BATCH = 8  # images a call
FRESH_SEED = 1  # of images that no choice was made by
TIMED_RUNS = 3  # of each schedule that is timed

Subnets = Mapping[int, tuple[int, ...]]  # depth -> layers


def search(
    model: ElasticVAR,
    budget: str | Sequence[str],
    data: str | Path | None = None,
    *,
    depths: Sequence[int] | None = None,
    choose_layers: bool = False,
    num_images: int = 256,
    batch_size: int = 64,
    timed_batch: int | None = None,
    finalists: int = 8,
    reference: str | Path | None = None,
    scored_images: int | None = None,
    progress: Progress = silent,
    note: Note = warnings.warn,
) -> SearchResult:
    """Find the schedule of least loss whose cost is within a budget, without training.

    budget: "latency=0.5", "cache=0.3" or "flops=0.4", a share of what `full` costs, or several, all of which hold.
    flops and cache are arithmetic (`predict`, with the decoder). latency is a model fitted to measured schedules: a
    constant, a time for each layer that is run and one for each FLOP, in batches of `timed_batch` images, by default 8
    (`LatencyModel`).

    Candidates are all ways to go from all layers to fewer from scale to scale, in steps of `depths` (by default those
    that the model was trained for, or 16, 8, 4 and 2); layers are the equidistant ones, the model's own, and with
    `choose_layers` those that backward elimination leaves. The predicted loss of a candidate is, at each scale, the
    measured one of the schedule that runs all layers first and from the same scale on the same depth: for schedules of
    a bridge and one depth it is exact. The best `finalists` by prediction are measured, and the best of these is found.

    It stands beside the best of the equidistant schedules within the budget, dN@B of any N of the depths and any bridge
    B, on as many images again, which neither of the two was chosen by.
    data, reference, scored_images: as `sensitivity` takes them. With a reference the finalists and as many equidistant
    schedules are scored as well, and the score decides instead of the loss, which tells of it from afar only; what it
    chose and `full` are then scored again on images of another seed.
    Returns a dict that JSON can hold, whose fields `results.SearchResult` names.
    Raises InputError for a budget that is unknown or below what is possible, and as `sensitivity` does.
    """
    started = time.monotonic()
    check_scoring(model, reference, scored_images)
    limits = parse_budgets([budget] if isinstance(budget, str) else budget)
    if timed_batch is not None and "latency" not in limits:
        raise InputError("--timed-batch is for a latency budget: add --budget latency=0.5, or leave it out")
    timed_batch = timed_batch or TIMED_BATCH
    full, depths = model.schedule("full"), candidate_depths(model, depths)
    check_candidates(len(depths) + 1, len(full.patch_nums))
    families = [{depth: equidistant(range(full.depth), depth) for depth in depths}]
    timing = LatencyModel.measure(model, depths, timed_batch, progress) if "latency" in limits else None
    cost_of = costs(model, timing)
    check_possible(limits, cost_of, candidates(full, families[0]))

    source, samples = read_tokens(model, data, 2 * num_images, progress=progress, note=note)
    mine, apart = halves(samples)
    if model.subnets:
        families.append({depth: model.schedule(f"d{depth}").layers[-1] for depth in depths})
    if choose_layers:
        families.append(chosen_layers(model, mine, depths, batch_size, progress))
    tried = 1 + len(families) * len(depths) * len(full.patch_nums) + finalists
    losses = ImageLosses(model, mine, batch_size, total=tried, progress=progress)
    predicted = predictions(full, families, losses)
    within = [schedule for schedule in predicted if fits(cost_of(schedule), limits)]

    def loss_then_cost(schedule: Schedule) -> tuple[float, float]:  # of equal losses the cheaper one
        return float(losses.of_image(schedule).mean()), sum(cost_of(schedule)[name] for name in limits)

    best = sorted(sorted(within, key=predicted.get)[:finalists], key=loss_then_cost)
    simple = (full, *schedules_by_scale(full, families[0])[1].values())
    others = sorted((schedule for schedule in simple if fits(cost_of(schedule), limits)), key=loss_then_cost)
    rival, found, scored, scores = others[0], min(best[0], others[0], key=loss_then_cost), None, {}
    if reference is not None:
        options = {"num_images": scored_images, "batch_size": batch_size, "progress": progress}
        tried_out = list(dict.fromkeys((full, *others[:finalists], *best)))
        scores = scores_of(model, tried_out, reference=reference, **options)["scores"]
        rival, found = chosen_by_score(scores, others[:finalists], best)
        shown = list(dict.fromkeys((rival, found, full)))  # differences are to the first
        scored = scores_of(model, shown, reference=reference, seed=FRESH_SEED, **options)
    rows: dict[Schedule, Candidate] = {
        schedule: {
            "schedule": str(schedule),
            "costs": cost_of(schedule),
            "predicted": predicted[schedule],
            "loss": loss_then_cost(schedule)[0],
        }
        for schedule in (full, *best, *others)
    }
    checked = ImageLosses(model, apart, batch_size, total=len({full, found, rival}), progress=progress)
    for schedule in (full, found, rival):
        rows[schedule]["loss_apart"], rows[schedule]["loss_apart_error"] = mean_and_error(checked.of_image(schedule))
    mean, error = mean_and_error(checked.of_image(found) - checked.of_image(rival))
    by_text = {row["schedule"]: row for row in rows.values()}
    if timing:
        shown = list(dict.fromkeys((full, rival, *best)))
        for row in timed(model, shown, timed_batch, progress):
            by_text[row["schedule"]]["latency_ms"] = row["latency_ms"]
    for text, score in scores.items():
        by_text[text]["score"] = {key: score[key] for key in ("value", "interval")}
    for text, score in (scored.pop("scores") if scored else {}).items():
        by_text[text]["score"] = score
    return {
        "kind": SEARCH,
        "schema": SCHEMA,
        **conditions(model),
        "data": {"name": source.name, "digest": source.digest, "images": len(losses)},
        "images_apart": len(checked),
        "budget": limits,
        "depths": depths,
        "candidates": len(predicted),
        "within_budget": len(within),
        "latency": timing and timing.facts,
        "full": rows[full],
        "found": rows[found],
        "equidistant": rows[rival],
        "difference": {"value": mean, "interval": interval(mean, error)},
        "finalists": [rows[schedule] for schedule in best],
        "others": [rows[schedule] for schedule in others],
        "scored": scored,
        "seconds": time.monotonic() - started,
    }


def chosen_by_score(
    scores: Mapping[str, Score], others: Sequence[Schedule], best: Sequence[Schedule]
) -> tuple[Schedule, Schedule]:
    """The equidistant schedule of the best score, and the one of all. scores: by a schedule's text, less is better."""

    def value(schedule: Schedule) -> float:
        return scores[str(schedule)]["value"]

    rival = min(others, key=value)
    return rival, min((rival, *best), key=value)


# -- budgets ------------------------------------------------------------------------------------


def parse_budgets(texts: Sequence[str]) -> dict[str, float]:
    """Cost -> the share of `full`'s that a schedule may have. Raises InputError for what is none of COSTS."""
    limits: dict[str, float] = {}
    for text in texts:
        name, _, share = text.partition("=")
        if name not in COSTS:
            raise InputError(f"budget {text!r}: there are {', '.join(COSTS)}: write one as flops=0.4")
        try:
            limits[name] = float(share)
        except ValueError:
            limits[name] = math.nan
        if not 0 < limits[name] <= 1:
            raise InputError(f"budget {text!r}: give a share of what full costs, above 0 and up to 1, as {name}=0.4")
    if not limits:
        raise InputError("a search needs a budget: --budget flops=0.4")
    return limits


def fits(cost: Mapping[str, float], limits: Mapping[str, float]) -> bool:
    """Whether a cost is within the budget."""
    return all(cost[name] <= limit for name, limit in limits.items())


def check_possible(
    limits: Mapping[str, float], cost_of: Callable[[Schedule], dict], among: Collection[Schedule]
) -> None:
    """Raises InputError where no candidate is within the budget, with the least that is possible."""
    if any(fits(cost_of(schedule), limits) for schedule in among):
        return
    least = {name: min(among, key=lambda schedule: cost_of(schedule)[name]) for name in limits}
    possible = ", ".join(f"{name}={math.ceil(1e3 * cost_of(one)[name]) / 1e3} ({one})" for name, one in least.items())
    asked = ", ".join(f"{name}={limit:g}" for name, limit in limits.items())
    raise InputError(f"budget {asked}: no schedule is that cheap; the least is {possible}; --depth names other depths")


def costs(model: ElasticVAR, timing: LatencyModel | None) -> Callable[[Schedule], dict[str, float]]:
    """A function of schedules: what each costs as a share of `full`."""
    full, known = predict(model, model.schedule("full")), {}

    def cost_of(schedule: Schedule) -> dict[str, float]:
        if schedule not in known:
            cost = predict(model, schedule)
            known[schedule] = {
                "flops": cost["flops"] / full["flops"],
                "cache": cost["cache_bytes"] / full["cache_bytes"],
            }
            if timing:
                known[schedule]["latency"] = timing(schedule) / timing(model.schedule("full"))
        return known[schedule]

    return cost_of


@dataclass(frozen=True)
class LatencyModel:
    """Time of a call: a constant, a time for each layer that is run at a scale, and a time for each FLOP.

    A small batch waits for launches and weights, which go with the layers; a large one for arithmetic. The three are
    fitted to measured schedules, none below 0, by least squares of the relative errors.
    """

    model: ElasticVAR
    batch_size: int
    constant_ms: float
    layer_ms: float
    flop_ms: float
    measured: dict[str, float]  # ms of the schedules that it is fitted to
    worst: float  # its largest relative error among them

    @classmethod
    def measure(cls, model: ElasticVAR, depths: Sequence[int], batch_size: int, progress: Progress) -> LatencyModel:
        """Fit to `full`, and to each depth at all scales and after the model's bridge."""
        texts = [f"d{depth}@{bridge}" for depth in depths for bridge in sorted({0, model.bridge})]
        schedules = [model.schedule(text) for text in ("full", *texts)]
        measured = {row["schedule"]: row["latency_ms"] for row in timed(model, schedules, batch_size, progress)}
        terms = np.array([cls._terms(model, model.schedule(text)) for text in measured])
        times = np.array(list(measured.values()))
        fitted = least_squares(terms / times[:, None], np.ones(len(times)))
        return cls(model, batch_size, *fitted, measured, float(np.abs(terms @ fitted / times - 1).max()))

    @staticmethod
    def _terms(model: ElasticVAR, schedule: Schedule) -> tuple[float, float, float]:
        return 1.0, float(sum(map(len, schedule.layers))), float(predict(model, schedule)["flops"])

    def __call__(self, schedule: Schedule) -> float:
        """Milliseconds of a call."""
        return float(np.dot(self._terms(self.model, schedule), (self.constant_ms, self.layer_ms, self.flop_ms)))

    @property
    def facts(self) -> dict:
        """What a result says of it."""
        fitted = {"constant_ms": self.constant_ms, "layer_ms": self.layer_ms, "gflop_ms": 1e9 * self.flop_ms}
        return fitted | {"batch_size": self.batch_size, "measured_ms": self.measured, "worst_error": self.worst}


def timed(model: ElasticVAR, schedules: Sequence[Schedule], batch_size: int, progress: Progress) -> list[ProfileRow]:
    """The profiles of schedules, `full` among them."""
    return profile(model, schedules, batch_size=batch_size, runs=TIMED_RUNS, progress=progress)["schedules"]


def least_squares(terms: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The weights of `terms` (n, few), none below 0, whose sum is nearest to `wanted` (n,): the best of all subsets."""
    places, best = range(terms.shape[1]), (math.inf, np.zeros(terms.shape[1]))
    for some in (list(c) for size in range(1, len(places) + 1) for c in combinations(places, size)):
        scale = np.linalg.norm(terms[:, some], axis=0)  # FLOPs are large numbers
        weights = np.zeros(len(places))
        weights[some] = np.linalg.lstsq(terms[:, some] / scale, wanted, rcond=None)[0] / scale
        if (weights >= 0).all():
            best = min(best, (float(np.square(terms @ weights - wanted).sum()), weights), key=lambda pair: pair[0])
    return best[1]


# -- candidates ---------------------------------------------------------------------------------


def check_candidates(depths: int, scales: int) -> None:
    """Raises InputError where there are more candidates than can be looked at."""
    count = math.comb(scales + depths - 1, scales)
    if count > MOST_CANDIDATES:
        raise InputError(f"{depths} depths at {scales} scales are {count:,} schedules: name fewer with --depth")


def candidates(full: Schedule, subnets: Subnets) -> list[Schedule]:
    """All schedules whose depth falls, or stays, from scale to scale, among that of `full` and those of `subnets`."""
    depths = sorted({full.depth, *subnets}, reverse=True)
    every = combinations_with_replacement(depths, len(full.patch_nums))
    return [nested(full, per_scale, subnets) for per_scale in every]


def nested(full: Schedule, per_scale: Sequence[int], subnets: Subnets) -> Schedule:
    """The schedule of these depths, from large to small. Its layers are those of `subnets` where all of them are still
    in use, else equidistant ones among those that are."""
    layers = [full.layers[0]]
    for depth in per_scale:
        own = subnets.get(depth, full.layers[0])
        layers.append(own if {*own} <= {*layers[-1]} else equidistant(layers[-1], depth))
    return Schedule(full.depth, full.patch_nums, tuple(layers[1:]))


def predictions(full: Schedule, families: Sequence[Subnets], losses: ImageLosses) -> dict[Schedule, float]:
    """The predicted loss of every candidate, whichever subnets its layers are from."""
    found: dict[Schedule, float] = {}
    for subnets in families:
        table = {key: losses(schedule).mean(0) for key, schedule in schedules_by_scale(full, subnets)[1].items()}
        table |= {(full.depth, k): losses(full).mean(0) for k in range(len(full.patch_nums))}
        for schedule in candidates(full, subnets):
            loss = prediction(schedule, table)
            found[schedule] = min(loss, found.get(schedule, math.inf))
    return found


def prediction(schedule: Schedule, table: Mapping[tuple[int, int], np.ndarray]) -> float:
    """The loss of a schedule by those of simpler ones, each scale weighing the same.

    table: (depth, scale from 0) -> the losses (K,) per token at each scale, all layers running before that scale.
    """
    parts = [
        table[len(part.layers), part.scales[0]][part.scales[0] : part.scales[-1] + 1] for part in schedule.segments
    ]
    return float(whole(np.concatenate(parts)))


def chosen_layers(
    model: ElasticVAR, samples: Samples, depths: Sequence[int], batch_size: int, progress: Progress
) -> Subnets:
    """Subnets by backward elimination after the model's bridge, on a few of the images."""
    few = Samples(*(part[:SENSITIVITY_IMAGES] for part in samples))
    losses, full = ImageLosses(model, few, batch_size, progress=silent), model.schedule("full")
    return eliminate(
        lambda schedule: float(losses.of_image(schedule).mean()),
        full,
        model.bridge,
        depths,
        keep=kept(full.depth),
        progress=progress,
    )


def halves(samples: Samples) -> tuple[Samples, Samples]:
    """Every other image, and those between them."""
    first, second = (Samples(*(part[start::2] for part in samples)) for start in (0, 1))
    if len(second.labels) < 2:
        raise InputError(f"{len(samples.labels)} images are too few: two to search by and two to compare on are needed")
    return first, second
