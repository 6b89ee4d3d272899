"""ElasticVAR: a transformer and its tokenizer, one set of weights, depth chosen at each call."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence

import torch
from torch import Tensor, nn

from varcompress.errors import InputError
from varcompress.fingerprint import rounded
from varcompress.hardware import exact_float32, without_autocast
from varcompress.models import generation, inputs, linear, transformer
from varcompress.models.generation import Observer
from varcompress.models.graphs import Graphs
from varcompress.models.offload import StreamedBlocks, move_all_but_blocks
from varcompress.models.runtime import Runtime
from varcompress.models.tokenizer import VQVAE
from varcompress.models.transformer import VAR
from varcompress.sampling import DEFAULT, DistilledCfg, Sampling, checked_cfg, image_index
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
    subnets: depth -> layers, ascending, of the subnets that are not the equidistant ones.
    distilled_cfg: the weight of guidance that is distilled into the model, so that it draws without an unconditional
    pass: one, or the range of those that it can be given; None for an ordinary model.
    """

    def __init__(
        self,
        var: VAR,
        tokenizer: VQVAE,
        *,
        bridge: int | None = None,
        depths: Sequence[int] = (),
        subnets: Mapping[int, tuple[int, ...]] = {},
        distilled_cfg: DistilledCfg = None,
        provenance: Provenance | None = None,
    ) -> None:
        super().__init__()
        self.var, self.tokenizer = var, tokenizer
        self.bridge = default_bridge(len(var.config.patch_nums)) if bridge is None else bridge
        self.depths, self.subnets = tuple(depths), dict(subnets)
        self.distilled_cfg = checked_cfg(distilled_cfg)
        self.provenance = provenance or Provenance()
        self._streamed: StreamedBlocks | None = None
        self._graphs = Graphs()
        self._placed = Runtime(self.device, self.dtype)
        self.eval()

    @property
    def device(self) -> torch.device:
        return self.var.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the transformer and the decoder."""
        return self.var.pos_start.dtype

    @property
    def runtime(self) -> Runtime:
        """How the model runs where a call says nothing else: as it was placed, on the device its weights are on now."""
        return dataclasses.replace(self._placed, device=self.device, dtype=self.dtype)

    @property
    def offloaded(self) -> bool:
        return self._streamed is not None

    def cast(self, dtype: torch.dtype) -> ElasticVAR:
        """Transformer and decoder to `dtype`.

        Encoder and quantiser stay float32, because tokens must be exact, and so do the temperatures of attention.
        The fingerprint stays that of the weights as they were. Raises InputError when offloaded.
        """
        self._refuse_when_offloaded()
        self._graphs.clear()
        with contextlib.nullcontext() if dtype is torch.float32 else rounded(self):
            transformer.to_dtype(self.var, dtype)
            self.tokenizer.decoder.to(dtype)
            self.tokenizer.post_quant_conv.to(dtype)
        return self

    def place(self, runtime: Runtime) -> ElasticVAR:
        """Move and cast the model to where and how it is to run. An offloaded one has no `forward` and no training."""
        self._graphs.clear()
        self._streamed, self._placed = None, runtime
        self.cast(runtime.dtype)
        layout = torch.channels_last if runtime.device.type == "cuda" else torch.contiguous_format
        for part in (self.tokenizer.decoder, self.tokenizer.post_quant_conv):
            part.to(memory_format=layout)
        if runtime.offload is None:
            return self.to(runtime.device)
        move_all_but_blocks(self.var, runtime.device)
        self.tokenizer.to(runtime.device)
        self._streamed = StreamedBlocks(self.var)
        return self

    def _refuse_when_offloaded(self) -> None:
        if self.offloaded:
            raise InputError("an offloaded model only generates, as it is: load it again without offload")

    def _apply(self, function: Callable[[Tensor], Tensor], *args: object, **kwargs: object) -> ElasticVAR:
        """What `to`, `half` and the like go through: a change of dtype is `cast`, the rest is torch's."""
        self._refuse_when_offloaded()
        self._graphs.clear()  # now, not at the next call: a model on its way from a GPU leaves no memory there
        after = function(self.var.pos_start.detach()[:, :0])  # nothing of it, to see what becomes of all
        if after.dtype == self.dtype:
            return super()._apply(function, *args, **kwargs)
        self.cast(after.dtype)
        return super()._apply(lambda tensor: tensor.to(after.device), *args, **kwargs)

    def prepare(self, schedule: Schedule, runtime: Runtime | None = None) -> None:
        """Bring weights to where a call under `schedule` wants them: packed on a CPU, or from host memory.

        Generation does so itself; measuring calls it before it begins.
        """
        if self._streamed:
            self._streamed.prepare(schedule)
        self._pack(runtime)

    def _blocks(self, schedule: Schedule) -> contextlib.AbstractContextManager[generation.Blocks]:
        """The block of each layer at each scale, for one call."""
        if self._streamed:
            return self._streamed.running(schedule)
        return contextlib.nullcontext(lambda scale, layer: self.var.blocks[layer])

    def _pack(self, runtime: Runtime | None = None) -> None:
        if self.device.type == "cpu":
            linear.pack(self.var) if self.packs(runtime or self.runtime) else linear.unpack(self.var)

    def packs(self, runtime: Runtime) -> bool:
        """Whether generation uses packed copies of the weights."""
        return runtime.kernels != "torch" and not self.offloaded and linear.packing_pays(self.var)

    def schedule(self, schedule: str | Schedule = "full") -> Schedule:
        """A schedule of this model, from its text form. Raises InputError for one that does not fit."""
        config = self.var.config
        if isinstance(schedule, str):
            own = {"bridge": self.bridge, "subnets": self.subnets}
            return Schedule.parse(schedule, depth=config.depth, patch_nums=config.patch_nums, **own)
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

    def sampling(self, sampling: Sampling = DEFAULT) -> Sampling:
        """`sampling` with a cfg, the model's own where it names none. Raises InputError for one of another model."""
        return sampling.resolved(self.distilled_cfg)

    def guided(self, sampling: Sampling = DEFAULT) -> bool:
        """Whether every image has an unconditional twin: not with cfg 0, nor where guidance is distilled."""
        return self.distilled_cfg is None and self.sampling(sampling).cfg != 0

    @torch.inference_mode()
    def generate(
        self,
        labels: Sequence[int] | Tensor,
        schedule: str | Schedule = "full",
        sampling: Sampling = DEFAULT,
        *,
        first_index: int = 0,
        runtime: Runtime | None = None,
        observer: Observer | None = None,
        **settings: float,
    ) -> Tensor:
        """Images of the given classes: (B, 3, H, W) float32 in [0, 1].

        sampling: how tokens are drawn, by default as published, but for a cfg that the model was distilled for;
        settings: its fields one by one (cfg, top_k, top_p, seed), in place of those of `sampling`. Image i of the call
        has the random stream (seed, first_index + i), whatever the batch size. An image whose logits overflow the dtype
        is NaN throughout.
        runtime: `self.runtime` with other kernels, cache_dtype or graphs; observer: is told what happens, in a call
        without graphs.
        Raises InputError for an unknown class, a schedule that does not fit, a setting that means nothing, and a cfg
        that the model was not distilled for.
        """
        sampling = dataclasses.replace(sampling, **settings)
        how = {"runtime": runtime, "observer": observer}
        _, f_hat = self.generate_tokens(labels, schedule, sampling, first_index=first_index, **how)
        return self.decode_features(f_hat, **how)

    @torch.inference_mode()
    def generate_tokens(
        self,
        labels: Sequence[int] | Tensor,
        schedule: str | Schedule = "full",
        sampling: Sampling = DEFAULT,
        *,
        first_index: int = 0,
        runtime: Runtime | None = None,
        observer: Observer | None = None,
        forced: Tensor | None = None,
        logits_out: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The transformer's part of `generate`: tokens (B, L) int64 and f_hat (B, C, P, P) float32.

        forced: tokens (B, L) to feed instead of the ones drawn; logits_out: collects, per scale,
        the unguided conditional logits (B, p*p, V). Together they let a test compare cached
        generation with the teacher-forced pass. Raises InputError as `generate` does, and for forced
        tokens of another shape or number.
        """
        first_index, runtime, sampling = image_index(first_index), self._checked(runtime), self.sampling(sampling)
        schedule, labels = self.schedule(schedule), inputs.labels(labels, self.var.config, self.device)
        forced = None if forced is None else inputs.tokens(forced, self.var.config, self.device, len(labels))
        watched = observer is not None or forced is not None or logits_out is not None
        # the seed is an input, so that one graph serves all
        settings = dataclasses.replace(sampling, seed=0)
        call = generation.Call(schedule, len(labels), settings, runtime, self.guided(sampling))
        self._pack(runtime)

        def body(labels: Tensor, seed: Tensor, image_ids: Tensor) -> tuple[Tensor, Tensor]:
            return generation.generate_tokens(
                call,
                self.var,
                self.tokenizer.quantize,
                blocks,
                labels,
                seed,
                image_ids,
                forced=forced,
                logits_out=logits_out,
                observer=observer,
            )

        given = (
            labels,
            torch.full((), sampling.seed, dtype=torch.int64, device=self.device),  # no copy from the host to wait for
            torch.arange(first_index, first_index + len(labels), device=self.device),
        )
        with self._current_device(), without_autocast(self.device), self._blocks(schedule) as blocks:
            if not watched and runtime.graphed(call.largest_elements(self.var.config.width)):
                return self._replay(call, body, *given)
            return body(*given)

    def _checked(self, runtime: Runtime | None) -> Runtime:
        """How a call runs. Raises InputError for what would need the weights elsewhere."""
        own = self.runtime
        if runtime is None:
            return own
        if (runtime.device, runtime.dtype, runtime.offload) != (own.device, own.dtype, own.offload):
            raise InputError("a call may change kernels, cache_dtype and graphs: for another device or dtype use place")
        return runtime

    def _replay(self, key: Hashable, body: Callable[..., tuple[Tensor, ...]], *given: Tensor) -> tuple[Tensor, ...]:
        """body(*given) as a graph of weights that are where they were when it was recorded."""
        tensors = (t for module in self.modules() for t in (*module._parameters.values(), *module._buffers.values()))
        addresses = tuple(tensor.data_ptr() for tensor in tensors if tensor is not None)
        return self._graphs.run(key, body, *given, weights=addresses)

    def _current_device(self) -> contextlib.AbstractContextManager:
        """Kernels and graphs go to the current GPU, which need not be the model's."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()

    @torch.inference_mode()
    def decode_features(
        self, f_hat: Tensor, *, runtime: Runtime | None = None, observer: Observer | None = None
    ) -> Tensor:
        """f_hat (B, C, P, P) to images (B, 3, H, W) float32 in [0, 1], a few at a time."""
        runtime = self._checked(runtime)
        if observer:
            observer.phase("decoder")
        kernels, at_a_time = runtime.operations, self.tokenizer.images_at_a_time
        largest = min(len(f_hat), at_a_time) * self.tokenizer.config.map_elements

        def body(f_hat: Tensor) -> tuple[Tensor]:
            return (self.tokenizer.decode_features(f_hat, kernels),)

        with self._current_device(), without_autocast(self.device):
            few = f_hat.split(at_a_time)
            if observer is None and runtime.graphed(largest):
                parts = [self._replay(("decode", len(part), kernels), body, part)[0] for part in few]
            else:
                parts = [body(part)[0] for part in few]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """Images in [0, 1], (B, 3, H, W), to tokens (B, L) int64. Raises InputError for another size."""
        return self.tokenizer.encode(inputs.images(images, self.tokenizer.config.image_size, self.device))

    @torch.inference_mode()
    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens (B, L) int64 to images (B, 3, H, W) in [0, 1]. Raises InputError for what are no tokens."""
        return self.decode_features(self.tokenizer.f_hat(inputs.tokens(tokens, self.var.config, self.device)))

    def forward(
        self,
        labels: Sequence[int] | Tensor,
        tokens: Tensor,
        schedule: str | Schedule = "full",
        cfg: float | Tensor | None = None,
    ) -> Tensor:
        """Teacher-forced logits (B, L, V) float32 of tokens (B, L) int64 under a schedule.

        cfg: the weight of guidance, or (B,), of a model that is given it; by default its own.
        Raises InputError for an unknown class, for what are no tokens of as many images, for a schedule that does not
        fit, and for a cfg that the model was not distilled for.
        """
        self._refuse_when_offloaded()
        schedule, labels = self.schedule(schedule), inputs.labels(labels, self.var.config, self.device)
        tokens = inputs.tokens(tokens, self.var.config, self.device, len(labels))
        cfg = self._cfg_input(cfg, len(labels))
        if not torch.is_grad_enabled():
            self.prepare(schedule)
        with torch.no_grad(), exact_float32(self.device):
            teacher_input = self.tokenizer.teacher_input(tokens)
        return self.var(labels, teacher_input, schedule, cfg=cfg)

    def _cfg_input(self, cfg: float | Tensor | None, num_images: int) -> Tensor | None:
        """The weights of guidance (B,) float32 that the transformer is given; None where it is given none."""
        if self.var.config.cfg_input:
            own = self.sampling().cfg
            return inputs.cfg(own if cfg is None else cfg, self.distilled_cfg, num_images, self.device)
        if cfg is not None:
            raise InputError("cfg is no input of this model, whose guidance is not distilled for a range: leave it out")
        return None
