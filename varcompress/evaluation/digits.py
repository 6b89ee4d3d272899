"""A feature network of our own for the embedded digits."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varcompress.checkpoint import read_pth
from varcompress.data.digits import FOLDER, SIZE, Digits
from varcompress.errors import InputError
from varcompress.evaluation.network import FeatureNetwork, Features, not_fid

WEIGHTS = FOLDER / "features.pth"
WIDTH = 64


class DigitsFeatures(nn.Module):
    """A small classifier of digits; its last hidden layer is the feature space of the embedded scores."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.hidden = nn.Linear(64 * 4 * 4, WIDTH)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Features:
        """Images (B, 3, 16, 16), uint8 or in [0, 1] -> vectors (B, 64) and logits (B, 10)."""
        images = images.float() / 255 if images.dtype is torch.uint8 else images
        x = F.relu(self.conv1(images * 2 - 1))
        x = F.relu(self.conv2(x))
        x = F.relu(self.conv3(x))
        vectors = F.relu(self.hidden(x.flatten(1)))
        return Features(vectors, self.head(vectors))


def _weights(file: Path | None) -> Path:
    if file is not None:
        raise InputError(
            "the digits features bring their weights: leave out --feature-weights, or add --features inception"
        )
    return WEIGHTS


def _load(weights: Path) -> nn.Module:
    network = DigitsFeatures()
    network.load_state_dict(read_pth(weights))
    return network


DIGITS = FeatureNetwork(
    name="digits",
    printed="digits",
    weights=_weights,
    load=_load,
    image_size=SIZE,
    source=Digits,
    note=not_fid("digits"),
)
