"""What a source of labelled images is, whatever holds them."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from varcompress.errors import InputError


class Source(Protocol):
    """Labelled images that are read one by one, by several threads at a time, and that other processes can be sent.

    name: as messages print it; digest: of the images, as far as it can be had without reading all of them;
    preprocessing: how an image becomes views, another text wherever other pixels come out; labels: (N,) int64.
    """

    name: str
    digest: str
    preprocessing: str
    labels: np.ndarray

    def __len__(self) -> int: ...

    def read(self, index: int, size: int, views: int) -> np.ndarray | None:
        """Views of image `index`, (views, 3, size, size), uint8 or float32 in [0, 1]; None if it is unreadable.

        InputError where it cannot be had now, which says nothing of the image.
        """

    def item(self, index: int) -> str:
        """What to call image `index` in a note to a person."""


class NamedSource(Source, Protocol):
    """A source that comes with the package: opened by its name, and chosen by itself for the model made with it.

    model: that model's name; image_size, classes: of its images.
    """

    model: str
    image_size: int
    classes: int

    def __init__(self) -> None: ...


def check_labels(source: Source, classes: int) -> None:
    """Raises InputError for a source without images, and for the first image whose label is no class of the model."""
    if not len(source):
        raise InputError(f"{source.name}: holds no images")
    outside = np.flatnonzero((source.labels < 0) | (source.labels >= classes))
    if len(outside):
        raise InputError(
            f"{source.name}: {source.item(outside[0])} has label {source.labels[outside[0]]}, "
            f"but the model has classes 0 to {classes - 1}: give images that fit"
        )
