"""Encoder and decoder of the tokenizer: those of the VQGAN family (CompVis/latent-diffusion), keys and all."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from varcompress.kernels.backend import TORCH, Kernels

NORM_GROUPS = 32
NORM_EPS = 1e-6
GPU_MIN_OUTPUTS = 8  # channels: cuDNN's kernel for the three of an image took a fifth of the decoder's time


@dataclass(frozen=True)
class TokenizerConfig:
    """The shape of a tokenizer; all but patch_nums is readable from its checkpoint."""

    channels: int
    channel_multipliers: tuple[int, ...]
    res_blocks: int
    z_channels: int
    vocab: int
    phis: int
    kernel: int  # of the convolutions around the quantiser
    patch_nums: tuple[int, ...]

    @property
    def downsampling(self) -> int:
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def map_elements(self) -> int:
        """Elements of the decoder's map at full resolution, for one image."""
        return self.channels * self.image_size**2

    @property
    def image_size(self) -> int:
        """Side of an image in pixels."""
        return self.patch_nums[-1] * self.downsampling


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, channels, eps=NORM_EPS)


class ResBlock(nn.Module):
    """Two normalised convolutions beside a shortcut: (B, channels, H, W) -> (B, out_channels, H, W)."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = _norm(channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, kernels: Kernels = TORCH) -> Tensor:
        h = kernels.group_norm(self.norm1, x, silu=True)
        h = self.conv1(h)
        h = kernels.group_norm(self.norm2, h, silu=True)  # one name: no map outlives its use
        h = self.conv2(h)
        return h.add_(self.nin_shortcut(x))


class AttentionBlock(nn.Module):
    """Self-attention over the pixels of a feature map, one head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, kernels: Kernels = TORCH) -> Tensor:
        q, k, v = self.qkv(kernels.group_norm(self.norm, x)).flatten(2).transpose(1, 2).chunk(3, dim=-1)
        h = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.proj_out(h.transpose(1, 2).unflatten(2, x.shape[2:]))


class Resample(nn.Module):
    """Half or double the resolution, then (or while) convolving."""

    def __init__(self, channels: int, *, down: bool) -> None:
        super().__init__()
        self.down = down
        self.conv = nn.Conv2d(channels, channels, 3, stride=2 if down else 1, padding=0 if down else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.down else F.interpolate(x, scale_factor=2, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution. `attn` is empty but at the lowest."""

    def __init__(self, channels: int, out_channels: int, blocks: int, attention: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResBlock(channels if i == 0 else out_channels, out_channels) for i in range(blocks))
        self.attn = nn.ModuleList(AttentionBlock(out_channels) for _ in range(blocks if attention else 0))

    def forward(self, x: Tensor, kernels: Kernels = TORCH) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x, kernels)
            if self.attn:
                x = self.attn[i](x, kernels)
        return x


class Middle(nn.Module):
    """The blocks at the lowest resolution, between encoder or decoder and the rest: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels)
        self.attn_1 = AttentionBlock(channels)
        self.block_2 = ResBlock(channels, channels)

    def forward(self, x: Tensor, kernels: Kernels = TORCH) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x, kernels), kernels), kernels)


class Encoder(nn.Module):
    """Images in [-1, 1], (B, 3, H, W), to (B, z_channels, P, P), P being H / downsampling."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.channel_multipliers]
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            lowest = i == len(widths) - 1
            level = Level(widths[i - 1] if i else config.channels, width, config.res_blocks, lowest)
            if not lowest:
                level.downsample = Resample(width, down=True)
            self.down.append(level)
        self.mid = Middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        h = self.conv_in(images)
        for level in self.down:
            h = level(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
        return self.conv_out(TORCH.group_norm(self.norm_out, self.mid(h), silu=True))


class Decoder(nn.Module):
    """Features (B, z_channels, P, P) to images (B, 3, H, W), about in [-1, 1]."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.channel_multipliers]
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            lowest = i == len(widths) - 1
            level = Level(width if lowest else widths[i + 1], width, config.res_blocks + 1, lowest)
            if i:
                level.upsample = Resample(width, down=False)
            self.up.append(level)
        self.norm_out = _norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor, kernels: Kernels = TORCH) -> Tensor:
        h = self.mid(self.conv_in(z), kernels)
        for level in reversed(self.up):
            h = level(h, kernels)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        return _convolve(self.conv_out, kernels.group_norm(self.norm_out, h, silu=True))


def _convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    return conv(x) if x.device.type == "cpu" else widened(conv, x)


def widened(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """conv(x), with output channels added whose results nobody reads."""
    missing = max(0, GPU_MIN_OUTPUTS - conv.out_channels)
    weight, bias = F.pad(conv.weight, (0, 0, 0, 0, 0, 0, 0, missing)), F.pad(conv.bias, (0, missing))
    return F.conv2d(x, weight, bias, conv.stride, conv.padding)[:, : conv.out_channels].contiguous()
