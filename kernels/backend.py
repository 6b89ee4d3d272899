"""Which version of the operations runs: plain torch or Triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from varcompress.kernels import available
from varcompress.kernels.draw import draw, draw_triton
from varcompress.kernels.group_norm import group_norm, group_norm_triton
from varcompress.kernels.modulate import add_modulate, add_modulate_triton, modulate, modulate_triton
from varcompress.kernels.philox import uniform
from varcompress.kernels.qkv import split_heads, split_heads_triton

CHOICES = ("auto", "torch", "triton")


class Kernels(NamedTuple):
    """One version of every operation, each with the arguments and results of its plain torch function."""

    adds_bias: bool  # whether split_heads is to add the bias; if not, the matrix product before it has
    modulate: Callable[..., Tensor]
    add_modulate: Callable[..., tuple[Tensor, Tensor]]
    split_heads: Callable[..., Tensor]
    draw: Callable[..., Tensor]
    group_norm: Callable[..., Tensor]


def _draw_torch(
    conditional: Tensor,
    unconditional: Tensor | None,
    guidance: float,
    seed: Tensor,
    image_ids: Tensor,
    scale: int,
    **filters,
) -> Tensor:
    """`draw` with the numbers of `uniform`, as `draw_triton` has them inside."""
    return draw(conditional, unconditional, guidance, uniform(seed, image_ids, scale, conditional.shape[1]), **filters)


TORCH = Kernels(False, modulate, add_modulate, split_heads, _draw_torch, group_norm)
TRITON = Kernels(True, modulate_triton, add_modulate_triton, split_heads_triton, draw_triton, group_norm_triton)


def choose(name: str, device: torch.device) -> Kernels:
    """The kernels called `name`, one of CHOICES, on a device. Raises ValueError where Triton cannot run on it."""
    if name == "triton" and not available(device):
        raise ValueError("Triton needs a CUDA device, and its package")
    use = name == "triton" or (name == "auto" and device.type == "cuda" and available(device))
    return TRITON if use else TORCH
