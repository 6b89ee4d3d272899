"""Images as bytes: 8-bit rounding, image files in, PNG grids and .npz out. Knows nothing of models."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from varcompress.errors import InputError
from varcompress.files import disk_errors, replacing
from varcompress.hardware import to_numpy

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})
OUTPUTS = (".png", ".npz")
ROUND, TRUNCATE = "round", "truncate"
ROUNDINGS = {ROUND: 0.5, TRUNCATE: 0.0}  # added before the fraction is cut off
LISTED = 5  # skipped images whose names a note lists
MIN_CELL_PIXELS = 64
GAP_PIXELS = 4  # between the cells of a grid


def check_rounding(rounding: str) -> str:
    """`rounding` itself. Raises InputError for one that is none of ROUNDINGS."""
    if rounding not in ROUNDINGS:
        raise InputError(f"rounding {rounding!r} is unknown: use {' or '.join(ROUNDINGS)}")
    return rounding


def to_uint8(images: Tensor, rounding: str = ROUND) -> Tensor:
    """Images in [0, 1] as bytes of the same shape: 255 x to the nearest whole number, or truncated to the one below.

    How images became bytes for VAR's published FID is not known. Its repository saves none for FID; its notebooks
    truncate, as ADM's samplers do. So a result names its rounding.
    """
    return (images.float() * 255 + ROUNDINGS[rounding]).floor().clamp(0, 255).to(torch.uint8)


def pixels(images: Tensor) -> np.ndarray:
    """Images (N, 3, H, W) of any device as numpy, Pillow and matplotlib want them: (N, H, W, 3), the same dtype."""
    return to_numpy(images.permute(0, 2, 3, 1))


# -- in -----------------------------------------------------------------------------------------


def image_files(folder: Path) -> list[Path]:
    """Image files in a folder and all below it, in the order of their paths."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())


def open_rgb(file: Path | BinaryIO) -> Image.Image | None:
    """An image file in RGB, None if it cannot be read."""
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except Exception:  # Pillow's decoders raise whatever they trip over: OSError, struct.error, TypeError, MemoryError
        return None


def skipped_note(names: Sequence[str], total: int) -> str:
    """What to say about images that `open_rgb` could not read: how many of how many, and the first of their names."""
    more = ", ..." if len(names) > LISTED else ""
    return f"skipped {len(names)} of {total} images that could not be read: {', '.join(names[:LISTED])}{more}"


def read_image(path: Path, size: int) -> tuple[Tensor, bool] | None:
    """One image file as (3, size, size) uint8, and whether it had to be resized for that; None if it is unreadable."""
    image = open_rgb(path)
    return None if image is None else (_fit(image, size), image.size != (size, size))


def fit(images: np.ndarray, size: int) -> Tensor:
    """Images (B, H, W, 3) uint8 as (B, 3, size, size) uint8, each fitted as `read_image` does."""
    return torch.stack([_fit(Image.fromarray(image), size) for image in images])


def centre(length: int, part: int) -> int:
    """Where the middle `part` of `length` pixels begins: half of an odd margin goes to the even number, as in
    torchvision's CenterCrop."""
    return round((length - part) / 2)


def _fit(image: Image.Image, size: int) -> Tensor:
    """Centre square of an image, resized where it is not of the right size already: (3, size, size) uint8.

    The square is the one of torchvision's CenterCrop(shorter side). Lanczos resizes it within the image, so that its
    outermost pixels still see what lies beyond them. ADM's center_crop_arr is another way: it halves and shrinks the
    image by box and bicubic filters first, and then cuts out the square.
    """
    side = min(image.size)
    if image.size != (size, size):
        left, top = centre(image.width, side), centre(image.height, side)
        box = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.LANCZOS, box=box)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


# -- out ----------------------------------------------------------------------------------------


def check_image_output(path: Path) -> None:
    """Raises InputError unless `path` names a .png or .npz file that can be written."""
    if path.suffix.lower() not in OUTPUTS:
        raise InputError(f"{path}: the name must end in .png (a grid) or .npz (arrays)")
    if path.is_dir():
        raise InputError(f"{path}: is a directory: name a file in it")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(f"{path}: {above} is no directory that can be written to: choose another")


def save_images(path: Path, images: Tensor, labels: Sequence[int], *, columns: int) -> None:
    """Write images (N, 3, H, W) uint8: a PNG grid, or an .npz of arr_0 (N, H, W, 3) uint8 and arr_1 labels (N,) int64.

    An existing file is replaced, whole or not at all. Raises InputError when the disk refuses.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, open(temporary, "wb") as file:
            if path.suffix.lower() == ".png":
                Image.fromarray(grid(images, columns)).save(file, format="PNG")
            else:
                np.savez(file, arr_0=pixels(images), arr_1=np.asarray(labels, np.int64))


def grid(images: Tensor, columns: int) -> np.ndarray:
    """Images (N, 3, H, W) uint8 row by row on one white sheet, (rows, columns, 3) uint8, a few pixels apart.

    Small ones are enlarged by a whole factor to 64 pixels or more.
    """
    cells = pixels(images)
    factor = math.ceil(MIN_CELL_PIXELS / min(cells.shape[1:3]))
    cells = cells.repeat(factor, axis=1).repeat(factor, axis=2)
    count, height, width, channels = cells.shape
    rows = math.ceil(count / columns)
    shape = (rows * (height + GAP_PIXELS) - GAP_PIXELS, columns * (width + GAP_PIXELS) - GAP_PIXELS, channels)
    sheet = np.full(shape, 255, np.uint8)
    for i, cell in enumerate(cells):
        top, left = (i // columns) * (height + GAP_PIXELS), (i % columns) * (width + GAP_PIXELS)
        sheet[top : top + height, left : left + width] = cell
    return sheet
