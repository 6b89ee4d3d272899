"""Image folders in the layout of ImageNet: one subfolder per class, in sorted order of their names."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from varcompress.data.streams import CROP, fractions, words
from varcompress.errors import InputError
from varcompress.images import centre, open_rgb

MARGIN = 1.125  # an image's shorter side before cropping, in units of the model's image size (VAR's training)
MAX_ASPECT = 16  # longer images lose their ends before resizing, which would make millions of pixels of a thin line


@dataclass(frozen=True)
class ImageFolder:
    """The images of a folder, not yet opened: a `Source`. Every file in a class folder is one, hidden files aside."""

    root: Path
    files: tuple[str, ...]  # below root, in order of class and name
    labels: np.ndarray  # (N,) int64
    digest: str  # of the names and sizes of all files
    preprocessing = "crops 2"  # crops 1 rounded the longer side, and the centre's offset, otherwise than torchvision

    @property
    def name(self) -> str:
        return str(self.root)

    def __len__(self) -> int:
        return len(self.files)

    def item(self, index: int) -> str:
        return self.files[index]

    def read(self, index: int, size: int, views: int) -> np.ndarray | None:
        """Views of one image, (views, 3, size, size) uint8: the centre, then random crops. None if it is unreadable.

        The pixels are those of VAR's training code: torchvision's Resize(round(1.125 size), LANCZOS), then CenterCrop
        for the first view and a RandomCrop for every other. Of an image more than 16 times as long as it is wide,
        only the middle 16 are used. A crop depends on (index, view) alone, so that runs of any seed can share tokens.
        """
        image = open_rgb(self.root / self.files[index])
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
        crops = [pixels[top : top + size, left : left + size] for top, left in corners]
        return np.stack(crops).transpose(0, 3, 1, 2)


def scan(root: str | Path, classes: int) -> ImageFolder:
    """List an image folder. Raises InputError unless it has one folder with images for each of `classes` classes."""
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"{root}: no such directory of images: give a folder with one subfolder per class")
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(folders) != classes:
        raise InputError(
            f"{root}: {len(folders)} class folders, but the model has {classes} classes; "
            "lay the images out as one folder per class"
        )
    files, labels, digest = [], [], hashlib.sha256()
    for label, folder in enumerate(folders):
        found = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
        if not found:
            raise InputError(f"{folder}: holds no images: remove it, or put the class's images there")
        for path in found:
            files.append(path.relative_to(root).as_posix())
            digest.update(f"{files[-1]}\0{path.stat().st_size}\0".encode())
        labels += [label] * len(found)
    return ImageFolder(root, tuple(files), np.array(labels, dtype=np.int64), digest.hexdigest())


def _resized(image: Image.Image, side: int) -> np.ndarray:
    """The image with its shorter side resized to `side`: (H, W, 3) uint8, at most MAX_ASPECT times as long as wide."""
    shorter = min(image.size)
    used = [min(length, MAX_ASPECT * shorter) for length in image.size]
    left, top = ((length - part) // 2 for length, part in zip(image.size, used, strict=True))
    size = tuple(int(side * part / shorter) for part in used)  # torchvision's arithmetic, to its last rounding
    box = (left, top, left + used[0], top + used[1])
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS, box=box))
