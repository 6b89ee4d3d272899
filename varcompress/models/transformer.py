"""The VAR transformer (arXiv 2404.02905), with state-dict keys of FoundationVision/VAR.

Weights and arithmetic are those of the public implementation; what is new is that every pass
takes a `Schedule` and runs, at each scale, only the layers that it names. `forward` is the
teacher-forced pass, which trains; `Block.prepare` and `Block.step` are the pieces of cached
generation, which `generation.py` puts together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from varcompress.hardware import compiled
from varcompress.kernels.backend import Kernels
from varcompress.kernels.modulate import modulate
from varcompress.models.cache import KVCache
from varcompress.models.linear import ConditionLinear, Linear
from varcompress.models.masks import Layout, masked_attention
from varcompress.schedule import Gapped, Schedule, Together

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

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
    cfg_input: bool = False  # whether the weight of guidance, distilled into the model, is an input

    @property
    def tokens(self) -> int:
        """Tokens of one image, L."""
        return sum(p * p for p in self.patch_nums)

    @property
    def mlp_ratio(self) -> float:
        return self.hidden / self.width


class Constants(NamedTuple):
    """What a layer computes once per call of generation.

    The six AdaLN vectors are (B, 1, C), the bias of queries, keys and values (3C,), the temperature (heads,) float32.
    """

    gamma1: Tensor
    gamma2: Tensor
    scale1: Tensor
    scale2: Tensor
    shift1: Tensor
    shift2: Tensor
    bias: Tensor
    temperature: Tensor

    def of(self, batch: slice) -> Constants:
        """The constants of some rows of the batch."""
        return Constants(*(vector[batch] for vector in self[:6]), self.bias, self.temperature)


class Residual:
    """The residual x (B, n, C) of one scale, together with the last branch, which has not been added to it yet.

    The branch waits with its gate until the next one reads the residual. The sum, LayerNorm and modulation are then
    one operation, and no intermediate result is held longer than it is needed.
    """

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self._waiting: tuple[Tensor, Tensor] | None = None

    def add(self, branch: Tensor, gate: Tensor) -> None:
        """Add `gate * branch` when the residual is read next; branch: (B, n, C), gate: (B, 1, C)."""
        self._waiting = branch, gate

    def read(self, scale: Tensor, shift: Tensor, kernels: Kernels) -> Tensor:
        """LayerNorm and modulation of the sum, which the next branch reads: (B, n, C). scale and shift: (B, 1, C)."""
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
        """The factor of the normalised queries, one per head: (heads,) float32."""
        return self.scale_mul_1H11.flatten().float().clamp_max(MAX_LOG_SCALE).exp()

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, n, C) -> queries, keys, values, each (B, heads, n, head_dim)."""
        qkv = self.mat_qkv(x, self.bias()).unflatten(-1, (3, self.heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q = (F.normalize(q.float(), dim=-1) * self.temperature()[:, None, None]).to(v.dtype)
        k = F.normalize(k.float(), dim=-1).to(v.dtype)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask | None = None) -> Tensor:
        """Queries (B, heads, n, head_dim), keys and values (B, heads, m, head_dim) -> (B, n, C).

        mask: what `Layout.mask` gives; none where every query sees all keys.
        """
        out = F.scaled_dot_product_attention(q, k, v, scale=1.0) if mask is None else masked_attention(q, k, v, mask)
        return self.proj(out.transpose(1, 2).flatten(2))


def to_dtype(module: nn.Module, dtype: torch.dtype) -> None:
    """Convert blocks, or a whole transformer, to `dtype`, and leave the temperatures of attention in float32.

    The exponential of a temperature multiplies every logit of its head, and would carry a rounding into all of them.
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
        """The AdaLN vectors gamma1, gamma2, scale1, scale2, shift1, shift2, each (B, 1, C); the same at every scale.

        condition: (B, C); shared: (B, 1, 6, C) in models whose layers share a part of them, else None.
        """
        if shared is not None:
            return (self.ada_gss + shared).unbind(2)
        return self.ada_lin(condition).unflatten(-1, (6, -1))[:, None].unbind(2)

    def forward(self, x: Tensor, condition: Tensor, shared: Tensor | None, mask: Tensor | BlockMask) -> Tensor:
        """The teacher-forced pass, in which all scales stand side by side: x (B, n, C) -> (B, n, C).

        condition and shared: see `modulation`; mask: see `Layout.mask`. The AdaLN vectors are computed in here
        so that activation checkpointing keeps the condition in their place, and so that whoever shards a block's
        weights (FSDP) can gather all of them when the block is called.
        """
        gamma1, gamma2, scale1, scale2, shift1, shift2 = self.modulation(condition, shared)
        branch = self.attn.attend(*self.attn.project(modulate(x, scale1, shift1)), mask)
        x = torch.addcmul(x, branch, gamma1)
        return torch.addcmul(x, self.ffn(modulate(x, scale2, shift2)), gamma2)

    def prepare(self, condition: Tensor, shared: Tensor | None) -> Constants:
        """Compute what stays the same at every scale of a call of generation; arguments as in `modulation`."""
        return Constants(*self.modulation(condition, shared), self.attn.bias(), self.attn.temperature())

    def step(
        self, residual: Residual, constants: Constants, cache: KVCache, layer: int, batch: slice, kernels: Kernels
    ) -> None:
        """Run one scale in generation, which needs no mask: the cache holds the earlier scales.

        residual: that of the rows `batch` of the call; constants: of the same rows.
        """
        residual.add(self._attend(residual, constants, cache, layer, batch, kernels), constants.gamma1)
        hidden = self.ffn.fc1(residual.read(constants.scale2, constants.shift2, kernels), gelu=True)
        residual.add(self.ffn.fc2(hidden), constants.gamma2)  # not self.ffn, within which its input would live on

    def _attend(
        self, residual: Residual, constants: Constants, cache: KVCache, layer: int, batch: slice, kernels: Kernels
    ) -> Tensor:
        # plain torch adds the bias within the matrix product, the fused kernel while it reads
        within, after = (None, constants.bias) if kernels.adds_bias else (constants.bias, None)
        qkv = self.attn.mat_qkv(residual.read(constants.scale1, constants.shift1, kernels), within)
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
        """The AdaLN vectors scale and shift, each (B, 1, C), of condition (B, C)."""
        return self.ada_lin(condition).unflatten(-1, (2, -1))[:, None].unbind(2)


def cfg_embedding(width: int) -> nn.Sequential:
    """The embedding of a weight of guidance, (B, 1) -> (B, C), which is zero until it is trained."""
    embedding = nn.Sequential(ConditionLinear(1, width), nn.SiLU(), ConditionLinear(width, width))
    nn.init.zeros_(embedding[2].weight)
    nn.init.zeros_(embedding[2].bias)
    return embedding


def add_cfg_input(var: VAR) -> None:
    """Give a transformer the weight of guidance as an input from now on, which changes nothing until it is trained.

    The new weights are the same in every process, and in the device and dtype of the others.
    """
    embedding, generator = cfg_embedding(var.config.width), torch.Generator().manual_seed(0)
    for parameter in embedding[0].parameters():
        nn.init.uniform_(parameter, -1, 1, generator=generator)  # as torch does for one input
    var.cfg_embed = embedding.to(var.device, var.pos_start.dtype)
    var.config = replace(var.config, cfg_input=True)


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
        if config.cfg_input:  # last, where `add_cfg_input` puts it: a fingerprint reads weights in order
            self.cfg_embed = cfg_embedding(width)
        self._layout: Layout | None = None

    @property
    def device(self) -> torch.device:
        return self.pos_start.device

    def compile_layers(self, on: bool = True) -> None:
        """Run the teacher-forced pass of each layer by torch.compile from now on, or as it is."""
        for block in self.blocks:
            if on:  # not the module: hooks around it, such as FSDP's, stay outside
                block.forward = compiled(block.forward)
            else:
                vars(block).pop("forward", None)

    def scale_positions(self, scale: int, start: int, end: int) -> Tensor:
        """Position plus level embedding of the tokens of `scale`, which go from `start` to `end`: (1, n, C)."""
        return self.pos_1LC[:, start:end] + self.lvl_embed.weight[scale]

    @property
    def layout(self) -> Layout:
        """Where tokens stand, on the model's device, where that is made once."""
        if self._layout is None or self._layout.scale.device != self.device:
            with torch.inference_mode(False):  # a later pass may train
                self._layout = Layout(self.config.patch_nums, self.device)
        return self._layout

    def positions(self) -> Tensor:
        """Position plus level embedding of every token: (1, L, C)."""
        return self.pos_1LC + self.lvl_embed(self.layout.scale)

    def shared_modulation(self, condition: Tensor) -> Tensor | None:
        """The part of the AdaLN vectors that all layers share, (B, 1, 6, C); None in models without."""
        return self.shared_ada_lin(condition).unflatten(-1, (6, -1))[:, None] if self.config.shared_aln else None

    def condition(self, labels: Tensor, cfg: Tensor | None = None) -> Tensor:
        """What conditions all layers: (B, C).

        labels: (B,) int64; cfg: (B,) float32, the weights of guidance, read by models with `config.cfg_input` alone.
        """
        condition = self.class_emb(labels)
        if self.config.cfg_input:
            condition = condition + self.cfg_embed(cfg[:, None].to(condition.dtype))
        return condition

    def first_input(self, condition: Tensor) -> Tensor:
        """The input of scale 1, its position not yet added: condition (B, C) -> (B, p_1^2, C)."""
        return condition[:, None] + self.pos_start

    def forward(
        self,
        labels: Tensor,
        teacher_input: Tensor,
        schedules: Schedule | Together,
        *,
        cfg: Tensor | None = None,
        checkpointing: bool = False,
    ) -> Tensor:
        """Teacher-forced logits under a schedule, (B, L, V) float32, or under several in one pass, (B, N, V).

        labels: (B,) int64; teacher_input: (B, L - p_1^2, z_channels), see `VQVAE.teacher_input`; N: the tokens of all
        pieces of the pass, one after another; cfg: see `condition`; checkpointing: recompute the activations of
        each layer in the backward pass instead of keeping them.
        A layer sees only the tokens of the scales that it runs at; the block-causal mask makes that exactly what
        cached generation computes. A `Gapped` schedule has a pass of its own, which is slower.
        """
        if isinstance(schedules, Gapped):
            return self._forward_gapped(labels, teacher_input, schedules, cfg)
        together = schedules if isinstance(schedules, Together) else Together((schedules,))
        condition, x = self._embed(labels, teacher_input, cfg)
        trunk, late = x.split((together.trunk, self.config.tokens - together.trunk), dim=1)
        pieces = Pieces([trunk, *[late] * (len(together.lengths) - 1)])
        shared = self.shared_modulation(condition)
        seen = None
        for layer in together.layers:
            if together.seen(layer) != seen:
                seen = together.seen(layer)
                x, mask = pieces.take(x, seen), self.layout.mask(together.trunk, seen)
            given = (x, condition, shared, mask)
            if checkpointing and torch.is_grad_enabled():
                x = checkpoint(self.blocks[layer], *given, use_reentrant=False)
            else:
                x = self.blocks[layer](*given)
        return self._classify(pieces.take(x, together.lengths), condition)

    def _embed(self, labels: Tensor, teacher_input: Tensor, cfg: Tensor | None) -> tuple[Tensor, Tensor]:
        """The condition (B, C), and what the first layer reads in a teacher-forced pass, (B, L, C)."""
        condition = self.condition(labels, cfg)
        x = torch.cat((self.first_input(condition), self.word_embed(teacher_input.to(condition.dtype))), dim=1)
        return condition, x + self.positions()

    def _classify(self, x: Tensor, condition: Tensor) -> Tensor:
        """The logits of what the last layer gave: (B, n, C) -> (B, n, V) float32."""
        return self.head(modulate(x, *self.head_nm.modulation(condition))).float()

    def _forward_gapped(self, labels: Tensor, teacher_input: Tensor, schedule: Gapped, cfg: Tensor | None) -> Tensor:
        """`forward` under a schedule with gaps: each layer runs the tokens of its scales, which see each other."""
        condition, x = self._embed(labels, teacher_input, cfg)
        shared = self.shared_modulation(condition)
        for layer, block in enumerate(self.blocks):
            runs = torch.tensor([layer in layers for layers in schedule.layers], device=x.device)
            tokens = runs[self.layout.scale].nonzero().flatten()
            if len(tokens):
                result = block(x[:, tokens], condition, shared, self.layout.mask_among(tokens))
                x = x.index_copy(1, tokens, result)
        return self._classify(x, condition)


class Pieces:
    """The residual of a pass in pieces (B, n, C), of which some layers see only the first tokens, or none."""

    def __init__(self, pieces: list[Tensor]) -> None:
        self._waiting, self._taken = pieces, [0] * len(pieces)

    def take(self, x: Tensor, tokens: tuple[int, ...]) -> Tensor:
        """The first `tokens` of each piece side by side, (B, n, C), once `x` has brought back what was taken before.

        It is no view: of a view, a layer would keep the whole base for its backward pass.
        """
        if sum(self._taken):
            back = x.split(self._taken, dim=1)
            self._waiting = [_join(part, rest) for part, rest in zip(back, self._waiting, strict=True)]
        self._taken = list(tokens)
        taken = [piece[:, :n] for piece, n in zip(self._waiting, tokens, strict=True)]
        self._waiting = [piece[:, n:] for piece, n in zip(self._waiting, tokens, strict=True)]
        return torch.cat([part for part in taken if part.shape[1]] or taken, dim=1)


def _join(part: Tensor, rest: Tensor) -> Tensor:
    if not rest.shape[1]:
        return part
    return torch.cat((part, rest), dim=1) if part.shape[1] else rest
