"""Fused operations of generation, one per file: plain torch, and the same in Triton.

`modulate` holds `modulate` and `add_modulate`, `qkv` holds `split_heads`, `draw` and `group_norm` what they are called.
Each has a plain torch function, which runs anywhere, and a launcher of the same name with `_triton` at its end, which
must equal it to rounding. The caller chooses by `available`. `philox` holds the random numbers, `backend` the choice.

A launcher allocates its output and at most small sums, reads no value back and decides nothing by one, so that a
CUDA graph can capture it; call it once before the capture, because the first call compiles. It
runs on the current CUDA device and knows no gradients.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

try:
    import triton
    import triton.language as tl
    from triton.language import constexpr
except ImportError:  # Triton is for Linux alone, and the plain functions need none of it
    triton = tl = constexpr = None


def available(device: torch.device | str) -> bool:
    """Whether the launchers run on `device`: a CUDA device, or any under TRITON_INTERPRET=1."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return triton is not None and (interpreted or torch.device(device).type == "cuda")


def jit(*general: str) -> Callable[[Callable], Callable]:
    """`triton.jit` that compiles no special case for a value of the arguments `general`.

    Without Triton the kernel stays the function that it is, which nobody calls.
    """
    return triton.jit(do_not_specialize=general) if triton is not None else lambda kernel: kernel
