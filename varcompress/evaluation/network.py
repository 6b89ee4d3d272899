"""What evaluation must know of a feature network; one object of this kind describes each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from varcompress.data.interface import NamedSource


@dataclass(frozen=True)
class FeatureNetwork:
    """A network whose features the scores compare.

    name: as a user names it; extractor: as torch-fidelity names it; printed: as results do; num_images: to draw for
    each schedule where nothing else is asked for; published: whether published figures are at that number;
    weights: given the user's file, or None, returns the file to load, or raises InputError; image_size: the only one
    that it takes, None for any; source: the data source it was trained on, of whose models it is the default;
    note: what a reader of its scores must know.
    """

    name: str
    extractor: str
    printed: str
    num_images: int
    weights: Callable[[Path | None], Path]
    published: bool = False
    image_size: int | None = None
    source: type[NamedSource] | None = None
    note: str | None = None
