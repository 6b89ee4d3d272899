"""The directory of a run: what it started from, the state it can continue from, and the finished checkpoint.

    OUT/steps.jsonl                     one line per step, stays
    OUT/.training/run.json              recipe, model and data the run was started with
    OUT/.training/subnets.json          layers of the depths that are not equidistant, as they were chosen
    OUT/.training/state.safetensors     weights, moments of the optimiser, step: one file, so always one moment
    OUT/.training/tokens/               the token store, unless it lives elsewhere

The last four go when the elastic checkpoint stands in OUT.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from varcompress.checkpoint import check_output, is_elastic, load_elastic
from varcompress.errors import InputError
from varcompress.files import disk_errors, replacing, sweep, write_json
from varcompress.models.elastic import ElasticVAR
from varcompress.models.transformer import VAR
from varcompress.progress import Note
from varcompress.publish import save
from varcompress.training.ema import WeightMean
from varcompress.training.optimizer import Optimizer
from varcompress.training.recipe import Recipe, machine_fields

ANEW = "choose another output directory"
STEPS, WORK = "steps.jsonl", ".training"
WEIGHT, MEAN = "weight", "mean"  # in a state, beside the moments of the optimiser


class Store(Protocol):
    """What is computed once, in a directory of its own."""

    path: Path

    def create(self) -> None: ...


class RunDirectory:
    """The output directory of one distillation."""

    def __init__(self, out: str | Path) -> None:
        self.out = Path(out)
        self.work = self.out / WORK
        self.steps_path = self.out / STEPS
        self.tokens_path = self.work / "tokens"
        self._run, self._state = self.work / "run.json", self.work / "state.safetensors"
        self._subnets = self.work / "subnets.json"

    @property
    def finished(self) -> bool:
        """Whether the run that wrote here has come to its end."""
        return is_elastic(self.out) and not self._state.is_file()

    def check(self, *, resume: bool) -> None:
        """Refuse to write where something else is: no step that was saved is ever overwritten."""
        if self.work.is_dir() and not self.finished:
            if self.step() and not resume:
                raise InputError(f"{self.out}: holds an unfinished run: continue it with --resume, or choose another")
            others = sorted({path.name for path in self.out.iterdir()} - {STEPS, WORK})
            if others and not self.step():
                raise InputError(f"{self.out}: holds something else already ({others[0]}): choose another directory")
        elif not resume and is_elastic(self.out):
            raise InputError(f"{self.out}: holds a finished checkpoint: choose another output directory")
        else:
            check_output(self.out)

    def begin(self, identity: dict, *, note: Note, resume: bool) -> int:
        """Start or continue a run, and return the number of steps that are done already.

        identity: {"recipe": {...}, "model": digest, "data": digest, "teacher": digest}, the last where there is one.
        Raises InputError when the run that is there was started with another, and names the difference; what only
        says how the machine is used may differ.
        """
        done = self.step()
        if done:
            _compare(self.out, self._started(), identity)
        with disk_errors(self.out):
            self.work.mkdir(parents=True, exist_ok=True)
            sweep(self.work)
            if not done:
                write_json(self._run, identity)
        if resume:
            note(f"continuing after step {done}" if done else "nothing to resume there: starting from the first step")
        return done

    def _started(self) -> dict:
        """What the run that is there was started with, as `begin` wrote it."""
        try:
            started = json.loads(self._run.read_text(encoding="utf-8"))
            if isinstance(started["recipe"], dict):
                return started
        except (OSError, ValueError, KeyError, TypeError):
            pass
        raise InputError(f"{self._run}: missing or damaged, so the run cannot go on: {ANEW}")

    def subnets(self, choose: Callable[[], dict[int, tuple[int, ...]]]) -> dict[int, tuple[int, ...]]:
        """The layers of each depth, as they were chosen when the run began: a continued run must not choose anew."""
        if self.step() and self._subnets.is_file():
            try:
                chosen = json.loads(self._subnets.read_text(encoding="utf-8"))
                return {int(depth): tuple(layers) for depth, layers in chosen.items()}
            except (OSError, ValueError, TypeError, AttributeError) as error:
                raise InputError(f"{self._subnets}: damaged: {ANEW}") from error
        chosen = choose()
        with disk_errors(self._subnets):
            write_json(self._subnets, chosen)
        return chosen

    def begin_store(self, store: Store) -> None:
        """Make a store, or find the one that is there.

        One in this directory that is refused is from a run that came to no step, and goes; elsewhere nothing does.
        """
        try:
            store.create()
        except InputError:
            if self.step() or self.work not in store.path.parents:
                raise
            shutil.rmtree(store.path, ignore_errors=True)
            store.create()

    def step(self) -> int:
        """Steps behind the saved state, 0 if there is none."""
        if not self._state.is_file():
            return 0
        try:
            with safe_open(self._state, framework="pt") as state:
                return int(state.metadata()["step"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{self._state}: damaged; delete {self.out} and start again") from error

    def save(self, var: VAR, optimizer: Optimizer, step: int, mean: WeightMean | None = None) -> None:
        """Write the state after `step`. The earlier state stays whole until the new one is."""
        tensors = {}
        for name, parameter in var.named_parameters():
            tensors[f"{WEIGHT}.{name}"] = parameter.detach().contiguous()
            for moment, value in optimizer.state(parameter).items():
                tensors[f"{moment}.{name}"] = value.contiguous()
        if mean:
            tensors |= {f"{MEAN}.{name}": value.contiguous() for name, value in mean.state.items()}
        with disk_errors(self._state), replacing(self._state) as temporary:
            save_file(tensors, temporary, metadata={"step": str(step)})

    @torch.no_grad()
    def load(self, var: VAR, optimizer: Optimizer, mean: WeightMean | None = None) -> None:
        """Put the saved state, if there is one, into the weights, the optimiser and the mean of the weights."""
        if not self._state.is_file():
            return
        with safe_open(self._state, framework="pt", device=str(var.device)) as state:
            kinds: dict[str, list[str]] = {}  # what there is of each parameter; one without a gradient has no moments
            for key in state.keys():  # noqa: SIM118 (it is no dict)
                kind, _, name = key.partition(".")
                kinds.setdefault(name, []).append(kind)
            for name, parameter in var.named_parameters():
                found = {kind: state.get_tensor(f"{kind}.{name}") for kind in kinds[name]}
                parameter.copy_(found.pop(WEIGHT))
                if mean:
                    mean.state[name].copy_(found.pop(MEAN))
                if found:
                    optimizer.load(parameter, found)

    def finish(self, model: ElasticVAR) -> None:
        """Put the elastic checkpoint into place, file by file, then drop what only training needed."""
        whole = self.work / "finished"
        with disk_errors(self.out):
            shutil.rmtree(whole, ignore_errors=True)
            save(model, whole)
            for file in sorted(whole.iterdir()):
                os.replace(file, self.out / file.name)
            self.clear()

    def clear(self) -> None:
        """Drop what only training needed. The state goes first: without it the run counts as finished."""
        self._state.unlink(missing_ok=True)
        shutil.rmtree(self.work, ignore_errors=True)

    def result(self, recipe: Recipe) -> ElasticVAR:
        """The checkpoint of a finished run, which the same recipe must have made."""
        model = load_elastic(self.out)
        _compare(self.out, {"recipe": model.provenance.recipe or {}}, {"recipe": recipe.to_dict()})
        self.clear()
        return model


def _compare(out: Path, started: dict, now: dict) -> None:
    """Refuse to go on with a run that is not this one, naming what differs; how the machine is used may differ."""
    before, after = started["recipe"], now["recipe"]
    differences = [
        f"{key} was {before.get(key)}, now {after.get(key)}"
        for key in {**before, **after}
        if key not in machine_fields() and before.get(key) != after.get(key)
    ]
    if differences:
        raise InputError(
            f"{out}: was made with another recipe: {'; '.join(differences)}: use that one, or choose another output"
        )
    for part in ("model", "data", "teacher"):
        if started.get(part) != now.get(part):
            raise InputError(f"{out}: was started with another {part}: resume with the same, or choose another output")
