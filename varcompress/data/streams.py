"""Random numbers that are a function of what they are for, and of nothing that came before.

Training asks for its order, its dropped labels, its crops and its depths by name. So a resumed run
needs no state of a generator, and the number of processes changes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from varcompress.kernels.philox import philox

DEPTH, SAMPLE, CROP, HOLDOUT, CFG = 1, 2, 3, 4, 5  # what a stream is for


def words(seed: int, stream: int, index: int, count: int, *, first: int = 0) -> tuple[Tensor, ...]:
    """Four independent rows of `count` random 32-bit words (int64, on the CPU) for (seed, stream, index).

    first: where in the rows to begin.
    """
    position = torch.arange(first, first + count)
    counter = (position, position.new_full((1,), index), position.new_full((1,), stream), position.new_zeros(1))
    return philox(tuple(torch.broadcast_tensors(*counter)), seed)


def fractions(word: Tensor) -> Tensor:
    """Words as uniform numbers in [0, 1), float64."""
    return word.double() * 2.0**-32
