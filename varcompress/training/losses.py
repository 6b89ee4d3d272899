"""Losses of training: small callable classes, chosen by a recipe's `loss`. A new one goes into LOSSES."""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor


class Loss(Protocol):
    """The loss of each token: logits (B, L, V) float32 and tokens (B, L) int64 -> (B, L) float32, in nats."""

    def __call__(self, logits: Tensor, tokens: Tensor) -> Tensor: ...


class CrossEntropy:
    """-log p(token), the loss of VAR and of VARiant (arXiv 2511.16546, section 3)."""

    def __call__(self, logits: Tensor, tokens: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view(tokens.shape)


LOSSES: dict[str, type[Loss]] = {"cross_entropy": CrossEntropy}
