"""ElasticVAR: a transformer and its tokenizer, one set of weights, depth chosen at each call."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from varcompress.cache import KVCache
from varcompress.errors import InputError
from varcompress.models.tokenizer import VQVAE
from varcompress.models.transformer import VAR
from varcompress.sampling import check_settings, draw, guide, uniform
from varcompress.schedule import Schedule


@dataclasses.dataclass
class Provenance:
    """Where a model comes from, and what was done to it. Saved with it."""

    name: str = "var"
    base_model: str | None = None  # Hub id of the checkpoint that was compressed
    license: str | None = None  # SPDX-style identifier as the Hub writes it
    recipe: dict | None = None  # the recipe that made it elastic, None for an untouched checkpoint


def default_bridge(scales: int) -> int:
    """Six scales of ten, as in VARiant's main table, and in that proportion for other models."""
    return max(1, round(0.6 * scales))


class ElasticVAR(nn.Module):
    """Generates, encodes and scores images under any schedule.

    bridge: scales that run all layers in schedules that name none (`d8`).
    depths: depths it was trained for, largest first; empty for an untouched checkpoint.
    """

    def __init__(
        self,
        var: VAR,
        tokenizer: VQVAE,
        *,
        bridge: int | None = None,
        depths: Sequence[int] = (),
        provenance: Provenance | None = None,
    ) -> None:
        super().__init__()
        self.var, self.tokenizer = var, tokenizer
        self.bridge = default_bridge(len(var.config.patch_nums)) if bridge is None else bridge
        self.depths = tuple(depths)
        self.provenance = provenance or Provenance()
        self.eval()

    @property
    def device(self) -> torch.device:
        return self.var.device

    @property
    def dtype(self) -> torch.dtype:
        return self.var.pos_start.dtype

    def cast(self, dtype: torch.dtype) -> ElasticVAR:
        """Transformer and decoder to `dtype`; encoder and quantiser stay float32, because tokens must be exact."""
        self.var.to(dtype)
        self.tokenizer.decoder.to(dtype)
        self.tokenizer.post_quant_conv.to(dtype)
        return self

    def schedule(self, schedule: str | Schedule = "full") -> Schedule:
        """A schedule of this model, from its text form. Raises InputError for one that does not fit."""
        config = self.var.config
        if isinstance(schedule, str):
            return Schedule.parse(schedule, depth=config.depth, patch_nums=config.patch_nums, bridge=self.bridge)
        if not isinstance(schedule, Schedule):
            raise InputError(f"a schedule is text, such as full or d8, or a Schedule, not {schedule!r}")
        if (schedule.depth, schedule.patch_nums) != (config.depth, config.patch_nums):
            raise InputError(f"schedule {schedule} was made for another model")
        return schedule

    def default_schedules(self) -> list[Schedule]:
        """`full`, then the depths the model was trained for, or 16, 8, 4 and 2 where it was trained for none."""
        depth = self.var.config.depth
        depths = self.depths or (16, 8, 4, 2)
        return [self.schedule("full"), *(self.schedule(f"d{d}") for d in depths if d < depth)]

    def labels(self, labels: Sequence[int] | Tensor) -> Tensor:
        """Class indices as a tensor (B,) on the model's device. Raises InputError for an unknown class."""
        classes, labels = self.var.config.classes, _integers(labels)
        if labels is None or labels.ndim != 1 or not len(labels):
            raise InputError("labels must be a list of at least one class index, a whole number")
        unknown = labels[(labels < 0) | (labels >= classes)]
        if len(unknown):
            raise InputError(f"class {int(unknown[0])} is unknown: this model has classes 0 to {classes - 1}")
        return labels.to(self.device)

    def _tokens(self, tokens: Tensor, images: int | None = None) -> Tensor:
        """Tokens as int64 (B, L) on the model's device. Raises InputError for what is none, or not of `images`."""
        config, found = self.var.config, _integers(tokens)
        if found is None or found.ndim != 2 or found.shape[1] != config.tokens or not len(found):
            shape = "" if found is None else f", not of shape {tuple(found.shape)}"
            raise InputError(f"tokens must be whole numbers of shape (B, {config.tokens}){shape}")
        if images not in (None, len(found)):
            raise InputError(f"tokens of {len(found)} images for {images} labels: give as many of each")
        low, high = torch.stack(found.aminmax()).tolist()
        if low < 0 or high >= config.vocab:
            raise InputError(f"token {low if low < 0 else high} is unknown: the codebook has 0 to {config.vocab - 1}")
        return found.to(self.device)

    @torch.inference_mode()
    def generate(
        self,
        labels: Sequence[int] | Tensor,
        schedule: str | Schedule = "full",
        *,
        cfg: float = 1.5,
        top_k: int = 900,
        top_p: float = 0.96,
        seed: int = 0,
        first_index: int = 0,
    ) -> Tensor:
        """Images of the given classes: (B, 3, H, W) float32 in [0, 1].

        Image i of the call has the random stream (seed, first_index + i), whatever the batch size.
        The defaults are the published settings of VAR's FID. An image whose logits overflow the dtype
        is NaN throughout. Raises InputError for an unknown class, a schedule that does not fit, cfg
        that is not finite, a negative top_k, top_p outside 0 to 1, and a seed outside 0 to 2^63 - 1.
        """
        tokens_f_hat = self.generate_tokens(
            labels, schedule, cfg=cfg, top_k=top_k, top_p=top_p, seed=seed, first_index=first_index
        )
        return self.tokenizer.decode_features(tokens_f_hat[1])

    @torch.inference_mode()
    def generate_tokens(
        self,
        labels: Sequence[int] | Tensor,
        schedule: str | Schedule = "full",
        *,
        cfg: float = 1.5,
        top_k: int = 900,
        top_p: float = 0.96,
        seed: int = 0,
        first_index: int = 0,
        forced: Tensor | None = None,
        logits_out: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The transformer's part of `generate`: tokens (B, L) int64 and f_hat (B, C, P, P) float32.

        forced: tokens (B, L) to feed instead of the ones drawn; logits_out: collects, per scale,
        the unguided conditional logits (B, p*p, V). Together they let a test compare cached
        generation with the teacher-forced pass. Raises InputError as `generate` does, and for forced
        tokens of another shape or number.
        """
        check_settings(cfg=cfg, top_k=top_k, top_p=top_p, seed=seed)
        schedule, labels = self.schedule(schedule), self.labels(labels)
        forced = None if forced is None else self._tokens(forced, len(labels))
        var, quantize, config = self.var, self.tokenizer.quantize, self.var.config
        images = torch.arange(first_index, first_index + len(labels), device=self.device)
        condition = var.class_emb(torch.cat((labels, torch.full_like(labels, config.classes))))
        modulations = var.modulations(condition, schedule.layers[0])
        head_modulation = var.head_nm.modulation(condition)
        positions = var.positions()
        cache = KVCache(
            schedule,
            batch=len(condition),
            heads=config.heads,
            head_dim=config.width // config.heads,
            dtype=condition.dtype,
            device=self.device,
        )
        side, scales = config.patch_nums[-1], len(config.patch_nums)
        f_hat = torch.zeros(len(labels), config.z_channels, side, side, device=self.device)
        x, start, drawn = var.first_input(condition), 0, []
        for scale, end in enumerate(schedule.ends):
            cache.begin(scale)
            x = x + positions[:, start:end]
            for layer in schedule.layers[scale]:
                x = var.blocks[layer].step(x, modulations[layer], cache, layer)
                if schedule.layer_tokens[layer] == end:
                    del modulations[layer]
            conditional, unconditional = var.logits(x, head_modulation).chunk(2)
            if logits_out is not None:
                logits_out.append(conditional)
            if forced is not None:
                tokens = forced[:, start:end]
            else:
                weight = cfg * scale / max(scales - 1, 1)
                uniforms = uniform(seed, images, scale, end - start)
                logits = guide(conditional, unconditional, weight)
                tokens = draw(logits, uniforms, top_k=top_k, top_p=top_p)
                # A largest logit that is NaN or infinite has no distribution: say so in the image, without a wait.
                overflow = ~logits.amax(dim=-1).isfinite().all(dim=1)
                f_hat.masked_fill_(overflow[:, None, None, None], torch.nan)
                del logits  # not to be kept through the next scale
            drawn.append(tokens)
            f_hat += quantize.contribution(scale, tokens)
            if scale + 1 < scales:
                next_input = var.word_embed(quantize.next_input(scale + 1, f_hat).to(self.dtype))
                x = torch.cat((next_input, next_input))
            start = end
        return torch.cat(drawn, dim=1), f_hat

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """Images in [0, 1], (B, 3, H, W), to tokens (B, L) int64. Raises InputError for another size."""
        size = self.tokenizer.config.image_size
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, size, size):
            raise InputError(f"images of shape {tuple(images.shape)}: this model takes (B, 3, {size}, {size})")
        return self.tokenizer.encode(images.to(self.device, torch.float32))

    @torch.inference_mode()
    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens (B, L) int64 to images (B, 3, H, W) in [0, 1]. Raises InputError for what are no tokens."""
        return self.tokenizer.decode(self._tokens(tokens))

    def forward(self, labels: Sequence[int] | Tensor, tokens: Tensor, schedule: str | Schedule = "full") -> Tensor:
        """Teacher-forced logits (B, L, V) float32 of tokens (B, L) int64 under a schedule.

        Raises InputError for an unknown class, for what are no tokens of as many images, and for a
        schedule that does not fit.
        """
        schedule, labels = self.schedule(schedule), self.labels(labels)
        tokens = self._tokens(tokens, len(labels))
        with torch.no_grad():
            teacher_input = self.tokenizer.teacher_input(tokens)
        return self.var(labels, teacher_input, schedule)

    def save_pretrained(self, path: str | Path) -> Path:
        """Write an elastic directory: config.json, model.safetensors, recipe.yaml, README.md. Returns its path."""
        from varcompress.checkpoint import save_elastic  # the one arrow that points up: a convenience on the object

        return save_elastic(self, path)


def _integers(values: Sequence[int] | Tensor) -> Tensor | None:
    """Whole numbers as an int64 tensor; None for anything else, which torch would round or refuse in its own words."""
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        return None
    return tensor.long()
