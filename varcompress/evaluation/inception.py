"""The Inception network of published FIDs, by torch-fidelity, whose weights are a download."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.utils import create_feature_extractor

from varcompress.errors import InputError
from varcompress.evaluation.network import FeatureNetwork, Features
from varcompress.files import sha256

# Of the file behind URL_INCEPTION_V3; its name carries the first eight digits.
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SPATIAL_CHANNELS = 7  # of the 192, as in the evaluation of ADM


class InceptionFeatures(nn.Module):
    """torch-fidelity's port of the TensorFlow network that FID was defined on, with the layers that scores need.

    Images (B, 3, H, W) uint8 -> the pool of 2048; the logits of 1008 classes without their bias; and for sFID the first
    7 channels of mixed_6/conv at its 17 x 17 places, 2023 numbers in the order of openai/guided-diffusion's evaluator,
    so that its mu_s and sigma_s fit.
    """

    def __init__(self, weights: Path) -> None:
        super().__init__()
        self.network = create_feature_extractor(
            "inception-v3-compat",
            ["2048", "logits_unbiased"],
            cuda=False,
            feature_extractor_weights_path=str(weights),
            verbose=False,
        )
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _inputs: tuple, output: Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)

    def forward(self, images: Tensor) -> Features:
        vectors, logits = self.network(images)
        return Features(vectors, logits, self._spatial)


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


INCEPTION = FeatureNetwork(name="inception", printed="inception-v3", weights=inception_weights, load=InceptionFeatures)
