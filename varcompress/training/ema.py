"""The running mean of the weights of a run (an exponential moving average, EMA), which its checkpoint then holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from varcompress.models.transformer import VAR


class WeightMean:
    """mean <- d mean + (1 - d) weights after every step, d being `decay`, and less in the first steps.

    d = min(decay, (1 + step) / (10 + step)), so that the weights a run starts from are soon forgotten.
    """

    def __init__(self, var: VAR, decay: float) -> None:
        self._parameters, self._decay = dict(var.named_parameters()), decay
        self._mean = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` (from 1)."""
        share = 1 - min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self._mean.values()), list(self._parameters.values()), share)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """A block in which the model has the mean for weights."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        """Give the model the mean, and keep its weights in its place."""
        for name, parameter in self._parameters.items():  # by value: FSDP2 reads weights from where they were at first
            weight = parameter.clone()
            parameter.copy_(self._mean[name])
            self._mean[name].copy_(weight)

    @property
    def state(self) -> dict[str, Tensor]:
        """The mean of each parameter."""
        return self._mean
