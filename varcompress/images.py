"""Images as bytes: 8-bit rounding, image files in, PNG grids and .npz out."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from varcompress.errors import InputError
from varcompress.files import disk_errors, replacing
from varcompress.memory import fitting_batch
from varcompress.progress import Progress, silent
from varcompress.sampling import PUBLISHED, Sampling
from varcompress.schedule import Schedule

if TYPE_CHECKING:
    from varcompress.models.elastic import ElasticVAR

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})
OUTPUTS = (".png", ".npz")
NAMED = 5  # skipped images whose names a note lists
MIN_CELL_PIXELS = 64
GAP_PIXELS = 4  # between the cells of a grid


def to_uint8(images: Tensor) -> Tensor:
    """Images in [0, 1] as bytes of the same shape: floor(255 x + 0.5), the rounding behind VAR's published FID."""
    return (images.float() * 255 + 0.5).floor().clamp(0, 255).to(torch.uint8)


# -- in -----------------------------------------------------------------------------------------


def image_files(folder: Path) -> list[Path]:
    """Image files in a folder and all below it, in the order of their paths."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())


def open_rgb(path: Path) -> Image.Image | None:
    """An image file in RGB, None if it cannot be read."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception:  # Pillow's decoders raise whatever they trip over: OSError, struct.error, TypeError, MemoryError
        return None


def skipped_note(names: Sequence[str], total: int) -> str:
    """What to say about images that `open_rgb` could not read: how many of how many, and the first of their names."""
    more = ", ..." if len(names) > NAMED else ""
    return f"skipped {len(names)} of {total} images that could not be read: {', '.join(names[:NAMED])}{more}"


def read_image(path: Path, size: int) -> tuple[Tensor, bool] | None:
    """One image file as (3, size, size) uint8, and whether it had to be resized for that; None if it is unreadable."""
    image = open_rgb(path)
    return None if image is None else (_fit(image, size), image.size != (size, size))


def fit(pixels: np.ndarray, size: int) -> Tensor:
    """Images (B, H, W, 3) uint8 as (B, 3, size, size) uint8, each fitted as `read_image` does."""
    return torch.stack([_fit(Image.fromarray(image), size) for image in pixels])


def _fit(image: Image.Image, size: int) -> Tensor:
    """Centre square of an image, resized (Lanczos) where it is not of the right size already."""
    side = min(image.size)
    if image.size != (size, size):
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.LANCZOS, box=box)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


# -- drawn --------------------------------------------------------------------------------------


def draw_images(
    model: ElasticVAR,
    labels: Sequence[int],
    schedule: str | Schedule = "full",
    *,
    batch_size: int = 16,
    sampling: Sampling = PUBLISHED,
    progress: Progress = silent,
) -> Tensor:
    """Images of any number of labels (N, 3, H, W) uint8, generated batch_size at a time.

    Image i has the random stream (seed, i), as in one call of `generate`. Raises InputError for an
    unknown class before any image is drawn, for a batch that the memory does not hold, and for images that are not
    finite.
    """
    labels, schedule = model.labels(labels), model.schedule(schedule)
    parts = []
    with fitting_batch(model, [schedule], min(batch_size, len(labels))):
        for first in range(0, len(labels), batch_size):
            batch = labels[first : first + batch_size]
            images = model.generate(batch, schedule, sampling, first_index=first)
            check_finite(images, schedule, model.dtype)
            parts.append(to_uint8(images).cpu())
            progress(first + len(batch), len(labels), f"{schedule}: images")
    return torch.cat(parts)


def check_finite(images: Tensor, schedule: Schedule, dtype: torch.dtype) -> None:
    """Raises InputError when generated images are not finite: their numbers grew beyond what `dtype` holds."""
    if not torch.isfinite(images).all():
        remedy = "are these trained weights?" if dtype is torch.float32 else "use float32"
        raise InputError(f"schedule {schedule} draws images that are not finite in {dtype}: {remedy}")


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
    pixels = images.permute(0, 2, 3, 1).cpu().numpy()
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, open(temporary, "wb") as file:
            if path.suffix.lower() == ".png":
                Image.fromarray(grid(pixels, columns)).save(file, format="PNG")
            else:
                np.savez(file, arr_0=pixels, arr_1=np.asarray(labels, np.int64))


def grid(pixels: np.ndarray, columns: int) -> np.ndarray:
    """Images (N, H, W, 3) uint8 row by row on one white sheet, a few pixels apart.

    Small ones are enlarged by a whole factor to 64 pixels or more.
    """
    factor = math.ceil(MIN_CELL_PIXELS / min(pixels.shape[1:3]))
    pixels = pixels.repeat(factor, axis=1).repeat(factor, axis=2)
    count, height, width, channels = pixels.shape
    rows = math.ceil(count / columns)
    shape = (rows * (height + GAP_PIXELS) - GAP_PIXELS, columns * (width + GAP_PIXELS) - GAP_PIXELS, channels)
    sheet = np.full(shape, 255, np.uint8)
    for i, image in enumerate(pixels):
        top, left = (i // columns) * (height + GAP_PIXELS), (i % columns) * (width + GAP_PIXELS)
        sheet[top : top + height, left : left + width] = image
    return sheet
