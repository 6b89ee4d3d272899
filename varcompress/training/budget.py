"""What a run costs, by arithmetic, before anything is fetched or started: work, memory, disk and time.

Memory is that of one device at its fullest moment. What is held all the time (weights, moments, teacher, tokenizer) is
exact; what a pass needs beside it `pass_memory` counts. tests/test_budget.py holds both against what is allocated.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import torch

from varcompress.data.tokens import CHUNK
from varcompress.errors import InputError
from varcompress.files import room_bytes
from varcompress.hardware import free_bytes
from varcompress.memory import held_bytes
from varcompress.models.elastic import ElasticVAR
from varcompress.models.transformer import VARConfig
from varcompress.report.format import settings
from varcompress.schedule import Schedule, Together
from varcompress.training.optimizer import FLOAT32, moments_bytes, muon_matrices
from varcompress.training.pass_memory import BFLOAT16, NODE, Bytes, Pass, added, parameter_count, shards_of
from varcompress.training.recipe import FULL, PHASES, Machine, Recipe, machine_fields
from varcompress.training.sensitivity import SENSITIVITY_IMAGES, kept, losses_of
from varcompress.training.strategy import Step, is_saved, plan

NEWTON_SCHULZ_STEPS = 5  # torch.optim.Muon's
GB = 10**9


@dataclass(frozen=True)
class GPU:
    """A device that is sold under a name: its memory, and the bfloat16 FLOP/s of its data sheet, without sparsity."""

    memory_bytes: int
    flops_per_second: float


GPUS = {
    "rtx3090": GPU(24 * GB, 71e12),
    "rtx4090": GPU(24 * GB, 165e12),
    "l40s": GPU(48 * GB, 362e12),
    "a100-40": GPU(40 * GB, 312e12),
    "a100": GPU(80 * GB, 312e12),
    "h100": GPU(80 * GB, 989e12),
    "h200": GPU(141 * GB, 989e12),
    "b200": GPU(180 * GB, 2250e12),
}


# -- work ---------------------------------------------------------------------------------------


def forward_flops(config: VARConfig, together: Together, images: int) -> tuple[int, int]:
    """FLOPs of a teacher-forced pass: of the layers, and of all else. Two per multiply-add.

    Attention under a mask computes every product of two tokens of the pass, and leaves out none that the mask hides.
    """
    width, condition = config.width, 6 * config.width**2
    layers = 0
    for layer in together.layers:
        tokens = sum(together.seen(layer))
        layers += 2 * tokens * (4 * width + 2 * config.hidden) * width + 4 * tokens**2 * width
        layers += 0 if config.shared_aln else 2 * condition
    rest = 2 * (config.tokens - config.patch_nums[0] ** 2) * config.z_channels * width
    rest += 2 * 2 * width**2 + (2 * condition if config.shared_aln else 0)
    rest += 2 * sum(together.lengths) * width * config.vocab
    return images * layers, images * rest


def step_flops(model: ElasticVAR, recipe: Recipe, depths: tuple[str | int, ...]) -> Counter:
    """FLOPs of a step that trains these depths, on all devices together, by what they are for."""
    config, found = model.var.config, Counter()
    for together in _passes(model, recipe, depths):
        layers, rest = forward_flops(config, together, recipe.batch_size)
        found["forward and backward"] += 3 * (layers + rest)
        found["recomputed"] += layers if recipe.activation_checkpointing else 0
    if recipe.teacher_logits == "live":
        found["teacher"] += teacher_flops(model, recipe, recipe.batch_size)
    return found


def teacher_flops(model: ElasticVAR, recipe: Recipe, images: int) -> int:
    """FLOPs of what the teacher says of so many images."""
    if recipe.teacher == "none":
        return 0
    full = Together((model.schedule(FULL),))
    return (1 + (recipe.cfg is not None)) * sum(forward_flops(model.var.config, full, images))


def muon_flops(model: ElasticVAR) -> int:
    """FLOPs of a step of Muon on one device: three products of each iteration of each matrix."""
    total = 0
    for matrix in muon_matrices(model.var).values():
        small, large = sorted(matrix.shape)
        total += NEWTON_SCHULZ_STEPS * 2 * (2 * small**2 * large + small**3)
    return total


def run_flops(model: ElasticVAR, recipe: Recipe, steps: list[Step], images: int, devices: int) -> Counter:
    """FLOPs of all steps on all devices together, by what they are for."""
    total = Counter()
    for depths, count in Counter(step.depths for step in steps).items():
        total.update({what: count * flops for what, flops in step_flops(model, recipe, depths).items()})
    if recipe.teacher_logits == "stored":
        total["teacher"] += teacher_flops(model, recipe, images * stored_answers(recipe))
    if recipe.optimizer == "muon":
        total["optimiser"] += len(steps) * devices * muon_flops(model)
    total["held-out images"] += heldout_flops(model, recipe, steps, images, devices)
    if recipe.layers == "sensitivity":
        total["choice of layers"] += sensitivity_flops(model, recipe, images - recipe.held_out(images))
    return total


def heldout_flops(model: ElasticVAR, recipe: Recipe, steps: list[Step], images: int, devices: int) -> int:
    """FLOPs of all measurements of the images held out, each under all schedules in one pass, and by the teacher.

    Where the passes do not divide evenly, devices without one of their own run the last once more.
    """
    heldout, size = recipe.held_out(images), recipe.pass_size(devices)
    if not heldout:
        return 0
    passes = -(-heldout // size)
    run = heldout + -passes % devices * (heldout - (passes - 1) * size)
    together = Together(tuple(schedules_of(model, recipe, (FULL, *recipe.depths))))
    once = sum(forward_flops(model.var.config, together, run))
    once += teacher_flops(model, recipe, run) if recipe.teacher_logits == "live" else 0
    return once * sum(step.number % recipe.holdout_every == 0 or step is steps[-1] for step in steps)


def sensitivity_flops(model: ElasticVAR, recipe: Recipe, images: int) -> int:
    """FLOPs of choosing layers by sensitivity, of so many images in training: by one device, all others wait."""
    config, count = model.var.config, min(images, SENSITIVITY_IMAGES)
    total = teacher_flops(model, recipe, count)
    for layers, losses in losses_of(config.depth, recipe.depths[-1], len(kept(config.depth))).items():
        options = {"depth": config.depth, "patch_nums": config.patch_nums, "bridge": recipe.bridge}
        together = Together((Schedule.after_bridge(tuple(range(layers)), **options),))
        total += losses * sum(forward_flops(config, together, count))
    return total


def schedules_of(model: ElasticVAR, recipe: Recipe, depths: tuple[str | int, ...]) -> list[Schedule]:
    """The schedules of these depths, as the recipe will have them; equidistant where it chooses layers by a trial."""
    config = model.var.config
    subnets = {} if isinstance(recipe.layers, str) else dict(zip(recipe.depths, recipe.layers, strict=True))
    shape = {"depth": config.depth, "patch_nums": config.patch_nums, "bridge": recipe.bridge, "subnets": subnets}
    return [Schedule.parse(depth if depth == FULL else f"d{depth}", **shape) for depth in depths]


# -- memory -------------------------------------------------------------------------------------


def memory(
    model: ElasticVAR,
    recipe: Recipe,
    *,
    devices: int = 1,
    depths: tuple[str | int, ...] | None = None,
    first: bool = False,
) -> Bytes:
    """Bytes on one device at the fullest moment of a run, by part.

    depths: of a step that trains these, by default of any step; first: of its first pass, before which there are no
    gradients.
    """
    held = _held(model, recipe, shards_of(recipe, devices))
    moments = [{**held, **_encoding(model)}]
    if recipe.parallel == "fsdp" and devices > 1:
        moments.append({**_held(model, recipe, 1), **_encoding(model)})  # before anything is shared out
        # whole weights, for a checkpoint or samples
        moments.append({**held, "gathered weights": FLOAT32 * parameter_count(model, recipe)})
    for together in _passes(model, recipe, depths):
        running = Pass(model, recipe, together, devices, accumulated=recipe.accumulation > 1 and not first)
        moments += [held | moment for moment in running.moments()]
    return {part: size for part, size in max(moments, key=lambda m: sum(m.values())).items() if size}


def _encoding(model: ElasticVAR) -> Bytes:
    """Images that become tokens, before the first step: four maps of the encoder at full resolution."""
    config = model.tokenizer.config
    pixels = 2 * 3 * config.image_size**2
    return {"moments": 0, "encoder": FLOAT32 * CHUNK * (4 * config.map_elements + pixels)}


def _held(model: ElasticVAR, recipe: Recipe, shards: int) -> Bytes:
    """What stays where it is between the steps."""
    weights = parameter_count(model, recipe)
    tokenizer = (*model.tokenizer.parameters(), *model.tokenizer.buffers())
    live = recipe.teacher == "frozen" and recipe.teacher_logits == "live"
    element = {"float32": FLOAT32, "bfloat16": BFLOAT16}[recipe.teacher_dtype]
    return {
        "parameters": FLOAT32 * weights // shards,
        "moments": optimizer_bytes(model, recipe) // shards,
        "teacher": element * sum(p.numel() for p in model.var.parameters()) // shards if live else 0,
        "tokenizer": FLOAT32 * sum(t.numel() for t in tokenizer),
    }


def optimizer_bytes(model: ElasticVAR, recipe: Recipe) -> int:
    """Bytes of all moments, on all devices together, once every parameter has had a gradient."""
    by_muon = set(map(id, muon_matrices(model.var).values())) if recipe.optimizer == "muon" else ()
    sizes = [(p.numel(), id(p) in by_muon) for p in model.var.parameters()]
    sizes += [(numel, False) for numel in added(model, recipe)]
    return sum(moments_bytes(recipe.optimizer, numel, by_muon=muon) for numel, muon in sizes)


def _passes(model: ElasticVAR, recipe: Recipe, depths: tuple[str | int, ...] | None) -> list[Together]:
    """The passes of a step that trains these depths; by default those that can be the fullest of all.

    Where depths are drawn, all of them may meet in one.
    """
    drawn = recipe.depth_probability
    every = [depth for depth in (FULL, *recipe.depths) if drawn is None or drawn.get(str(depth))]
    schedules = schedules_of(model, recipe, depths or tuple(every))
    if recipe.together and (depths or drawn):
        return [Together(tuple(schedules))]
    return [Together((schedule,)) for schedule in schedules]


def host_bytes(model: ElasticVAR, recipe: Recipe, devices: int) -> int:
    """Bytes of the host of one node while a state is written: what each of its devices holds of weights and moments."""
    return min(devices, NODE) * (state_bytes(model, recipe) // shards_of(recipe, devices))


def state_bytes(model: ElasticVAR, recipe: Recipe) -> int:
    """Bytes of a state to continue from: weights and moments."""
    return FLOAT32 * parameter_count(model, recipe) + optimizer_bytes(model, recipe)


def checkpoint_bytes(model: ElasticVAR, recipe: Recipe) -> int:
    """Bytes of an elastic checkpoint in float32, as training writes it."""
    return FLOAT32 * (parameter_count(model, recipe) + sum(p.numel() for p in model.tokenizer.parameters()))


# -- disk ---------------------------------------------------------------------------------------


def disk(model: ElasticVAR, recipe: Recipe, images: int) -> Bytes:
    """Bytes that a run writes, by part, at their most: one state more than are kept, while it is written."""
    config, views = model.var.config, images * recipe.num_views
    narrow = 2 if config.vocab <= 2**16 else 4  # of a token
    top = min(recipe.teacher_top or 0, config.vocab)
    phases = sum(getattr(recipe, phase) > 0 for phase in PHASES)  # each of which leaves a checkpoint
    answers = images * stored_answers(recipe) * config.tokens * (2 * (top + 1) + narrow * top) if top else 0
    parts = {
        "tokens": views * config.tokens * narrow,
        "teacher's logits": answers,
        "states": (recipe.keep + 1) * state_bytes(model, recipe),
        "checkpoints": max(1, phases) * checkpoint_bytes(model, recipe),
    }
    return {part: size for part, size in parts.items() if size}


def check_disk(
    model: ElasticVAR, recipe: Recipe, out: Path, *, images: int, states: int = 0, encoded: bool = False
) -> None:
    """Raises InputError for a run whose states, at their most, the disk of `out` has no room for.

    images: of the data; states: how many are there already; encoded: whether room for tokens, and for the teacher's
    logits beside them, is taken already, or is needed elsewhere.
    """
    steps = plan(recipe, (images - recipe.held_out(images)) // recipe.batch_size)
    count = min(recipe.keep + 1, sum(is_saved(step, recipe) for step in steps))
    parts = disk(model, recipe, images) | {"states": max(1, count - states) * state_bytes(model, recipe)}
    del parts["checkpoints"]  # which take the place of states
    needed = {part: size for part, size in parts.items() if part == "states" or not encoded}
    if (free := room_bytes(out)) < sum(needed.values()):
        most = ", ".join(f"{size / 2**20:,.0f} for {part}" for part, size in needed.items())
        raise InputError(
            f"{out}: {free / 2**20:,.0f} MiB are free, and the run needs {sum(needed.values()) / 2**20:,.0f} ({most}): "
            "free some, or choose another disk or a lower keep"
        )


def stored_answers(recipe: Recipe) -> int:
    """How often a teacher whose logits are stored answers for an image: for each view, and with the label dropped."""
    return recipe.num_views * (2 if recipe.label_drop else 1)


# -- what fits, and what would ------------------------------------------------------------------

# Changes that spare memory. Which of them is the cheapest is found by trying.
CHANGES: tuple[dict[str, object], ...] = (
    {"parallel": "fsdp"},
    {"activation_checkpointing": True},
    {"together": False},
    {"teacher_dtype": "bfloat16"},
    {"teacher_logits": "stored", "teacher_top": 64},
    {"optimizer": "muon"},
    {"optimizer": "adamw8bit"},
)


def cheapest_change(
    model: ElasticVAR, recipe: Recipe, memory_bytes: int, *, devices: int = 1
) -> dict[str, object] | None:
    """What to change of a recipe so that it fits so much memory on each device; empty where it does, None if nothing.

    The cheapest is what leaves most of what is learned as it is, then what adds the least work, then what changes the
    fewest keys; more passes (accumulation), each of fewer images, cost nothing by this count.
    """
    possible = [change for change in CHANGES if _applies(recipe, change, devices)]
    tries = [chosen for count in range(len(possible) + 1) for chosen in combinations(possible, count)]
    ways = []
    for chosen in tries:
        change = {key: value for one in chosen for key, value in one.items()}
        ways.append((_learned(change), _work(model, replace(recipe, **change)), len(change), change))
    for *_, change in sorted(ways, key=lambda way: way[:3]):
        for accumulation in _accumulations(recipe, devices):
            changed = replace(recipe, **change, accumulation=accumulation)
            if sum(memory(model, changed, devices=devices).values()) <= memory_bytes:
                more = {"accumulation": accumulation} if accumulation != recipe.accumulation else {}
                return more | change
    return None


def _applies(recipe: Recipe, change: dict[str, object], devices: int) -> bool:
    """Whether a change changes a recipe, and leaves it one that runs on so many devices."""
    if (change == {"optimizer": "adamw8bit"} and devices > 1) or ("parallel" in change and devices == 1):
        return False
    if all(getattr(recipe, key) == value for key, value in change.items()):
        return False
    if "together" in change and recipe.depth_probability is None:
        return False
    if recipe.teacher == "none" and any(key.startswith("teacher") for key in change):
        return False
    return not (change.get("teacher_logits") and isinstance(recipe.cfg, tuple))  # a range cannot be stored


def _learned(change: dict[str, object]) -> int:
    """How many changes are of what is learned, not of how the machine is used alone."""
    return len(change.keys() - machine_fields())


def _work(model: ElasticVAR, recipe: Recipe) -> int:
    """FLOPs of a step that trains all depths."""
    return sum(step_flops(model, recipe, (FULL, *recipe.depths)).values())


def _accumulations(recipe: Recipe, devices: int) -> list[int]:
    """Numbers of passes that a device's share of the batch divides into, from the recipe's own on."""
    share = recipe.batch_size // devices
    return [count for count in range(recipe.accumulation, share + 1) if share % count == 0]


def check_memory(model: ElasticVAR, recipe: Recipe, device: torch.device, devices: int = 1) -> None:
    """Raises InputError for a run that by arithmetic needs more than is free on its device, saying what would fit.

    devices: processes that train together; those on CPUs are taken to share the memory of one machine.
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif (free := free_bytes()) is not None:
        free //= devices
    if free is None:  # nobody can tell
        return
    _check_host(model, recipe, device, devices)
    available = free + (held_bytes(model) if model.device == device else 0)  # the model is in what is needed
    parts = memory(model, recipe, devices=devices)
    needed = sum(parts.values())
    if needed <= available:
        return
    change = cheapest_change(model, recipe, available, devices=devices)
    remedy = settings(change) if change else "use a device with more memory, or a smaller model"
    most = ", ".join(f"{part} {size / GB:.3g}" for part, size in sorted(parts.items(), key=lambda item: -item[1])[:3])
    raise InputError(
        f"recipe {recipe.name} needs {needed / GB:.3g} GB on a device, by arithmetic ({most}, ...), and "
        f"{available / GB:.3g} are to be had: {remedy}"
    )


def _check_host(model: ElasticVAR, recipe: Recipe, device: torch.device, devices: int) -> None:
    """The same for the copy of a state, which on a CPU comes beside all else."""
    needed, free = host_bytes(model, recipe, devices), free_bytes()
    if device.type == "cuda" and free is not None and needed > free:
        raise InputError(
            f"recipe {recipe.name} needs {needed / GB:.3g} GB of the host's memory while a state is written, by "
            f"arithmetic, and {free / GB:.3g} are to be had: set parallel=fsdp, or give the job more"
        )


# -- all of it ----------------------------------------------------------------------------------


# Of a GPU's FLOP/s in bfloat16. Measured on an H200 (docs/benchmarks/step, of 990 TFLOP/s): 28 % for `full` of VAR-d30,
# 16 % for d2 alone, 24 to 25 % over a recipe's passes. The round figure is below these: averaging gradients over
# devices, and reading images, are not in them.
UTILISATION = 0.2
IMAGENET = 1_281_167


def budget(
    model: ElasticVAR,
    recipe: Recipe,
    *,
    images: int = IMAGENET,
    devices: int | None = None,
    memory_bytes: int | None = None,
    flops_per_second: float | None = None,
    utilisation: float = UTILISATION,
) -> dict:
    """What a run of a recipe costs: a dict that JSON can hold, of kind "plan".

    model: it may be without weights (`loading.outline`), and the recipe fits it (`checks.check_fit`); images: of the
    data, those held out included; devices, memory_bytes (of each): by default as the recipe says; flops_per_second: of
    each device, None for no estimate of time; utilisation: the share of it that training reaches, by FLOPs that are
    computed, recomputed ones included. "fits" and "change" (see `cheapest_change`) are None where no memory is named;
    change_disk_bytes: on the disk with it.
    Raises InputError for fewer images than a batch.
    """
    machine = Machine.parse(recipe.machine)
    devices, memory_bytes = devices or machine.devices, memory_bytes or machine.memory_bytes
    trained = images - recipe.held_out(images)
    steps = plan(recipe, trained // recipe.batch_size)
    if not steps:
        raise InputError(
            f"recipe: batch_size {recipe.batch_size} is more than the {trained} images there are: lower it"
        )
    flops = run_flops(model, recipe, steps, images, devices)
    needed = memory(model, recipe, devices=devices)
    fits, change = None, None
    if memory_bytes:
        fits = sum(needed.values()) <= memory_bytes
        change = {} if fits else cheapest_change(model, recipe, memory_bytes, devices=devices)
    seconds = sum(flops.values()) / (devices * flops_per_second * utilisation) if flops_per_second else None
    return {
        "kind": "plan",
        "model": model.provenance.name,
        "recipe": recipe.to_dict(),
        "images": images,
        "devices": devices,
        "images_per_pass": recipe.pass_size(devices),
        "steps": len(steps),
        "tokens": len(steps) * recipe.batch_size * model.var.config.tokens,
        "flops": dict(flops),
        "memory": needed,
        "memory_bytes": sum(needed.values()),
        "device_memory_bytes": memory_bytes,
        "fits": fits,
        "change": change,
        "disk": (written := disk(model, recipe, images)),
        "disk_bytes": sum(written.values()),
        "change_disk_bytes": sum(disk(model, replace(recipe, **change), images).values()) if change else None,
        "host_bytes": host_bytes(model, recipe, devices),
        "flops_per_second": flops_per_second,
        "utilisation": utilisation if flops_per_second else None,
        "seconds": seconds,
    }
