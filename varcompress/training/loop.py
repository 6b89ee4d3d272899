"""Distillation, from a pretrained model and a recipe to one elastic checkpoint. Reads from top to bottom."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from varcompress.data.sources import open_source
from varcompress.data.tokens import Epoch, TokenData, TokenStore
from varcompress.errors import InputError
from varcompress.fingerprint import weights_digest
from varcompress.hardware import fitting_memory
from varcompress.images import skipped_note
from varcompress.models.elastic import ElasticVAR
from varcompress.models.transformer import VAR
from varcompress.progress import Note, Progress, silent
from varcompress.schedule import Schedule
from varcompress.training.distributed import Ranks, joined, local_device
from varcompress.training.log import StepLog
from varcompress.training.losses import LOSSES, Loss
from varcompress.training.progressive import Step, plan
from varcompress.training.recipe import Recipe, load_recipe
from varcompress.training.state import RunDirectory

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

    recipe: a Recipe, a recipe's name or a YAML file; data: an image folder, one subfolder per class, or
    "digits" (the embedded model needs none); out: the directory that becomes the elastic checkpoint;
    resume: continue the run that is there, to the weights it would have reached undisturbed;
    tokens: a directory that keeps the encoded images for further runs; note: called with remarks.

    Under torchrun every process calls this, and each takes its share of the batch. Returns the
    trained model, in float32. Raises InputError for a recipe that does not fit the model or the
    data, for an `out` that holds anything else, and for processes that opened different weights.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    directory = RunDirectory(out)
    with joined(local_device(model.device)) as ranks:
        ranks.on_rank_zero(lambda: check_fit(recipe, model, ranks))
        if not ranks.is_rank_zero:
            progress = note = silent
        model.to(local_device(model.device)).float()
        model.tokenizer.requires_grad_(False)
        model.var.requires_grad_(True).zero_grad()
        ranks.on_rank_zero(lambda: directory.check(resume=resume))
        if ranks.on_rank_zero(lambda: directory.finished):
            note(f"{out}: that run is finished already")
            return directory.result(recipe).to(model.device)

        source = ranks.on_rank_zero(lambda: open_source(data, model))
        ranks.on_rank_zero(lambda: _check_size(recipe, len(source)))
        digest = ranks.check_same(partial(weights_digest, model), "the weights of the model", SAME_MODEL)
        identity = {"recipe": recipe.to_dict(), "model": digest, "data": source.digest}
        done = ranks.on_rank_zero(lambda: directory.begin(identity, note=note, resume=resume))

        store = TokenStore(tokens or directory.tokens_path, source, model, recipe.views)
        create = store.create if tokens or done else partial(directory.create_tokens, store.create)
        encoded = _encode(store, create, ranks, progress, note)
        ranks.on_rank_zero(lambda: _check_size(recipe, len(encoded)))  # again, now that unreadable ones are out
        steps = plan(recipe, len(encoded) // recipe.batch_size)  # a pass drops its last, incomplete batch
        with StepLog(directory.steps_path, done) if ranks.is_rank_zero else nullcontext() as log:
            try:
                train(model, recipe, steps[done:], encoded, directory, log, ranks, progress)
            finally:
                model.var.zero_grad()  # of a step that was interrupted; they are as large as the weights

        model.bridge, model.depths = recipe.bridge, recipe.depths
        model.provenance = replace(model.provenance, recipe=recipe.to_dict())
        ranks.on_rank_zero(lambda: directory.finish(model))
    return model


def train(
    model: ElasticVAR,
    recipe: Recipe,
    steps: list[Step],
    data: TokenData,
    directory: RunDirectory,
    log: StepLog | None,
    ranks: Ranks,
    progress: Progress = silent,
) -> None:
    """Run `steps`, which follow the saved state if there is one. Rank 0 saves and logs."""
    var = model.var
    schedules = {depth: model.schedule(f"d{depth}@{recipe.bridge}") for depth in recipe.depths}
    schedules[None] = model.schedule("full")
    parameters = list(var.parameters())
    optimizer = adamw(var, recipe)
    loss_of_tokens = LOSSES[recipe.loss]()
    directory.load(var, optimizer)
    if steps and steps[0].number > 1:
        ranks.check_same(partial(weights_digest, var), "the weights of the state to continue from", SHARE_OUT)
    epoch = None
    for step in steps:
        began = time.perf_counter()
        if epoch is None or step.place == 0:
            null = var.config.classes
            epoch = Epoch.draw(data, seed=recipe.seed, epoch=step.epoch, label_drop=recipe.label_drop, null=null)
        schedule = schedules[step.depth]
        learning_rate = learning_rate_at(step.number, steps[-1].number, recipe)

        token_loss = torch.zeros(var.config.tokens, device=model.device)  # (L,), mean over this process's images
        for places in micro_batches(step, recipe, ranks):
            token_loss += backward(model, *epoch.samples(places), schedule, recipe, loss_of_tokens)
        # Layers that a step leaves out have no gradient: neither clipping nor AdamW touches them.
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        ranks.average_([*gradients, token_loss])
        gradient_norm = nn.utils.clip_grad_norm_(parameters, recipe.gradient_clip or math.inf)  # the norm before it
        per_scale = [part.mean() for part in token_loss.split([p * p for p in var.config.patch_nums])]
        loss, gradient_norm, *per_scale = torch.stack([token_loss.mean(), gradient_norm, *per_scale]).tolist()
        _check_finite(step, loss, gradient_norm)  # before the weights move: no state of a spoilt model is saved
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        if ranks.is_rank_zero:
            log.append(
                {
                    "step": step.number,
                    "epoch": step.epoch,
                    "phase": step.phase,
                    "p": round(step.p, 6),
                    "schedule": str(schedule),
                    "depth": step.depth or var.config.depth,
                    "loss": loss,
                    "loss_per_scale": per_scale,
                    "learning_rate": learning_rate,
                    "gradient_norm": gradient_norm,
                    "seconds": round(time.perf_counter() - began, 4),
                }
            )
            if step.number % recipe.checkpoint_every == 0 or step.ends_phase:
                directory.save(var, optimizer, step.number)
        what = f"distill: phase {step.phase}, p {step.p:.2f}, {schedule}, loss {loss:.3f}"
        progress(step.number, steps[-1].number, what)


def backward(
    model: ElasticVAR, labels: Tensor, tokens: Tensor, schedule: Schedule, recipe: Recipe, loss: Loss
) -> Tensor:
    """Add the gradients of one pass of a step, and return its share of the loss of the step: (L,) float32.

    labels: (B,) int64; tokens: (B, L) int64; both may be on the host.
    """
    labels, tokens = labels.to(model.device), tokens.to(model.device)
    with fitting_memory(model.device, len(labels), _memory_remedy(recipe)):
        losses = token_losses(model, labels, tokens, schedule, recipe, loss) / recipe.accumulation
        losses.mean().backward()
    return losses.detach()


def _memory_remedy(recipe: Recipe) -> str:
    """What to do about a device that is too small."""
    more = "" if recipe.activation_checkpointing else ", or set activation_checkpointing=true"
    return f"raise accumulation (now {recipe.accumulation}){more}"


def _check_finite(step: Step, loss: float, gradient_norm: float) -> None:
    for what, value in (("loss", loss), ("norm of the gradient", gradient_norm)):
        if not math.isfinite(value):
            raise InputError(f"step {step.number}: the {what} is {value}; start another run with a lower learning_rate")


def token_losses(
    model: ElasticVAR, labels: Tensor, tokens: Tensor, schedule: Schedule, recipe: Recipe, loss: Loss
) -> Tensor:
    """The loss of the teacher-forced pass under a schedule, in nats.

    labels: (B,) int64, the null class included; tokens: (B, L) int64; returns the mean over the batch at each place,
    (L,). The arithmetic is in the recipe's dtype, and activations are recomputed where the recipe says so.
    """
    with torch.no_grad():
        teacher_input = model.tokenizer.teacher_input(tokens)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=recipe.dtype == "bfloat16"):
        logits = model.var(labels, teacher_input, schedule, checkpointing=recipe.activation_checkpointing)
    return loss(logits, tokens).mean(dim=0)


def micro_batches(step: Step, recipe: Recipe, ranks: Ranks) -> Iterator[slice]:
    """The places in the epoch of the images that this process runs, one slice per pass.

    All processes together cover the batch.
    """
    size = recipe.batch_size // (ranks.count * recipe.accumulation)
    for micro in range(recipe.accumulation):
        start = step.place * recipe.batch_size + (micro * ranks.count + ranks.rank) * size
        yield slice(start, start + size)


def learning_rate_at(number: int, steps: int, recipe: Recipe) -> float:
    """The learning rate of step `number` (from 1) of `steps`.

    It rises linearly over the warm-up and falls linearly over the whole run, and the two are multiplied.
    """
    rise = min(1.0, number / max(recipe.warmup_steps, 1))
    return recipe.learning_rate * rise * (1 - (1 - recipe.learning_rate_end) * number / steps)


def adamw(var: VAR, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW over the transformer. Only the matrices of linear layers decay, not biases and embeddings."""
    matrices = [module.weight for module in var.modules() if isinstance(module, nn.Linear)]
    known = set(map(id, matrices))
    rest = [parameter for parameter in var.parameters() if id(parameter) not in known]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=True)


def check_fit(recipe: Recipe, model: ElasticVAR, ranks: Ranks) -> None:
    """Refuse a recipe that asks for what the model, or the number of processes, has no room for."""
    depth, scales = model.var.config.depth, len(model.var.config.patch_nums)
    if recipe.depths[0] >= depth:
        raise InputError(
            f"recipe: depths names {recipe.depths[0]}, but the model has {depth} layers: list fewer than that"
        )
    if recipe.bridge >= scales:
        raise InputError(
            f"recipe: a bridge of {recipe.bridge} leaves nothing to thin out: "
            f"the model has {scales} scales, choose fewer"
        )
    if recipe.batch_size % (ranks.count * recipe.accumulation):
        raise InputError(
            f"recipe: batch_size {recipe.batch_size} does not divide into "
            f"{ranks.count} processes x {recipe.accumulation} passes (accumulation): choose a multiple"
        )


def _check_size(recipe: Recipe, num_images: int) -> None:
    if num_images < recipe.batch_size:
        raise InputError(
            f"recipe: batch_size {recipe.batch_size} is more than the {num_images} images there are: lower it"
        )


def _encode(
    store: TokenStore,
    create: Callable[[], None],
    ranks: Ranks,
    progress: Progress,
    note: Note,
) -> TokenData:
    """Encode the images, each process a share of them, and say which could not be read."""
    ranks.on_rank_zero(create)
    store.encode(ranks.rank, ranks.count, progress)
    ranks.barrier()
    data = store.read()
    if data.skipped:
        note(skipped_note(data.skipped, len(store.source)))
    return data
