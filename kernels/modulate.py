"""LayerNorm with AdaLN modulation, alone or after the gated residual of the branch before it.

The arithmetic between two branches of a VAR layer (arXiv 2404.02905): x + branch * gate, LayerNorm
without affine, times 1 + scale, plus shift. As one pass it reads x and the branch once and writes
x and y once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from varcompress.kernels import constexpr, jit, tl, triton

EPS = 1e-6


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """LayerNorm without affine, then AdaLN: x (R, n, C), scale and shift (R, 1, C) -> (R, n, C)."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPS), 1 + scale)


def add_modulate(x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Gated residual, then `modulate`: x and branch (R, n, C), the others (R, 1, C) -> the sum and its modulation.

    The sum overwrites x.
    """
    x.addcmul_(branch, gate)
    return x, modulate(x, scale, shift)


def modulate_triton(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """`modulate` in one kernel, float32 inside.

    x is contiguous; scale and shift may be views whose last dimension is. Raises ValueError for other layouts.
    """
    return _launch(x, None, None, scale, shift)


def add_modulate_triton(x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """`add_modulate` in one kernel, float32 inside.

    Layouts and errors are those of `modulate_triton`, branch as x and gate as scale.
    """
    return x, _launch(x, branch, gate, scale, shift)


def _launch(x: Tensor, branch: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor) -> Tensor:
    rows, tokens, width = x.shape
    if not all(tensor is None or (tensor.is_contiguous() and tensor.shape == x.shape) for tensor in (x, branch)):
        raise ValueError(f"x and branch must be contiguous and of one shape, {tuple(x.shape)}")
    vectors = [vector for vector in (gate, scale, shift) if vector is not None]
    if not all(vector.shape == (rows, 1, width) and vector.stride(-1) == 1 for vector in vectors):
        raise ValueError(f"gate, scale and shift must be {(rows, 1, width)} with contiguous vectors")
    out, block = torch.empty_like(x), triton.next_power_of_2(width)
    _modulate[(tokens, rows)](
        x,
        branch,
        gate,
        scale,
        shift,
        out,
        0 if gate is None else gate.stride(0),
        scale.stride(0),
        shift.stride(0),
        EPS,
        width,
        block,
        num_warps=min(max(block // 256, 1), 8),  # eight values a thread: one vector of 16 bytes in half precision
    )
    return out


@jit()
def _modulate(
    x_pointer,
    branch_pointer,  # None for no residual
    gate_pointer,
    scale_pointer,
    shift_pointer,
    out_pointer,
    gate_stride,
    scale_stride,
    shift_stride,
    eps,
    WIDTH: constexpr,
    BLOCK: constexpr,
):
    """One token."""
    token, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    here = (row * tl.num_programs(0) + token) * WIDTH + column
    x = tl.load(x_pointer + here, mask=inside, other=0.0).to(tl.float32)
    if branch_pointer is not None:
        branch = tl.load(branch_pointer + here, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(gate_pointer + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
        # what is normalised is what is stored, rounded to its dtype
        total = (x + branch * gate).to(x_pointer.dtype.element_ty)
        tl.store(x_pointer + here, total, mask=inside)
        x = total.to(tl.float32)
    centred = tl.where(inside, x - tl.sum(x) / WIDTH, 0.0)
    normal = centred * tl.rsqrt(tl.sum(centred * centred) / WIDTH + eps)
    scale = tl.load(scale_pointer + row * scale_stride + column, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(shift_pointer + row * shift_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_pointer + here, normal * (1 + scale) + shift, mask=inside)
