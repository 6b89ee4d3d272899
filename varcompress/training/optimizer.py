"""The optimiser of a run and its rate: torch's AdamW, torchao's in 8 bits, or Muon for the matrices of the layers."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from varcompress.errors import InputError
from varcompress.hardware import compiling
from varcompress.models.transformer import VAR
from varcompress.training.recipe import Recipe

MUON_MOMENTUM = 0.95  # its authors' figure
BLOCK, LEAST = 256, 4096  # of a moment in 8 bits: numbers that share a scale; smaller parameters keep float32
FLOAT32 = 4


class Optimizer:
    """One or two of torch's optimisers, which share a learning rate."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self._parts = parts

    def step(self, learning_rate: float) -> None:
        """Move the weights, and let go of their gradients."""
        for part in self._parts:
            for group in part.param_groups:
                if isinstance(group["lr"], Tensor):  # of code that is compiled
                    group["lr"].fill_(learning_rate)
                else:
                    group["lr"] = learning_rate
            with compiling():
                part.step()
        self.drop()

    @torch.no_grad()
    def begin(self, parameters: Iterable[Tensor]) -> None:
        """Make the moments of some parameters, all zero, for a state to be read into."""
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.step(0.0)

    def drop(self) -> None:
        """Let go of the gradients."""
        for part in self._parts:
            part.zero_grad(set_to_none=True)

    def state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Moments of a parameter by their names, to be read and changed; empty before its first gradient.

        One in 8 bits is its codes and their scales.
        """
        found = {}
        for name, moment in self._of(parameter).state[parameter].items():
            if hasattr(moment, "codes"):  # torchao's OptimState8bit
                found |= {f"{name}_codes": moment.codes, f"{name}_scale": moment.scale}
            else:
                found[name] = moment
        return found

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
    if recipe.optimizer == "adamw8bit":
        return Optimizer(_adamw_8bit()(groups, lr=recipe.learning_rate, betas=betas, block_size=BLOCK))
    adamw = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=betas, fused=True)
    if not muons:
        return Optimizer(adamw)
    options = {"weight_decay": decay, "momentum": MUON_MOMENTUM, "adjust_lr_fn": "match_rms_adamw"}
    return Optimizer(torch.optim.Muon(list(muons.values()), lr=recipe.learning_rate, **options), adamw)


def _adamw_8bit() -> type[torch.optim.Optimizer]:
    """torchao's AdamW8bit: moments in blocks of 8 bits (arXiv 2110.02861), arithmetic and weights in float32."""
    notices = logging.getLogger("torch.utils._pytree")  # of what torchao does while it is imported
    level = notices.level
    notices.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="OptimState8bit does not implement")  # of a cache on the disk
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise InputError("optimizer: adamw8bit needs the torchao package: pip install 'varcompress[lowmem]'") from error
    finally:
        notices.setLevel(level)
    return AdamW8bit


def moments_bytes(optimizer: str, numel: int, *, by_muon: bool = False) -> int:
    """Bytes of the moments of a parameter of so many numbers. by_muon: whether it is one of `muon_matrices`."""
    if by_muon:
        return FLOAT32 * numel
    if optimizer == "adamw8bit" and numel >= LEAST and numel % BLOCK == 0:
        return 2 * (numel + FLOAT32 * numel // BLOCK)
    return 2 * FLOAT32 * numel


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
