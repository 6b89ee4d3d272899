"""The Inception network of published FIDs, by torch-fidelity, whose weights are a download."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

from varcompress.errors import InputError
from varcompress.evaluation.network import FeatureNetwork

# Of the file behind URL_INCEPTION_V3; its name carries the first eight digits.
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
DIGEST_CHUNK_BYTES = 1 << 20


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


INCEPTION = FeatureNetwork(
    name="inception",
    extractor="inception-v3-compat",
    printed="inception-v3",
    num_images=50_000,
    published=True,
    weights=inception_weights,
)
