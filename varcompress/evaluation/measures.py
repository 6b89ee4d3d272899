"""Every score of generated images beside a reference, and how far each image moves it.

The influence of image i on a score is N times what the score would change by if the image weighed 1/N more: the first
term of what the bootstrap resamples, without its resamples (the infinitesimal jackknife, Efron 1982). Its mean is 0,
its standard deviation over the square root of N is the standard error of the score. Two schedules that draw the same
labels from the same random streams have influences that pair image by image.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

from varcompress.evaluation.neighbours import Neighbours, find_neighbours
from varcompress.evaluation.network import Features
from varcompress.evaluation.protocols import CONSECUTIVE
from varcompress.evaluation.reference import Reference
from varcompress.hardware import exact_float32

# torch-fidelity's defaults, written out because they are part of what a score means
SEED = 2020
IS_GROUPS = 10  # of shuffled images
IS_GROUP_SIZE = 5_000  # of consecutive ones, as in openai/guided-diffusion's evaluator
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
ROWS = 1 << 13  # vectors in float64 at a time
KERNEL_ELEMENTS = 1 << 24  # of a kernel's matrix at a time


@dataclass(frozen=True)
class Measure:
    """A score of one set of images.

    influence: (N,) float64 of each generated image, or (M,) of each image of the reference where its mean is the score
    (`of_reference`); std: a spread that publications print with it, which is no standard error.
    """

    value: float
    influence: Tensor
    of_reference: bool = False
    std: float | None = None


@dataclass(frozen=True)
class Compared:
    """Features of generated images beside a reference, on the CPU. device: where distances are computed.

    distances: "exact" or "adm", as `neighbours` explains; groups: of the Inception Score, "shuffled" or "consecutive".
    """

    features: Features
    reference: Reference
    device: torch.device
    distances: str
    groups: str

    @property
    def kid_subset_size(self) -> int:
        """Images in a subset of KID, fewer than usual where there are not so many."""
        return min(KID_SUBSET_SIZE, len(self.features.vectors), len(self.reference.vectors))

    @cached_property
    def neighbours(self) -> Neighbours:
        """One pass over all distances, for four scores."""
        return find_neighbours(self.features.vectors, self.reference.vectors, self.device, self.distances)


def frechet(compared: Compared) -> Measure:
    """Frechet distance of two Gaussians (arXiv 1706.08500); on Inception's features, FID."""
    return _frechet(compared.features.vectors, compared.reference.statistics, compared.device)


def spatial_frechet(compared: Compared) -> Measure | None:
    """The same in features that know places; on Inception, sFID (arXiv 2103.03841). None where there are none."""
    spatial, statistics = compared.features.spatial, compared.reference.spatial_statistics
    return None if spatial is None or statistics is None else _frechet(spatial, statistics, compared.device)


def _frechet(vectors: Tensor, statistics: dict[str, np.ndarray], device: torch.device) -> Measure:
    own = fid_features_to_statistics(vectors)
    value = fid_statistics_to_metric(own, statistics, verbose=False)[KEY_METRIC_FID]
    return Measure(value, _frechet_influence(vectors, own, statistics, device))


def _frechet_influence(
    vectors: Tensor, own: dict[str, np.ndarray], reference: dict[str, np.ndarray], device: torch.device
) -> Tensor:
    """(x - mu)' A (x - mu) + 2 (mu - mu_r)' (x - mu), centred, with A = 1 - S_r^(1/2) (S_r^(1/2) S S_r^(1/2))^(-1/2)
    S_r^(1/2), the derivative of the distance by S. Directions without variance have none."""
    mu, sigma, mu_r, sigma_r = (
        torch.from_numpy(np.asarray(part, np.float64)).to(device)
        for part in (own["mu"], own["sigma"], reference["mu"], reference["sigma"])
    )
    root = _power(sigma_r, 0.5)
    slope = torch.eye(len(mu), dtype=mu.dtype, device=device) - root @ _power(root @ sigma @ root, -0.5) @ root
    parts = []
    for rows in vectors.split(ROWS):
        centred = rows.to(device, torch.float64) - mu
        parts.append((((centred @ slope) * centred).sum(dim=1) + 2 * centred @ (mu - mu_r)).cpu())
    influence = torch.cat(parts)
    return influence - influence.mean()


def _power(matrix: Tensor, exponent: float) -> Tensor:
    """A power of a positive semi-definite matrix, within the directions in which it is more than rounding."""
    values, directions = torch.linalg.eigh((matrix + matrix.T) / 2)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return (directions[:, kept] * values[kept] ** exponent) @ directions[:, kept].T


def inception_score(compared: Compared) -> Measure | None:
    """Inception Score (arXiv 1606.03498), the mean over groups of images. None where the network knows no classes."""
    logits = compared.features.logits
    if logits is None:
        return None
    if compared.groups == CONSECUTIVE:
        scores = [
            isc_features_to_metric(group, splits=1, shuffle=False)[KEY_METRIC_ISC_MEAN]
            for group in logits.split(IS_GROUP_SIZE)
        ]
        value, std = float(np.mean(scores)), float(np.std(scores))
    else:
        found = isc_features_to_metric(logits, splits=IS_GROUPS, shuffle=True, rng_seed=SEED)
        value, std = found[KEY_METRIC_ISC_MEAN], found[KEY_METRIC_ISC_STD]
    log_probs = logits.double().log_softmax(dim=1)
    probs = log_probs.exp()
    divergence = (probs * (log_probs - probs.mean(dim=0).log())).sum(dim=1)  # its mean is the score's logarithm
    return Measure(value, value * (divergence - divergence.mean()), std=std)


def kernel_distance(compared: Compared) -> Measure | None:
    """Kernel Inception Distance (arXiv 1801.01401), the mean over KID_SUBSETS; elsewhere, a kernel distance."""
    vectors, reference = compared.features.vectors, compared.reference.vectors
    if reference is None:
        return None
    found = kid_features_to_metric(
        vectors,
        reference,
        kid_subsets=KID_SUBSETS,
        kid_subset_size=compared.kid_subset_size,
        kid_kernel="poly",
        kid_kernel_poly_degree=3,
        kid_kernel_poly_gamma=None,
        kid_kernel_poly_coef0=1,
        rng_seed=SEED,
        verbose=False,
    )
    own = _mean_kernel(vectors, vectors, compared.device, without_itself=True)
    influence = 2 * (own - _mean_kernel(vectors, reference, compared.device))
    return Measure(found[KEY_METRIC_KID_MEAN], influence - influence.mean(), std=found[KEY_METRIC_KID_STD])


def _mean_kernel(vectors: Tensor, others: Tensor, device: torch.device, *, without_itself: bool = False) -> Tensor:
    """(N,) float64: of each vector (N, D) the mean of (x . y / D + 1)^3 over others (M, D), but for itself."""
    others, means = others.to(device), []
    with exact_float32(device):
        for rows in vectors.split(max(1, KERNEL_ELEMENTS // len(others))):
            rows = rows.to(device)
            sums = (rows @ others.T / rows.shape[1] + 1).pow(3).sum(dim=1, dtype=torch.float64)
            if without_itself:
                sums -= ((rows * rows).sum(dim=1) / rows.shape[1] + 1).pow(3)
            means.append((sums / (len(others) - without_itself)).cpu())
    return torch.cat(means)


def precision(compared: Compared) -> Measure | None:
    """Share of generated images within the reference's manifold (arXiv 1904.06991)."""
    return _mean(compared, "within_reference")


def recall(compared: Compared) -> Measure | None:
    """Share of the reference's images within the generated ones' manifold (arXiv 1904.06991)."""
    return _mean(compared, "within_generated", of_reference=True)


def density(compared: Compared) -> Measure | None:
    """In how many balls of the reference a generated image lies, over the neighbours of each (arXiv 2002.09797)."""
    return _mean(compared, "balls")


def coverage(compared: Compared) -> Measure | None:
    """Share of the reference's images in whose ball a generated one lies (arXiv 2002.09797)."""
    return _mean(compared, "covered", of_reference=True)


def _mean(compared: Compared, of: str, *, of_reference: bool = False) -> Measure | None:
    if compared.reference.vectors is None:
        return None
    each = getattr(compared.neighbours, of).double()
    return Measure(float(each.mean()), each - each.mean(), of_reference)


MEASURES = {  # the keys of metrics.METRICS
    "fd": frechet,
    "sfd": spatial_frechet,
    "is": inception_score,
    "kd": kernel_distance,
    "precision": precision,
    "recall": recall,
    "density": density,
    "coverage": coverage,
}


def measure(compared: Compared) -> dict[str, Measure]:
    """All scores that these features and this reference give, by the keys of `metrics.METRICS`."""
    found = {key: function(compared) for key, function in MEASURES.items()}
    return {key: value for key, value in found.items() if value is not None}
