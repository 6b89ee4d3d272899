"""The networks whose features the scores compare, the choice between them, and features of images."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from torch_fidelity.utils import create_feature_extractor

from varcompress.data.sources import own_source
from varcompress.errors import InputError
from varcompress.evaluation.digits import DIGITS
from varcompress.evaluation.inception import INCEPTION
from varcompress.evaluation.network import FeatureNetwork
from varcompress.hardware import exact_float32
from varcompress.models.elastic import ElasticVAR

NETWORKS = {network.name: network for network in (INCEPTION, DIGITS)}
DEFAULT = INCEPTION  # of a model whose images no network was made for


def choose_network(name: str | None, model: ElasticVAR) -> FeatureNetwork:
    """The feature network called so; None for the one that was made for the model's own images, else Inception.

    Raises InputError for an unknown name, and for a network that takes images of another size.
    """
    if name is None:
        own = own_source(model)
        return next((network for network in NETWORKS.values() if own and network.source is own), DEFAULT)
    if name not in NETWORKS:
        raise InputError(f"features {name!r} are unknown: choose {' or '.join(NETWORKS)}")
    network = NETWORKS[name]
    if network.image_size not in (None, model.tokenizer.config.image_size):
        raise InputError(
            f"the {name} features are for images of {network.image_size} pixels: use --features {DEFAULT.name}"
        )
    return network


class Features(NamedTuple):
    """What the scores of N images need: vectors (N, D) and logits (N, C), float32 on the CPU."""

    vectors: Tensor
    logits: Tensor

    @classmethod
    def join(cls, parts: list[Features]) -> Features:
        return cls(torch.cat([part.vectors for part in parts]), torch.cat([part.logits for part in parts]))


class Extractor:
    """A feature network on a device. spec: which one; width: numbers in a feature vector.

    weights: the user's file of them, None for what the network finds by itself. FID, KID, precision and recall share
    one layer (with Inception the pool of 2048, as in the ADM evaluation). Raises InputError when the weights cannot
    be had or are not the ones expected.
    """

    def __init__(self, spec: FeatureNetwork, weights: Path | None, device: torch.device) -> None:
        network = FEATURE_EXTRACTORS_REGISTRY[spec.extractor]
        layers = [network.get_default_feature_layer_for_metric(metric) for metric in ("fid", "isc")]
        self.spec, self.width, self.device = spec, int(layers[0]), device
        self.network = create_feature_extractor(
            spec.extractor,
            layers,
            cuda=False,
            feature_extractor_weights_path=str(spec.weights(weights)),
            verbose=False,
        ).to(device)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Features:
        """Features of images (B, 3, H, W) uint8, computed in full float32, so that no card's rounding is in a score."""
        with exact_float32(self.device):
            return Features(*(layer.float().cpu() for layer in self.network(images.to(self.device))))
