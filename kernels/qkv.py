"""From the output of the qkv projection to queries, and keys and values in the cache.

VAR (arXiv 2404.02905) attends with L2-normalised queries and keys and one learned temperature per
head. Bias, normalisation, temperature and the write into the cache are one pass over the
projection's output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from varcompress.kernels import constexpr, jit, tl, triton

EPS = 1e-12  # of torch.nn.functional.normalize
_GROUP = 8  # heads of one program


def split_heads(qkv: Tensor, bias: Tensor | None, temperature: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Write keys and values, return the queries.

    qkv: (R, n, 3C), queries, keys and values side by side; bias: (3C,), or None where it is in qkv
    already; temperature: (heads,) float32, multiplies the queries; keys, values: views (R, heads,
    n, head_dim) of a cache, in qkv's dtype. Returns (R, heads, n, head_dim), contiguous, in qkv's
    dtype. Norms and products are float32.
    """
    qkv = qkv if bias is None else qkv + bias
    q, k, v = qkv.unflatten(-1, (3, *keys.shape[1::2])).permute(2, 0, 3, 1, 4)
    torch.div(k, _norm(k), out=keys)
    values.copy_(v)
    return torch.mul(q, temperature[:, None, None] / _norm(q), out=q.new_empty(q.shape))


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).clamp_min_(EPS)


def split_heads_triton(
    qkv: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """`split_heads` in one kernel, which adds the bias in float32 too.

    qkv, bias and temperature are contiguous; keys and values have the same
    strides, the last 1. Raises ValueError for other shapes and layouts.
    """
    rows, heads, tokens, dim = keys.shape
    out = qkv.new_empty(keys.shape)
    if qkv.shape != (rows, tokens, 3 * heads * dim) or values.shape != keys.shape:
        raise ValueError(f"qkv {tuple(qkv.shape)} is not that of keys and values {tuple(keys.shape)}")
    if not all(tensor is None or tensor.is_contiguous() for tensor in (qkv, bias, temperature)):
        raise ValueError("qkv, bias and temperature must be contiguous")
    if keys.stride() != values.stride() or keys.stride(-1) != 1:
        raise ValueError("keys and values must have the same strides, the last 1")
    _split_heads[(tokens, rows, triton.cdiv(heads, _GROUP))](
        qkv,
        bias,
        temperature,
        keys,
        values,
        out,
        *keys.stride()[:3],
        EPS,
        heads,
        dim,
        _GROUP,
        triton.next_power_of_2(dim),
        num_warps=2,
    )
    return out


@jit()
def _split_heads(
    qkv_pointer,
    bias_pointer,  # None where the bias is in qkv
    temperature_pointer,
    keys_pointer,
    values_pointer,
    out_pointer,
    row_stride,
    head_stride,
    token_stride,
    eps,
    HEADS: constexpr,
    DIM: constexpr,
    GROUP: constexpr,
    BLOCK: constexpr,
):
    """A few heads of one token."""
    token, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)  # a cache may pass 2^31 elements
    tokens = tl.num_programs(0)
    head = tl.program_id(2) * GROUP + tl.arange(0, GROUP)[:, None]
    part = tl.arange(0, BLOCK)[None, :]
    inside = (head < HEADS) & (part < DIM)
    column = head * DIM + part
    qkv_pointer += (row * tokens + token) * 3 * HEADS * DIM
    temperature = tl.load(temperature_pointer + head, mask=head < HEADS, other=0.0)
    q = _biased(qkv_pointer, bias_pointer, column, inside)
    q = q * (temperature / _head_norm(q, eps))
    tl.store(out_pointer + ((row * HEADS + head) * tokens + token) * DIM + part, q, mask=inside)
    cached = row * row_stride + head * head_stride + token * token_stride + part
    k = _biased(qkv_pointer, bias_pointer, HEADS * DIM + column, inside)
    tl.store(keys_pointer + cached, k / _head_norm(k, eps), mask=inside)
    v = _biased(qkv_pointer, bias_pointer, 2 * HEADS * DIM + column, inside)
    tl.store(values_pointer + cached, v, mask=inside)


@jit()
def _biased(qkv_pointer, bias_pointer, column, inside):
    x = tl.load(qkv_pointer + column, mask=inside, other=0.0).to(tl.float32)
    if bias_pointer is not None:
        x += tl.load(bias_pointer + column, mask=inside, other=0.0).to(tl.float32)
    return x


@jit()
def _head_norm(x, eps):
    norm = tl.sqrt(tl.sum(x * x, axis=1, keep_dims=True))
    return tl.maximum(norm, eps, propagate_nan=tl.PropagateNan.ALL)
