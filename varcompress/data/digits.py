"""The embedded handwritten digits: 1797 images of 8 x 8 pixels in 17 grey levels.

Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning
Repository, CC BY 4.0, as scikit-learn ships it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from varcompress.images import to_numpy

FOLDER = Path(__file__).parent / "digits"
DATA = FOLDER / "digits.npz"
SIZE = 16
LEVELS = 16  # the brightest grey level


class Digits:
    """The digits as a `Source`, and the one that the embedded model was made with."""

    name = "embedded digits"
    model = "digits"
    image_size, classes = SIZE, 10
    preprocessing = "digits 1"

    def __init__(self) -> None:
        self.labels = to_numpy(load_digits()[1])
        self.digest = hashlib.sha256(DATA.read_bytes()).hexdigest()
        self._views: dict[int, np.ndarray] = {}  # of all images at once, since they are jittered together

    def __len__(self) -> int:
        return len(self.labels)

    def item(self, index: int) -> str:
        return f"digit {index}"

    def read(self, index: int, size: int, views: int) -> np.ndarray:
        """Views of one image, (views, 3, 16, 16) float32 in [0, 1], as `load_digits` makes them."""
        for view in set(range(views)) - self._views.keys():
            self._views[view] = to_numpy(load_digits(view)[0])
        return np.stack([self._views[view][index] for view in range(views)])


def load_digits(view: int = 0) -> tuple[Tensor, Tensor]:
    """Images (1797, 3, 16, 16) float32 in [0, 1] and labels (1797,) int64.

    View 0 is the data set itself, doubled in size; every other view turns, shifts and scales each
    image a little, always the same way for the same view.
    """
    with np.load(DATA) as file:
        grey = torch.from_numpy(file["images"].astype(np.float32) / LEVELS)
        labels = torch.from_numpy(file["labels"].astype(np.int64))
    images = F.interpolate(grey[:, None], size=(SIZE, SIZE), mode="bicubic").clamp(0, 1)
    if view:
        images = _jitter(images, torch.Generator().manual_seed(view))
    return images.expand(
        -1, 3, -1, -1
    ).contiguous(), labels  # in this layout, which a convolution's rounding depends on


def _jitter(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn by up to 8 degrees, scale by up to 8 %, shift by up to one pixel."""
    angle, log_scale, dx, dy = torch.rand(4, len(images), generator=generator) * 2 - 1
    angle, scale = angle * (8 * torch.pi / 180), torch.exp(0.08 * log_scale)
    shift = 2 / SIZE
    rows = [scale * angle.cos(), -scale * angle.sin(), dx * shift, scale * angle.sin(), scale * angle.cos(), dy * shift]
    grid = F.affine_grid(torch.stack(rows, dim=1).view(-1, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False).clamp(0, 1)
