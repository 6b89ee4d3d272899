"""Distillation, from a pretrained model and a recipe to one elastic checkpoint. Reads from top to bottom."""

from __future__ import annotations

import hashlib
import math
import shutil
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from varcompress.data.sources import open_source
from varcompress.data.tokens import Samples, TokenData, TokenStore, store_of
from varcompress.distributed import Ranks, joined, local_device
from varcompress.errors import InputError, Stopped
from varcompress.fingerprint import weights_digest
from varcompress.hardware import compiling, peak_bytes
from varcompress.images import skipped_note
from varcompress.models.elastic import ElasticVAR
from varcompress.models.linear import unpack
from varcompress.models.transformer import add_cfg_input
from varcompress.progress import Note, Progress, silent
from varcompress.schedule import Schedule, is_subnet
from varcompress.training.batches import Batch, Batches, ended, loader
from varcompress.training.budget import check_memory, checkpoint_bytes, state_bytes
from varcompress.training.log import StepLog, step_text
from varcompress.training.objective import Objective
from varcompress.training.optimizer import Optimizer, learning_rate_at, optimizer_of
from varcompress.training.parallel import average_gradients, full, gathered, parallelize
from varcompress.training.recipe import FULL, Recipe, load_recipe, with_origin
from varcompress.training.samples import draw_grid
from varcompress.training.sensitivity import SENSITIVITY_IMAGES, eliminate, kept
from varcompress.training.state import RunDirectory
from varcompress.training.states import METADATA, tensors_of
from varcompress.training.stopping import Stopper
from varcompress.training.strategy import Step, plan
from varcompress.training.teacher import StoredTeacher, Teacher
from varcompress.training.tracker import Tracker, check_tracker

SAME_MODEL = "open the same file everywhere, or one --revision of the Hub's"
SHARE_OUT = "the output directory must be the same one on all machines"


def distill(
    model: ElasticVAR,
    recipe: Recipe | str | Path,
    *,
    data: str | Path | None = None,
    out: str | Path,
    resume: bool = False,
    tokens: str | Path | None = None,
    progress: Progress = silent,
    note: Note = warnings.warn,
) -> ElasticVAR:
    """Make a model elastic in depth: train it, in place, as the recipe says (VARiant, arXiv 2511.16546).

    recipe: a Recipe, a recipe's name or a YAML file; data: images or a finished token store, as `open_source` takes
    them (the embedded model needs none); out: the directory that becomes the elastic checkpoint;
    resume: continue the run that is there, to the weights it would have reached undisturbed;
    tokens: a directory that keeps the encoded images for further runs; note: called with remarks.

    Under torchrun every process calls this, and each takes its share of the batch. Returns the
    trained model, in float32. Raises InputError for a recipe that does not fit the model or the
    data, for an `out` that holds anything else, and for processes that opened different weights;
    Stopped where a SIGTERM or Ctrl-C came during training, once the state is saved.
    """
    recipe = with_origin(recipe) if isinstance(recipe, Recipe) else load_recipe(recipe)
    directory = RunDirectory(out, recipe.keep)
    try:
        return _distill(model, recipe, directory, data, tokens, resume=resume, progress=progress, note=note)
    finally:
        directory.release()


def _distill(
    model: ElasticVAR,
    recipe: Recipe,
    directory: RunDirectory,
    data: str | Path | None,
    tokens: str | Path | None,
    *,
    resume: bool,
    progress: Progress,
    note: Note,
) -> ElasticVAR:
    with joined(local_device(model.device)) as ranks, ExitStack() as until_written:
        ranks.on_rank_zero(lambda: check_tracker(recipe.tracker))
        ranks.on_rank_zero(lambda: check_fit(recipe, model, ranks))
        ranks.on_rank_zero(lambda: check_finite(model))
        ranks.on_rank_zero(lambda: check_memory(model, recipe, local_device(model.device), ranks.count))
        if not ranks.is_rank_zero:
            progress = note = silent
        model.to(local_device(model.device)).float()
        model.tokenizer.requires_grad_(False)
        model.var.requires_grad_(True).zero_grad()
        unpack(model.var)  # copies of weights that are about to change
        ranks.on_rank_zero(lambda: directory.check(resume=resume))
        if ranks.on_rank_zero(lambda: directory.finished):
            note(f"{directory.out}: that run is finished already")
            return directory.result(recipe).to(model.device)

        source = ranks.on_rank_zero(lambda: open_source(data, model))
        ranks.on_rank_zero(lambda: _check_size(recipe, len(source)))
        digest = ranks.check_same(partial(weights_digest, model), "the weights of the model", SAME_MODEL)
        teacher = teacher_of(model, recipe)  # a copy taken before the weights of a state to continue from
        identity = {"recipe": recipe.to_dict(), "model": digest, "data": source.digest}
        identity |= {"teacher": teacher.digest} if teacher and ranks.is_rank_zero else {}
        done = ranks.on_rank_zero(lambda: directory.begin(identity, note=note, resume=resume))
        ranks.check_same(directory.identity, "the output directory", SHARE_OUT)
        if isinstance(recipe.cfg, tuple):
            add_cfg_input(model.var)

        store = store_of(source, model, recipe.num_views, path=tokens, work=directory.tokens_path)
        ranks.on_rank_zero(lambda: directory.begin_store(store))
        encoded = _encode(store, ranks, progress, note)
        data, heldout = encoded.split(recipe.held_out(len(encoded)))
        ranks.on_rank_zero(lambda: _check_size(recipe, len(encoded)))  # again, now that unreadable ones are out
        model.bridge, model.depths = recipe.bridge, recipe.depths
        objective = Objective(model, recipe, teacher)
        model.subnets = ranks.on_rank_zero(
            lambda: directory.subnets(lambda: subnets_of(objective, data, ranks, progress))
        )
        steps = plan(recipe, len(data) // recipe.batch_size)  # a pass drops its last, incomplete batch
        if recipe.teacher_logits == "stored" and teacher:
            objective.teacher = _store_answers(teacher, store, encoded, objective, directory, ranks, progress)
            del teacher  # whose memory nobody needs any more
        model.distilled_cfg = recipe.cfg
        model.provenance = replace(model.provenance, recipe=recipe.to_dict())
        ranks.on_rank_zero(lambda: directory.keep_start(model))
        model.var.compile_layers(recipe.compile)
        parallelize(model.var, recipe.parallel, ranks)
        objective.parallelize_teacher(recipe.parallel, ranks)
        run = Run(model, recipe, steps, data, heldout, directory, ranks, objective, note)
        tracker = None
        if ranks.is_rank_zero and recipe.tracker != "none":
            tracker = Tracker(directory, recipe, model.var.config.patch_nums, done, note)
            until_written.enter_context(tracker)
        with StepLog(directory.steps_path, done) if ranks.is_rank_zero else nullcontext() as log:
            try:
                train(run, done, log, tracker, progress)
            finally:
                model.var.zero_grad()  # of a step that was interrupted; they are as large as the weights
                model.var.compile_layers(False)
        model.var = gathered(model.var)
        ranks.on_rank_zero(lambda: directory.finish(model))
    return model


@dataclass
class Run:
    """What the steps of a run share."""

    model: ElasticVAR
    recipe: Recipe
    steps: list[Step]  # all of the run
    data: TokenData
    heldout: TokenData
    directory: RunDirectory
    ranks: Ranks
    objective: Objective
    note: Note


def train(
    run: Run, done: int, log: StepLog | None, tracker: Tracker | None = None, progress: Progress = silent
) -> None:
    """Run all steps after `done`, of which the directory holds the state. Rank 0 logs.

    Raises Stopped where a signal asked to end, and InputError after `max_bad_steps` in a row that gave no finite
    gradient, in both cases once the state is saved.
    """
    model, recipe, ranks, last = run.model, run.recipe, run.ranks, len(run.steps)
    var, states = model.var, run.directory.states
    optimizer = optimizer_of(var, recipe)
    if done:
        ranks.check_same(partial(_identity, states.path(done)), "the state to continue from", SHARE_OUT)
        states.load(done, var, optimizer)
    batches = Batches(run.data, recipe, ranks, run.steps[done:], var.config.classes)
    reading, heldout, bad = iter(loader(batches, recipe.workers, var.device)), {}, 0
    with Stopper() as stopper, states.writing(ranks), ended(reading):
        for step in run.steps[done:]:
            saves = step.number % recipe.checkpoint_every == 0 or step.ends_phase
            if saves:
                states.wait()
                ranks.on_rank_zero(partial(_check_room, run, step))
            began, schedules = time.perf_counter(), schedules_of(model, step.depths)
            with _kept(run, step, optimizer, stopper):
                batch = next(reading)
                waited = time.perf_counter() - began
                found = gradients(run, step, batch, list(schedules.values()))
            line = take_step(run, step, schedules, *found, optimizer)
            bad = bad + 1 if "skipped" in line else 0
            spent = {"seconds": round(time.perf_counter() - began, 4), "waited": round(waited, 4)}
            line |= {**spent, "memory_bytes": peak_bytes(var.device)}
            if len(run.heldout) and (step.number % recipe.holdout_every == 0 or step.number == last):
                line["heldout"] = heldout = measure_heldout(run)
            for watching in filter(None, (log, tracker)):
                watching.append(line)
            if recipe.samples_every and (step.number % recipe.samples_every == 0 or step.number == last):
                _draw_samples(run, step)
            stopped, writing = ranks.largest(stopper.signal, states.busy)
            if not writing:  # a state takes its place, or its failure is told, at once
                states.wait()
            ends = stopped or bad == recipe.max_bad_steps
            if step.ends_phase and step.number < last:  # before the state: a run that goes on from it finds it done
                _finish_phase(run, step)
            if saves or ends:
                states.save(step.number, tensors_of(var, optimizer))
            if ends:
                states.wait()
                _end(run, line, stopped)
            progress(step.number, last, f"distill: {step_text(line, recipe.batch_size, heldout)}")


def _identity(state: Path) -> str:
    """What tells a state from another: its table of contents, which names every tensor's place."""
    path = state / METADATA
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "none"


def _check_room(run: Run, step: Step) -> None:
    """Before a step whose files would be lost. Raises InputError where the disk has no room for them."""
    needed = state_bytes(run.model, run.recipe)
    needed += checkpoint_bytes(run.model, run.recipe) if step.ends_phase else 0
    free = shutil.disk_usage(run.directory.out).free
    if free < needed:
        raise InputError(
            f"{run.directory.out}: {free / 2**20:,.0f} MiB are free, and what is saved next needs "
            f"{needed / 2**20:,.0f}: free some, then continue with --resume"
        )


@contextmanager
def _kept(run: Run, step: Step, optimizer: Optimizer, stopper: Stopper) -> Iterator[None]:
    """A block that reads a batch and makes its gradients: what fails there costs a single process no earlier step.

    A process that reads may be killed; a compiler that gets the signal meant for the run dies of it.
    """
    try:
        with compiling():
            yield
    except (RuntimeError, InputError) as error:
        dead = "DataLoader worker" in str(error)
        if run.ranks.count > 1 or not (dead or stopper.signal):
            raise
        optimizer.drop()
        states, before = run.directory.states, step.number - 1
        states.wait()
        if before > max(states.steps, default=0):
            states.save(before, tensors_of(run.model.var, optimizer))
            states.wait()
        if stopper.signal:
            message = f"stopped after step {before} of {len(run.steps)}, whose state is saved"
            raise Stopped(message, stopper.signal) from error
        raise InputError(
            f"step {step.number}: a process that read batches has died ({error}): the state of step {before} is saved: "
            "continue with --resume, and fewer workers where memory was short"
        ) from error


def _end(run: Run, line: dict, stopped: int) -> None:
    """Leave a run whose state is saved: for the signal `stopped`, or since too many steps were skipped."""
    if stopped:
        raise Stopped(f"stopped after step {line['step']} of {len(run.steps)}, whose state is saved", stopped)

    def refuse() -> None:
        raise InputError(
            f"step {line['step']}: {line['skipped']}, and so it was for {run.recipe.max_bad_steps} steps, which were "
            "skipped; the state is saved: start anew with a lower learning_rate, or resume with more max_bad_steps"
        )

    run.ranks.on_rank_zero(refuse)


@contextmanager
def _whole(run: Run) -> Iterator[None]:
    """A block in which the model has whole weights on every device."""
    var, run.model.var = run.model.var, gathered(run.model.var)
    try:
        yield
    finally:
        run.model.var = var


def _finish_phase(run: Run, step: Step) -> None:
    """Write the checkpoint at the end of a phase."""
    with _whole(run):
        run.ranks.on_rank_zero(lambda: run.directory.finish_phase(run.model, step.phase))


def _draw_samples(run: Run, step: Step) -> None:
    """Draw the images that show how far the run is. What fails in it is a remark: the run goes on."""

    def draw() -> None:
        try:
            draw_grid(run.model, run.directory.samples_path / f"step-{step.number}.png")
        except InputError as error:
            run.note(f"step {step.number}: no samples: {error}")

    with _whole(run):
        run.ranks.on_rank_zero(draw)


def take_step(
    run: Run,
    step: Step,
    schedules: dict[str, Schedule],
    losses: Tensor,
    loss: float,
    gradient_norm: float,
    optimizer: Optimizer,
) -> dict:
    """Move the weights by what `gradients` found, unless that is not finite. Returns what the log says of it."""
    learning_rate = learning_rate_at(step.number, len(run.steps), run.recipe)
    if skipped := _not_finite(loss, gradient_norm):
        optimizer.drop()
        found = {"skipped": skipped}
    else:
        optimizer.step(learning_rate)
        found = loss_line(run.objective, losses, loss, gradient_norm, schedules)
    phase = {} if step.phase is None else {"phase": step.phase, "p": round(step.p, 6)}
    return {"step": step.number, "epoch": step.epoch, **phase, **found, "learning_rate": learning_rate}


def _not_finite(loss: float, gradient_norm: float) -> str | None:
    """Which of them is not finite, in words; None where both are."""
    found = {"loss": loss, "norm of the gradient": gradient_norm}
    return next((f"the {what} is {value}" for what, value in found.items() if not math.isfinite(value)), None)


def gradients(run: Run, step: Step, batch: Batch, schedules: list[Schedule]) -> tuple[Tensor, float, float]:
    """The clipped gradients of a step, in the parameters, averaged over the processes.

    Returns the losses by kind, schedule and token (N, S, L), the one that is minimised, and the norm of the gradient
    before clipping; of a step that is to be skipped they are not finite.
    """
    ranks, losses = run.ranks, run.objective.zeros(len(schedules))
    for number, (places, samples) in enumerate(batch, 1):
        # once a step, where all its passes run the same layers
        average_gradients(run.model.var, number == len(batch) or not run.recipe.together)
        losses += run.objective.backward(samples, places, step.number, schedules)
    losses = ranks.sum_(losses) / ranks.count
    # Layers that a step leaves out have no gradient: neither clipping nor the optimiser touches them.
    trained = [parameter for parameter in run.model.var.parameters() if parameter.grad is not None]
    # summed in an order of its own on each machine, of which copies of the weights must know nothing
    norm = ranks.agree_(full(nn.utils.get_total_norm([parameter.grad for parameter in trained])))
    nn.utils.clip_grads_with_norm_(trained, run.recipe.gradient_clip or math.inf, norm)
    loss, norm = torch.stack((run.objective.total(losses), norm)).tolist()
    return losses, loss, norm


def loss_line(
    objective: Objective, losses: Tensor, loss: float, gradient_norm: float, schedules: dict[str, Schedule]
) -> dict:
    """What the log says of a step's losses."""
    return {"loss": loss, **loss_fields(objective, losses, schedules), "gradient_norm": gradient_norm}


@torch.no_grad()
def measure_heldout(run: Run) -> dict:
    """The losses of images that are never trained on, under the full network and every depth.

    Each image in its first view and with its label, so that the figures of all steps and runs compare.
    """
    recipe, ranks = run.recipe, run.ranks
    schedules = schedules_of(run.model, (FULL, *recipe.depths))
    losses = run.objective.zeros(len(schedules))
    parts = in_first_view(run.heldout, recipe.pass_size(ranks.count))
    for first in range(0, len(parts), ranks.count):  # all run equally many passes, in which they gather weights
        mine = first + ranks.rank
        samples = parts[min(mine, len(parts) - 1)]
        images = len(samples.labels) if mine < len(parts) else 0
        losses += run.objective.evaluate(samples, list(schedules.values())) * images
    losses = ranks.sum_(losses) / len(run.heldout)
    return {"loss": run.objective.total(losses).item(), **loss_fields(run.objective, losses, schedules)}


def loss_fields(objective: Objective, losses: Tensor, schedules: dict[str, Schedule]) -> dict:
    """What the log says of losses (N, S, L): of each schedule the loss, and each kind of it scale by scale."""
    counts = [side * side for side in objective.model.var.config.patch_nums]
    per_scale = torch.stack([part.mean(-1) for part in losses.split(counts, dim=-1)], dim=-1)  # (N, S, K)
    kinds, of_schedules = per_scale.tolist(), objective.of_schedules(losses).tolist()
    return {
        "losses": dict(zip(schedules, of_schedules, strict=True)),
        **{
            kind: dict(zip(schedules, values, strict=True))
            for kind, values in zip(objective.losses, kinds, strict=True)
        },
    }


def schedules_of(model: ElasticVAR, depths: Iterable[str | int]) -> dict[str, Schedule]:
    """The schedules of these depths, by their texts."""
    chosen = [model.schedule(depth if depth == FULL else f"d{depth}") for depth in depths]
    return {str(schedule): schedule for schedule in chosen}


def subnets_of(objective: Objective, data: TokenData, ranks: Ranks, progress: Progress) -> dict[int, tuple[int, ...]]:
    """The layers of each depth, where they are not the equidistant ones."""
    model, recipe = objective.model, objective.recipe
    if recipe.layers == "equidistant":
        return {}
    if recipe.layers != "sensitivity":
        return dict(zip(recipe.depths, recipe.layers, strict=True))
    whole = model.schedule(FULL)
    loss = objective.loss_of(in_first_view(data, recipe.pass_size(ranks.count), SENSITIVITY_IMAGES))
    return eliminate(loss, whole, recipe.bridge, recipe.depths, keep=kept(whole.depth), progress=progress)


def in_first_view(data: TokenData, size: int, count: int | None = None) -> list[Samples]:
    """The first `count` images, or all, in their first view and with their labels, `size` at a time."""
    places = np.arange(len(data))[:count]
    return [data.samples(part, np.zeros_like(part)) for part in np.split(places, range(size, len(places), size))]


def teacher_of(model: ElasticVAR, recipe: Recipe) -> Teacher | None:
    """The teacher that a recipe asks for: the model as it is now."""
    if recipe.teacher == "none":
        return None
    guided = recipe.cfg is not None
    options = {"dtype": recipe.teacher_dtype, "guided": guided, "compiled": recipe.compile}
    return Teacher(model.var, model.schedule(FULL), **options)


def check_finite(model: ElasticVAR) -> None:
    """Refuse weights that are not finite, of which nothing can be learnt."""
    spoilt = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
    if spoilt:
        raise InputError(f"{model.provenance.name}: {spoilt[0]} holds NaN or infinite weights: get the model again")


def check_fit(recipe: Recipe, model: ElasticVAR, ranks: Ranks) -> None:
    """Refuse a recipe that asks for what the model, or the number of processes, has no room for."""
    depth, scales = model.var.config.depth, len(model.var.config.patch_nums)
    if model.distilled_cfg is not None:
        raise InputError(
            f"{model.provenance.name}: guidance is distilled into it already: start from the model that it "
            "was made from"
        )
    if recipe.depths[0] >= depth:
        raise InputError(
            f"recipe: depths names {recipe.depths[0]}, but the model has {depth} layers: list fewer than that"
        )
    numbered = [] if isinstance(recipe.layers, str) else recipe.layers
    if any(not is_subnet(layers, depth) or {layers[0], layers[-1]} != {0, depth - 1} for layers in numbered):
        raise InputError(
            f"recipe: each list of layers must hold the first and the last layer of the model, 0 and {depth - 1}, "
            "and ascend between them"
        )
    if recipe.bridge >= scales:
        raise InputError(
            f"recipe: a bridge of {recipe.bridge} leaves nothing to thin out: "
            f"the model has {scales} scales, choose fewer"
        )
    if recipe.optimizer == "adamw8bit" and ranks.count > 1:
        raise InputError(
            "recipe: optimizer: adamw8bit is for one device: on several set optimizer=adamw and parallel=fsdp, "
            "which divides its moments"
        )
    if recipe.batch_size % (ranks.count * recipe.accumulation):
        raise InputError(
            f"recipe: batch_size {recipe.batch_size} does not divide into "
            f"{ranks.count} processes x {recipe.accumulation} passes (accumulation): choose a multiple"
        )


def _check_size(recipe: Recipe, num_images: int) -> None:
    kept_aside = recipe.held_out(num_images)
    if recipe.holdout and not kept_aside:
        raise InputError(
            f"recipe: holdout {recipe.holdout:g} of {num_images} images is none of them: raise it, or set 0 and leave "
            "out holdout_every"
        )
    if num_images - kept_aside < recipe.batch_size:
        aside = f" ({kept_aside} of {num_images} are held out)" if kept_aside else ""
        raise InputError(
            f"recipe: batch_size {recipe.batch_size} is more than the {num_images - kept_aside} images there are"
            f"{aside}: lower it"
        )


def _encode(store: TokenStore, ranks: Ranks, progress: Progress, note: Note) -> TokenData:
    """Encode the images, each process a share of them, and say which could not be read."""
    store.encode(ranks.rank, ranks.count, progress)
    ranks.barrier()
    data = store.read()
    if data.skipped:
        note(skipped_note(data.skipped, len(store.source)))
    return data


def _store_answers(
    teacher: Teacher,
    store: TokenStore,
    data: TokenData,
    objective: Objective,
    directory: RunDirectory,
    ranks: Ranks,
    progress: Progress,
) -> StoredTeacher:
    """Compute what the teacher says of all images, each process a share of them, and keep it beside their tokens."""
    recipe, config = objective.recipe, objective.model.var.config
    settings = {"dtype": recipe.dtype, "label_drop": recipe.label_drop > 0, "cfg": recipe.cfg}
    options = {"top": recipe.teacher_top, "digest": teacher.digest, "settings": settings}
    stored = StoredTeacher(store.aside / "teacher", data, config, **options)
    ranks.on_rank_zero(lambda: directory.begin_store(stored))
    stored.compute(objective.teacher_says, ranks.rank, ranks.count, progress, at_a_time=recipe.pass_size(ranks.count))
    ranks.barrier()
    stored.open()
    return stored
