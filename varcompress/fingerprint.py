"""Which weights these are: a short fingerprint that results carry, and a digest of every byte."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import torch
from torch import nn

from varcompress.hardware import to_numpy

SAMPLED = 1024  # values of each tensor that go into a fingerprint


def fingerprint(model: nn.Module) -> str:
    """16 hex digits by which a result knows the weights it was measured on, as their checkpoint stores them.

    The same on every device, and for a model that was `rounded` to fewer bits since it was opened, until its weights
    change.
    """
    values = values_digest(model)
    return getattr(model, "_rounded_from", {}).get(values, values)


@contextlib.contextmanager
def rounded(model: nn.Module) -> Iterator[None]:
    """A block that rounds the weights of `model`, whose fingerprint stays the one that it had."""
    before = fingerprint(model)
    yield
    model._rounded_from = {values_digest(model): before}


def values_digest(module: nn.Module) -> str:
    """16 hex digits of names, shapes and values, whatever dtype holds them.

    The values are evenly spaced ones, first and last included, so that opening a model costs little more for it:
    training moves them all, while a change to some others alone goes unnoticed.
    """
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        count, values = min(SAMPLED, tensor.numel()), tensor.detach().reshape(-1)
        places = torch.arange(count, device=tensor.device) * (len(values) - 1) // max(count - 1, 1)
        digest.update(f"{name} {tuple(tensor.shape)}\0".encode())
        if not tensor.is_meta:
            digest.update(to_numpy(values[places].float()))
    return digest.hexdigest()[:16]


def weights_digest(module: nn.Module) -> str:
    """SHA-256 of all of a module's weights, names, shapes and dtypes included: seconds for a large model."""
    digest = hashlib.sha256()
    for key, value in module.state_dict().items():
        digest.update(f"{key} {tuple(value.shape)} {value.dtype}\0".encode())
        digest.update(to_numpy(value.detach().contiguous().view(-1).view(torch.uint8)))
    return digest.hexdigest()
