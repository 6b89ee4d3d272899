"""The embedded digits' feature network for torch-fidelity's own commands, to compare our scores with."""

from __future__ import annotations

from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

from varcompress.evaluation.digits import DIGITS, WIDTH

NAME = "varcompress-digits"


class DigitsExtractor(FeatureExtractorBase):
    """As torch-fidelity wants its extractors: images (B, 3, 16, 16) uint8 -> a tuple of features."""

    def __init__(self, name: str, features_list: list[str], **_: object) -> None:
        super().__init__(name, features_list)
        self.network = DIGITS.load(DIGITS.weights(None)).eval()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        found = self.network(images)
        provided = {str(WIDTH): found.vectors, "logits": found.logits}
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


if NAME not in FEATURE_EXTRACTORS_REGISTRY:  # torch-fidelity refuses a second registration
    register_feature_extractor(NAME, DigitsExtractor)
