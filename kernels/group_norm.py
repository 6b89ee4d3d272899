"""GroupNorm of a channels-last map, with the SiLU that follows it.

What stands before the convolutions of the decoder's residual blocks. Torch's own group norm on a GPU turns a
channels-last map around and leaves the result so, for the next convolution to turn it back; here the map keeps its
layout, is read twice and written once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varcompress.kernels import constexpr, jit, tl, triton

_SLABS = 256  # parts of one map that are summed side by side, at most
_TILE = 2048  # values that a program holds at a time


def group_norm(norm: nn.GroupNorm, x: Tensor, *, silu: bool = False) -> Tensor:
    """norm(x), then SiLU if asked: (B, C, H, W) -> (B, C, H, W). `norm` has weight and bias."""
    y = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return F.silu(y, inplace=True) if silu else y


def group_norm_triton(norm: nn.GroupNorm, x: Tensor, *, silu: bool = False) -> Tensor:
    """`group_norm` in three kernels, float32 inside: sums of slabs of the map, statistics, result.

    The result is channels-last. x is best so too; otherwise it is copied.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(x)
    images, channels, *_ = x.shape
    pixels, block = x[0, 0].numel(), triton.next_power_of_2(channels)
    slab = max(16, triton.next_power_of_2(triton.cdiv(pixels, _SLABS)))
    slabs, rows = triton.cdiv(pixels, slab), min(slab, max(1, _TILE // block))
    sums = x.new_empty(images, slabs, 2, channels, dtype=torch.float32)
    affine = x.new_empty(images, 2, channels, dtype=torch.float32)
    _sum_slab[(slabs, images)](x, sums, pixels, channels, block, slab, rows, num_warps=4)
    _combine[(norm.num_groups, images)](
        sums,
        norm.weight,
        norm.bias,
        affine,
        pixels,
        norm.eps,
        channels,
        channels // norm.num_groups,
        triton.next_power_of_2(channels // norm.num_groups),
        slab,
        slabs,
        triton.next_power_of_2(slabs),
        num_warps=4,
    )
    _apply[(slabs, images)](x, affine, out, pixels, channels, block, slab, rows, silu, num_warps=4)
    return out


@jit("pixels")
def _sum_slab(
    x_pointer,
    sums_pointer,
    pixels,
    CHANNELS: constexpr,
    BLOCK: constexpr,
    SLAB: constexpr,
    ROWS: constexpr,
):
    """Of one slab of pixels: the mean of each channel, and its sum of squared distances from that mean."""
    slab, image = tl.program_id(0), tl.program_id(1)
    first, channel = slab * SLAB, tl.arange(0, BLOCK)
    x_pointer += image.to(tl.int64) * pixels * CHANNELS
    # Distances from some value of the channel: squares of the values would cancel where the mean is large.
    near = tl.load(x_pointer + first * CHANNELS + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    squares = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, SLAB, ROWS):
        here, inside = _tile(first + start, pixels, channel, CHANNELS, ROWS)
        x = tl.load(x_pointer + here, mask=inside, other=0.0).to(tl.float32)
        distance = tl.where(inside, x - near[None, :], 0.0)
        sums += distance
        squares += distance * distance
    total = tl.sum(sums, axis=0)
    shift = total / tl.minimum(SLAB, pixels - first)
    sums_pointer += (image.to(tl.int64) * tl.num_programs(0) + slab) * 2 * CHANNELS
    tl.store(sums_pointer + channel, near + shift, mask=channel < CHANNELS)
    deviation = tl.sum(squares, axis=0) - total * shift
    tl.store(sums_pointer + CHANNELS + channel, deviation, mask=channel < CHANNELS)


@jit("pixels")
def _combine(
    sums_pointer,
    weight_pointer,
    bias_pointer,
    affine_pointer,
    pixels,
    eps,
    CHANNELS: constexpr,
    PER_GROUP: constexpr,
    BLOCK: constexpr,
    SLAB: constexpr,
    SLABS: constexpr,
    SLAB_BLOCK: constexpr,
):
    """One group of one image: its norm as a factor and a summand for each channel (Chan et al., 1979)."""
    group, image = tl.program_id(0), tl.program_id(1)
    slab, part = tl.arange(0, SLAB_BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    channel, inside = group * PER_GROUP + part, (slab < SLABS) & (part < PER_GROUP)
    sums_pointer += image.to(tl.int64) * SLABS * 2 * CHANNELS + slab * 2 * CHANNELS + channel
    means = tl.load(sums_pointer, mask=inside, other=0.0)
    deviations = tl.load(sums_pointer + CHANNELS, mask=inside, other=0.0)
    count = tl.where(inside, tl.minimum(SLAB, pixels - slab * SLAB), 0).to(tl.float32)
    total = pixels * PER_GROUP
    mean = tl.sum(means * count) / total
    apart = means - mean
    variance = (tl.sum(deviations) + tl.sum(apart * apart * count)) / total
    weight = tl.load(weight_pointer + channel, mask=part < PER_GROUP, other=0.0).to(tl.float32)
    bias = tl.load(bias_pointer + channel, mask=part < PER_GROUP, other=0.0).to(tl.float32)
    factor = weight * tl.rsqrt(tl.maximum(variance, 0.0, propagate_nan=tl.PropagateNan.ALL) + eps)
    affine_pointer += image * 2 * CHANNELS + channel
    tl.store(affine_pointer, factor, mask=part < PER_GROUP)
    tl.store(affine_pointer + CHANNELS, bias - mean * factor, mask=part < PER_GROUP)


@jit("pixels")
def _apply(
    x_pointer,
    affine_pointer,
    out_pointer,
    pixels,
    CHANNELS: constexpr,
    BLOCK: constexpr,
    SLAB: constexpr,
    ROWS: constexpr,
    SILU: constexpr,
):
    """One slab of pixels."""
    slab, image = tl.program_id(0), tl.program_id(1)
    first, channel = slab * SLAB, tl.arange(0, BLOCK)
    x_pointer += image.to(tl.int64) * pixels * CHANNELS
    out_pointer += image.to(tl.int64) * pixels * CHANNELS
    affine_pointer += image * 2 * CHANNELS
    factor = tl.load(affine_pointer + channel, mask=channel < CHANNELS, other=0.0)[None, :]
    summand = tl.load(affine_pointer + CHANNELS + channel, mask=channel < CHANNELS, other=0.0)[None, :]
    for start in range(0, SLAB, ROWS):
        here, inside = _tile(first + start, pixels, channel, CHANNELS, ROWS)
        y = tl.load(x_pointer + here, mask=inside, other=0.0).to(tl.float32) * factor + summand
        if SILU:
            y = y * tl.sigmoid(y)
        tl.store(out_pointer + here, y, mask=inside)


@jit()
def _tile(start, pixels, channel, CHANNELS: constexpr, ROWS: constexpr):
    """Where the values of a few pixels of one map are, and which of them exist."""
    pixel = start + tl.arange(0, ROWS)[:, None]
    return pixel * CHANNELS + channel[None, :], (pixel < pixels) & (channel[None, :] < CHANNELS)
