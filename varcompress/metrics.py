"""Scores: what each is called, which direction is better, and how torch-fidelity computes it. One entry each, in TABLE.

torch-fidelity is imported where it computes: it is slow to import, and most readers of results only want the names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from varcompress.hardware import exact_float32

# torch-fidelity's defaults, written out because they are part of what a score means
SEED = 2020
IS_SPLITS = 10
MIN_OF_CLASS = 10  # images, to resample within a class
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
PRC_NEIGHBOURS = 3
PRC_ROWS = 2_500  # of the distance matrix at a time; changes memory, not the score
PLAIN = "inception"  # the features on which a score goes by its plain name
FEATURES = (PLAIN, "digits")  # the names of the feature networks


@dataclass(frozen=True)
class Compared:
    """Features of generated images beside those of a reference, on the CPU.

    vectors: (N, D) and logits: (N, C) of the generated ones; statistics: mu (D,) and sigma (D, D) of the reference;
    reference: its vectors (M, D), None where it holds statistics only; device: where distances are computed; labels:
    (N,) int64, the class of each generated image.
    """

    vectors: Tensor
    logits: Tensor
    statistics: dict[str, np.ndarray]
    reference: Tensor | None
    device: torch.device
    labels: Tensor

    @property
    def kid_subset_size(self) -> int:
        """Images in a subset of KID, fewer than usual where there are not so many."""
        return min(KID_SUBSET_SIZE, len(self.vectors), len(self.reference))

    @cached_property
    def precision_and_recall(self) -> tuple[float, float]:
        """Both come from one pass over the distances between all images."""
        from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

        with exact_float32(self.device):
            found = prc_features_to_metric(
                self.vectors.to(self.device),
                self.reference.to(self.device),
                prc_neighborhood=PRC_NEIGHBOURS,
                prc_batch_size=PRC_ROWS,
                save_cpu_ram=True,
                verbose=False,
            )
        return found[KEY_METRIC_PRECISION], found[KEY_METRIC_RECALL]


def frechet(compared: Compared) -> tuple[float]:
    """Frechet distance of two Gaussians (arXiv 1706.08500); on Inception's features, FID."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    statistics = fid_features_to_statistics(compared.vectors)
    return (fid_statistics_to_metric(statistics, compared.statistics, verbose=False)[KEY_METRIC_FID],)


def inception_score(compared: Compared) -> tuple[float, float]:
    """Inception Score (arXiv 1606.03498), mean and standard deviation over IS_SPLITS groups."""
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    found = isc_features_to_metric(compared.logits, splits=IS_SPLITS, shuffle=True, rng_seed=SEED)
    return found[KEY_METRIC_ISC_MEAN], found[KEY_METRIC_ISC_STD]


def kernel_distance(compared: Compared) -> tuple[float, float]:
    """Kernel Inception Distance (arXiv 1801.01401), mean and standard deviation over KID_SUBSETS."""
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    found = kid_features_to_metric(
        compared.vectors,
        compared.reference,
        kid_subsets=KID_SUBSETS,
        kid_subset_size=compared.kid_subset_size,
        kid_kernel="poly",
        kid_kernel_poly_degree=3,
        kid_kernel_poly_gamma=None,
        kid_kernel_poly_coef0=1,
        rng_seed=SEED,
        verbose=False,
    )
    return found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD]


def precision(compared: Compared) -> tuple[float]:
    """Share of generated images within the reference's manifold (arXiv 1904.06991)."""
    return (compared.precision_and_recall[0],)


def recall(compared: Compared) -> tuple[float]:
    """Share of the reference's images within the generated ones' manifold (arXiv 1904.06991)."""
    return (compared.precision_and_recall[1],)


@dataclass(frozen=True)
class Metric:
    """A score on some features. name: where people read it; compute: its value, and its spread where it has one."""

    name: str
    more_is_better: bool
    compute: Callable[[Compared], tuple[float, ...]]
    has_spread: bool = False  # the field KEY_std goes with it
    resampled: bool = False  # and is found by scoring resamples of the generated images, where those are asked for
    needs_images: bool = False  # of the reference, not its statistics alone

    @property
    def better(self) -> str:
        """more or less."""
        return "more" if self.more_is_better else "less"


TABLE = {
    "fid": Metric("FID", False, frechet, has_spread=True, resampled=True),
    "is": Metric("IS", True, inception_score, has_spread=True),
    "kid": Metric("KID", False, kernel_distance, has_spread=True, needs_images=True),
    "precision": Metric("precision", True, precision, needs_images=True),
    "recall": Metric("recall", True, recall, needs_images=True),
}


def metrics_on(features: str) -> dict[str, Metric]:
    """Key of a score on these features -> the score.

    Away from Inception its name says on which it is computed, and a Frechet distance is no FID.
    """
    if features == PLAIN:
        return TABLE
    elsewhere = {key.replace("fid", "fd"): metric for key, metric in TABLE.items()}
    return {
        f"{features}_{key}": replace(metric, name=f"{features} {metric.name.replace('FID', 'FD')}")
        for key, metric in elsewhere.items()
    }


METRICS = {key: metric for features in FEATURES for key, metric in metrics_on(features).items()}


def score_fields(features: str) -> tuple[str, ...]:
    """The fields of a row that hold scores on these features: key by key, each followed by its spread."""
    fields = ([key, f"{key}_std"][: 1 + metric.has_spread] for key, metric in metrics_on(features).items())
    return tuple(field for pair in fields for field in pair)


def score(compared: Compared, features: str, *, resamples: int = 0) -> dict[str, float | None]:
    """All scores on these features, field by field; None where the reference has statistics only.

    resamples: of the images, for the spread of scores that have none by themselves; 0: None in its place.
    """
    found: dict[str, float | None] = {}
    for key, metric in metrics_on(features).items():
        missing = metric.needs_images and compared.reference is None
        values = (None, None) if missing else metric.compute(compared)
        if metric.resampled:
            values = (*values, spread(metric, compared, resamples) if resamples else None)
        found |= zip((key, f"{key}_std")[: 1 + metric.has_spread], values, strict=False)
    return found


def spread(metric: Metric, compared: Compared, resamples: int) -> float:
    """The standard deviation of a score over the choice of images, by the bootstrap: images drawn with replacement.

    As many of each class as there are, for their numbers are no chance; but where a class has too few to stand for
    others, all images are drawn from as one.
    """
    generator = np.random.default_rng(SEED)
    classes = [np.flatnonzero(compared.labels == label) for label in compared.labels.unique()]
    if min(map(len, classes)) < MIN_OF_CLASS:
        classes = [np.arange(len(compared.labels))]
    scores = []
    for _ in range(resamples):
        drawn = np.concatenate([generator.choice(images, size=len(images)) for images in classes])
        scores.append(metric.compute(replace(compared, vectors=compared.vectors[drawn]))[0])
    return float(np.std(scores, ddof=1))
