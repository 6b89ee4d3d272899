"""GroupNorm with SiLU on channels-last maps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.kernels import DEVICE, DTYPES, assert_close, needs_triton
from varcompress.kernels.group_norm import group_norm, group_norm_triton

# groups, then a map: (B, C, H, W)
SHAPES = [
    (32, (2, 160, 5, 7)),
    (32, (1, 32, 40, 40)),  # several slabs, the last not full
    (32, (2, 320, 4, 4)),
    (4, (3, 12, 1, 1)),
    (1, (1, 5, 3, 11)),
    (2, (1, 4, 70, 65)),  # slabs of more than the least
]


def inputs(groups, shape, dtype, seed=0, mean=0.0):
    generator = torch.Generator().manual_seed(seed)
    norm = nn.GroupNorm(groups, shape[1], eps=1e-6).to(DEVICE, dtype)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn(shape, generator=generator) + mean
    return norm, x.to(DEVICE, dtype, memory_format=torch.channels_last)


@torch.no_grad()
def assert_equals_plain(groups, shape, dtype, silu, seed=0):
    """In half precision the kernel rounds once, where plain torch rounds before SiLU too: that is done in float32."""
    norm, x = inputs(groups, shape, dtype, seed)
    y = group_norm_triton(norm, x, silu=silu)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y, group_norm(norm.float(), x.float(), silu=silu).to(dtype))


def test_plain_function_equals_the_formula():
    norm, x = inputs(4, (2, 12, 5, 3), torch.float64)
    groups = x.reshape(2, 4, -1)
    normal = (groups - groups.mean(-1, keepdim=True)) / (groups.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    expected = normal.reshape(x.shape) * norm.weight[:, None, None] + norm.bias[:, None, None]
    torch.testing.assert_close(group_norm(norm, x), expected)
    torch.testing.assert_close(group_norm(norm, x, silu=True), expected * expected.sigmoid())


@needs_triton
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("groups", "shape"), SHAPES)
def test_kernel_equals_plain(groups, shape, dtype, silu):
    assert_equals_plain(groups, shape, dtype, silu)


@needs_triton
@settings(max_examples=15)
@given(
    groups=st.integers(1, 6),
    per_group=st.integers(1, 6),
    images=st.integers(1, 3),
    side=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    dtype=st.sampled_from(DTYPES),
    silu=st.booleans(),
    seed=st.integers(0, 99),
)
def test_kernel_equals_plain_at_any_size(groups, per_group, images, side, dtype, silu, seed):
    if per_group * side[0] * side[1] >= 8:  # of few values the variance may be so small that its rounding is all
        assert_equals_plain(groups, (images, groups * per_group, *side), dtype, silu, seed)


@needs_triton
@torch.no_grad()
def test_a_mean_that_is_large_beside_the_spread_does_not_cancel():
    norm, x = inputs(2, (1, 8, 24, 24), torch.float32, mean=300.0)
    expected = group_norm(norm.double(), x.double())
    torch.testing.assert_close(group_norm_triton(norm.float(), x).double(), expected, atol=3e-4, rtol=3e-4)


@needs_triton
@torch.no_grad()
def test_a_map_in_another_layout_is_copied():
    norm, x = inputs(4, (2, 12, 5, 3), torch.float32)
    before = x.contiguous()
    assert torch.equal(group_norm_triton(norm, before), group_norm_triton(norm, x))
    assert torch.equal(before, x)


@needs_triton
@torch.no_grad()
def test_what_is_not_finite_stays_in_its_group():
    norm, x = inputs(2, (2, 4, 3, 3), torch.float32)
    x[0, 1, 2, 2] = torch.nan
    y = group_norm_triton(norm, x, silu=True)
    assert y[0, :2].isnan().all()
    assert y[0, 2:].isfinite().all()
    assert y[1].isfinite().all()
