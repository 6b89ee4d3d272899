"""Features of generated images on a disk, part by part: what a killed evaluation goes on from, and ranks share.

A part is a few batches of consecutive images. Which these are depends on neither ranks nor kills, and a part appears
whole or not at all: so every image is drawn in the same batch however the work was shared and interrupted, and the
scores are the same bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from varcompress.errors import InputError
from varcompress.evaluation.network import Features
from varcompress.evaluation.saving import check_unused
from varcompress.files import disk_errors, replacing

BATCHES = 4  # in a part
FOLDER = ".eval"  # in the directory of the results
FIELDS = Features._fields


@dataclass(frozen=True)
class Part:
    """What was made of images `first` to `first` + N - 1. images: (N, 3, H, W) uint8, None where they are not kept;
    times_ms: of its full batches."""

    first: int
    features: Features
    times_ms: list[float]
    images: Tensor | None = None


@dataclass(frozen=True)
class Parts:
    """The parts of one schedule and seed. folder: where; num_images: together; batch_size: in which they are drawn."""

    folder: Path
    num_images: int
    batch_size: int

    @classmethod
    def under(cls, folder: Path, identity: dict, num_images: int, batch_size: int) -> Parts:
        """Parts in a folder of their own, named by all that their content depends on."""
        content = json.dumps({**identity, "images": num_images, "batch": batch_size}, sort_keys=True)
        return cls(folder / hashlib.sha256(content.encode()).hexdigest()[:16], num_images, batch_size)

    def ranges(self) -> list[range]:
        """The images of each part."""
        size = BATCHES * self.batch_size
        return [range(start, min(start + size, self.num_images)) for start in range(0, self.num_images, size)]

    def missing(self) -> list[range]:
        """The parts that are not there, or damaged, as a power cut may leave them."""
        return [images for images in self.ranges() if not _is_whole(self._file(images.start))]

    def claim(self, pngs: Path) -> None:
        """Take a folder for PNG files of these images. Raises InputError where it holds others.

        Its files are of this call alone where the folder of the parts was made before them.
        """
        if not self.folder.is_dir():
            check_unused(pngs)
            with disk_errors(self.folder):
                self.folder.mkdir(parents=True)

    def write(self, part: Part) -> None:
        """Write a part, whole or not at all. Raises InputError when the disk refuses."""
        arrays = {name: value for name, value in part.features._asdict().items() if value is not None}
        if part.images is not None:
            arrays["images"] = part.images
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(self._file(part.first)) as temporary:
                save_file(
                    {name: value.contiguous() for name, value in arrays.items()},
                    temporary,
                    {"times_ms": json.dumps(part.times_ms)},
                )

    def read(self) -> tuple[Features, list[float]]:
        """Features of all images in their order, and the times of all full batches. Raises InputError if one lacks."""
        features, times_ms = [], []
        for file in self._files():
            with safe_open(file, "pt") as opened:
                kept = set(opened.keys())
                features.append(Features(*(opened.get_tensor(name) if name in kept else None for name in FIELDS)))
                times_ms += json.loads(opened.metadata()["times_ms"])
        return Features.join(features), times_ms

    def images(self) -> Iterator[Tensor]:
        """The images (N, 3, H, W) uint8 of one part after another."""
        for file in self._files():
            with safe_open(file, "pt") as opened:
                yield opened.get_tensor("images")

    def _file(self, first: int) -> Path:
        return self.folder / f"{first:08}.safetensors"

    def _files(self) -> list[Path]:
        if missing := self.missing():
            raise InputError(
                f"{self.folder}: the images from {missing[0].start} on are not there: processes on several machines "
                "need an --out that they share"
            )
        return [self._file(images.start) for images in self.ranges()]


def _is_whole(file: Path) -> bool:
    try:
        with safe_open(file, "pt") as opened:
            return "vectors" in opened.keys()  # noqa: SIM118 - no dict
    except (OSError, SafetensorError):
        return False


def forget(directory: Path) -> None:
    """Remove the parts under a directory of results, once the result is written."""
    shutil.rmtree(directory / FOLDER, ignore_errors=True)
