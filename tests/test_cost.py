"""The arithmetic of cost against what the code allocates, on models whose tensors have shapes and no values."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from varcompress import cost
from varcompress.memory import LiveTensors
from varcompress.models import generation
from varcompress.models.autoencoder import TokenizerConfig
from varcompress.models.elastic import ElasticVAR
from varcompress.models.runtime import Runtime
from varcompress.models.tokenizer import VQVAE
from varcompress.models.transformer import VAR, VARConfig
from varcompress.sampling import PUBLISHED

PATCH_NUMS = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
CLOSE = {"cuda": 1 / 100, "cpu": 1 / 50}  # of what a call allocates beyond the weights


def official(depth: int, dtype: torch.dtype) -> ElasticVAR:
    """A model of the official shape that holds no memory."""
    with torch.device("meta"):
        var = VAR(VARConfig(depth, 64 * depth, depth, PATCH_NUMS, 4096, 32, 1000, False, 256 * depth))
        model = ElasticVAR(var, VQVAE(TokenizerConfig(160, (1, 1, 2, 2, 4), 2, 32, 4096, 4, 3, PATCH_NUMS)))
    return model.cast(dtype)


def appear(model: ElasticVAR, runtime: Runtime) -> None:
    """Give the model tensors on a device, as the mode that is active makes them; `place` would move values."""
    model._placed = runtime
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                empty = torch.empty(value.shape, dtype=value.dtype, device=runtime.device)
                if value.ndim == 4 and runtime.device.type == "cuda":
                    empty = empty.contiguous(memory_format=torch.channels_last)
                module._parameters[name] = nn.Parameter(empty)


class Unlaunched:
    """A Triton kernel that is never launched: its launcher allocates, and that is all that counts here."""

    def __getitem__(self, grid):
        return lambda *arguments, **options: None


# Operators that, without a GPU, torch believes to take another way than on one: what each allocates there.


def convolution(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    side = (x.shape[2] + 2 * padding[0] - weight.shape[2]) // stride[0] + 1
    return channels_last(x, len(x), len(weight), side, side)


def interpolation(x, size=None, scale_factor=None, mode="nearest", plain=torch.nn.functional.interpolate, **more):
    if mode != "nearest":
        return plain(x, size, scale_factor, mode, **more)
    return channels_last(x, *x.shape[:2], *(scale_factor * side for side in x.shape[2:]))


def channels_last(x, *shape):
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def attention(q, k, v, attn_mask=None, scale=None):
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[0]


ON_A_GPU = {
    "torch.nn.functional.conv2d": convolution,
    "torch.nn.functional.interpolate": interpolation,
    "torch.nn.functional.scaled_dot_product_attention": attention,
}
LAUNCHED = ("modulate._modulate", "qkv._split_heads", "draw._draw")
LAUNCHED += ("group_norm._sum_slab", "group_norm._combine", "group_norm._apply")
ON_A_GPU |= {f"varcompress.kernels.{kernel}": Unlaunched() for kernel in LAUNCHED}


@pytest.mark.parametrize(
    ("depth", "device", "dtype", "batches"),
    [
        (16, "cuda", torch.bfloat16, (1, 8, 64)),
        (30, "cuda", torch.bfloat16, (1, 8, 64)),
        (16, "cpu", torch.float32, (1,)),  # in strips: more takes minutes
    ],
)
def test_the_predicted_peak_is_what_the_code_allocates(depth, device, dtype, batches, monkeypatch):
    """All but what a graph holds, which needs the device itself."""
    monkeypatch.setattr(ElasticVAR, "_current_device", lambda self: contextlib.nullcontext())  # there is none
    for name, stand_in in ON_A_GPU.items() if device == "cuda" else ():
        monkeypatch.setattr(name, stand_in)
    runtime = Runtime(torch.device(device), dtype, kernels="auto" if device == "cuda" else "torch", graphs=False)
    model = official(depth, dtype)
    with FakeTensorMode(), torch.device(device), torch.inference_mode():
        appear(model, runtime)
        blocks = model.var.blocks
        for schedule, guided in itertools.product(map(model.schedule, ("full", "d2@6")), (True, False)):
            for num_images in batches:
                call = generation.Call(schedule, num_images, PUBLISHED, runtime, guided)
                given = torch.zeros(num_images, dtype=torch.int64), torch.zeros((), dtype=torch.int64)
                ids = torch.arange(num_images)
                with LiveTensors() as tensors:
                    _, f_hat = generation.generate_tokens(
                        call, model.var, model.tokenizer.quantize, lambda scale, layer: blocks[layer], *given, ids
                    )
                    model.decode_features(f_hat)
                    del f_hat
                predicted = cost.peak_bytes(model, schedule, num_images, guided=guided)
                growth = predicted - cost.weight_bytes(model, schedule, runtime)
                assert tensors.peak_bytes == pytest.approx(growth, rel=CLOSE[device])


@pytest.mark.parametrize(
    ("num_images", "guided", "recorded"),
    [
        (6, True, "both"),
        (7, True, "transformer"),
        (68, True, "transformer"),
        (69, True, "neither"),
        (136, False, "transformer"),
    ],
)
def test_what_graphs_hold_is_in_the_predicted_peak(num_images, guided, recorded):
    """Inputs and results that stay, and where only one part of d30 is recorded, the memory of the other beside it."""
    model = official(30, torch.bfloat16)
    runtime, schedule = Runtime(torch.device("cuda"), torch.bfloat16), model.schedule("d2@6")
    without = runtime.eager()
    peak = cost.peak_bytes(model, schedule, num_images, runtime, guided=guided)
    f_hat, image, tokens = 32 * 16 * 16 * 4, 3 * 256 * 256 * 4, 680 * 8
    held = num_images * (f_hat + tokens + 2 * 8) if recorded != "neither" else 0
    held += num_images * (f_hat + image) if recorded == "both" else 0
    if recorded == "transformer":
        call = generation.Call(schedule, num_images, PUBLISHED, without, guided)
        scales = (cost._scale_bytes(model, call, scale) for scale in range(10))
        transformer = max(scales) + cost.cache_bytes(model, schedule, num_images, without, guided=guided)
        held += min(transformer, cost._decoder_bytes(model, num_images, without))
    assert peak - cost.peak_bytes(model, schedule, num_images, without, guided=guided) == held
