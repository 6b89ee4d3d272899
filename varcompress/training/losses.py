"""Losses of training: small callable classes, weighed against each other by a recipe's `loss`. LOSSES names them."""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Targets(NamedTuple):
    """What a pass is to predict: tokens (B, n) int64 of the data, and the teacher's log-probabilities, if there is one.

    teacher: a `Teacher`'s answer, (B, n, ...).
    """

    tokens: Tensor
    teacher: Distribution | None = None

    def of(self, tokens: slice) -> Targets:
        """The targets of some tokens of each image."""
        return Targets(self.tokens[:, tokens], self.teacher and self.teacher.of(tokens))


class Distribution(NamedTuple):
    """The teacher's distribution over the codebook at each token, whole or its largest part.

    log_probs: (B, n, V) float32; where only the largest k are known (B, n, k + 1), the last being that of all others
    together, and `tokens` (B, n, k) int64 are the k.
    """

    log_probs: Tensor
    tokens: Tensor | None = None

    def largest(self, count: int) -> Distribution:
        """The largest `count` of whole distributions, and the rest."""
        tokens = self.log_probs.topk(count, dim=-1).indices
        return Distribution(part(self.log_probs, tokens), tokens)

    def of(self, tokens: slice) -> Distribution:
        """The distributions of some tokens of each image."""
        return Distribution(self.log_probs[:, tokens], None if self.tokens is None else self.tokens[:, tokens])


class Loss(Protocol):
    """The loss of each token: log-probabilities (B, n, V) float32 and their targets -> (B, n) float32, in nats.

    needs_teacher: whether it reads the teacher's distributions; else it goes by the data's tokens.
    """

    needs_teacher: ClassVar[bool]

    def __call__(self, log_probs: Tensor, targets: Targets) -> Tensor: ...


class CrossEntropy:
    """-log q(token), the loss of VAR and of VARiant (arXiv 2511.16546, section 3)."""

    needs_teacher = False

    def __call__(self, log_probs: Tensor, targets: Targets) -> Tensor:
        return -log_probs.gather(-1, targets.tokens[..., None]).squeeze(-1)


class KullbackLeibler:
    """sum_v p(v) log(p(v) / q(v)), p being the teacher's distribution (arXiv 1503.02531, at temperature 1).

    Of a teacher of whom only the largest probabilities are known, the rest is one event on both sides: a lower bound.
    """

    needs_teacher = True

    def __call__(self, log_probs: Tensor, targets: Targets) -> Tensor:
        teacher = targets.teacher
        known = log_probs if teacher.tokens is None else part(log_probs, teacher.tokens)
        return F.kl_div(known, teacher.log_probs, log_target=True, reduction="none").sum(-1)


def part(log_probs: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities (..., V) of some tokens (..., k), and of all others together behind them: (..., k + 1)."""
    rest = log_probs.scatter(-1, tokens, -torch.inf).logsumexp(-1, keepdim=True)
    smallest = math.log(torch.finfo(log_probs.dtype).tiny)  # where nothing is left
    return torch.cat((log_probs.gather(-1, tokens), rest.clamp_min(smallest)), dim=-1)


LOSSES: dict[str, type[Loss]] = {"cross_entropy": CrossEntropy, "kl": KullbackLeibler}
