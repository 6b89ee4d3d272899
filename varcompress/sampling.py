"""Guidance, top-k, top-p and draws, with a random stream of its own for every image.

A draw depends on (seed, image, scale, position) alone: one Philox4x32-10 word (Salmon et al.,
SC 2011) is the uniform number that inverts the filtered distribution. So an image does not change
with the batch it is drawn in, nor with the device.
"""

from __future__ import annotations

import math
from operator import index

import torch
from torch import Tensor

from varcompress.errors import InputError

MAX_SEED = 2**63 - 1
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low words of a 32 x 32 bit product, kept inside int64 by splitting `a` in halves."""
    low, high = (a & 0xFFFF) * b, (a >> 16) * b
    high = high + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, ...]:
    """Philox4x32-10: four int64 tensors that hold 32-bit words, from four such counters and a 64-bit key."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def uniform(seed: int, images: Tensor, scale: int, positions: int) -> Tensor:
    """Uniform numbers in [0, 1) for the tokens of one scale: images (B,) int64 -> (B, positions) float32."""
    position = torch.arange(positions, device=images.device)
    counter = torch.broadcast_tensors(
        position[None, :], images.new_full((1, 1), scale), (images & _WORD)[:, None], (images >> 32)[:, None]
    )
    return (philox(counter, seed)[0] >> 8).float() * 2.0**-24


def check_settings(*, cfg: float, top_k: int, top_p: float, seed: int) -> None:
    """Raises InputError for a setting of generation that means nothing."""
    checks = (
        ("cfg", cfg, math.isfinite, "a finite number"),
        ("top_k", top_k, lambda value: index(value) >= 0, "a whole number, 0 or more"),
        ("top_p", top_p, lambda value: 0 <= value <= 1, "from 0 to 1"),
        ("seed", seed, lambda value: 0 <= index(value) <= MAX_SEED, f"a whole number from 0 to {MAX_SEED}"),
    )
    for name, value, holds, expected in checks:
        try:
            good = holds(value)
        except (TypeError, ValueError, OverflowError):
            good = False
        if not good:
            raise InputError(f"{name} must be {expected}, not {value!r}")


def guide(conditional: Tensor, unconditional: Tensor, weight: float) -> Tensor:
    """Classifier-free guidance: (1 + t) cond - t uncond, in float32."""
    return (1 + weight) * conditional.float() - weight * unconditional.float()


def filtered_probabilities(logits: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Probabilities after top-k, then top-p, sorted from high to low, and the token of each: both (..., V).

    top_k 0 and top_p 0 switch a filter off. Tokens tied with the k-th stay. A token stays in top-p
    when the tokens above it hold less than top_p, so the first always does
    (FoundationVision/VAR, models/helpers.py).
    """
    values, tokens = logits.sort(dim=-1, descending=True, stable=True)
    if 0 < top_k < values.shape[-1]:
        values = values.masked_fill(values < values[..., top_k - 1 : top_k], -torch.inf)
    probabilities = values.softmax(dim=-1)
    if 0 < top_p < 1:
        above = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(above >= top_p, 0.0)
    return probabilities, tokens


def draw(logits: Tensor, uniforms: Tensor, *, top_k: int, top_p: float) -> Tensor:
    """Tokens drawn by inverting the filtered distribution: logits (B, n, V), uniforms (B, n) -> (B, n) int64."""
    if top_k == 1:
        return logits.argmax(dim=-1)
    probabilities, tokens = filtered_probabilities(logits, top_k, top_p)
    cumulative = probabilities.cumsum(dim=-1)
    target = uniforms[..., None] * cumulative[..., -1:]
    # rank of the first token whose cumulative probability passes the target; never one of probability 0
    rank = (cumulative <= target).sum(dim=-1, keepdim=True)
    last = ((probabilities > 0).sum(dim=-1, keepdim=True) - 1).clamp_min_(0)  # -1 would be of NaN alone
    return tokens.gather(-1, torch.minimum(rank, last)).squeeze(-1)
