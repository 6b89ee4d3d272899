"""The VAR transformer (arXiv 2404.02905), with state-dict keys of FoundationVision/VAR.

Weights and arithmetic are those of the public implementation; what is new is that every pass
takes a `Schedule` and runs, at each scale, only the layers that it names. `forward` is the
teacher-forced pass, which trains; `Block.prepare` and `Block.step` are the pieces of cached
generation, which `generation.py` puts together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from varcompress.kernels.backend import Kernels
from varcompress.kernels.modulate import modulate
from varcompress.models.cache import KVCache
from varcompress.models.linear import ConditionLinear, Linear
from varcompress.schedule import Schedule

MAX_LOG_SCALE = math.log(100)


@dataclass(frozen=True)
class VARConfig:
    """The shape of a transformer, all of it readable from a checkpoint."""

    depth: int
    width: int
    heads: int
    patch_nums: tuple[int, ...]
    vocab: int
    z_channels: int
    classes: int
    shared_aln: bool
    hidden: int  # width of the MLP

    @property
    def tokens(self) -> int:
        """Tokens of one image, L."""
        return sum(p * p for p in self.patch_nums)

    @property
    def mlp_ratio(self) -> float:
        return self.hidden / self.width


class Constants(NamedTuple):
    """What a layer computes once per call: AdaLN vectors (B, 1, C), qkv bias (3C,), temperature (heads,) float32."""

    gamma1: Tensor
    gamma2: Tensor
    scale1: Tensor
    scale2: Tensor
    shift1: Tensor
    shift2: Tensor
    bias: Tensor
    temperature: Tensor

    def of(self, batch: slice) -> Constants:
        """Those of a part of the batch."""
        return Constants(*(vector[batch] for vector in self[:6]), self.bias, self.temperature)


class Stream:
    """The residual stream x (B, n, C) of one scale, and the last branch, which waits with its gate to be added.

    So that the sum, LayerNorm and modulation before the next branch are one operation, and nothing is held longer.
    """

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self._waiting: tuple[Tensor, Tensor] | None = None

    def add(self, branch: Tensor, gate: Tensor) -> None:
        """Let a branch (B, n, C) wait with its gate (B, 1, C)."""
        self._waiting = branch, gate

    def read(self, scale: Tensor, shift: Tensor, kernels: Kernels) -> Tensor:
        """What the next branch reads: LayerNorm and modulation of the sum."""
        if self._waiting is None:
            return kernels.modulate(self.x, scale, shift)
        waiting, self._waiting = self._waiting, None
        self.x, y = kernels.add_modulate(self.x, *waiting, scale, shift)
        return y


class Attention(nn.Module):
    """Multi-head attention with L2-normalised queries and keys and a learned temperature per head."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4.0)))
        self.mat_qkv = Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = Linear(width, width)

    def bias(self) -> Tensor:
        """Bias of queries, keys (always zero) and values: (3C,)."""
        return torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))

    def temperature(self) -> Tensor:
        """What multiplies the normalised queries: (heads,) float32."""
        return self.scale_mul_1H11.flatten().float().clamp_max(MAX_LOG_SCALE).exp()

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, n, C) -> queries, keys, values, each (B, heads, n, head_dim)."""
        qkv = self.mat_qkv(x, self.bias()).unflatten(-1, (3, self.heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q = (F.normalize(q.float(), dim=-1) * self.temperature()[:, None, None]).to(v.dtype)
        k = F.normalize(k.float(), dim=-1).to(v.dtype)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Queries (B, heads, n, head_dim), keys and values (B, heads, m, head_dim), mask (n, m) -> (B, n, C)."""
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
        return self.proj(out.transpose(1, 2).flatten(2))


def cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Blocks, or a whole transformer, to `dtype`, but for the temperatures of attention.

    Their exponential multiplies every logit of a head, and would carry a rounding into all of them.
    """
    attentions = [part for part in module.modules() if isinstance(part, Attention)]
    temperatures = [attention.scale_mul_1H11.data.float() for attention in attentions]
    module.to(dtype)
    for attention, temperature in zip(attentions, temperatures, strict=True):
        attention.scale_mul_1H11.data = temperature


class FeedForward(nn.Module):
    """The MLP of a layer: (B, n, C) -> (B, n, C)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x, gelu=True))


class Block(nn.Module):
    """One layer: attention and MLP, each between an AdaLN modulation and a gate."""

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        width = config.width
        self.attn = Attention(width, config.heads)
        self.ffn = FeedForward(width, config.hidden)
        if config.shared_aln:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, width) / width**0.5)
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), ConditionLinear(width, 6 * width))

    @property
    def matrix_bytes(self) -> int:
        """Bytes of the matrices that every scale reads: AdaLN's are read once a call."""
        return sum(layer.weight.nbytes for layer in (self.attn.mat_qkv, self.attn.proj, self.ffn.fc1, self.ffn.fc2))

    def modulation(self, condition: Tensor, shared: Tensor | None) -> tuple[Tensor, ...]:
        """gamma1, gamma2, scale1, scale2, shift1, shift2, each (B, 1, C); the same at every scale."""
        if shared is not None:
            return (self.ada_gss + shared).unbind(2)
        return self.ada_lin(condition).unflatten(-1, (6, -1))[:, None].unbind(2)

    def forward(self, x: Tensor, modulation: tuple[Tensor, ...], mask: Tensor) -> Tensor:
        """Teacher-forced: x (B, n, C), all scales side by side under a block-causal mask."""
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation
        branch = self.attn.attend(*self.attn.project(modulate(x, scale1, shift1)), mask)
        x = torch.addcmul(x, branch, gamma1)
        return torch.addcmul(x, self.ffn(modulate(x, scale2, shift2)), gamma2)

    def prepare(self, condition: Tensor, shared: Tensor | None) -> Constants:
        """What stays the same at every scale of a call, for class embeddings (B, C)."""
        return Constants(*self.modulation(condition, shared), self.attn.bias(), self.attn.temperature())

    def step(
        self, stream: Stream, constants: Constants, cache: KVCache, layer: int, batch: slice, kernels: Kernels
    ) -> None:
        """Generation: the stream holds one scale of part of the batch; the cache holds earlier ones. No mask."""
        stream.add(self._attend(stream, constants, cache, layer, batch, kernels), constants.gamma1)
        hidden = self.ffn.fc1(stream.read(constants.scale2, constants.shift2, kernels), gelu=True)
        stream.add(self.ffn.fc2(hidden), constants.gamma2)  # not self.ffn, within which its input would live on

    def _attend(
        self, stream: Stream, constants: Constants, cache: KVCache, layer: int, batch: slice, kernels: Kernels
    ) -> Tensor:
        # plain torch adds the bias within the matrix product, the fused kernel while it reads
        within, after = (None, constants.bias) if kernels.adds_bias else (constants.bias, None)
        qkv = self.attn.mat_qkv(stream.read(constants.scale1, constants.shift1, kernels), within)
        new = cache.new(layer, qkv.shape[1], batch)
        q = kernels.split_heads(qkv, after, constants.temperature, *new)
        del qkv
        k, v = cache.read(layer, new, batch)
        del new
        return self.attn.attend(q, k, v)


class HeadNorm(nn.Module):
    """AdaLN before the classifier."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ada_lin = nn.Sequential(nn.SiLU(), ConditionLinear(width, 2 * width))

    def modulation(self, condition: Tensor) -> tuple[Tensor, ...]:
        """scale and shift, each (B, 1, C)."""
        return self.ada_lin(condition).unflatten(-1, (2, -1))[:, None].unbind(2)


class VAR(nn.Module):
    """Next-scale prediction transformer.

    Class index `config.classes` is the null class of classifier-free guidance.
    """

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.word_embed = nn.Linear(config.z_channels, width)
        self.class_emb = nn.Embedding(config.classes + 1, width)
        self.pos_start = nn.Parameter(torch.zeros(1, config.patch_nums[0] ** 2, width))
        self.pos_1LC = nn.Parameter(torch.zeros(1, config.tokens, width))
        self.lvl_embed = nn.Embedding(len(config.patch_nums), width)
        if config.shared_aln:
            self.shared_ada_lin = nn.Sequential(nn.SiLU(), ConditionLinear(width, 6 * width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head_nm = HeadNorm(width)
        self.head = Linear(width, config.vocab)
        self.checkpointing = False  # recompute activations in the backward pass; set by the training loop

    @property
    def device(self) -> torch.device:
        return self.pos_start.device

    def scale_positions(self, scale: int, start: int, end: int) -> Tensor:
        """Position plus level embedding of the tokens start to end, which are those of `scale`: (1, n, C)."""
        return self.pos_1LC[:, start:end] + self.lvl_embed.weight[scale]

    def scale_index(self) -> Tensor:
        """The scale of each token: (L,) int64."""
        sides = torch.tensor(self.config.patch_nums, device=self.device)
        return torch.arange(len(sides), device=self.device).repeat_interleave(sides**2)

    def positions(self) -> Tensor:
        """Position plus level embedding of every token: (1, L, C)."""
        return self.pos_1LC + self.lvl_embed(self.scale_index())

    def shared_modulation(self, condition: Tensor) -> Tensor | None:
        """The part of the AdaLN vectors that all layers share, (B, 1, 6, C); None in models without."""
        return self.shared_ada_lin(condition).unflatten(-1, (6, -1))[:, None] if self.config.shared_aln else None

    def first_input(self, condition: Tensor) -> Tensor:
        """Input of scale 1 from class embeddings: (B, C) -> (B, p_1^2, C), position not yet added."""
        return condition[:, None] + self.pos_start

    def forward(self, labels: Tensor, teacher_input: Tensor, schedule: Schedule) -> Tensor:
        """Teacher-forced logits under a schedule.

        labels: (B,) int64; teacher_input: (B, L - p_1^2, z_channels), see `VQVAE.teacher_input`.
        Returns (B, L, V) float32. A layer sees only the tokens of the scales that it runs at; the
        block-causal mask makes that exactly what cached generation computes.
        """
        condition = self.class_emb(labels)
        x = torch.cat((self.first_input(condition), self.word_embed(teacher_input.to(condition.dtype))), dim=1)
        x = x + self.positions()
        shared = self.shared_modulation(condition)
        scale = self.scale_index()
        mask = scale[:, None] >= scale[None, :]
        for layer in schedule.layers[0]:
            seen = schedule.layer_tokens[layer]
            arguments = (x[:, :seen], self.blocks[layer].modulation(condition, shared), mask[:seen, :seen])
            if self.checkpointing and torch.is_grad_enabled():
                y = checkpoint(self.blocks[layer], *arguments, use_reentrant=False)
            else:
                y = self.blocks[layer](*arguments)
            x = y if seen == x.shape[1] else torch.cat((y, x[:, seen:]), dim=1)
        return self.head(modulate(x, *self.head_nm.modulation(condition))).float()
