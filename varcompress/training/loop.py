"""Distillation, from a pretrained model and a recipe to one elastic checkpoint. Reads from top to bottom."""

from __future__ import annotations

import hashlib
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from varcompress.data.sources import open_source
from varcompress.data.tokens import TokenData, TokenStore, store_of
from varcompress.distributed import Ranks, joined, local_device
from varcompress.errors import InputError, Stopped
from varcompress.files import room_bytes
from varcompress.fingerprint import weights_digest
from varcompress.hardware import compiling, most_held_bytes
from varcompress.images import skipped_note
from varcompress.models.elastic import ElasticVAR
from varcompress.models.linear import unpack
from varcompress.models.transformer import add_cfg_input
from varcompress.progress import Note, Progress, silent
from varcompress.schedule import Schedule
from varcompress.training.batches import Batch, Batches, ReaderDied, ended, loader, next_batch
from varcompress.training.budget import check_disk, check_memory, checkpoint_bytes, state_bytes
from varcompress.training.checks import check_finite, check_fit, check_size
from varcompress.training.heldout import in_first_view, loss_fields, measure_heldout
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
from varcompress.training.strategy import Step, is_saved, plan, schedules_of
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
        ranks.on_rank_zero(lambda: check_size(recipe, len(source)))
        digest = ranks.check_same(partial(weights_digest, model), "the weights of the model", SAME_MODEL)
        store = store_of(source, model, recipe.num_views, path=tokens, work=directory.tokens_path)
        ranks.on_rank_zero(lambda: directory.check_store(store))
        ranks.on_rank_zero(lambda: _check_disk(model, recipe, directory, store))
        teacher = teacher_of(model, recipe)  # a copy taken before the weights of a state to continue from
        identity = {"recipe": recipe.to_dict(), "model": digest, "data": source.digest}
        identity |= {"teacher": teacher.digest} if teacher and ranks.is_rank_zero else {}
        done = ranks.on_rank_zero(lambda: directory.begin(identity, note=note, resume=resume))
        ranks.check_same(directory.identity, "the output directory", SHARE_OUT)
        if isinstance(recipe.cfg, tuple):
            add_cfg_input(model.var)

        ranks.on_rank_zero(lambda: directory.begin_store(store))
        encoded = _encode(store, ranks, progress, note)
        data, heldout = encoded.split(recipe.held_out(len(encoded)))
        ranks.on_rank_zero(lambda: check_size(recipe, len(encoded)))  # again, now that unreadable ones are out
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
    over, due = None, False  # when the step before was; whether its state is still to be saved
    with Stopper() as stopper, states.writing(ranks), ended(reading):
        for step in run.steps[done:]:
            saves = due or is_saved(step, recipe)
            if saves:
                states.wait()
                ranks.on_rank_zero(partial(_check_room, run, step))
            began, schedules = time.perf_counter(), schedules_of(model, step.depths)
            with _kept(run, step, optimizer, stopper):
                batch = next_batch(reading, ranks)
                waited = time.perf_counter() - began
                found = gradients(run, step, batch, list(schedules.values()))
            line = take_step(run, step, schedules, *found, optimizer)
            bad = bad + 1 if "skipped" in line else 0
            between, over = began - (over or began), time.perf_counter()
            spent = {"seconds": over - began, "waited": waited, "between": between}
            line |= {what: round(seconds, 4) for what, seconds in spent.items()}
            line["memory_bytes"] = most_held_bytes(var.device)
            if len(run.heldout) and (step.number % recipe.holdout_every == 0 or step.number == last):
                line["heldout"] = heldout = measure_heldout(run.objective, run.heldout, ranks)
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
            if ends or (saves and not bad):  # a bad row makes no state, and takes none from before it away
                states.save(step.number, tensors_of(var, optimizer), drop=not bad)
            due = saves and bad > 0
            if ends:
                states.wait()
                _end(run, step.number, stopped, _bad_steps(run, line))
            progress(step.number, last, f"distill: {step_text(line, recipe.batch_size, heldout)}")


def _identity(state: Path) -> str:
    """What tells a state from another: its table of contents, which names every tensor's place."""
    path = state / METADATA
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "none"


def _check_disk(model: ElasticVAR, recipe: Recipe, directory: RunDirectory, store: TokenStore) -> None:
    """Before anything is begun: of what a run writes, what does not lie there yet, or elsewhere, must have room."""
    begun = store.path.exists() or directory.work not in store.path.parents
    there = {"encoded": begun, "states": len(directory.states.steps)}
    check_disk(model, recipe, directory.out, images=len(store.source), **there)


def _check_room(run: Run, step: Step) -> None:
    """Before a step whose files would be lost. Raises InputError where the disk has no room for them."""
    needed = state_bytes(run.model, run.recipe)
    needed += checkpoint_bytes(run.model, run.recipe) if step.ends_phase else 0
    free = room_bytes(run.directory.out)
    if free < needed:
        raise InputError(
            f"{run.directory.out}: {free / 2**20:,.0f} MiB are free, and what is saved next needs "
            f"{needed / 2**20:,.0f}: free some, then continue with --resume"
        )


@contextmanager
def _kept(run: Run, step: Step, optimizer: Optimizer, stopper: Stopper) -> Iterator[None]:
    """A block that reads a batch and makes its gradients: what fails there costs no earlier step.

    That is a process that reads, which was killed, and in a run of a single process a compiler, which gets the signal
    meant for the run and dies of it.
    """
    ranks, states, before = run.ranks, run.directory.states, step.number - 1
    try:
        with compiling():
            yield
    except (ReaderDied, RuntimeError, InputError) as error:
        if not isinstance(error, ReaderDied) and (ranks.count > 1 or not stopper.signal):
            raise
        optimizer.drop()
        states.wait()
        if ranks.on_rank_zero(lambda: before > max(states.steps, default=0)):
            states.save(before, tensors_of(run.model.var, optimizer))
            states.wait()
        (stopped,) = ranks.largest(stopper.signal)
        saved = f"the state of step {before} is saved: continue with --resume, and"
        remedy = saved if before else "nothing was trained yet: start the command again, with"
        _end(run, before, stopped, f"step {step.number}: {error}: {remedy} fewer workers where memory was short")


def _end(run: Run, saved: int, stopped: int, why: str) -> None:
    """Leave a run of which the state of a step is saved, unless that is 0: for a signal, or for what is an error."""
    if stopped and not saved:
        raise Stopped("stopped before the first step, with nothing trained yet", stopped)
    if stopped:
        raise Stopped(f"stopped after step {saved} of {len(run.steps)}, whose state is saved", stopped)

    def refuse() -> None:
        raise InputError(why)

    run.ranks.on_rank_zero(refuse)


def _bad_steps(run: Run, line: dict) -> str:
    """Why a run ends after bad steps, and which state from before them is there."""
    text = (
        f"step {line['step']}: {line.get('skipped')}, and so it was for {run.recipe.max_bad_steps} steps, which were "
        "skipped: start anew with a lower learning_rate, or resume with more max_bad_steps"
    )
    before = max((step for step in run.directory.states.steps if step < line["step"]), default=0)
    kept = f"; the state of step {before}, from before them, stays for `varcompress export --step {before}`"
    return text + kept * bool(before)


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
        found = {"loss": loss, **loss_fields(run.objective, losses, schedules), "gradient_norm": gradient_norm}
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


def teacher_of(model: ElasticVAR, recipe: Recipe) -> Teacher | None:
    """The teacher that a recipe asks for: the model as it is now."""
    if recipe.teacher == "none":
        return None
    guided = recipe.cfg is not None
    options = {"dtype": recipe.teacher_dtype, "guided": guided, "compiled": recipe.compile}
    return Teacher(model.var, model.schedule(FULL), **options)


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
