"""Where training images come from: one interface, its kinds, and the choice between them."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np

from varcompress.data.digits import Digits
from varcompress.data.folder import scan
from varcompress.errors import InputError
from varcompress.models.elastic import ElasticVAR


class Source(Protocol):
    """Labelled images that are read one by one, by several threads at a time.

    name: as messages print it; digest: of the images, as far as it can be had without reading all of them;
    preprocessing: how an image becomes views, another text wherever other pixels come out; labels: (N,) int64.
    """

    name: str
    digest: str
    preprocessing: str
    labels: np.ndarray

    def __len__(self) -> int: ...

    def read(self, index: int, size: int, views: int) -> np.ndarray | None:
        """Views of image `index`, (views, 3, size, size), uint8 or float32 in [0, 1]; None if it is unreadable."""

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


NAMED: dict[str, type[NamedSource]] = {"digits": Digits}


def own_source(model: ElasticVAR) -> type[NamedSource] | None:
    """The source of the package that a model, or the one it was compressed from, was made with, if there is one."""
    names, size = (model.provenance.name, model.provenance.base_model), model.tokenizer.config.image_size
    return next((source for source in NAMED.values() if source.model in names and source.image_size == size), None)


def open_source(data: str | Path | None, model: ElasticVAR) -> Source:
    """The images to train a model on. data: an image folder, or a name of NAMED; None for the model's own source.

    Raises InputError where there is none, and for images that do not fit the model.
    """
    classes, size = model.var.config.classes, model.tokenizer.config.image_size
    if data is None:
        kind = own_source(model)
        if kind is None:
            raise InputError(
                f"{model.provenance.name} needs images: give a folder with one subfolder per class as --data"
            )
    else:
        kind = None if Path(data).is_dir() else NAMED.get(str(data))  # what lies here goes first
    if kind is None:
        return scan(data, classes)
    if (kind.image_size, kind.classes) != (size, classes):
        raise InputError(
            f"{kind.name}: {kind.classes} classes in {kind.image_size} pixels, "
            f"but the model has {classes} in {size}: give images that fit as --data"
        )
    return kind()
