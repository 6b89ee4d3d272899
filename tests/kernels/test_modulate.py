"""LayerNorm, modulation and gated residual."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels import DEVICE, DTYPES, assert_close, needs_triton
from varcompress.kernels.modulate import add_modulate, add_modulate_triton, modulate, modulate_triton

SHAPES = [(1, 1, 32), (3, 4, 48), (2, 5, 33), (2, 3, 300), (2, 1, 1920), (1, 2, 2304), (2, 3, 1)]


def inputs(shape, dtype, seed=0):
    """x, branch, then gate, scale and shift as strided views, which is how AdaLN yields them."""
    generator = torch.Generator().manual_seed(seed)
    rows, _, width = shape
    x, branch = torch.randn(2, *shape, generator=generator).to(DEVICE, dtype)
    vectors = torch.randn(rows, 1, 6, width, generator=generator).to(DEVICE, dtype)
    return x, branch, *vectors.unbind(2)[1:4]


def test_plain_functions_equal_the_formula():
    x, branch, gate, scale, shift = (tensor.double() for tensor in inputs((3, 4, 48), torch.float32))
    total = x + branch * gate
    normal = (total - total.mean(-1, keepdim=True)) / (total.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    expected = normal * (1 + scale) + shift
    for actual, wanted in zip(add_modulate(x, branch, gate, scale, shift), (total, expected), strict=True):
        torch.testing.assert_close(actual, wanted)
    torch.testing.assert_close(modulate(total, scale, shift), expected)


def assert_equals_plain(shape, dtype, seed=0):
    """In half precision the kernel rounds once where plain torch rounds at every step: that is done in float32."""
    x, branch, gate, scale, shift = inputs(shape, dtype, seed)
    vectors = scale.float(), shift.float()
    assert_close(modulate_triton(x, scale, shift), modulate(x.float(), *vectors).to(dtype))
    expected = torch.addcmul(x.float(), branch.float(), gate.float()).to(dtype)
    total, y = add_modulate_triton(x, branch, gate, scale, shift)
    assert_close(total, expected)
    assert_close(y, modulate(total.float(), *vectors).to(dtype))


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_equals_plain(shape, dtype):
    assert_equals_plain(shape, dtype)


@needs_triton
@settings(max_examples=15)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(8, 200)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_kernel_equals_plain_at_any_size(shape, dtype, seed):
    assert_equals_plain(shape, dtype, seed)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernel_is_as_near_to_float32_as_plain_half_precision(dtype):
    tensors = inputs((4, 8, 96), dtype)
    exact = add_modulate(*(tensor.float() for tensor in tensors))[1]
    plain = add_modulate(*(tensor.clone() for tensor in tensors))[1].float()  # the sum overwrites x
    ours = add_modulate_triton(*tensors)[1].float()
    # the interpreter cuts to bfloat16 where a GPU rounds: four times the squared error
    assert float((ours - exact).square().mean()) <= 4 * float((plain - exact).square().mean())


@needs_triton
def test_a_large_mean_leaves_the_variance_exact():
    x, _, _, scale, shift = inputs((1, 2, 300), torch.float32)
    x += 1000
    expected = modulate(x.double(), scale.double(), shift.double()).float()
    torch.testing.assert_close(modulate_triton(x, scale, shift), expected, atol=1e-3, rtol=1e-3)


@needs_triton
def test_the_sum_overwrites_x_alone():
    x, branch, gate, scale, shift = inputs((2, 3, 48), torch.bfloat16)
    before = x.clone(), branch.clone()
    total, _ = add_modulate_triton(x, branch, gate, scale, shift)
    assert total is x
    assert not torch.equal(x, before[0])
    assert torch.equal(branch, before[1])


@needs_triton
def test_vectors_may_be_broadcast():
    x, branch, *vectors = inputs((3, 2, 48), torch.float32)
    vectors = [vector[:1].expand(3, -1, -1) for vector in vectors]
    expected = add_modulate(x.clone(), branch, *vectors)  # the sum overwrites x
    for ours, plain in zip(add_modulate_triton(x, branch, *vectors), expected, strict=True):
        assert_close(ours, plain)


@needs_triton
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter's numpy
def test_an_overflow_stays_in_its_token():
    x, branch, gate, scale, shift = inputs((2, 3, 48), torch.float16)
    x[0, 1, 5], x[1, 2, 0] = torch.inf, torch.nan
    _, y = add_modulate_triton(x, branch, gate, scale, shift)
    finite = torch.ones(2, 3, dtype=torch.bool, device=DEVICE)
    finite[0, 1] = finite[1, 2] = False
    assert torch.equal(y.isfinite().all(dim=-1), finite)
    assert not bool(y[~finite].isfinite().any())


@needs_triton
def test_other_layouts_are_refused():
    x, branch, gate, scale, shift = inputs((2, 3, 48), torch.float32)
    with pytest.raises(ValueError, match="contiguous"):
        modulate_triton(x.mT.contiguous().mT, scale, shift)
    with pytest.raises(ValueError, match="contiguous"):
        add_modulate_triton(x, branch[:, :2], gate, scale, shift)
    with pytest.raises(ValueError, match="gate, scale and shift"):
        modulate_triton(x, scale[:1], shift)
    with pytest.raises(ValueError, match="gate, scale and shift"):
        modulate_triton(x, scale, shift.repeat_interleave(2, -1)[..., ::2])
