"""The views of a photograph: its centre, then random crops, as VAR's training code makes them."""

from __future__ import annotations

import numpy as np
from PIL import Image

from varcompress.data.streams import CROP, fractions, words
from varcompress.images import centre

MARGIN = 1.125  # an image's shorter side before cropping, in units of the model's image size (VAR's training)
MAX_ASPECT = 16  # longer images lose their ends before resizing, which would make millions of pixels of a thin line
CROPS = "crops 2"  # crops 1 rounded the longer side, and the centre's offset, otherwise than torchvision


def crops(image: Image.Image | None, index: int, size: int, views: int) -> np.ndarray | None:
    """Views of an image in RGB, (views, 3, size, size) uint8: the centre, then random crops. None of None.

    The pixels are those of VAR's training code: torchvision's Resize(round(1.125 size), LANCZOS), then CenterCrop
    for the first view and a RandomCrop for every other. Of an image more than 16 times as long as it is wide,
    only the middle 16 are used. A crop depends on (index, view) alone, so that runs of any seed can share tokens.
    """
    if image is None:
        return None
    pixels = _resized(image, round(MARGIN * size))
    height, width = pixels.shape[:2]
    rows, columns = (fractions(word).tolist() for word in words(0, CROP, index, views)[:2])
    corners = [
        (int(row * (height - size + 1)), int(column * (width - size + 1)))
        for row, column in zip(rows, columns, strict=True)
    ]
    corners[0] = centre(height, size), centre(width, size)
    parts = [pixels[top : top + size, left : left + size] for top, left in corners]
    return np.stack(parts).transpose(0, 3, 1, 2)


def _resized(image: Image.Image, side: int) -> np.ndarray:
    """The image with its shorter side resized to `side`: (H, W, 3) uint8, at most MAX_ASPECT times as long as wide."""
    shorter = min(image.size)
    used = [min(length, MAX_ASPECT * shorter) for length in image.size]
    left, top = ((length - part) // 2 for length, part in zip(image.size, used, strict=True))
    size = tuple(int(side * part / shorter) for part in used)  # torchvision's arithmetic, to its last rounding
    box = (left, top, left + used[0], top + used[1])
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS, box=box))
