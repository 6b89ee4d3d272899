"""What evaluation must know of a feature network, and what such a network gives of images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from varcompress.data.interface import NamedSource


class Features(NamedTuple):
    """What the scores of N images need, float32.

    vectors: (N, D), whose distribution is compared; logits: (N, C) of classes, None of a network that knows none;
    spatial: (N, S), in which places count, None but on Inception.
    """

    vectors: Tensor
    logits: Tensor | None = None
    spatial: Tensor | None = None

    @classmethod
    def join(cls, parts: list[Features]) -> Features:
        return cls(*(None if part[0] is None else torch.cat(part) for part in zip(*parts, strict=True)))


@dataclass(frozen=True)
class FeatureNetwork:
    """A network whose features the scores compare.

    name: as a user names it and a score's name says it; printed: as results do; weights: given the user's file, or
    None, returns the file to load, or raises InputError; load: that file as a module, images (B, 3, H, W) uint8 ->
    `Features`; image_size: the only one that it takes, None for any; source: the data source it was trained on, of
    whose models it is the default; note: what a reader of its scores must know; version: what else its features depend
    on, such as how images are prepared.
    """

    name: str
    printed: str
    weights: Callable[[Path | None], Path]
    load: Callable[[Path], nn.Module]
    image_size: int | None = None
    source: type[NamedSource] | None = None
    note: str | None = None
    version: str = ""


def not_fid(name: str) -> str:
    """The note of a network other than Inception, by its name."""
    return f"scores on the {name} features: not FID, and not comparable with scores on Inception"
