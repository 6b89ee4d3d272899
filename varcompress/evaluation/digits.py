"""A feature network of our own for the embedded digits, as a spec and as torch-fidelity wants it."""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

from varcompress.checkpoint import read_pth
from varcompress.data.digits import FOLDER, SIZE, Digits
from varcompress.errors import InputError
from varcompress.evaluation.network import FeatureNetwork

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

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, 16, 16) in [0, 1] -> features (B, 64) and logits (B, 10)."""
        x = F.relu(self.conv1(images * 2 - 1))
        x = F.relu(self.conv2(x))
        x = F.relu(self.conv3(x))
        features = F.relu(self.hidden(x.flatten(1)))
        return features, self.head(features)


class DigitsExtractor(FeatureExtractorBase):
    """`DigitsFeatures` as torch-fidelity wants its extractors: images (B, 3, 16, 16) uint8 -> a tuple of features."""

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None, **_: object
    ) -> None:
        super().__init__(name, features_list)
        self.network = DigitsFeatures()
        self.network.load_state_dict(read_pth(feature_extractor_weights_path or WEIGHTS))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        vectors, logits = self.network(images.float() / 255)
        provided = {str(WIDTH): vectors, "logits": logits}
        return tuple(provided[layer] for layer in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return str(WIDTH), "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else str(WIDTH)

    @staticmethod
    def can_be_compiled() -> bool:
        return False


def _weights(file: Path | None) -> Path:
    if file is not None:
        raise InputError(
            "the digits features bring their weights: leave out --feature-weights, or add --features inception"
        )
    return WEIGHTS


DIGITS = FeatureNetwork(
    name="digits",
    extractor="varcompress-digits",
    printed="digits",
    num_images=2_000,  # about as many as the data set has
    weights=_weights,
    image_size=SIZE,
    source=Digits,
    note="scores on the digits features: not FID, and not comparable with scores on Inception",
)
if DIGITS.extractor not in FEATURE_EXTRACTORS_REGISTRY:  # torch-fidelity refuses a second registration
    register_feature_extractor(DIGITS.extractor, DigitsExtractor)
