"""How sure a score is: its 95 % interval, over images or over seeds, and that of its difference to another schedule."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from scipy.stats import t
from torch import Tensor

from varcompress.evaluation.measures import Measure
from varcompress.results import Score

LEVEL = 0.95
NORMAL = statistics.NormalDist().inv_cdf((1 + LEVEL) / 2)


def standard_error(influence: Tensor, labels: Tensor | None = None) -> float:
    """Standard error of a score whose influences (N,) these are.

    labels: (N,) int64, the class of each image. Their numbers are no chance, so the spread between classes is none of
    it, unless a class has a single image.
    """
    groups = [influence]
    if labels is not None:
        found = [influence[labels == label] for label in labels.unique()]
        groups = found if min(map(len, found)) > 1 else groups
    return float(sum(len(group) * group.var() for group in groups)) ** 0.5 / len(influence)


def scored(
    seeds: Sequence[Mapping[str, Measure]], labels: Tensor, base: Sequence[Mapping[str, Measure]] | None = None
) -> dict[str, Score]:
    """Scores of one schedule by key: the mean over seeds, with intervals over seeds, or over images of a single one.

    labels: (N,) int64 of the images, the same under every schedule and seed; base: the scores, seed by seed, of the
    schedule to which differences are taken, pair by pair of images or seeds.
    """
    return {
        key: _scored([each[key] for each in seeds], labels, base and [each[key] for each in base]) for key in seeds[0]
    }


def _scored(measures: Sequence[Measure], labels: Tensor, base: Sequence[Measure] | None) -> Score:
    values = [measure.value for measure in measures]
    found: Score = {"value": statistics.fmean(values)}
    found["interval"] = _interval(values, [measure.influence for measure in measures], _labels(measures, labels))
    if len(measures) > 1:
        found["seeds"] = values
    elif measures[0].std is not None:
        found["std"] = measures[0].std
    if base is not None:
        differences = [own.value - other.value for own, other in zip(measures, base, strict=True)]
        influences = [own.influence - other.influence for own, other in zip(measures, base, strict=True)]
        found["difference"] = statistics.fmean(differences)
        found["difference_interval"] = _interval(differences, influences, _labels(measures, labels))
    return found


def _labels(measures: Sequence[Measure], labels: Tensor) -> Tensor | None:
    return None if measures[0].of_reference else labels


def _interval(values: Sequence[float], influences: Sequence[Tensor], labels: Tensor | None) -> list[float]:
    centre, count = statistics.fmean(values), len(values)
    if count > 1:
        half = t.ppf((1 + LEVEL) / 2, count - 1) * statistics.stdev(values) / count**0.5
    else:
        half = NORMAL * standard_error(influences[0], labels)
    return [float(centre - half), float(centre + half)]
