"""Which tokens see which in a teacher-forced pass, and attention under that.

On a GPU it is FlexAttention (torch.nn.attention.flex_attention), which computes no block of which nothing is seen:
at 512 px a mask of every token and every other takes three times as long (docs/training.md). Elsewhere it is that mask.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from varcompress.hardware import compiled
from varcompress.kernels import available

if TYPE_CHECKING:  # which takes a second to import, and generation never needs it
    from torch.nn.attention.flex_attention import BlockMask

# All but cuDNN's, whose backward pass gives NaN under a mask at some lengths, such as the 2,240 tokens of 512 px.
MASKED_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Layout:
    """Where the tokens of an image stand, on a device. scale: of each token, (L,) int64."""

    def __init__(self, patch_nums: tuple[int, ...], device: torch.device) -> None:
        self.scale = torch.tensor([k for k, side in enumerate(patch_nums) for _ in range(side * side)], device=device)
        self._blocks: dict[tuple[int, ...], BlockMask] = {}

    def mask(self, trunk: int, seen: tuple[int, ...]) -> Tensor | BlockMask:
        """The mask of a layer that sees the first `seen` tokens of each piece of a pass (see `Together`).

        Block-causal: a token sees those of its own scale and of earlier ones, in the trunk and in its own tail.
        (n, n) bool, [i, j] saying whether token i sees token j; or the same in blocks, where attention takes these.
        """
        lengths, device = (seen[0], *filter(None, seen[1:])), self.scale.device
        if not blockwise(device):
            places = torch.arange(sum(lengths), device=device)
            return self._rule(trunk, lengths)(places[:, None], places)
        if lengths not in self._blocks:
            from torch.nn.attention.flex_attention import create_block_mask

            with torch.inference_mode(False):  # a later pass may train
                rule, size = self._rule(trunk, lengths), sum(lengths)
                self._blocks[lengths] = create_block_mask(
                    lambda batch, head, i, j: rule(i, j), None, None, size, size, device=device
                )
        return self._blocks[lengths]

    def mask_among(self, tokens: Tensor) -> Tensor:
        """The same of a layer that sees some tokens of an image, (n,) int64 ascending: (n, n) bool, on every device."""
        scale = self.scale[tokens]
        return scale[:, None] >= scale

    def _rule(self, trunk: int, lengths: tuple[int, ...]) -> Callable[[Tensor, Tensor], Tensor]:
        """Whether token i of a pass sees token j, as a function of tensors of both."""
        device = self.scale.device
        starts = [0, *[trunk] * (len(lengths) - 1)]
        scale = torch.cat([self.scale[start : start + n] for start, n in zip(starts, lengths, strict=True)])
        piece = torch.cat([torch.full((n,), i, device=device) for i, n in enumerate(lengths)])
        return lambda i, j: (scale[i] >= scale[j]) & ((piece[i] == piece[j]) | (piece[j] == 0))


def blockwise(device: torch.device) -> bool:
    """Whether attention takes its mask in blocks: on a GPU that is there, whose kernel Triton compiles."""
    return device.type == "cuda" and torch.cuda.is_available() and available(device)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask) -> Tensor:
    """Attention of normalised queries: q, k, v (B, heads, n, head_dim) under a `Layout.mask` -> the same shape."""
    if isinstance(mask, Tensor):
        with sdpa_kernel(MASKED_BACKENDS):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
    return _flex_attention()(q, k, v, block_mask=mask, scale=1.0)


@cache
def _flex_attention() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return compiled(flex_attention)
