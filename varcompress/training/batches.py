"""What the steps of a run read: torch's DataLoader over the token store, every batch a function of its step alone."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.utils.data import DataLoader, Dataset

from varcompress.data.tokens import Epoch, Samples, TokenData
from varcompress.distributed import Ranks
from varcompress.training.recipe import EPOCHS, Recipe
from varcompress.training.stopping import leave_signals
from varcompress.training.strategy import Step

Batch = list[tuple[slice, Samples]]  # of each pass of this process: its places in the epoch, and the samples there


class Batches(Dataset):
    """The batches of this process, one for each step."""

    def __init__(self, data: TokenData, recipe: Recipe, ranks: Ranks, steps: Sequence[Step], null: int) -> None:
        self._data, self._recipe, self._ranks, self._steps, self._null = data, recipe, ranks, steps, null
        self._epoch: tuple[int, Epoch] | None = None

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, index: int) -> Batch:
        step, recipe = self._steps[index], self._recipe
        if self._epoch is None or self._epoch[0] != step.epoch:
            options = {"seed": recipe.seed, "label_drop": recipe.label_drop, "null": self._null}
            options |= {"own_view": recipe.views == EPOCHS}
            self._epoch = step.epoch, Epoch.draw(self._data, epoch=step.epoch, **options)
        epoch = self._epoch[1]
        return [(places, epoch.samples(places)) for places in passes(step, recipe, self._ranks)]


def passes(step: Step, recipe: Recipe, ranks: Ranks) -> list[slice]:
    """The places in the epoch of the images that this process runs, one slice per pass.

    All processes together cover the batch.
    """
    size = recipe.pass_size(ranks.count)
    starts = (
        step.place * recipe.batch_size + (micro * ranks.count + ranks.rank) * size
        for micro in range(recipe.accumulation)
    )
    return [slice(start, start + size) for start in starts]


def loader(batches: Batches, workers: int, device: torch.device) -> DataLoader:
    """The batches in order, read ahead by so many processes; with none, by this one when they are asked for."""
    # forked, a process shares the memory map of the store; it would be copied to one that is started anew
    forks = workers > 0 and "fork" in multiprocessing.get_all_start_methods()
    return DataLoader(
        batches,
        batch_size=None,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        multiprocessing_context="fork" if forks else None,
        worker_init_fn=leave_signals,
        collate_fn=_as_it_is,
    )


@contextmanager
def ended(reading: Iterator[Batch]) -> Iterator[None]:
    """A block at whose end no process reads any more, also where an error keeps the iterator alive.

    At the end of this process torch would end them by a SIGTERM, which they leave to the run.
    """
    try:
        yield
    finally:
        if shut_down := getattr(reading, "_shutdown_workers", None):
            shut_down()


def _as_it_is(batch: Batch) -> Batch:
    """Without torch's own conversion, which would make tensors of the rows and views."""
    return batch
