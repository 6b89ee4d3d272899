"""Who lies in whose neighbourhood: what precision, recall, density and coverage count.

The ball of an image reaches to its k-th nearest image of the same set. Precision and recall take k = 3 (arXiv
1904.06991), density and coverage k = 5 (arXiv 2002.09797); the first two count an image on a ball's surface, the others
do not, as published.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from varcompress.evaluation.protocols import ADM_DISTANCES
from varcompress.hardware import exact_float32

PRECISION_NEIGHBOURS, DENSITY_NEIGHBOURS = 3, 5
NEAREST = DENSITY_NEIGHBOURS + 1  # images to an image, itself the first
ADM_BLOCK = 10_000  # rows and columns; a block of which one distance is not finite in float16 is computed in float32
ELEMENTS = 1 << 26  # of distances at a time


class Neighbours(NamedTuple):
    """Of N generated images and M of a reference, on the CPU.

    within_reference: (N,) bool and within_generated: (M,) bool for precision and recall; balls: (N,) float64, the share
    of DENSITY_NEIGHBOURS in how many balls of the reference an image lies; covered: (M,) bool.
    """

    within_reference: Tensor
    within_generated: Tensor
    balls: Tensor
    covered: Tensor


def find_neighbours(generated: Tensor, reference: Tensor, device: torch.device, distances: str) -> Neighbours:
    """The neighbourhoods of generated (N, D) and reference (M, D), float32, by blocks of distances on `device`.

    distances: "exact", Euclidean in float32; "adm", squared and rounded to float16 as in the graph of
    openai/guided-diffusion's evaluator (sums in float32), but for blocks that float16 does not hold.
    """
    generated, reference = generated.to(device), reference.to(device)
    with exact_float32(device):
        reference_radii, generated_radii = (_radii(images, distances) for images in (reference, generated))
        near, far = reference_radii[:, PRECISION_NEIGHBOURS], reference_radii[:, DENSITY_NEIGHBOURS]
        own = generated_radii[:, PRECISION_NEIGHBOURS]
        within_generated = torch.zeros(len(reference), dtype=torch.bool, device=device)
        covered, within_reference, balls = within_generated.clone(), [], []
        for start, block in _blocks(generated, reference, distances):
            within_reference.append((block <= near).any(dim=1))
            inside = block < far
            balls.append(inside.sum(dim=1))
            covered |= inside.any(dim=0)
            within_generated |= (block <= own[start : start + len(block), None]).any(dim=0)
    return Neighbours(
        torch.cat(within_reference).cpu(),
        within_generated.cpu(),
        torch.cat(balls).cpu().double() / DENSITY_NEIGHBOURS,
        covered.cpu(),
    )


def _radii(images: Tensor, distances: str) -> Tensor:
    """Distances (N, NEAREST) of each image to its nearest ones, itself the first."""
    return torch.cat(
        [block.topk(NEAREST, dim=1, largest=False).values for _, block in _blocks(images, images, distances)]
    )


def _blocks(rows: Tensor, columns: Tensor, distances: str) -> Iterator[tuple[int, Tensor]]:
    """Distances of some rows (N, D) to all columns (M, D), (n, M) float32, and the number of the first."""
    count = max(1, ELEMENTS // len(columns))
    if distances == ADM_DISTANCES:
        count = min(count, ADM_BLOCK)
    for start in range(0, len(rows), count):
        part = rows[start : start + count]
        if distances == ADM_DISTANCES:
            yield start, torch.cat([_adm_distances(part, other) for other in columns.split(ADM_BLOCK)], dim=1)
        else:
            yield start, torch.cdist(part, columns)


def _adm_distances(rows: Tensor, columns: Tensor) -> Tensor:
    """Squared distances (n, m) as ADM's graph has them: each operation rounded to float16."""
    found = _squared(rows.half().float(), columns.half().float(), lambda part: part.half().float())
    return found if torch.isfinite(found).all() else _squared(rows, columns, lambda part: part)


def _squared(rows: Tensor, columns: Tensor, rounded) -> Tensor:  # noqa: ANN001 - a function of a tensor
    """|u|^2 - 2 u.v + |v|^2, at least 0, with every intermediate result rounded."""
    of_rows, of_columns = (rounded(rounded(part * part).sum(dim=1)) for part in (rows, columns))
    products = rounded(2 * rounded(rows @ columns.T))
    return rounded(rounded(of_rows[:, None] - products) + of_columns).clamp(min=0)
