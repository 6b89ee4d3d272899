"""Philox4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011): random words by number.

A word is a function of a key and a counter, of nothing that was drawn before. In Triton it is `tl.philox`.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low words of a 32 x 32 bit product, b >= 2^31: with b - 2^32 in its place it stays inside int64."""
    product = a * (b - (1 << 32))
    return (product >> 32) + a, product & _WORD


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int | Tensor) -> tuple[Tensor, ...]:
    """Philox4x32-10: four int64 tensors that hold 32-bit words, from four such counters and a 64-bit key.

    The key is a whole number, or a 0-dim int64 tensor on the counters' device.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def uniform(seed: int | Tensor, image_ids: Tensor, scale: int, positions: int) -> Tensor:
    """Uniform numbers in [0, 1) for the tokens of one scale: image_ids (B,) int64 -> (B, positions) float32.

    seed: a whole number, or a 0-dim int64 tensor on the device of image_ids.
    """
    position = torch.arange(positions, device=image_ids.device)
    counter = torch.broadcast_tensors(
        position[None, :],
        image_ids.new_full((1, 1), scale),
        (image_ids & _WORD)[:, None],
        (image_ids >> 32 & _WORD)[:, None],
    )
    return (philox(counter, seed)[0] >> 8).float() * 2.0**-24
