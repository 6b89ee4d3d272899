"""Image folders in the layout of ImageNet: one subfolder per class, in sorted order of their names."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from varcompress.data.crops import CROPS, crops
from varcompress.errors import InputError
from varcompress.images import open_rgb


@dataclass(frozen=True)
class ImageFolder:
    """The images of a folder, not yet opened: a `Source`. Every file in a class folder is one, hidden files aside."""

    root: Path
    files: tuple[str, ...]  # below root, in order of class and name
    labels: np.ndarray  # (N,) int64
    digest: str  # of the names and sizes of all files
    preprocessing = CROPS

    @property
    def name(self) -> str:
        return str(self.root)

    def __len__(self) -> int:
        return len(self.files)

    def item(self, index: int) -> str:
        return self.files[index]

    def read(self, index: int, size: int, views: int) -> np.ndarray | None:
        """Views of one image, as `crops` makes them."""
        return crops(open_rgb(self.root / self.files[index]), index, size, views)


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
