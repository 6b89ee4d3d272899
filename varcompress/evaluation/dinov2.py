"""DINOv2's features, in which distances agree with people better than in Inception's (arXiv 2306.04675)."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from varcompress.checkpoint import read_pth
from varcompress.errors import InputError
from varcompress.evaluation.network import FeatureNetwork, not_fid
from varcompress.evaluation.timm_features import Preparation, TimmFeatures, need
from varcompress.hub import hub_client, reachable

NAME = "dinov2"
ARCHITECTURE = "vit_large_patch14_dinov2"
REPO, FILE = f"timm/{ARCHITECTURE}.lvd142m", "model.safetensors"
SIDE, PATCH = 224, 14  # pixels
OFFSET = 0.1


def dinov2_weights(file: Path | None) -> Path:
    """A file of DINOv2 ViT-L/14's weights: the user's, else the Hub's, from its cache where it is there.

    Raises InputError when there is none, or timm is missing.
    """
    need("timm", NAME)
    if file is None:
        return _download()
    if not file.is_file():
        raise InputError(f"{file}: no such file of feature weights: take {FILE} of {REPO} on the Hub")
    return file


def _download() -> Path:
    from huggingface_hub import hf_hub_download

    try:
        with hub_client(f"cannot load the {NAME} features from {REPO}"):
            return Path(hf_hub_download(REPO, FILE, local_files_only=not reachable()))
    except InputError as error:
        raise InputError(f"{error}; or fetch its {FILE} elsewhere and pass it with --feature-weights FILE") from error


def load_dinov2(weights: Path, architecture: str = ARCHITECTURE) -> TimmFeatures:
    """DINOv2 as layer6ai-labs/dgm-eval scores with it: 224 x 224 pixels, the class token after the last norm.

    weights: a .safetensors of timm's, or a .pth in the same names as Meta publishes it; architecture: timm's name of
    what they belong to. Raises InputError for a file that holds something else.
    """
    import timm

    with torch.device("meta"):  # 1.2 GB of random numbers that would be overwritten
        network = timm.create_model(architecture, img_size=SIDE, num_classes=0)
    try:
        state = load_file(weights) if weights.suffix == ".safetensors" else read_pth(weights)
        state.pop("mask_token", None)  # of its training, in Meta's file
        state["pos_embed"] = resized_positions(state["pos_embed"], SIDE // PATCH)
        network.load_state_dict(state, assign=True)
    except (SafetensorError, OSError, KeyError, IndexError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{weights}: not the weights of DINOv2's {architecture}: take {FILE} of {REPO} on the Hub"
        ) from error
    return TimmFeatures(network.float(), Preparation((SIDE, SIDE)))


def resized_positions(positions: Tensor, side: int) -> Tensor:
    """Position embeddings (1, 1 + M x M, D) -> (1, 1 + side x side, D), as DINOv2's own code resizes them.

    The public checkpoints were made for 37 x 37 patches and their features are those of this bicubic filter without
    antialiasing, whose scale is that of side + 0.1. timm would resize by another.
    """
    token, grid = positions[:, :1], positions[:, 1:]
    size = math.isqrt(grid.shape[1])
    if size == side:
        return positions
    grid = grid.unflatten(1, (size, size)).permute(0, 3, 1, 2)
    scale = (side + OFFSET) / size
    grid = F.interpolate(grid.float(), scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([token.float(), grid.flatten(2).transpose(1, 2)], dim=1)


DINOV2 = FeatureNetwork(
    name=NAME,
    printed=f"DINOv2 ViT-L/14 ({ARCHITECTURE}.lvd142m)",
    weights=dinov2_weights,
    load=load_dinov2,
    note=not_fid(NAME),
)
