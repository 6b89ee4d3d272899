"""Some images of a source, so that a measurement encodes no more than it looks at."""

from __future__ import annotations

import hashlib
from functools import cached_property

import numpy as np

from varcompress.data.interface import Source
from varcompress.data.tokens import holdout_order


class Selection:
    """The images of `source` at `indices` (n,) int64, ascending, as a `Source`."""

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self.source, self.indices = source, indices
        self.name, self.preprocessing, self.labels = source.name, source.preprocessing, source.labels[indices]

    @classmethod
    def held_out(cls, source: Source, count: int) -> Selection:
        """The first `count` images that a training run holds out: one that holds out more has seen none of them."""
        return cls(source, np.sort(holdout_order(len(source))[:count]))

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.source.digest.encode() + self.indices.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int, size: int, views: int) -> np.ndarray | None:
        """As the source reads it."""
        return self.source.read(int(self.indices[index]), size, views)

    def item(self, index: int) -> str:
        """As the source calls it."""
        return self.source.item(int(self.indices[index]))
