"""ElasticVAR: a transformer and its tokenizer, one set of weights, depth chosen at each call."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from varcompress.errors import InputError
from varcompress.fingerprint import rounded
from varcompress.kernels.backend import CHOICES, choose
from varcompress.models import generation, transformer
from varcompress.models.cache import token_bytes
from varcompress.models.graphs import Graphs
from varcompress.models.linear import Linear, packable
from varcompress.models.offload import StreamedBlocks, device_blocks, move_all_but_blocks
from varcompress.models.tokenizer import VQVAE
from varcompress.models.transformer import VAR
from varcompress.sampling import PUBLISHED, Sampling, image_index
from varcompress.schedule import Schedule

CACHE_DTYPES = {"int8": torch.int8, "float8": torch.float8_e4m3fn}
OFFLOADS = ("bridge",)


@dataclasses.dataclass
class Provenance:
    """Where a model comes from, and what was done to it. Saved with it."""

    name: str = "var"
    base_model: str | None = None  # Hub id of the checkpoint that was compressed
    license: str | None = None  # SPDX-style identifier as the Hub writes it
    recipe: dict | None = None  # the recipe that made it elastic, None for an untouched checkpoint


def check_placement(device: torch.device, *, kernels: str, cache_dtype: str | None, offload: str | None) -> None:
    """Raises InputError for what `ElasticVAR.place` cannot do."""
    if kernels not in CHOICES:
        raise InputError(f"kernels {kernels!r} are unknown: use {', '.join(CHOICES)}")
    if cache_dtype not in (None, *CACHE_DTYPES):
        raise InputError(f"cache dtype {cache_dtype!r} is unknown: use {' or '.join(CACHE_DTYPES)}, or leave it out")
    if offload not in (None, *OFFLOADS):
        raise InputError(f"offload {offload!r} is unknown: use {OFFLOADS[0]}, or leave it out")
    try:
        choose(kernels, device)
    except ValueError as error:
        raise InputError(f"kernels {kernels!r}: {error}: use auto or torch") from error


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
        self.kernels = "auto"
        self.cache_dtype: torch.dtype | None = None
        self._streamed: StreamedBlocks | None = None
        self._graphs = Graphs()
        self._use_graphs = True
        self._weights = [w for module in self.modules() for w in (module._parameters, module._buffers) if w]
        self.eval()

    @property
    def device(self) -> torch.device:
        return self.var.device

    @property
    def dtype(self) -> torch.dtype:
        return self.var.pos_start.dtype

    def cast(self, dtype: torch.dtype) -> ElasticVAR:
        """Transformer and decoder to `dtype`.

        Encoder and quantiser stay float32, because tokens must be exact, and so do the temperatures of attention.
        The fingerprint stays that of the weights as they were. Raises InputError when offloaded.
        """
        self._refuse_when_offloaded()
        self._graphs.clear()
        with contextlib.nullcontext() if dtype is torch.float32 else rounded(self):
            transformer.cast(self.var, dtype)
            self.tokenizer.decoder.to(dtype)
            self.tokenizer.post_quant_conv.to(dtype)
        return self

    def _refuse_when_offloaded(self) -> None:
        if self.offloaded:
            raise InputError("an offloaded model only generates, as it is: load it again without offload")

    def place(
        self,
        device: torch.device,
        *,
        kernels: str = "auto",
        cache_dtype: str | None = None,
        offload: str | None = None,
    ) -> ElasticVAR:
        """Move to a device and say how generation runs there.

        kernels: "torch" for plain torch alone, "triton" for the fused kernels, "auto" for what is fast on the device;
        cache_dtype: "int8" or "float8" stores keys and values in eight bits; offload: "bridge" keeps the layers that
        a schedule's last scale does not run in host memory (then there is no `forward` and no training).
        Raises InputError for anything else.
        """
        check_placement(device, kernels=kernels, cache_dtype=cache_dtype, offload=offload)
        self._graphs.clear()
        self._streamed = None
        self.kernels, self.cache_dtype = kernels, CACHE_DTYPES.get(cache_dtype)
        layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        for part in (self.tokenizer.decoder, self.tokenizer.post_quant_conv):
            part.to(memory_format=layout)
        if offload is None:
            return self.to(device)
        move_all_but_blocks(self.var, device)
        self.tokenizer.to(device)
        self._streamed = StreamedBlocks(self.var, device)
        return self

    def _apply(self, *args: object, **kwargs: object) -> ElasticVAR:
        self._refuse_when_offloaded()
        self._graphs.clear()  # now, not at the next call: a model on its way from a GPU leaves no memory there
        return super()._apply(*args, **kwargs)

    @property
    def offloaded(self) -> bool:
        return self._streamed is not None

    def prepare(self, schedule: Schedule) -> None:
        """Bring weights to where a call under `schedule` wants them: packed on a CPU, or from host memory.

        Called by generation; measuring calls it before it begins.
        """
        if self._streamed:
            self._streamed.begin(schedule)
        if self.device.type == "cpu":
            packed = set(self.packed_layers())
            for layer in self.var.modules():
                if isinstance(layer, Linear):
                    layer.pack() if layer in packed else layer.unpack()

    def packed_layers(self) -> list[Linear]:
        """The layers of which generation uses packed copies."""
        return [] if self.kernels == "torch" or self.offloaded else packable(self.var)

    def held_weight_bytes(self, schedule: Schedule) -> int:
        """Bytes of all weights that the device holds in a call, packed copies and streamed layers included."""
        held = sum(tensor.nbytes for tensor in (*self.parameters(), *self.buffers()))
        if self.offloaded:
            block = sum(parameter.nbytes for parameter in self.var.blocks[0].parameters())
            return held + (device_blocks(schedule) - self.var.config.depth) * block
        return held + sum(layer.weight.nbytes for layer in self.packed_layers())

    @property
    def cache_token_bytes(self) -> int:
        """Bytes of one layer's keys, or values, of one token in the cache."""
        config = self.var.config
        return token_bytes(width=config.width, heads=config.heads, dtype=self.cache_dtype or self.dtype)

    @contextlib.contextmanager
    def eager(self) -> Iterator[None]:
        """For measuring: on a GPU, run operators one by one, visible to hooks and counters, not as recorded graphs.

        Graphs recorded before are dropped, with the memory that they hold.
        """
        before, self._use_graphs = self._use_graphs, False
        self._graphs.clear()
        try:
            yield
        finally:
            self._use_graphs = before

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
        sampling: Sampling = PUBLISHED,
        *,
        first_index: int = 0,
        **settings: float,
    ) -> Tensor:
        """Images of the given classes: (B, 3, H, W) float32 in [0, 1].

        sampling: how tokens are drawn, by default as published; settings: its fields one by one (cfg, top_k, top_p,
        seed), in place of those of `sampling`. Image i of the call has the random stream (seed, first_index + i),
        whatever the batch size. An image whose logits overflow the dtype is NaN throughout.
        Raises InputError for an unknown class, a schedule that does not fit, and a setting that means nothing.
        """
        sampling = dataclasses.replace(sampling, **settings)
        return self.decode_features(self.generate_tokens(labels, schedule, sampling, first_index=first_index)[1])

    @torch.inference_mode()
    def generate_tokens(
        self,
        labels: Sequence[int] | Tensor,
        schedule: str | Schedule = "full",
        sampling: Sampling = PUBLISHED,
        *,
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
        first_index = image_index(first_index)
        schedule, labels = self.schedule(schedule), self.labels(labels)
        forced = None if forced is None else self._tokens(forced, len(labels))
        call = generation.Call(
            schedule,
            len(labels),
            sampling.cfg,
            sampling.top_k,
            sampling.top_p,
            choose(self.kernels, self.device),
            self.cache_dtype,
            streamed=self.offloaded,
        )
        self.prepare(schedule)
        blocks = self._streamed or (lambda scale, layer: self.var.blocks[layer])

        def body(labels: Tensor, seed: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
            return generation.generate_tokens(
                call,
                self.var,
                self.tokenizer.quantize,
                blocks,
                labels,
                seed,
                images,
                forced=forced,
                logits_out=logits_out,
            )

        inputs = (
            labels,
            torch.full((), sampling.seed, dtype=torch.int64, device=self.device),  # no copy from the host to wait for
            torch.arange(first_index, first_index + len(labels), device=self.device),
        )
        with self._current_device():
            if self._graphed and forced is None and logits_out is None and not self.offloaded:
                return self._replay(call, body, *inputs)
            return body(*inputs)

    def _replay(self, key: Hashable, body: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor, ...]:
        """body(*inputs) as a graph of weights that are where they were when it was recorded."""
        self._graphs.keep_if(
            tuple(w.data_ptr() for weights in self._weights for w in weights.values() if w is not None)
        )
        return self._graphs.run(key, body, *inputs)

    def _current_device(self) -> contextlib.AbstractContextManager:
        """Kernels and graphs go to the current GPU, which need not be the model's."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()

    @property
    def _graphed(self) -> bool:
        return self._use_graphs and self.device.type == "cuda"

    @torch.inference_mode()
    def decode_features(self, f_hat: Tensor) -> Tensor:
        """f_hat (B, C, P, P) to images (B, 3, H, W) float32 in [0, 1], a few at a time."""
        with self._current_device():
            parts = [self._decode_few(part) for part in f_hat.split(self.tokenizer.images_at_a_time)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _decode_few(self, f_hat: Tensor) -> Tensor:
        kernels = choose(self.kernels, self.device)

        def body(f_hat: Tensor) -> tuple[Tensor]:
            return (self.tokenizer.decode_features(f_hat, kernels),)

        (images,) = self._replay(("decode", len(f_hat), kernels), body, f_hat) if self._graphed else body(f_hat)
        return images

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
        return self.decode_features(self.tokenizer.f_hat(self._tokens(tokens)))

    def forward(self, labels: Sequence[int] | Tensor, tokens: Tensor, schedule: str | Schedule = "full") -> Tensor:
        """Teacher-forced logits (B, L, V) float32 of tokens (B, L) int64 under a schedule.

        Raises InputError for an unknown class, for what are no tokens of as many images, and for a
        schedule that does not fit.
        """
        self._refuse_when_offloaded()
        schedule, labels = self.schedule(schedule), self.labels(labels)
        tokens = self._tokens(tokens, len(labels))
        if not torch.is_grad_enabled():
            self.prepare(schedule)
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
