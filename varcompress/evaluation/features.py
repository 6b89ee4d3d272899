"""The choice between feature networks, and one of them at work on a device."""

from __future__ import annotations

from pathlib import Path

import torch
import torch_fidelity
from torch import Tensor

from varcompress import __version__
from varcompress.data.sources import own_source
from varcompress.errors import InputError
from varcompress.evaluation.digits import DIGITS
from varcompress.evaluation.dinov2 import DINOV2
from varcompress.evaluation.efficientnet import EFFICIENTNET_LITE0
from varcompress.evaluation.inception import INCEPTION
from varcompress.evaluation.network import FeatureNetwork, Features
from varcompress.evaluation.timm_file import CONFIG, SUFFIX, is_file, network_of_file
from varcompress.files import sha256
from varcompress.hardware import exact_float32
from varcompress.models.elastic import ElasticVAR

NETWORKS = {network.name: network for network in (INCEPTION, DINOV2, EFFICIENTNET_LITE0, DIGITS)}
DEFAULT = INCEPTION  # of a model whose images no network was made for


def choose_network(name: str | None, model: ElasticVAR) -> FeatureNetwork:
    """The feature network called so, or in the file of this name; None for the one that was made for the model's own
    images, else Inception.

    Raises InputError for an unknown name, for a file that holds no network of timm, and for a network that takes images
    of another size.
    """
    if name is None:
        own = own_source(model)
        return next((network for network in NETWORKS.values() if own and network.source is own), DEFAULT)
    if name not in NETWORKS and not is_file(name):
        choices = ", ".join(NETWORKS)
        raise InputError(f"features {name!r} are unknown: choose {choices}, or a {SUFFIX} file with its {CONFIG}")
    network = NETWORKS[name] if name in NETWORKS else network_of_file(name)
    if network.image_size not in (None, model.tokenizer.config.image_size):
        raise InputError(
            f"the {name} features are for images of {network.image_size} pixels: use --features {DEFAULT.name}"
        )
    return network


class Extractor:
    """A feature network on a device. spec: which one; digest: SHA-256 of the file of its weights; key: of all that its
    features depend on, for what is kept of them.

    weights: the user's file of them, None for what the network finds by itself. Raises InputError when the weights
    cannot be had or are not the ones expected.
    """

    def __init__(self, spec: FeatureNetwork, weights: Path | None, device: torch.device) -> None:
        file = spec.weights(weights)
        self.spec, self.device, self.digest = spec, device, sha256(file)
        self.network = spec.load(file).to(device).eval().requires_grad_(False)
        libraries = [__version__, torch.__version__, torch_fidelity.__version__]
        self.key = "\0".join([spec.name, spec.printed, spec.version, self.digest, device.type, *libraries])

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Features:
        """Features on the CPU of images (B, 3, H, W) uint8, in full float32: no card's rounding is in a score."""
        with exact_float32(self.device):
            found = self.network(images.to(self.device))
        return Features(*(None if part is None else part.float().cpu() for part in found))
