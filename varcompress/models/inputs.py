"""What a caller gives, checked once, at the door: labels, tokens, images and cfg as tensors on the model's device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from varcompress.errors import InputError
from varcompress.models.transformer import VARConfig
from varcompress.sampling import DistilledCfg, cfg_bounds


def labels(values: Sequence[int] | Tensor, config: VARConfig, device: torch.device) -> Tensor:
    """Class indices as int64 (B,). Raises InputError for what is no list of whole numbers, and for an unknown class."""
    found = _integers(values)
    if found is None or found.ndim != 1 or not len(found):
        raise InputError("labels must be a list of at least one class index, a whole number")
    unknown = found[(found < 0) | (found >= config.classes)]
    if len(unknown):
        raise InputError(f"class {int(unknown[0])} is unknown: this model has classes 0 to {config.classes - 1}")
    return found.to(device)


def tokens(values: Tensor, config: VARConfig, device: torch.device, num_images: int | None = None) -> Tensor:
    """Tokens as int64 (B, L). Raises InputError for what is none, and where they are not of `num_images` images."""
    found = _integers(values)
    if found is None or found.ndim != 2 or found.shape[1] != config.tokens or not len(found):
        shape = "" if found is None else f", not of shape {tuple(found.shape)}"
        raise InputError(f"tokens must be whole numbers of shape (B, {config.tokens}){shape}")
    if num_images not in (None, len(found)):
        raise InputError(f"tokens of {len(found)} images for {num_images} labels: give as many of each")
    low, high = torch.stack(found.aminmax()).tolist()
    if low < 0 or high >= config.vocab:
        raise InputError(f"token {low if low < 0 else high} is unknown: the codebook has 0 to {config.vocab - 1}")
    return found.to(device)


def images(values: Tensor, size: int, device: torch.device) -> Tensor:
    """Images (B, 3, size, size) as float32. Raises InputError for another shape."""
    if values.ndim != 4 or tuple(values.shape[1:]) != (3, size, size):
        raise InputError(f"images of shape {tuple(values.shape)}: this model takes (B, 3, {size}, {size})")
    return values.to(device, torch.float32)


def cfg(values: float | Tensor, distilled: DistilledCfg, num_images: int, device: torch.device) -> Tensor:
    """Weights of guidance as float32 (B,), from one for all or from (B,).

    Raises InputError for another shape, and for one that the model was not distilled for.
    """
    low, high = cfg_bounds(distilled)
    try:
        found = torch.as_tensor(values, dtype=torch.float32, device=device).expand(num_images)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"cfg must be a number, or one for each of {num_images} images") from error
    if not ((found >= low) & (found <= high)).all():
        raise InputError(f"cfg must be from {low} to {high} in this model")
    return found


def _integers(values: Sequence[int] | Tensor) -> Tensor | None:
    """Whole numbers as an int64 tensor; None for anything else, which torch would round or refuse in its own words."""
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        return None
    return tensor.long()
