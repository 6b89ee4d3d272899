"""Losses of training: small callable classes, weighed against each other by a recipe's `loss`. LOSSES names them."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

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
    """The loss of each token: log-probabilities (B, n, V) float32 and their targets -> (B, n) float32, in nats."""

    def __call__(self, log_probs: Tensor, targets: Targets) -> Tensor: ...


class CrossEntropy:
    """-log q(token), the loss of VAR and of VARiant (arXiv 2511.16546, section 3)."""

    def __call__(self, log_probs: Tensor, targets: Targets) -> Tensor:
        return -log_probs.gather(-1, targets.tokens[..., None]).squeeze(-1)


class KullbackLeibler:
    """sum_v p(v) log(p(v) / q(v)), p being the teacher's distribution (arXiv 1503.02531, at temperature 1).

    Of a teacher of whom only the largest probabilities are known, the rest is one event on both sides: a lower bound.
    """

    def __call__(self, log_probs: Tensor, targets: Targets) -> Tensor:
        teacher = targets.teacher
        if teacher.tokens is None:
            return F.kl_div(log_probs, teacher.log_probs, log_target=True, reduction="none").sum(-1)
        known = part(log_probs, teacher.tokens)
        return F.kl_div(known, teacher.log_probs, log_target=True, reduction="none").sum(-1)


def part(log_probs: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities (..., V) of some tokens (..., k), and of all others together behind them: (..., k + 1)."""
    rest = log_probs.scatter(-1, tokens, -torch.inf).logsumexp(-1, keepdim=True)
    smallest = math.log(torch.finfo(log_probs.dtype).tiny)  # where nothing is left
    return torch.cat((log_probs.gather(-1, tokens), rest.clamp_min(smallest)), dim=-1)


LOSSES: dict[str, type[Loss]] = {"cross_entropy": CrossEntropy, "kl": KullbackLeibler}


def scale_weights(name: str, patch_nums: tuple[int, ...]) -> Tensor:
    """The weight of each token in the loss, (L,) float32 with mean 1.

    tokens: each token the same, as VAR is trained; scales: each scale the same; lognormal: a scale's share falls off
    like a normal distribution with the distance of the side, seen from the last scale, from the mean side, as HMAR
    weighs them (arXiv 2506.04421, section 4; NVlabs/HMAR, trainer.py, which calls it lognorm).
    """
    counts = torch.tensor([side * side for side in patch_nums])
    if len(counts) == 1:
        return torch.ones(int(counts))
    sides = torch.tensor(patch_nums, dtype=torch.float32)
    share = {
        "tokens": counts.float(),
        "scales": torch.ones(len(patch_nums)),
        "lognormal": (-(((sides.flip(0) - sides.mean()) / sides.std().clamp_min(1e-6)) ** 2) / 2).exp(),
    }[name]
    return (share / share.sum() * counts.sum() / counts).repeat_interleave(counts)
