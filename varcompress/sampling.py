"""Sampling of one scale: what a call may ask for, and tokens from hidden states without all logits at once.

Guidance, filters and the draw itself are one operation in `kernels/draw.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import index

import torch
from torch import Tensor

from varcompress.errors import InputError
from varcompress.kernels.backend import Kernels

MAX_SEED = 2**63 - 1
MAX_INDEX = 2**62  # leaves room for the images of a call
MAX_CFG = 1000  # beyond any use, and far from float32's end
LOGITS_BYTES = 1 << 25  # of logits that exist at a time: the largest tensor of a big batch, if they all did


def check_settings(*, cfg: float, top_k: int, top_p: float, seed: int, first_index: int = 0) -> None:
    """Raises InputError for a setting of generation that means nothing."""
    checks = (
        ("cfg", cfg, lambda value: abs(value) <= MAX_CFG, f"a number from -{MAX_CFG} to {MAX_CFG}"),
        ("top_k", top_k, lambda value: index(value) >= 0, "a whole number, 0 or more"),
        ("top_p", top_p, lambda value: 0 <= value <= 1, "from 0 to 1"),
        (
            "first_index",
            first_index,
            lambda value: 0 <= index(value) <= MAX_INDEX,
            f"a whole number from 0 to {MAX_INDEX}",
        ),
        ("seed", seed, lambda value: 0 <= index(value) <= MAX_SEED, f"a whole number from 0 to {MAX_SEED}"),
    )
    for name, value, holds, expected in checks:
        try:
            good = holds(value)
        except (TypeError, ValueError, OverflowError):
            good = False
        if not good:
            raise InputError(f"{name} must be {expected}, not {value!r}")


def images_at_a_time(tokens: int, vocab: int, element_bytes: int) -> int:
    """Images whose logits, guided and not, fit in LOGITS_BYTES; at least one."""
    return max(1, LOGITS_BYTES // (2 * tokens * vocab * element_bytes))


def sample(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    *,
    weight: float,
    seed: Tensor,
    images: Tensor,
    scale: int,
    top_k: int,
    top_p: float,
    vocab: int,
    kernels: Kernels,
) -> Tensor:
    """Tokens (B, n) int64 of one scale, -1 where the logits are not finite, a few images at a time.

    head: hidden states to logits; hidden: (2B, n, C), conditional rows, then unconditional ones, which
    are not read where the guidance weight is 0; seed: () int64; images: (B,) int64, their random streams.
    """
    conditional, unconditional = hidden.chunk(2)
    size = images_at_a_time(hidden.shape[1], vocab, hidden.element_size())
    parts = []
    for first in range(0, len(images), size):
        few = slice(first, first + size)
        parts.append(
            kernels.draw(
                head(conditional[few]),
                head(unconditional[few]) if weight else None,
                weight,
                seed,
                images[few],
                scale,
                top_k=top_k,
                top_p=top_p,
            )
        )
    return torch.cat(parts)
