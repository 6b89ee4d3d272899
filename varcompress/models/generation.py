"""Generation under a schedule: scale by scale, each with the layers that the schedule names.

Everything here is decided before it begins, by a `Call`: no value is read back from the device and
no shape depends on one, so that a CUDA graph can hold all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from varcompress.models.cache import GappedCache, KVCache
from varcompress.models.runtime import Runtime
from varcompress.models.tokenizer import Quantizer
from varcompress.models.transformer import VAR, Block, Constants, Residual
from varcompress.sampling import Sampling
from varcompress.schedule import Gapped, Schedule

PHASES = ("transformer", "sampling", "decoder")
# Of one scale that run through its layers together, by device. More are no faster on a CPU, and a GPU would wait for
# the launches of fewer; their activations stand beside the cache when that is fullest.
TOKENS_AT_A_TIME = {"cpu": 1 << 12, "cuda": 1 << 14}
# Of logits that exist at a time: the largest tensor of a big batch, if they all did.
LOGITS_BYTES = {"cpu": 1 << 25, "cuda": 1 << 27}


def _limit(limits: dict[str, int], device: torch.device) -> int:
    """That of a device; of the meta device, on which a model has shapes alone, a GPU's."""
    return limits["cpu" if device.type == "cpu" else "cuda"]


@dataclass(frozen=True)
class Call:
    """What a call fixes before it begins: all but labels, the indices of its images, and the seed of its sampling."""

    schedule: Schedule
    num_images: int
    sampling: Sampling
    runtime: Runtime
    guided: bool  # whether every image has an unconditional twin; see `ElasticVAR.guided`

    @property
    def rows(self) -> int:
        """Rows of the batch that the layers run: the images, then their unconditional twins."""
        return (1 + self.guided) * self.num_images

    def guidance(self, scale: int) -> float:
        """The weight of the unconditional twins at `scale` (from 0)."""
        return self.sampling.guidance(scale, len(self.schedule.patch_nums)) if self.guided else 0.0

    def largest_elements(self, width: int) -> int:
        """Elements of the residual at the largest scale."""
        return self.rows * max(side * side for side in self.schedule.patch_nums) * width


class Observer:
    """What a call tells of itself while it runs. This one listens to nothing: override what is of interest."""

    def phase(self, name: str) -> None:
        """One of PHASES begins. On a GPU that is queued work, not yet done."""

    def cache(self, held_bytes: int) -> None:
        """The key/value cache holds so many bytes from now on."""

    def ran(self, block: Block) -> None:
        """A layer has run, so that its matrices were read once."""


def parts(call: Call, scale: int) -> list[slice]:
    """The rows of a call in parts of at most TOKENS_AT_A_TIME at a scale, one row at least.

    All in one where the scale runs layers that are streamed.
    """
    schedule, runtime = call.schedule, call.runtime
    if runtime.offload and schedule.layers[scale] != schedule.layers[-1]:
        return [slice(0, call.rows)]
    size = max(1, _limit(TOKENS_AT_A_TIME, runtime.device) // schedule.patch_nums[scale] ** 2)
    return [slice(first, min(first + size, call.rows)) for first in range(0, call.rows, size)]


# The block of a layer, ready to run at a scale (from 0).
Blocks = Callable[[int, int], Block]


def generate_tokens(
    call: Call,
    var: VAR,
    quantize: Quantizer,
    blocks: Blocks,
    labels: Tensor,
    seed: Tensor,
    image_ids: Tensor,
    *,
    forced: Tensor | None = None,
    logits_out: list[Tensor] | None = None,
    observer: Observer | None = None,
) -> tuple[Tensor, Tensor]:
    """Tokens (B, L) int64 and f_hat (B, C, P, P) float32 for labels (B,), seed () and image_ids (B,), all int64.

    forced: tokens (B, L) to feed instead of the ones drawn; logits_out: collects, per scale, the
    unguided conditional logits (B, p*p, V) float32. f_hat of an image whose logits are not finite is NaN.
    """
    observer = observer or Observer()
    observer.phase("transformer")
    config, schedule, kernels = var.config, call.schedule, call.runtime.operations
    classes = torch.cat((labels, torch.full_like(labels, config.classes))) if call.guided else labels
    cfg = torch.full(classes.shape, call.sampling.cfg, dtype=torch.float32, device=classes.device)
    condition = var.condition(classes, cfg)
    shared, head_modulation = var.shared_modulation(condition), var.head_nm.modulation(condition)
    constants: dict[int, Constants] = {}
    cache = (GappedCache if isinstance(schedule, Gapped) else KVCache)(
        schedule,
        batch=len(condition),
        heads=config.heads,
        head_dim=config.width // config.heads,
        dtype=condition.dtype,
        device=condition.device,
        stored=call.runtime.stored_dtype,
    )
    observer.cache(cache.nbytes)
    side, scales = config.patch_nums[-1], len(config.patch_nums)
    f_hat = torch.zeros(len(labels), config.z_channels, side, side, dtype=torch.float32, device=labels.device)
    x, start, drawn = var.first_input(condition), 0, []
    for scale, end in enumerate(schedule.ends):
        cache.begin(scale)
        hidden = x.add_(var.scale_positions(scale, start, end))
        del x
        batches = parts(call, scale)
        for batch in batches:
            residual = Residual(hidden[batch])
            for layer in schedule.layers[scale]:
                block = blocks(scale, layer)
                if layer not in constants:
                    constants[layer] = block.prepare(condition, shared)
                block.step(residual, constants[layer].of(batch), cache, layer, batch, kernels)
                observer.ran(block)
            result = residual.read(*(vector[batch] for vector in head_modulation), kernels)
            del residual
            if len(batches) == 1:
                hidden = result
            else:
                hidden[batch] = result
            del result
        constants = {i: value for i, value in constants.items() if schedule.layer_tokens[i] > end}
        if logits_out is not None:
            logits_out.append(var.head(hidden[: len(labels)]).float())
        if forced is not None:
            tokens = forced[:, start:end]
        else:
            tokens = draw_tokens(call, var.head, hidden, scale, seed, image_ids, observer)
            overflow = (tokens < 0).any(dim=1)  # said in the image, without a wait
            f_hat.masked_fill_(overflow[:, None, None, None], torch.nan)
            tokens = tokens.clamp_(min=0)
        del hidden
        observer.phase("transformer")
        drawn.append(tokens)
        f_hat += quantize.contribution(scale, tokens)
        if scale + 1 < scales:
            x = var.word_embed(quantize.next_input(scale + 1, f_hat).to(condition.dtype))
            x = torch.cat((x, x)) if call.guided else x
        start = end
    return torch.cat(drawn, dim=1), f_hat


def draw_tokens(
    call: Call, head: nn.Linear, hidden: Tensor, scale: int, seed: Tensor, image_ids: Tensor, observer: Observer
) -> Tensor:
    """Tokens (B, n) int64 of one scale, -1 where the logits are not finite, a few images at a time.

    head: hidden states to logits; hidden: (B or 2B, n, C), conditional rows, then in guided calls unconditional ones,
    which are not read where the guidance is 0; seed: () int64; image_ids: (B,) int64, the images' random streams.
    Guidance, filters and the draw itself are one operation, in `kernels/draw.py`.
    """
    guidance = call.guidance(scale)
    conditional, unconditional = hidden[: call.num_images], hidden[call.num_images :]
    size = images_at_a_time(hidden.device, hidden.shape[1], head.out_features, hidden.element_size())
    drawn = []
    for first in range(0, len(image_ids), size):
        few = slice(first, first + size)
        observer.phase("transformer")
        logits = head(conditional[few]), head(unconditional[few]) if guidance else None
        observer.phase("sampling")
        draw = call.runtime.operations.draw
        drawn.append(draw(*logits, guidance, seed, image_ids[few], scale, **call.sampling.filters))
        del logits
    return torch.cat(drawn)


def images_at_a_time(device: torch.device, tokens: int, vocab: int, element_bytes: int) -> int:
    """Images whose logits, guided and not, fit in LOGITS_BYTES; at least one."""
    return max(1, _limit(LOGITS_BYTES, device) // (2 * tokens * vocab * element_bytes))
