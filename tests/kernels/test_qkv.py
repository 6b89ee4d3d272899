"""From the projection's output to queries and the cache."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels import DEVICE, DTYPES, assert_close, needs_triton
from varcompress.kernels.qkv import split_heads, split_heads_triton
from varcompress.models.transformer import Attention

UNTOUCHED = 7.0


def inputs(rows, tokens, heads, dim, dtype, seed=0):
    """qkv, bias, temperature, and a cache of keys and values with a window into it."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(rows, tokens, 3 * heads * dim, generator=generator).to(DEVICE, dtype)
    bias = torch.randn(3, heads * dim, generator=generator)
    bias[1] = 0  # keys have none
    temperature = (torch.rand(heads, generator=generator) * 4).exp().to(DEVICE)
    cache = torch.full((2, rows, heads, tokens + 9, dim), UNTOUCHED, dtype=dtype, device=DEVICE)
    return qkv, bias.flatten().to(DEVICE, dtype), temperature, cache, cache[:, :, :, 4 : 4 + tokens]


@pytest.mark.parametrize("split", [split_heads, pytest.param(split_heads_triton, marks=needs_triton)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_attention_of_the_model(split, dtype):
    torch.manual_seed(0)
    attention = Attention(96, 6).to(DEVICE, dtype).requires_grad_(False)
    for bias in (attention.q_bias, attention.v_bias):
        bias.normal_()
    attention.scale_mul_1H11.normal_(mean=1.0, std=2.0)
    x = torch.randn(2, 5, 96).to(DEVICE, dtype)
    expected = attention.project(x)
    bias = torch.cat((attention.q_bias, torch.zeros_like(attention.q_bias), attention.v_bias))
    temperature = attention.scale_mul_1H11.float().clamp_max(torch.tensor(100.0).log().item()).exp().flatten()
    window = inputs(2, 5, 6, 16, dtype)[-1]
    q = split(torch.nn.functional.linear(x, attention.mat_qkv.weight), bias, temperature, *window)
    for ours, theirs in zip((q, *window), expected, strict=True):
        # half precision: here the projection is rounded before the bias is added, there after
        scale = theirs.float().abs().amax()
        assert_close((ours.float() / scale).to(dtype), (theirs.float() / scale).to(dtype))
        assert ours.dtype == dtype


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1, 16), (2, 3, 5, 16), (1, 4, 8, 32), (2, 2, 11, 64), (1, 2, 3, 24)])
def test_kernel_equals_plain(shape, biased, dtype):
    qkv, bias, temperature, cache, window = inputs(*shape, dtype)
    ours = cache.clone()
    bias = bias if biased else None
    expected = split_heads(qkv, bias, temperature, *window)
    actual = split_heads_triton(qkv, bias, temperature, *ours[:, :, :, 4 : 4 + shape[1]])
    assert_close(actual, expected)
    assert_close(ours, cache)
    assert actual.is_contiguous()
    assert expected.is_contiguous()
    assert bool((ours[:, :, :, :4] == UNTOUCHED).all())
    assert bool((ours[:, :, :, 4 + shape[1] :] == UNTOUCHED).all())


@needs_triton
@settings(max_examples=15)
@given(
    rows=st.integers(1, 3),
    tokens=st.integers(1, 5),
    heads=st.integers(1, 20),
    dim=st.sampled_from([8, 16, 20, 32]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_kernel_equals_plain_at_any_size(rows, tokens, heads, dim, dtype, seed):
    qkv, bias, temperature, cache, window = inputs(rows, tokens, heads, dim, dtype, seed)
    expected = split_heads(qkv, bias, temperature, *window)
    written = cache.clone()
    assert_close(split_heads_triton(qkv, bias, temperature, *window), expected)
    assert_close(cache, written)


@needs_triton
def test_any_strides_of_the_cache_will_do():
    qkv, bias, temperature, _, window = inputs(2, 3, 5, 16, torch.float32)
    by_token = torch.empty(2, 3, 2, 5, 16, device=DEVICE).permute(0, 2, 3, 1, 4)  # tokens outermost
    expected = split_heads(qkv, bias, temperature, *window)
    for split in (split_heads, split_heads_triton):
        by_token.zero_()
        assert_close(split(qkv, bias, temperature, *by_token), expected)
        assert_close(by_token, window)


@pytest.mark.parametrize("split", [split_heads, pytest.param(split_heads_triton, marks=needs_triton)])
def test_zero_stays_zero_and_nan_stays_in_its_head(split):
    qkv, _, temperature, _, window = inputs(1, 2, 4, 16, torch.float32)
    qkv[0, 0] = 0
    qkv.view(1, 2, 3, 4, 16)[0, 1, :, 2, 5] = torch.nan
    q = split(qkv, None, temperature, *window)
    keys, values = window
    for tensor in (q, keys, values):
        assert bool((tensor[0, :, 0] == 0).all())
        assert bool(tensor[0, [0, 1, 3], 1].isfinite().all())
    for tensor in (q, keys):
        assert bool(tensor[0, 2, 1].isnan().all())


@needs_triton
def test_other_layouts_are_refused():
    qkv, bias, temperature, _, (keys, values) = inputs(2, 3, 5, 16, torch.float32)
    with pytest.raises(ValueError, match="same strides"):
        split_heads_triton(qkv, bias, temperature, keys, values.contiguous())
    with pytest.raises(ValueError, match="is not that of"):
        split_heads_triton(qkv[:, :2], bias, temperature, keys, values)
    with pytest.raises(ValueError, match="must be contiguous"):
        split_heads_triton(qkv.mT.contiguous().mT, bias, temperature, keys, values)
