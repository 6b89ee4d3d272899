"""A network of timm (PyTorch Image Models) as a feature network; timm is in the extra `features`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from varcompress.errors import InputError
from varcompress.evaluation.network import Features

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preparation:
    """What becomes of an image before a network: resized as a whole to size, (height, width) in pixels, by the filter
    of Pillow that interpolation names, then (image in [0, 1] - mean) / std, channel by channel.

    Nothing is cropped, as timm would for accuracy on photographs: what lies at the edge is scored too.
    """

    size: tuple[int, int]
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def resized(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) uint8 on the CPU -> (B, 3, height, width) uint8.

        By Pillow itself, image by image in threads, because that is what published features were computed with:
        torchvision's filter for tensors differs from it by several levels. It takes 3 to 5 ms of a core for an image.
        """
        height, width = self.size
        method = Image.Resampling[self.interpolation.upper()]

        def resize(image: np.ndarray) -> np.ndarray:
            return np.asarray(Image.fromarray(image).resize((width, height), method))

        with ThreadPoolExecutor() as pool:
            resized = list(pool.map(resize, images.permute(0, 2, 3, 1).contiguous().numpy()))
        return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)


class TimmFeatures(nn.Module):
    """A network of timm with its preparation: images (B, 3, H, W) uint8 -> what its classifier reads, one vector for
    each image, and its logits, None where it has no classifier."""

    def __init__(self, network: nn.Module, preparation: Preparation) -> None:
        super().__init__()
        self.network, self.preparation = network, preparation
        self.register_buffer("mean", torch.tensor(preparation.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preparation.std).view(3, 1, 1), persistent=False)

    def prepared(self, images: Tensor) -> Tensor:
        """What the network is given: images (B, 3, H, W) uint8 -> (B, 3, height, width) float32."""
        resized = self.preparation.resized(images.cpu()).to(self.mean.device)
        return (resized.float() / 255 - self.mean) / self.std

    def forward(self, images: Tensor) -> Features:
        maps = self.network.forward_features(self.prepared(images))
        vectors = self.network.forward_head(maps, pre_logits=True)
        return Features(vectors, self.network.forward_head(maps) if self.network.num_classes else None)


def need(package: str, features: str) -> None:
    """Raises InputError where a package of the extra `features` is missing. features: those that need it."""
    if find_spec(package) is None:
        name = package.replace("_", "-")
        raise InputError(f"the {features} features need the package {name}: pip install 'varcompress[features]'")
