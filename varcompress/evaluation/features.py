"""The networks whose features the scores compare: Inception by torch-fidelity, and one of our own for the digits."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

DIGITS_WIDTH = 64


class DigitsFeatures(nn.Module):
    """A small classifier of digits; its last hidden layer is the feature space of the embedded scores."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.hidden = nn.Linear(64 * 4 * 4, DIGITS_WIDTH)
        self.head = nn.Linear(DIGITS_WIDTH, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, 16, 16) in [0, 1] -> features (B, 64) and logits (B, 10)."""
        x = F.relu(self.conv1(images * 2 - 1))
        x = F.relu(self.conv2(x))
        x = F.relu(self.conv3(x))
        features = F.relu(self.hidden(x.flatten(1)))
        return features, self.head(features)
