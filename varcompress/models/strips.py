"""The tokenizer's decoder on a CPU: the arithmetic of `Decoder.forward`, in strips of rows and in two buffers.

A map of 256 x 256 pixels is larger than a processor's cache, and a fresh one costs more in page faults than what is
computed in it. So normalisation, SiLU and convolution run together on a few rows at a time, residual sums are made in
place, and the large maps take turns in two buffers. Doubling the resolution and convolving 3 x 3 is four convolutions
of 2 x 2 on the small map, one for each place of a pixel in its block: 4 / 9 of the multiplications.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varcompress.models.autoencoder import Decoder, ResBlock

STRIP_ELEMENTS = 1 << 20  # of the wider of a convolution's two maps
MIN_OUTPUTS = 16  # channels: oneDNN convolves to fewer at a tenth of its speed


def decode(decoder: Decoder, z: Tensor) -> Tensor:
    """`Decoder.forward` without gradients: (B, z_channels, P, P) -> (B, 3, H, W). Memory is not chunked over images."""
    x = decoder.mid.attn_1(_res_block(decoder.mid.block_1, decoder.conv_in(z), None))
    x = _res_block(decoder.mid.block_2, x, None)
    large, spare = (x.new_empty(len(x) * largest_map(decoder, x.shape[-1])) for _ in range(2))
    for level in reversed(decoder.up):
        for i, block in enumerate(level.block):
            x = _res_block(block, x, spare)
            if level.attn:
                x = level.attn[i](x)
        if hasattr(level, "upsample"):
            large, spare = spare, large
            x = _upsample(level.upsample.conv, x, large)
    return _norm_conv(decoder.norm_out, decoder.conv_out, x, x.new_empty(len(x), 3, *x.shape[2:]))


def largest_map(decoder: Decoder, side: int) -> int:
    """Elements of the decoder's largest map for one image of side x side features."""
    largest = 0
    for level in reversed(decoder.up):
        largest = max(largest, side**2 * level.block[-1].conv1.out_channels)
        if hasattr(level, "upsample"):
            side *= 2
            largest = max(largest, side**2 * level.upsample.conv.out_channels)
    return largest


def _res_block(block: ResBlock, x: Tensor, spare: Tensor | None) -> Tensor:
    """A residual block; x is overwritten where the shortcut changes nothing, and `spare` holds the inner map."""
    shape = (len(x), block.conv1.out_channels, *x.shape[2:])
    inner = x.new_empty(shape) if spare is None else _in(spare, shape)
    _norm_conv(block.norm1, block.conv1, x, inner)
    return _norm_conv(block.norm2, block.conv2, inner, block.nin_shortcut(x), add=True)


def _norm_conv(norm: nn.GroupNorm, conv: nn.Conv2d, x: Tensor, out: Tensor, *, add: bool = False) -> Tensor:
    """Write, or add, conv(silu(norm(x))) to `out`. The convolution is 3 x 3 with padding 1."""
    factor, offset = _affine(norm, x)
    height, weight, bias = x.shape[2], conv.weight, conv.bias
    write = Tensor.add_ if add else Tensor.copy_
    if (missing := MIN_OUTPUTS - len(weight)) > 0:
        weight, bias = F.pad(weight, (0, 0, 0, 0, 0, 0, 0, missing)), F.pad(bias, (0, missing))
    for first, last in _strips(x, len(weight)):
        above, below = first == 0, last == height
        rows = x[:, :, max(first - 1, 0) : last + 1]
        rows = F.silu(torch.addcmul(offset, rows, factor), inplace=True)
        if above or below:
            rows = F.pad(rows, (0, 0, int(above), int(below)))
        write(out[:, :, first:last], F.conv2d(rows, weight, bias, padding=(0, 1))[:, : out.shape[1]])
    return out


def _affine(norm: nn.GroupNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """A group norm of x (B, C, H, W) as one multiplication and addition: factor and offset, each (B, C, 1, 1).

    Sums of squares instead of torch's own mean and variance, which walk the map element by element.
    """
    groups = x.reshape(len(x), norm.num_groups, -1)
    count = groups.shape[2]
    mean = groups.sum(dim=2, dtype=torch.float32).double() / count
    square = torch.linalg.vector_norm(groups, dim=2, dtype=torch.float32).double().square() / count
    factor = (square - mean.square()).clamp_min_(0).add_(norm.eps).rsqrt_()
    factor, mean = (value.repeat_interleave(x.shape[1] // norm.num_groups, dim=1) for value in (factor, mean))
    factor = norm.weight * factor
    offset = norm.bias - mean * factor
    return factor.to(x.dtype)[:, :, None, None], offset.to(x.dtype)[:, :, None, None]


def _upsample(conv: nn.Conv2d, x: Tensor, buffer: Tensor) -> Tensor:
    """conv(nearest-neighbour doubling of x): (B, C, H, W) -> (B, C', 2H, 2W), in `buffer`."""
    height, width = x.shape[2:]
    out = _in(buffer, (len(x), conv.out_channels, 2 * height, 2 * width))
    padded = F.pad(x, (1, 1, 1, 1))
    for row, column in itertools.product(range(2), repeat=2):
        weight = _half(_half(conv.weight, 2, row), 3, column)
        for first, last in _strips(x, conv.out_channels):
            seen = padded[:, :, first + row : last + row + 1, column : column + width + 1]
            out[:, :, 2 * first + row : 2 * last : 2, column::2] = F.conv2d(seen, weight, conv.bias)
        del weight  # before the next is made
    return out


def _half(weight: Tensor, dim: int, pixel: int) -> Tensor:
    """A kernel of 3 as the first (0) or the second (1) pixel of a doubled pair sees it: a kernel of 2."""
    before, here, after = weight.unbind(dim)
    return torch.stack((before + here, after) if pixel else (before, here + after), dim)


def _strips(x: Tensor, channels: int) -> Iterator[tuple[int, int]]:
    """First and last row (exclusive) of each strip of x (B, C, H, W) that is convolved to `channels`."""
    height = x.shape[2]
    rows = _strip_rows(len(x), x.shape[3], max(x.shape[1], channels))
    return ((first, min(first + rows, height)) for first in range(0, height, rows))


def _strip_rows(num_images: int, width: int, channels: int) -> int:
    return max(1, STRIP_ELEMENTS // (num_images * width * channels))


def _in(buffer: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The beginning of a buffer as a map."""
    return buffer[: torch.Size(shape).numel()].view(shape)


# -- memory -------------------------------------------------------------------------------------


def peak_elements(decoder: Decoder, num_images: int, side: int, element_bytes: int) -> int:
    """Elements that `decode` holds at its fullest for features of side x side, its result left out.

    The two buffers, the map where it is in neither of them, and the fullest of what runs on it.
    """
    buffers = 2 * num_images * largest_map(decoder, side)
    x, fullest = num_images * side**2 * decoder.conv_in.out_channels, 0
    for level in reversed(decoder.up):
        pixels = num_images * side**2
        for block in level.block:
            wide, narrow = block.conv1.in_channels, block.conv1.out_channels
            shortcut = 0 if wide == narrow else pixels * narrow
            first = _norm_conv_elements(num_images, side, wide, narrow, element_bytes)
            second = shortcut + _norm_conv_elements(num_images, side, narrow, narrow, element_bytes)
            fullest, x = max(fullest, x + first, x + second), shortcut or x
            if level.attn:  # queries, keys and values, and three results
                fullest, x = max(fullest, x + 6 * pixels * narrow), pixels * narrow
        if hasattr(level, "upsample"):
            fullest, x, side = max(fullest, x + _upsample_elements(num_images, side, level.upsample.conv)), 0, 2 * side
    channels = decoder.conv_out.in_channels
    last = 9 * MIN_OUTPUTS * channels + _norm_conv_elements(num_images, side, channels, MIN_OUTPUTS, element_bytes)
    return buffers + max(fullest, x + last)


def _norm_conv_elements(num_images: int, side: int, channels: int, out_channels: int, element_bytes: int) -> int:
    """Of `_norm_conv` beyond its two maps: a strip while it is padded, or beside its result.

    Or, in half precision, a copy of the map in float32, for its mean and variance.
    """
    rows, line = min(side, _strip_rows(num_images, side, max(channels, out_channels))), num_images * side
    padding = line * channels * (min(rows + 1, side) + rows + 2)
    convolving = line * (channels * (rows + 2) + out_channels * rows)
    exact = 0 if element_bytes == 4 else line * side * channels * 4 // element_bytes
    return max(padding, convolving, exact)


def _upsample_elements(num_images: int, side: int, conv: nn.Conv2d) -> int:
    """Of `_upsample` beyond its two maps: the padded map, beside a kernel in the making or at work."""
    rows = min(side, _strip_rows(num_images, side, max(conv.in_channels, conv.out_channels)))
    ninth = conv.weight.numel() // 9
    making = 12 * ninth  # the kernel of 2 x 3, the sum of two of its parts, and the one of 2 x 2
    at_work = 4 * ninth + num_images * rows * side * conv.out_channels
    return num_images * (side + 2) ** 2 * conv.in_channels + max(making, at_work)
