"""Bytes and FLOPs of a call by arithmetic: what the shapes of a model and a schedule say before anything runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from varcompress.kernels import draw
from varcompress.kernels.backend import TRITON
from varcompress.models import strips
from varcompress.models.autoencoder import TokenizerConfig
from varcompress.models.cache import token_bytes
from varcompress.models.elastic import ElasticVAR
from varcompress.models.generation import Call, images_at_a_time, parts
from varcompress.models.linear import linear_layers
from varcompress.models.offload import device_blocks
from varcompress.models.runtime import Runtime
from varcompress.sampling import PUBLISHED
from varcompress.schedule import Schedule


def predict(
    model: ElasticVAR,
    schedule: Schedule,
    num_images: int = 1,
    runtime: Runtime | None = None,
    *,
    guided: bool | None = None,
) -> dict[str, int]:
    """Arithmetic for one call: cache_bytes, weight_bytes, peak_bytes, flops, flops_without_decoder.

    guided: whether every image has an unconditional twin, by default as the model draws.
    weight_bytes are the matrices of the blocks, summed over the scales that read them. flops are those of the
    linear layers, attention, head and decoder; AdaLN (once per image), the word embedding and phi are left out.
    """
    config, runtime = model.var.config, runtime or model.runtime
    guided = model.guided() if guided is None else guided
    shape = {"width": config.width, "mlp_ratio": config.mlp_ratio}
    transformer = num_images * schedule.flops(vocab=config.vocab, guided=guided, **shape)
    decoder = num_images * decoder_flops(model.tokenizer.config, in_strips=runtime.device.type == "cpu")
    return {
        "cache_bytes": cache_bytes(model, schedule, num_images, runtime, guided=guided),
        "weight_bytes": sum(schedule.weights(**shape)) * runtime.dtype.itemsize,
        "peak_bytes": peak_bytes(model, schedule, num_images, runtime, guided=guided),
        "flops": transformer + decoder,
        "flops_without_decoder": transformer,
    }


def describe(model: ElasticVAR, schedules: Sequence[str | Schedule] | None = None) -> dict:
    """What a model is, and what its schedules run and cost for one image.

    Returns a JSON-able dict with kind "inspect": "schedules" cost what they do as the model draws by default,
    "unguided" what those of a guided model do with cfg 0; all ratios are to a guided `full`.
    Raises InputError for a schedule that does not fit.
    """
    config, tokenizer = model.var.config, model.tokenizer.config
    schedules = [model.schedule(s) for s in schedules] if schedules else model.default_schedules()
    guided, distilled = model.guided(), model.distilled_cfg
    costs = _costs(model, schedules, guided=guided)
    return {
        "kind": "inspect",
        "model": model.provenance.name,
        "checkpoint": "elastic" if model.depths else "official",
        "base_model": model.provenance.base_model,
        "license": model.provenance.license,
        "dtype": str(model.dtype).removeprefix("torch."),
        "depth": config.depth,
        "width": config.width,
        "heads": config.heads,
        "shared_aln": config.shared_aln,
        "parameters": {
            "transformer": sum(p.numel() for p in model.var.parameters()),
            "tokenizer": sum(p.numel() for p in model.tokenizer.parameters()),
        },
        "patch_nums": list(config.patch_nums),
        "tokens": config.tokens,
        "classes": config.classes,
        "codebook": [config.vocab, config.z_channels],
        "image_size": tokenizer.image_size,
        "bridge": model.bridge,
        "depths": list(model.depths),
        "distilled_cfg": list(distilled) if isinstance(distilled, tuple) else distilled,
        "recipe": model.provenance.recipe,
        "guided": guided,
        "schedules": [_segments(schedule) | cost for schedule, cost in zip(schedules, costs, strict=True)],
        "unguided": _costs(model, schedules, guided=False) if guided else [],
    }


def _segments(schedule: Schedule) -> dict:
    """The layers that a schedule runs."""
    segments = [{"scales": [s.scales[0] + 1, s.scales[-1] + 1], "layers": list(s.layers)} for s in schedule.segments]
    return {"schedule": str(schedule), "segments": segments}


def _costs(model: ElasticVAR, schedules: Sequence[Schedule], *, guided: bool) -> list[dict]:
    """What each schedule costs for one image, beside a guided `full`."""
    # of a model without weights as on a CPU, where one is loaded to be described
    runtime = Runtime(torch.device("cpu"), model.dtype) if model.device.type == "meta" else model.runtime
    full = predict(model, model.schedule("full"), runtime=runtime, guided=True)
    costs = [predict(model, schedule, runtime=runtime, guided=guided) for schedule in schedules]
    names = map(str, schedules)
    return [{"schedule": name, **cost, **ratios(cost, full)} for name, cost in zip(names, costs, strict=True)]


def ratios(cost: dict[str, int], full: dict[str, int]) -> dict[str, float]:
    """What a prediction saves beside another."""
    return {
        "cache_ratio": cost["cache_bytes"] / full["cache_bytes"],
        "speedup_predicted": full["flops"] / cost["flops"],
        "speedup_without_decoder_predicted": full["flops_without_decoder"] / cost["flops_without_decoder"],
    }


# -- bytes --------------------------------------------------------------------------------------


def cache_bytes(model: ElasticVAR, schedule: Schedule, num_images: int, runtime: Runtime, *, guided: bool) -> int:
    """Bytes of the keys and values at their largest."""
    config = model.var.config
    per_token = token_bytes(width=config.width, heads=config.heads, dtype=runtime.stored_dtype)
    return schedule.cache_bytes(batch=num_images, token_bytes=per_token, guided=guided)


def weight_bytes(model: ElasticVAR, schedule: Schedule, runtime: Runtime) -> int:
    """Bytes of all weights that the device holds in a call, packed copies and streamed layers included."""
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    if runtime.offload:
        block = sum(parameter.nbytes for parameter in model.var.blocks[0].parameters())
        return held + (device_blocks(schedule) - model.var.config.depth) * block
    return held + packed_bytes(model, runtime)


def packed_bytes(model: ElasticVAR, runtime: Runtime) -> int:
    """Bytes of the packed copies that a call uses."""
    return sum(layer.weight.nbytes for layer in linear_layers(model.var)) if model.packs(runtime) else 0


def peak_bytes(
    model: ElasticVAR,
    schedule: Schedule,
    num_images: int,
    runtime: Runtime | None = None,
    *,
    guided: bool | None = None,
) -> int:
    """Weights, plus the larger of the transformer's and the decoder's fullest moment, and what graphs hold beside it.

    Transformer: cache and f_hat and the fullest scale. Decoder: f_hat, images and maps. Where one of the two is
    recorded as a graph, whose memory is for graphs alone, they stand beside each other. What a kernel needs inside is
    not in it. guided: see `predict`.
    """
    runtime, guided = runtime or model.runtime, model.guided() if guided is None else guided
    call = Call(schedule, num_images, PUBLISHED, runtime, guided)
    cache = cache_bytes(model, schedule, num_images, runtime, guided=guided)
    fullest = max(_scale_bytes(model, call, scale) for scale in range(len(schedule.ends)))
    together = sum if len(set(_graphed(model, call))) == 2 else max
    running = _f_hat_bytes(model, num_images) + together((cache + fullest, _decoder_bytes(model, num_images, runtime)))
    return weight_bytes(model, schedule, runtime) + running + _graph_bytes(model, call)


def _f_hat_bytes(model: ElasticVAR, num_images: int) -> int:
    config = model.var.config
    return num_images * config.z_channels * config.patch_nums[-1] ** 2 * 4


def _image_bytes(model: ElasticVAR, num_images: int) -> int:
    return num_images * 3 * model.tokenizer.config.image_size**2 * 4


def _scale_bytes(model: ElasticVAR, call: Call, scale: int) -> int:
    """What layers compute once per call, and the fullest of attention, MLP and sampling at one scale (from 0)."""
    schedule, runtime, rows = call.schedule, call.runtime, call.rows
    config, element_bytes = model.var.config, runtime.dtype.itemsize
    width, side, end = config.width, config.patch_nums[scale], schedule.ends[scale]
    following = schedule.layers[scale + 1] if end < schedule.ends[-1] else ()
    once, after = (
        (rows * 6 + 3) * len(layers) * width + rows * 3 * width for layers in (schedule.layers[scale], following)
    )
    batch = parts(call, scale)[0].stop
    tokens, token = rows * side**2, batch * side**2
    # the residual, queries, keys and values side by side, and the queries again; the others are in the cache
    attention = token * (1 + 3 + 1) * width
    if runtime.cache_dtype:  # or beside it; and the residual, queries, the layer's keys and values, three results
        attention = max(attention + token * 2 * width, token * (1 + 1 + 3) * width + batch * 2 * end * width)
    # the residual, what was read from it or the result, the hidden layer
    mlp = token * (1 + 1) * width + token * config.hidden
    waiting = (tokens - token) * width  # the residual of the other parts of the batch
    # the input, and in a guided call its copy for both halves beside it
    given = tokens * width + (call.num_images * side**2 * width if call.guided else 0)
    few = min(call.num_images, images_at_a_time(runtime.device, side**2, config.vocab, element_bytes))
    conditional = few * side**2 * config.vocab
    logits = (1 + call.guided) * conditional
    fused = runtime.operations is TRITON
    drawing = 0 if fused else draw.BYTES_PER_LOGIT * min(conditional, draw.chunk(runtime.device))
    running = max(waiting + max(attention, mlp), given)
    return max((once + running) * element_bytes, (after + tokens * width + logits) * element_bytes + drawing)


def _decoder_bytes(model: ElasticVAR, num_images: int, runtime: Runtime) -> int:
    """Images and the decoder's feature maps at their fullest, for the images that it decodes together.

    On a GPU that is the last convolution of a residual block: the level's input, the block's input, and two maps of
    its own, three where plain torch has normalised it into another layout.
    """
    config, element_bytes = model.tokenizer.config, runtime.dtype.itemsize
    few = min(num_images, model.tokenizer.images_at_a_time)
    images = _image_bytes(model, num_images)
    joining = images if few < num_images else 0
    if runtime.device.type == "cpu":
        maps = strips.peak_elements(model.tokenizer.decoder, few, config.patch_nums[-1], element_bytes)
        return images + max(maps * element_bytes, joining)
    widths = [config.channels * m for m in config.channel_multipliers]
    inputs = [*widths[1:], widths[-1]]
    sides = [config.image_size // 2**level for level in range(len(widths))]
    own = 3 if runtime.operations is TRITON else 4
    maps = few * max(side**2 * (given + own * width) for side, given, width in zip(sides, inputs, widths, strict=True))
    return images + max(maps * element_bytes, joining)


def _graph_bytes(model: ElasticVAR, call: Call) -> int:
    """What recorded graphs hold beyond a call's own growth: inputs and results that stay where they are.

    The rest of their pool is what the call would allocate without them.
    """
    num_images, held = call.num_images, 0
    transformer, decoder = _graphed(model, call)
    if transformer:  # tokens, labels and image ids are int64
        held += _f_hat_bytes(model, num_images) + num_images * (model.var.config.tokens + 2) * 8
    if decoder:
        few = min(num_images, model.tokenizer.images_at_a_time)
        held += _f_hat_bytes(model, few) + _image_bytes(model, few)
    return held


def _graphed(model: ElasticVAR, call: Call) -> tuple[bool, bool]:
    """Whether the transformer's part of a call is recorded as a graph, and whether the decoder's is."""
    few = min(call.num_images, model.tokenizer.images_at_a_time)
    largest = call.largest_elements(model.var.config.width), few * model.tokenizer.config.map_elements
    return call.runtime.graphed(largest[0]), call.runtime.graphed(largest[1])


# -- FLOPs --------------------------------------------------------------------------------------


def decoder_flops(config: TokenizerConfig, *, in_strips: bool = False) -> int:
    """FLOPs of the decoder for one image: convolutions and attention, two per multiply-add.

    in_strips: as a CPU computes it (`strips.py`), which doubles the resolution with kernels of 2 x 2.
    """

    def conv(channels: int, out_channels: int, kernel: int, side: int) -> int:
        return 2 * channels * out_channels * kernel * kernel * side * side

    def res(channels: int, out_channels: int, side: int) -> int:
        shortcut = 0 if channels == out_channels else conv(channels, out_channels, 1, side)
        return conv(channels, out_channels, 3, side) + conv(out_channels, out_channels, 3, side) + shortcut

    def attention(channels: int, side: int) -> int:
        return conv(channels, 4 * channels, 1, side) + 4 * side**4 * channels

    widths = [config.channels * m for m in config.channel_multipliers]
    side, width, z = config.patch_nums[-1], widths[-1], config.z_channels
    total = conv(z, z, config.kernel, side) + conv(z, width, 3, side) + 2 * res(width, width, side)
    total += attention(width, side)
    for level in reversed(range(len(widths))):
        for _ in range(config.res_blocks + 1):
            total += res(width, widths[level], side)
            width = widths[level]
            total += attention(width, side) if level == len(widths) - 1 else 0
        if level:
            side *= 2
            total += conv(width, width, 2 if in_strips else 3, side)
    return total + conv(width, strips.MIN_OUTPUTS if in_strips else 3, 3, side)
