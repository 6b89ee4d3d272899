"""The optimiser of a run, torch's AdamW or Muon for the matrices of the layers and AdamW for the rest, and its rate."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from varcompress.models.transformer import VAR
from varcompress.training.recipe import Recipe

MUON_MOMENTUM = 0.95  # its authors' figure


class Optimizer:
    """One or two of torch's optimisers, which share a learning rate."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self._parts = parts

    def step(self, learning_rate: float) -> None:
        """Move the weights, and let go of their gradients."""
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = learning_rate
            part.step()
        self.drop()

    def drop(self) -> None:
        """Let go of the gradients."""
        for part in self._parts:
            part.zero_grad(set_to_none=True)

    def state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Moments of a parameter by their names, to read and to set; empty before its first gradient."""
        return self._of(parameter).state[parameter]

    @property
    def moments_bytes(self) -> int:
        """Bytes of all moments, on all devices together, once every parameter has had a gradient."""
        counts = [1 if isinstance(part, torch.optim.Muon) else 2 for part in self._parts]
        sizes = (sum(parameter.nbytes for parameter in parameters(part)) for part in self._parts)
        return sum(count * size for count, size in zip(counts, sizes, strict=True))

    def _of(self, parameter: Tensor) -> torch.optim.Optimizer:
        return next(part for part in self._parts if any(parameter is one for one in parameters(part)))


def parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All that an optimiser moves."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def optimizer_of(var: VAR, recipe: Recipe) -> Optimizer:
    """The optimiser over the transformer that a recipe asks for.

    Only matrices of linear layers decay, not biases and embeddings. Muon (arXiv 2502.16982; torch.optim.Muon) takes
    those within the layers, AdaLN's aside, with updates as large as AdamW's usually are, so that one learning rate
    serves both.
    """
    betas, decay = recipe.betas, recipe.weight_decay
    matrices = linear_matrices(var)
    muons = muon_matrices(var) if recipe.optimizer == "muon" else {}
    decaying = [weight for name, weight in matrices.items() if name not in muons]
    known = set(map(id, matrices.values()))
    rest = [parameter for parameter in var.parameters() if id(parameter) not in known]
    groups = [{"params": decaying, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=betas, fused=True)
    if not muons:
        return Optimizer(adamw)
    options = {"weight_decay": decay, "momentum": MUON_MOMENTUM, "adjust_lr_fn": "match_rms_adamw"}
    return Optimizer(torch.optim.Muon(list(muons.values()), lr=recipe.learning_rate, **options), adamw)


def linear_matrices(var: VAR) -> dict[str, Tensor]:
    """The weights of the linear layers, by the names of these."""
    return {name: module.weight for name, module in var.named_modules() if isinstance(module, nn.Linear)}


def muon_matrices(var: VAR) -> dict[str, Tensor]:
    """Those that Muon takes: of the layers, AdaLN's aside."""
    return {name: w for name, w in linear_matrices(var).items() if name.startswith("blocks.") and "ada_lin" not in name}


def learning_rate_at(number: int, steps: int, recipe: Recipe) -> float:
    """The learning rate of step `number` (from 1) of `steps`.

    It rises linearly over the warm-up and falls over the whole run, linearly or as a cosine; the two are multiplied.
    """
    rise, done = min(1.0, number / max(recipe.warmup_steps, 1)), number / steps
    fallen = done if recipe.learning_rate_decay == "linear" else (1 - math.cos(math.pi * done)) / 2
    return recipe.learning_rate * rise * (1 - (1 - recipe.learning_rate_end) * fallen)
