"""The directory of a run: what it started from, the states it can continue from, and the finished checkpoint.

    OUT/steps.jsonl                 one line per step, stays
    OUT/samples/step-N.png          images drawn on the way, stay
    OUT/tensorboard/, wandb/        what a tracker keeps, stays
    OUT/phase-NAME/                 the checkpoint at the end of a phase before the last, stays
    OUT/.training/run.json          recipe, model and data the run was started with
    OUT/.training/subnets.json      layers of the depths that are not equidistant, as they were chosen
    OUT/.training/tracker.json      what the run is called in each tracker
    OUT/.training/start/            what training leaves as it is: config.json and the tokenizer
    OUT/.training/step-N/           a state to continue from, see states.py
    OUT/.training/tokens/           the token store, unless it lives elsewhere
    OUT/.training/lock, writer      held by the process that writes here, and which that is

OUT/.training goes when the elastic checkpoint stands in OUT.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from varcompress.checkpoint import CONFIG, assembled, check_output, config_text, is_elastic, load_elastic
from varcompress.data.tokens import TokenStore
from varcompress.errors import InputError
from varcompress.files import disk_errors, replacing, sweep, write_json, write_text
from varcompress.models.elastic import ElasticVAR
from varcompress.progress import Note
from varcompress.publish import save
from varcompress.report.page import PAGE
from varcompress.training.recipe import Recipe, defaults, machine_fields
from varcompress.training.states import WEIGHT, Gone, States, read

ANEW = "choose another output directory"
STEPS, PICTURE, SAMPLES, WORK, PHASE = "steps.jsonl", "steps.png", "samples", ".training", "phase-"
TENSORBOARD, WANDB = "tensorboard", "wandb"
TOKENIZER = "tokenizer.safetensors"
LOCK, WRITER = "lock", "writer"  # the second says who holds the first


class Store(Protocol):
    """What is computed once, in a directory of its own."""

    path: Path

    def create(self) -> None: ...


class RunDirectory:
    """The output directory of one distillation."""

    def __init__(self, out: str | Path, keep: int = 1) -> None:
        self.out = Path(out)
        self.work = self.out / WORK
        self.steps_path = self.out / STEPS
        self.samples_path = self.out / SAMPLES
        self.tokens_path, self.tracker_path = self.work / "tokens", self.work / "tracker.json"
        self.states = States(self.work, keep)
        self._run, self._subnets = self.work / "run.json", self.work / "subnets.json"
        self._start, self._lock = self.work / "start", FileLock(self.work / LOCK)

    @property
    def finished(self) -> bool:
        """Whether the run that wrote here has come to its end."""
        return is_elastic(self.out) and not self.work.exists()

    def check(self, *, resume: bool) -> None:
        """Refuse to write where something else is: no step that was saved is ever overwritten."""
        if self.work.is_dir():
            if self.step() and not resume:
                raise InputError(f"{self.out}: holds an unfinished run: continue it with --resume, or choose another")
            ours = {STEPS, WORK, PICTURE, SAMPLES, TENSORBOARD, WANDB, PAGE}
            others = sorted(
                path.name for path in self.out.iterdir() if path.name not in ours and not path.name.startswith(PHASE)
            )
            if others and not self.step():
                raise InputError(f"{self.out}: holds something else already ({others[0]}): choose another directory")
        elif not resume and is_elastic(self.out):
            raise InputError(f"{self.out}: holds a finished checkpoint: choose another output directory")
        else:
            check_output(self.out)

    def begin(self, identity: dict, *, note: Note, resume: bool) -> int:
        """Start or continue a run, and return the number of steps that are done already. To be ended by `release`.

        identity: {"recipe": {...}, "model": digest, "data": digest, "teacher": digest}, the last where there is one.
        Raises InputError when the run that is there was started with another, and names the difference; what only
        says how the machine is used may differ. And when another process is writing here.
        """
        with disk_errors(self.out):
            self.work.mkdir(parents=True, exist_ok=True)
            self._acquire()
            done = self.step()
            if not done and is_elastic(self.out):  # by the process that held the lock when `check` looked
                shutil.rmtree(self.work, ignore_errors=True)
                raise InputError(f"{self.out}: holds a finished checkpoint by now: {ANEW}")
            if done:
                _compare(self.out, self._started(), identity)
            sweep(self.work)
            if not done:
                write_json(self._run, identity)
        if resume:
            note(f"continuing after step {done}" if done else "nothing to resume there: starting from the first step")
        return done

    def _acquire(self) -> None:
        """The system's own lock, which ends with its process, however that ends."""
        writer = self.work / WRITER
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            who = writer.read_text(encoding="utf-8") if writer.is_file() else "another process"
            raise InputError(f"{self.out}: {who} is writing there: wait for it, or {ANEW}") from error
        write_text(writer, f"process {os.getpid()} on {platform.node()}")

    def release(self) -> None:
        """Let other processes write here."""
        self._lock.release()

    def identity(self) -> str:
        """What tells this directory from one of the same path on another machine."""
        return self._run.read_text(encoding="utf-8") if self._run.is_file() else "nothing"

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

    def check_store(self, store: TokenStore) -> None:
        """Refuse a store of something else before anything is begun; what this directory holds of one may go."""
        if self.work not in store.path.parents:
            store.check()

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
        """Steps behind the last saved state, 0 if there is none."""
        return max(self.states.steps, default=0)

    def keep_start(self, model: ElasticVAR) -> None:
        """Write what a state leaves out and `unfinished` needs."""
        with disk_errors(self._start):
            self._start.mkdir(exist_ok=True)
            with replacing(self._start / TOKENIZER) as temporary:
                save_file({key: t.cpu().contiguous() for key, t in model.tokenizer.state_dict().items()}, temporary)
            write_text(self._start / CONFIG, config_text(model))

    def newest(self) -> tuple[int, ElasticVAR]:
        """The last step of which there is a state, and the model after it, on the CPU.

        Of a run that goes on it may be a newer one than there was at first. Raises InputError where there is none.
        """
        while True:
            step = self.step()
            try:
                return step, self.unfinished(step)
            except Gone:  # and a newer one is there
                continue

    def unfinished(self, step: int | None = None) -> ElasticVAR:
        """The model after a step of which there is a state, the last one by default, on the CPU.

        Raises InputError where there is no such state, Gone where the run took it away meanwhile.
        """
        steps = self.states.steps
        if not steps:
            raise InputError(f"{self.out}: holds no state of an unfinished run: give the --out of a distill")
        step = steps[-1] if step is None else step
        if step not in steps:
            raise InputError(f"{self.out}: has no state of step {step}: there is {', '.join(map(str, steps))}")
        recipe = self._started()["recipe"]
        shapes = self.states.shapes(step)
        tensors = {key: torch.empty(size) for key, size in shapes.items() if key.startswith(f"{WEIGHT}.")}
        read(self.states.path(step), tensors)
        parts = {"var": {key.partition(".")[2]: tensor for key, tensor in tensors.items()}}
        try:
            parts["tokenizer"] = load_file(self._start / TOKENIZER)
            config = json.loads((self._start / CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(f"{self._start}: missing or damaged, so no model can be made of the state") from error
        return assembled(config, parts, recipe, self._start)

    def _written(self, model: ElasticVAR) -> Path:
        """A whole checkpoint, beside the place that it is for."""
        whole = self.work / "finished"
        shutil.rmtree(whole, ignore_errors=True)
        try:
            return save(model, whole)
        except BaseException:
            shutil.rmtree(whole, ignore_errors=True)
            raise

    def finish_phase(self, model: ElasticVAR, phase: str) -> None:
        """Write the checkpoint at the end of a phase before the last."""
        place = self.out / f"{PHASE}{phase}"
        with disk_errors(self.out):
            whole = self._written(model)
            shutil.rmtree(place, ignore_errors=True)  # of a run that goes on from before it
            os.replace(whole, place)

    def finish(self, model: ElasticVAR) -> None:
        """Put the elastic checkpoint into place, file by file, then drop what only training needed."""
        with disk_errors(self.out):
            for file in sorted(self._written(model).iterdir()):
                os.replace(file, self.out / file.name)
            self.clear()

    def clear(self) -> None:
        """Drop what only training needed, at once: without it the run counts as finished."""
        if self.work.exists():
            done = self.work.with_name(f"{WORK}.done.tmp")
            shutil.rmtree(done, ignore_errors=True)
            os.replace(self.work, done)
        for left in self.out.glob(f"{WORK}.*.tmp"):
            shutil.rmtree(left, ignore_errors=True)

    def result(self, recipe: Recipe) -> ElasticVAR:
        """The checkpoint of a finished run, which the same recipe must have made."""
        model = load_elastic(self.out)
        _compare(self.out, {"recipe": model.provenance.recipe or {}}, {"recipe": recipe.to_dict()})
        self.clear()
        return model


def _compare(out: Path, started: dict, now: dict) -> None:
    """Refuse to go on with a run that is not this one, naming what differs; how the machine is used may differ."""
    before, after = ({**defaults(), **part["recipe"]} for part in (started, now))
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
