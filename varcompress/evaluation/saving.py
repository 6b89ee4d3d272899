"""The images that were scored, as other evaluators take them: an .npz in the ADM layout, or PNG files."""

from __future__ import annotations

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
        """Raises InputError for a place that does not take these images. image_bytes: of all of them."""
        if self.is_npz and len(schedules) * len(seeds) * models > 1:
            raise InputError(
                f"{self.path}: an .npz holds the images of one schedule and seed: name a folder, or choose one with -s"
            )
        if self.path.is_dir() if self.is_npz else self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path}: is there as something else: choose another --save-images")
        above = next(folder for folder in self.path.absolute().parents if folder.exists())
        free = shutil.disk_usage(above).free
        if image_bytes * (1 + self.is_npz) > free:  # the parts of an .npz are kept until it is written
            raise InputError(
                f"{self.path}: the images take {image_bytes / 2**20:,.0f} MiB and as much again while an .npz is put "
                f"together, and {free / 2**20:,.0f} MiB are free: save to another disk, or fewer images"
            )

    def folder(self, schedule: str, seed: int | None, model: str | None) -> Path:
        """The folder of PNG files of one schedule."""
        parts = [model.replace("/", "--")] if model else []
        return self.path.joinpath(*parts, schedule, *([] if seed is None else [f"seed-{seed}"]))


def write_pngs(folder: Path, first: int, images: Tensor) -> None:
    """Write images (B, 3, H, W) uint8 as INDEX.png from `first` on. Raises InputError when the disk refuses."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for index, image in enumerate(pixels(images), start=first):
            Image.fromarray(image).save(folder / f"{index:06}.png")


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
