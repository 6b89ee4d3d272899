"""The networks whose features the scores compare: Inception by torch-fidelity, and one of our own for the digits."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor
from torch_fidelity.utils import create_feature_extractor

from varcompress.checkpoint import read_pth
from varcompress.data import digits
from varcompress.errors import InputError

INCEPTION, DIGITS = "inception", "digits"  # as a user names them
EXTRACTORS = {INCEPTION: "inception-v3-compat", DIGITS: "varcompress-digits"}  # as torch-fidelity does
# Of the file behind URL_INCEPTION_V3; its name carries the first eight digits.
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
DIGITS_WEIGHTS = digits.FOLDER / "features.pth"
DIGITS_WIDTH = 64
DIGEST_CHUNK_BYTES = 1 << 20


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


class DigitsExtractor(FeatureExtractorBase):
    """`DigitsFeatures` as torch-fidelity wants its extractors: images (B, 3, 16, 16) uint8 -> a tuple of features."""

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None, **_: object
    ) -> None:
        super().__init__(name, features_list)
        self.network = DigitsFeatures()
        self.network.load_state_dict(read_pth(feature_extractor_weights_path or DIGITS_WEIGHTS))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        vectors, logits = self.network(images.float() / 255)
        provided = {str(DIGITS_WIDTH): vectors, "logits": logits}
        return tuple(provided[layer] for layer in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return str(DIGITS_WIDTH), "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else str(DIGITS_WIDTH)

    @staticmethod
    def can_be_compiled() -> bool:
        return False


if EXTRACTORS[DIGITS] not in FEATURE_EXTRACTORS_REGISTRY:  # torch-fidelity refuses a second registration
    register_feature_extractor(EXTRACTORS[DIGITS], DigitsExtractor)


class Features(NamedTuple):
    """What the scores of N images need: vectors (N, D) and logits (N, C), float32 on the CPU."""

    vectors: Tensor
    logits: Tensor

    @classmethod
    def join(cls, parts: list[Features]) -> Features:
        return cls(torch.cat([part.vectors for part in parts]), torch.cat([part.logits for part in parts]))


class Extractor:
    """A feature network on a device. kind: inception or digits; width: numbers in a feature vector.

    FID, KID, precision and recall share one layer (with Inception the pool of 2048, as in the ADM evaluation).
    Raises InputError when Inception's weights cannot be had or are not the ones expected.
    """

    def __init__(self, kind: str, weights: Path | None, device: torch.device) -> None:
        name = EXTRACTORS[kind]
        network = FEATURE_EXTRACTORS_REGISTRY[name]
        layers = [network.get_default_feature_layer_for_metric(metric) for metric in ("fid", "isc")]
        path = inception_weights(weights) if kind == INCEPTION else DIGITS_WEIGHTS
        self.kind, self.width = kind, int(layers[0])
        self.network = create_feature_extractor(
            name, layers, cuda=False, feature_extractor_weights_path=str(path), verbose=False
        ).to(device)
        self.device = device

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Features:
        """Features of images (B, 3, H, W) uint8."""
        return Features(*(layer.float().cpu() for layer in self.network(images.to(self.device))))


def inception_weights(file: Path | None) -> Path:
    """A file that holds torch-fidelity's Inception weights, checked by its digest before anything opens it.

    file None: the copy in torch's cache, downloaded when there is none.
    """
    path = file or Path(torch.hub.get_dir(), "checkpoints", Path(URL_INCEPTION_V3).name)
    if file is None and not path.is_file():
        _download(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file of feature weights: download {URL_INCEPTION_V3}")
    if sha256(path) != INCEPTION_SHA256:
        raise InputError(
            f"{path}: not the Inception weights of torch-fidelity, whose SHA-256 begins with {INCEPTION_SHA256[:8]}: "
            f"put {URL_INCEPTION_V3} in its place"
        )
    return path


def _download(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=INCEPTION_SHA256, progress=False)
    except (OSError, RuntimeError) as error:  # no network, no disk; a wrong digest is a RuntimeError
        raise InputError(
            f"the Inception weights could not be downloaded ({error}): "
            f"fetch {URL_INCEPTION_V3} elsewhere and pass it with --feature-weights FILE"
        ) from error


def sha256(path: Path) -> str:
    """Digest of a file in hexadecimal, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(DIGEST_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
