"""What a step minimises: the recipe's losses, of one teacher-forced pass under all schedules of the step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

from varcompress.data.streams import CFG, fractions, words
from varcompress.data.tokens import Samples
from varcompress.distributed import Ranks
from varcompress.hardware import fitting_memory
from varcompress.models.elastic import ElasticVAR
from varcompress.sampling import cfg_bounds
from varcompress.schedule import Schedule, Together
from varcompress.training.losses import LOSSES, Distribution, Targets
from varcompress.training.recipe import Recipe
from varcompress.training.teacher import StoredTeacher, Teacher


class Given(NamedTuple):
    """What a pass is given: labels (B,) int64, teacher_input (B, L - p_1^2, z_channels), and what it is to predict."""

    labels: Tensor
    teacher_input: Tensor
    targets: Targets


class Objective:
    """The loss of a step. A loss of several schedules is the mean over them.

    Of schedules in one pass that is E/L times the loss of the E tokens they share, which are computed once, and
    (1 - E/L) times the mean of the others' losses over the schedules.
    """

    def __init__(self, model: ElasticVAR, recipe: Recipe, teacher: Teacher | StoredTeacher | None = None) -> None:
        self.model, self.recipe, self.teacher = model, recipe, teacher
        # all that can be measured are, for the log
        self.losses = {name: loss() for name, loss in LOSSES.items() if teacher or not loss.needs_teacher}
        device = model.device
        self._weights = torch.tensor([recipe.loss.get(name, 0.0) for name in self.losses], device=device)

    def backward(self, samples: Samples, places: slice, step: int, schedules: Sequence[Schedule]) -> Tensor:
        """Add the gradients of one pass of a step. Returns its losses by kind, schedule and token: (N, S, L) float32.

        samples: those at these places of the epoch; they may be on the host. All passes of step `step` together have
        the gradient of the step, so each has its share of it.
        """
        recipe, cfg = self.recipe, self._drawn_cfg(step, places)
        with self._fitting(samples):
            given = self.given(samples, cfg)
            if recipe.together:
                measured = self.measure(given, schedules, cfg) / recipe.accumulation
                self.total(measured).backward()
                return measured.detach()
            parts = []
            for schedule in schedules:  # the same gradients, one after another: less memory, more time
                measured = self.measure(given, [schedule], cfg) / recipe.accumulation
                (self.total(measured) / len(schedules)).backward()
                parts.append(measured.detach())
            return torch.cat(parts, dim=1)

    @torch.no_grad()
    def evaluate(self, samples: Samples, schedules: Sequence[Schedule]) -> Tensor:
        """Losses by kind, schedule and token, the mean over the images: (N, S, L) float32. Free of chance."""
        with self._fitting(samples):
            cfg = self._middle_cfg(samples)
            return self.measure(self.given(samples, cfg), schedules, cfg)

    def parallelize_teacher(self, how: str, ranks: Ranks) -> None:
        """Distribute the teacher's weights too, where those in training are."""
        if how == "fsdp" and isinstance(self.teacher, Teacher):
            self.teacher.parallelize(how, ranks)

    def loss_of(self, parts: Sequence[Samples]) -> Callable[[Schedule], float]:
        """A function of schedules: their loss on some images, in parts that fit the device. Free of chance."""
        # what they are given stays the same for all schedules; the guidance of a range is its middle
        given = [(self.given(part, cfg), cfg) for part, cfg in ((part, self._middle_cfg(part)) for part in parts)]
        images = sum(len(part.labels) for part in parts)

        @torch.no_grad()
        def loss(schedule: Schedule) -> float:
            with self._fitting(parts[0]):
                found = (self.total(self.measure(part, [schedule], cfg)) * len(part.labels) for part, cfg in given)
                return sum(found).item() / images

        return loss

    def teacher_says(self, samples: Samples) -> Distribution:
        """The teacher's distributions of these samples."""
        with self._fitting(samples):
            return self.given(samples, self._middle_cfg(samples)).targets.teacher

    def _middle_cfg(self, samples: Samples) -> Tensor | None:
        """The guidance in the middle of the range, for each sample; None where none is distilled."""
        if self.recipe.cfg is None:
            return None
        middle = sum(cfg_bounds(self.recipe.cfg)) / 2
        return torch.full((len(samples.labels),), middle, device=self.model.device)

    def zeros(self, schedules: int) -> Tensor:
        """Losses (N, S, L) to add to."""
        return torch.zeros(len(self.losses), schedules, self.model.var.config.tokens, device=self.model.device)

    @torch.no_grad()
    def given(self, samples: Samples, cfg: Tensor | None = None) -> Given:
        """What a pass over these samples is given, on the model's device. cfg: (B,) float32, what to distil."""
        labels, tokens = (part.to(self.model.device) for part in (samples.labels, samples.tokens))
        teacher_input = self.model.tokenizer.teacher_input(tokens)
        if self.teacher is None:
            return Given(labels, teacher_input, Targets(tokens))
        with self._autocast():
            return Given(labels, teacher_input, Targets(tokens, self.teacher(samples, teacher_input, cfg)))

    def measure(self, given: Given, schedules: Sequence[Schedule], cfg: Tensor | None = None) -> Tensor:
        """Losses by kind, schedule and token, the mean over the images, in nats: (N, S, L) float32, with gradients.

        cfg: see `VAR.condition`.
        """
        together, var = Together(tuple(schedules)), self.model.var
        with self._autocast():
            options = {"checkpointing": self.recipe.activation_checkpointing}
            options |= {"cfg": cfg} if var.config.cfg_input else {}
            logits = var(given.labels, given.teacher_input, together, **options)
        early, late = (given.targets.of(tokens) for tokens in (slice(0, together.trunk), slice(together.trunk, None)))
        trunk, *tails = (
            self._of_piece(piece, late if i else early) for i, piece in enumerate(logits.split(together.lengths, dim=1))
        )
        whole = [torch.cat((trunk, tail), dim=-1) for tail in tails] or [trunk] * len(schedules)
        return torch.stack(whole, dim=1)

    def _of_piece(self, logits: Tensor, targets: Targets) -> Tensor:
        """Losses of some tokens, the mean over the images: (N, n)."""
        log_probs, found = logits.log_softmax(-1), []
        for name, loss in self.losses.items():
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.recipe.loss.get(name, 0.0) > 0):
                found.append(loss(log_probs, targets).mean(0))
        return torch.stack(found)

    def total(self, measured: Tensor) -> Tensor:
        """The loss that is minimised, of losses (N, S, L): ()."""
        return self.of_schedules(measured).mean()

    def of_schedules(self, measured: Tensor) -> Tensor:
        """The same of each schedule: (S,)."""
        return torch.einsum("n,nsl->sl", self._weights, measured).mean(-1)

    def _drawn_cfg(self, step: int, places: slice) -> Tensor | None:
        """The guidance to distil for each image of a pass (B,), whatever the other images and processes."""
        recipe, images = self.recipe, places.stop - places.start
        if recipe.cfg is None:
            return None
        low, high = cfg_bounds(recipe.cfg)
        drawn = fractions(words(recipe.seed, CFG, step, images, first=places.start)[0])
        return (low + (high - low) * drawn).float().to(self.model.device)

    def _autocast(self) -> torch.autocast:
        half = self.recipe.dtype == "bfloat16"
        # no cache: a pass reads each weight once, and recomputed layers would leave all their casts in it meanwhile
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=half, cache_enabled=False)

    def _fitting(self, samples: Samples) -> AbstractContextManager:
        """A block whose passes over these samples may be too much for the device, which an InputError then says."""
        recipe = self.recipe
        more = "" if recipe.activation_checkpointing else ", or set activation_checkpointing=true"
        apart = ", or set together=false" if recipe.together and recipe.depth_probability else ""
        remedy = f"raise accumulation (now {recipe.accumulation}){more}{apart}"
        return fitting_memory(self.model.device, len(samples.labels), remedy)
