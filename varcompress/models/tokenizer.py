"""The multi-scale residual VQVAE tokenizer of VAR, with state-dict keys of FoundationVision/VAR.

The quantiser writes an image as a pyramid of token maps whose decoded sum is f_hat; the encoder before it and the
decoder after it are in `autoencoder.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varcompress.hardware import exact_float32
from varcompress.kernels.backend import TORCH, Kernels
from varcompress.models import strips
from varcompress.models.autoencoder import Decoder, Encoder, TokenizerConfig

PHI_RATIO = 0.5
# Elements of the decoder's map at full resolution, of all images decoded together: beyond it a CPU is not faster; a
# GPU's is chosen by memory.
CPU_MAP_ELEMENTS, GPU_MAP_ELEMENTS = 1 << 22, 1 << 27


def upsample(h: Tensor, side: int) -> Tensor:
    """Bicubic interpolation of square maps: (B, C, p, p) -> (B, C, side, side).

    On a GPU as two products with the matrix of one dimension: torch's own kernel, with a thread for each place of a
    single map, took a third of the kernels' time of VAR-d16 under d2 (docs/performance.md).
    """
    return F.interpolate(h, size=(side, side), mode="bicubic") if h.device.type == "cpu" else by_products(h, side)


def by_products(h: Tensor, side: int) -> Tensor:
    """`upsample` as matrix products, equal to rounding."""
    unit = torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)
    matrix = F.interpolate(unit[None, :, :, None], size=(side, 1), mode="bicubic")[0, :, :, 0]  # (p, side)
    with exact_float32(h.device):
        return matrix.T @ h @ matrix


class Phi(nn.Conv2d):
    """The residual convolution after upsampling: (1 - r) x + r conv(x)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 - PHI_RATIO) + super().forward(x) * PHI_RATIO


class SharedPhis(nn.Module):
    """A few phi shared over the scales: each scale takes the one whose tick is nearest to k / (K - 1)."""

    def __init__(self, channels: int, count: int) -> None:
        super().__init__()
        self.qresi_ls = nn.ModuleList(Phi(channels) for _ in range(count))
        edge = 1 / (3 * count) if count == 4 else 1 / (2 * count)
        # numpy's own rounding decides ties, as in the public code: with three scales the middle one is a tie
        self.ticks = np.linspace(edge, 1 - edge, count)

    def at(self, scale: int, scales: int) -> Phi:
        position = scale / (scales - 1) if scales > 1 else 0.0
        return self.qresi_ls[int(np.abs(self.ticks - position).argmin())]


class Quantizer(nn.Module):
    """Multi-scale residual quantisation. Always computes in float32: one wrong index spoils all later scales."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.patch_nums = config.patch_nums
        self.embedding = nn.Embedding(config.vocab, config.z_channels)
        self.quant_resi = SharedPhis(config.z_channels, config.phis)

    def nearest(self, z: Tensor) -> Tensor:
        """Index of the nearest codebook entry by Euclidean distance: (N, C) -> (N,) int64."""
        codebook = self.embedding.weight
        distance = z.square().sum(dim=1, keepdim=True) + codebook.square().sum(dim=1)
        with exact_float32(z.device):
            return distance.addmm_(z, codebook.T, alpha=-2).argmin(dim=1)

    def contribution(self, scale: int, tokens: Tensor) -> Tensor:
        """What one decoded token map adds to f_hat: (B, p*p) int64 -> (B, C, P, P)."""
        side, full = self.patch_nums[scale], self.patch_nums[-1]
        h = self.embedding(tokens).transpose(1, 2).unflatten(2, (side, side))
        if scale < len(self.patch_nums) - 1:
            h = upsample(h, full)
        with exact_float32(h.device):
            return self.quant_resi.at(scale, len(self.patch_nums))(h.contiguous())

    def next_input(self, scale: int, f_hat: Tensor) -> Tensor:
        """Input of scale `scale` from f_hat of all earlier ones: (B, C, P, P) -> (B, p*p, C)."""
        side = self.patch_nums[scale]
        return F.interpolate(f_hat, size=(side, side), mode="area").flatten(2).transpose(1, 2)

    @torch.no_grad()
    def tokens(self, f: Tensor) -> Tensor:
        """Token maps of encoder features: (B, C, P, P) -> (B, L) int64."""
        rest, maps = f.float().clone(), []
        for scale, side in enumerate(self.patch_nums):
            z = rest if scale == len(self.patch_nums) - 1 else F.interpolate(rest, size=(side, side), mode="area")
            maps.append(self.nearest(z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])).view(len(f), -1))
            rest -= self.contribution(scale, maps[-1])
        return torch.cat(maps, dim=1)

    def partial_sums(self, tokens: Tensor) -> Iterator[Tensor]:
        """f_hat after each scale: tokens (B, L) int64 -> K tensors (B, C, P, P) float32.

        Differentiable in codebook and phi.
        """
        f_hat = None
        for scale, scale_tokens in enumerate(tokens.split([p * p for p in self.patch_nums], dim=1)):
            added = self.contribution(scale, scale_tokens).float()
            f_hat = added if f_hat is None else f_hat + added
            yield f_hat


class VQVAE(nn.Module):
    """Images to token pyramids and back."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Quantizer(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.z_channels, config.kernel, padding=config.kernel // 2)
        self.post_quant_conv = nn.Conv2d(
            config.z_channels, config.z_channels, config.kernel, padding=config.kernel // 2
        )

    def features(self, images: Tensor) -> Tensor:
        """Encoder features of images in [0, 1]: (B, 3, H, W) -> (B, C, P, P)."""
        with exact_float32(images.device):
            return self.quant_conv(self.encoder(images * 2 - 1))

    def encode(self, images: Tensor) -> Tensor:
        """Images in [0, 1], (B, 3, H, W), to tokens (B, L) int64."""
        return self.quantize.tokens(self.features(images))

    def f_hat(self, tokens: Tensor) -> Tensor:
        """The decoded sum of all token maps: (B, L) int64 -> (B, C, P, P) float32."""
        *_, f_hat = self.quantize.partial_sums(tokens)
        return f_hat

    def teacher_input(self, tokens: Tensor) -> Tensor:
        """What the transformer reads at scales 2 to K when fed `tokens`: (B, L) -> (B, L - p_1^2, C) float32."""
        sums = zip(range(1, len(self.config.patch_nums)), self.quantize.partial_sums(tokens), strict=False)
        return torch.cat([self.quantize.next_input(scale, f_hat) for scale, f_hat in sums], dim=1)

    def decode_features(self, f_hat: Tensor, kernels: Kernels = TORCH) -> Tensor:
        """f_hat (B, C, P, P) to images (B, 3, H, W) in [0, 1], float32."""
        z = self.post_quant_conv(f_hat.to(self.post_quant_conv.weight.dtype))
        on_cpu = z.device.type == "cpu" and not torch.is_grad_enabled()
        images = strips.decode(self.decoder, z) if on_cpu else self.decoder(z, kernels)
        return images.float().clamp_(-1, 1).add_(1).mul_(0.5)

    @property
    def images_at_a_time(self) -> int:
        """Images that are decoded together, so that a map of the last level stays small; at least one."""
        limit = CPU_MAP_ELEMENTS if self.quantize.embedding.weight.device.type == "cpu" else GPU_MAP_ELEMENTS
        return max(1, limit // self.config.map_elements)

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens (B, L) int64 to images (B, 3, H, W) in [0, 1]."""
        return self.decode_features(self.f_hat(tokens))
