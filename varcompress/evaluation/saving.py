"""The images that were scored, as other evaluators take them: an .npz in the ADM layout, or PNG files."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from varcompress.errors import InputError
from varcompress.files import disk_errors, replacing
from varcompress.images import pixels
from varcompress.schedule import Schedule


@dataclass(frozen=True)
class ImageOutput:
    """Where scored images go: FILE.npz with those of one schedule, or FOLDER/SCHEDULE/INDEX.png (several seeds:
    FOLDER/SCHEDULE/seed-SEED/INDEX.png)."""

    path: Path

    @property
    def is_npz(self) -> bool:
        return self.path.suffix.lower() == ".npz"

    def check(self, schedules: Sequence[Schedule], seeds: Sequence[int], models: int, image_bytes: int) -> None:
        """Raises InputError for a place that does not take these images. image_bytes: of those of one model."""
        if self.is_npz and len(schedules) * len(seeds) * models > 1:
            raise InputError(
                f"{self.path}: an .npz holds the images of one schedule and seed: name a folder, or choose one with -s"
            )
        if self.path.is_dir() if self.is_npz else self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path}: is there as something else: choose another --save-images")
        above = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        above = above.parent if self.is_npz and above == self.path else above
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise InputError(f"{self.path}: {above} is no directory that can be written to: choose another")
        free, needed = shutil.disk_usage(above).free, image_bytes * models
        again = ", and as much again where their parts are kept," if self.is_npz else ""
        if needed > free:
            raise InputError(
                f"{self.path}: the images take {needed / 2**20:,.0f} MiB{again} and {free / 2**20:,.0f} MiB are free: "
                "save to another disk, or fewer images"
            )

    def folder(self, schedule: str, seed: int | None, model: str | None) -> Path:
        """The folder of PNG files of one schedule."""
        parts = [model.replace("/", "--")] if model else []
        return self.path.joinpath(*parts, schedule, *([] if seed is None else [f"seed-{seed}"]))


def check_unused(folder: Path) -> None:
    """Raises InputError for a folder of PNG files that holds something already."""
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{folder}: holds images already: name an empty folder, or remove them")


def has_pngs(folder: Path, images: range) -> bool:
    """Whether a folder holds the PNG files of these images."""
    return all(_png(folder, index).is_file() for index in images)


def _png(folder: Path, index: int) -> Path:
    return folder / f"{index:06}.png"


def write_pngs(folder: Path, first: int, images: Tensor) -> None:
    """Write images (B, 3, H, W) uint8 as INDEX.png from `first` on. Raises InputError when the disk refuses."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for index, image in enumerate(pixels(images), start=first):
            Image.fromarray(image).save(_png(folder, index))


def write_npz(path: Path, images: Iterator[Tensor], shape: tuple[int, int, int, int], labels: np.ndarray) -> None:
    """Write arr_0 (N, H, W, 3) uint8 from images that come as (B, 3, H, W), a batch in memory at a time, and arr_1
    labels (N,) int64. shape: (N, H, W, 3). Raises InputError when the disk refuses."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for batch in images:
                    file.write(np.ascontiguousarray(pixels(batch)).tobytes())
            with archive.open("arr_1.npy", "w") as file:
                np.lib.format.write_array(file, labels)
