"""States of a run that it can continue from: weights, and moments of the optimiser.

PyTorch's distributed checkpoints (torch.distributed.checkpoint): every process writes its part in the background, and
any number of processes, sharded in any way, reads them. A state is a folder step-N that is complete or absent.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from varcompress.distributed import PATIENCE, Ranks
from varcompress.errors import InputError
from varcompress.files import disk_errors
from varcompress.models.transformer import VAR
from varcompress.training.optimizer import Optimizer

# what a run of one process is: no news
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
METADATA = ".metadata"  # which rank 0 writes once all others have written their parts
WEIGHT = "weight"  # in a state, beside the moments of the optimiser


class Gone(InputError):
    """A state that its run took away while it was read."""


class States:
    """The states in a folder. The last `keep` of them are kept."""

    def __init__(self, folder: Path, keep: int = 1) -> None:
        self.folder, self._keep = folder, keep
        self._ranks, self._group = Ranks(), None
        self._pending: tuple[int, Future, bool] | None = None

    @property
    def steps(self) -> list[int]:
        """The steps that there is a state of, ascending."""
        found = (re.fullmatch(r"step-(\d+)", path.name) for path in self.folder.glob("step-*"))
        return sorted(int(match[1]) for match in found if match and (self.folder / match[0] / METADATA).is_file())

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step}"

    @contextmanager
    def writing(self, ranks: Ranks) -> Iterator[States]:
        """A block in which states are saved; at its end they are all on the disk."""
        # a group of its own: what is written in the background must not meet the collectives of training
        self._ranks, self._group = ranks, None
        if ranks.count > 1:
            self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
        try:
            yield self
        finally:
            self.wait()

    def save(self, step: int, tensors: dict[str, Tensor], *, drop: bool = True) -> None:
        """Begin to write the state after `step`; returns once the tensors may change. Earlier states stay whole.

        drop: whether those beyond `keep` go once it is written. Raises InputError where an earlier one could not be.
        """
        self.wait()
        aside = self.path(step).with_name(f"step-{step}.tmp")
        with disk_errors(self.folder), _reasons():
            if self._ranks.is_rank_zero:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
            self._ranks.barrier()
            saving = dcp.async_save(
                tensors, storage_writer=dcp.FileSystemWriter(aside), process_group=self._group, no_dist=not self._group
            )
        self._pending = step, saving, drop

    def wait(self) -> None:
        """Wait until the state that is being written is in its place. Raises InputError where that failed."""
        if self._pending is None:
            return
        (step, saving, drop), self._pending = self._pending, None
        aside = self.path(step).with_name(f"step-{step}.tmp")
        try:
            with disk_errors(self.folder), _reasons():
                saving.result()
                if self._ranks.is_rank_zero:
                    os.replace(aside, self.path(step))
                    for old in self.steps[: -self._keep] if drop else ():
                        self._drop(old)
        except InputError:
            shutil.rmtree(aside, ignore_errors=True)
            raise

    def _drop(self, step: int) -> None:
        """Delete a state, which is whole under its name or not there."""
        going = self.path(step).with_name(f"step-{step}.old.tmp")
        os.replace(self.path(step), going)
        shutil.rmtree(going, ignore_errors=True)

    @property
    def busy(self) -> bool:
        """Whether this process is still writing a state; where not, `wait` returns, or raises, at once."""
        return self._pending is not None and not self._pending[1].done()

    def load(self, step: int, var: VAR, optimizer: Optimizer) -> None:
        """Put a state into the weights and the optimiser, each tensor in its own place and shards.

        Raises InputError for one that is damaged, or of another optimiser.
        """
        found = self.shapes(step).keys()
        moved = {name for kind, _, name in (key.partition(".") for key in found) if kind != WEIGHT}
        # a parameter that has had no gradient yet has no moments
        optimizer.begin([parameter for name, parameter in var.named_parameters() if name in moved])
        tensors = tensors_of(var, optimizer)
        if tensors.keys() != found:
            raise InputError(f"{self.path(step)}: holds other tensors than this run has: start anew")
        read(self.path(step), tensors)

    def shapes(self, step: int) -> dict[str, torch.Size]:
        """The shape of each tensor in a state. Raises InputError for one that is damaged."""
        with _readable(self.path(step)):
            found = dcp.FileSystemReader(self.path(step)).read_metadata().state_dict_metadata
            return {key: tensor.size for key, tensor in found.items()}


def tensors_of(var: VAR, optimizer: Optimizer) -> dict[str, Tensor]:
    """What a state holds, by KIND.PARAMETER."""
    tensors = {}
    for name, parameter in var.named_parameters():
        tensors[f"{WEIGHT}.{name}"] = parameter.detach()
        tensors |= {f"{moment}.{name}": value for moment, value in optimizer.state(parameter).items()}
    return tensors


def read(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill tensors, whole or distributed, from the state in a folder. Raises InputError for one that is damaged."""
    with _readable(path):
        dcp.load(tensors, checkpoint_id=path, no_dist=not dist.is_initialized())


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """A block that reads a state, and says in one line what is wrong with it."""
    root, silent = logging.getLogger(), lambda record: False
    root.addFilter(silent)  # where torch prints the traceback of what it then raises
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (Exception, CheckpointException) as error:  # torch raises what unpickling and its planner do
        if not (path / METADATA).is_file():
            raise Gone(f"{path}: is gone, as the run that goes on there keeps newer ones: name one of these") from error
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):
            raise InputError(f"{path}: could not be read ({cause.strerror or cause})") from error
        raise InputError(f"{path}: damaged; delete it to continue from an earlier state, or to begin anew") from error
    finally:
        root.removeFilter(silent)


@contextmanager
def _reasons() -> Iterator[None]:
    """The reason of the first process where torch tells of several failures."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error
