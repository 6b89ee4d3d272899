"""Watching a run: the lines of steps.jsonl as scalars in TensorBoard, Weights & Biases or Trackio."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np
import yaml

from varcompress.errors import InputError
from varcompress.files import write_json
from varcompress.progress import Note
from varcompress.training.log import read_steps
from varcompress.training.losses import LOSSES
from varcompress.training.recipe import Recipe
from varcompress.training.state import TENSORBOARD, RunDirectory

PROJECT = "varcompress"  # unless WANDB_PROJECT or TRACKIO_PROJECT names another
NEEDS = {"tensorboard": ("torch.utils.tensorboard", "SummaryWriter"), "wandb": ("wandb", "init")}
NEEDS |= {"trackio": ("trackio", "init")}
# what is drawn as it is
PLAIN = ("loss", "learning_rate", "gradient_norm", "seconds", "waited", "between", "memory_bytes", "epoch", "p")
FINISH_S = 60.0  # for what is still to be uploaded when a run ends


def check_tracker(name: str) -> None:
    """Before a download or a long run: InputError where a tracker's package is missing, or wandb knows no account."""
    if name == "none":
        return
    _opener(name)
    if name == "wandb":
        _log_in()


def scalars(line: dict, recipe: Recipe, patch_nums: Sequence[int]) -> dict[str, float]:
    """A line of steps.jsonl by the names it has in a tracker.

    loss is what is minimised, loss/d8 that of a depth, kl/d8 each kind of it as the mean over tokens, heldout/… the
    same of held-out images, and heldout_by_scale/kl/d8/3 at their third scale. In nats per token, and seconds.
    """
    heldout = line.get("heldout", {})
    return {
        **{key: line[key] for key in PLAIN if key in line},
        "skipped": float("skipped" in line),
        "images_per_second": recipe.batch_size / line["seconds"],
        **_losses(line, patch_nums),
        **({"heldout/loss": heldout["loss"]} if heldout else {}),
        **{f"heldout/{name}": loss for name, loss in _losses(heldout, patch_nums).items()},
        **{
            f"heldout_by_scale/{kind}/{_depth(schedule)}/{scale}": loss
            for kind in LOSSES
            for schedule, by_scale in heldout.get(kind, {}).items()
            for scale, loss in enumerate(by_scale, 1)
        },
    }


def _losses(found: dict, patch_nums: Sequence[int]) -> dict[str, float]:
    """Of each schedule its loss, and each kind of it, which the log has scale by scale."""
    tokens = np.square(patch_nums)
    return {f"loss/{_depth(schedule)}": loss for schedule, loss in found.get("losses", {}).items()} | {
        f"{kind}/{_depth(schedule)}": float(np.average(by_scale, weights=tokens))
        for kind in LOSSES
        for schedule, by_scale in found.get(kind, {}).items()
    }


def _depth(schedule: str) -> str:
    """d8 of d8@6: a run has one schedule of each depth, and an @ is no letter of a tag."""
    return schedule.partition("@")[0]


class Tracker:
    """What a recipe's `tracker` names, for a block. Whatever fails in it is a note, once: the run goes on without."""

    def __init__(
        self, directory: RunDirectory, recipe: Recipe, patch_nums: Sequence[int], done: int, note: Note
    ) -> None:
        """done: the step that the run continues from; the log of steps still holds all that came after it."""
        self._recipe, self._patch_nums, self._note = recipe, patch_nums, note
        self._tracked: Tracked | None = None
        with self._forgiving(), redirect_stdout(sys.stderr):  # where remarks of theirs belong
            self._tracked = TRACKERS[recipe.tracker](directory, recipe, done)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._tracked:
            with self._forgiving(), redirect_stdout(sys.stderr):
                self._tracked.finish(failed=kind is not None)

    def append(self, line: dict) -> None:
        """Draw one line of steps.jsonl."""
        if self._tracked:
            with self._forgiving():
                self._tracked.log(scalars(line, self._recipe, self._patch_nums), line["step"])

    @contextmanager
    def _forgiving(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._tracked = None
            what = " ".join(str(error).split()) or type(error).__name__
            self._note(f"tracker: {self._recipe.tracker} failed ({what}): the run goes on without; see steps.jsonl")


class Tracked(Protocol):
    """A run in a tracker, which continues the one of the same directory where there is one."""

    def log(self, values: dict[str, float], step: int) -> None: ...

    def finish(self, *, failed: bool) -> None: ...


class TensorBoard:
    """Event files in OUT/tensorboard. Those of steps that a continued run repeats are taken back."""

    def __init__(self, directory: RunDirectory, recipe: Recipe, done: int) -> None:
        self._writer = _opener("tensorboard")(str(directory.out / TENSORBOARD), purge_step=done + 1)
        text = yaml.safe_dump(recipe.to_dict(), sort_keys=False)
        self._writer.add_text("recipe", "".join(f"    {line}\n" for line in text.splitlines()), done)

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # so that a killed run has drawn what it logged

    def finish(self, *, failed: bool) -> None:
        self._writer.close()


class Hosted:
    """What wandb and trackio have in common: a run with a name, of which no step can be taken back or drawn again."""

    def __init__(self, directory: RunDirectory, recipe: Recipe, done: int) -> None:
        name, known = _name_of(directory, recipe.tracker, done)
        steps = read_steps(directory.steps_path) if known else []
        self._seen = max((line["step"] for line in steps), default=done)
        project = os.environ.get(f"{recipe.tracker.upper()}_PROJECT", PROJECT)
        self._run = self._open(directory.out, project=project, name=name, config=recipe.to_dict(), resume="allow")

    def log(self, values: dict[str, float], step: int) -> None:
        if step > self._seen:
            self._run.log(values, step=step)


class Wandb(Hosted):
    """A run on Weights & Biases, whose files lie in OUT/wandb unless WANDB_DIR says otherwise."""

    def _open(self, out: Path, **options: object) -> object:
        import wandb

        settings = {"console": "off"}  # progress bars
        if "finish_timeout" in wandb.Settings.model_fields:  # of recent versions; earlier ones wait without end
            settings["finish_timeout"] = FINISH_S
        place = os.environ.get("WANDB_DIR", str(out))
        run = wandb.init(**options, id=options["name"], dir=place, settings=wandb.Settings(**settings))
        with suppress(ImportError):  # it reports what is imported: where its process has died, imports would fail
            from wandb.sdk.lib.import_hooks import unregister_all_post_import_hooks

            unregister_all_post_import_hooks()
        return run

    def finish(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class Trackio(Hosted):
    """A run in Trackio: in its own place in the home directory (TRACKIO_DIR), or on the Hub (TRACKIO_SPACE_ID)."""

    def _open(self, out: Path, **options: object) -> object:
        return _opener("trackio")(**options, embed=False)

    def finish(self, *, failed: bool) -> None:
        import trackio

        trackio.finish()  # not of the run, which at the end of the process would be finished, and said to be, again


TRACKERS = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}


def _name_of(directory: RunDirectory, tracker: str, done: int) -> tuple[str, bool]:
    """What the run is called in a tracker, and whether it was there before; one that starts anew gets a new name."""
    path = directory.tracker_path
    names = json.loads(path.read_text(encoding="utf-8")) if done and path.is_file() else {}
    if known := tracker in names:
        return names[tracker], known
    names[tracker] = f"{re.sub(r'[^A-Za-z0-9_-]+', '-', directory.out.resolve().name)[:64]}-{uuid.uuid4().hex[:8]}"
    write_json(path, names)
    return names[tracker], known


def _opener(tracker: str) -> Callable:
    """The function that opens a tracker. Raises InputError where its package is missing."""
    module, name = NEEDS[tracker]
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:  # the second: a folder of that name is taken for the package
        raise InputError(f"tracker: {tracker} needs the {tracker} package: pip install {tracker}") from error


def _log_in() -> None:
    """Ask for an account now, where somebody may be there to answer. Needs no network."""
    import wandb

    if wandb.setup().settings.mode != "online":
        return
    try:
        wandb.login(verify=False)
    except Exception as error:
        what = " ".join(str(error).split())
        raise InputError(f"tracker: wandb knows no account ({what}): wandb login, or set WANDB_MODE=offline") from error
