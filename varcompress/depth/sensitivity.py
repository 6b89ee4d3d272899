"""Where depth hurts: what each scale, and each layer, is worth to a model, without any training."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from varcompress.cost import predict
from varcompress.depth.losses import ImageLosses, increase, read_tokens
from varcompress.depth.scoring import check_scoring, scores_of
from varcompress.errors import InputError
from varcompress.models.elastic import ElasticVAR
from varcompress.profiling import conditions
from varcompress.progress import Note, Progress, silent
from varcompress.results import SCHEMA, SENSITIVITY, SensitivityResult
from varcompress.schedule import Gapped, Schedule


def sensitivity(
    model: ElasticVAR,
    data: str | Path | None = None,
    *,
    depths: Sequence[int] | None = None,
    num_images: int = 512,
    batch_size: int = 64,
    reference: str | Path | None = None,
    scored_images: int | None = None,
    progress: Progress = silent,
    note: Note = warnings.warn,
) -> SensitivityResult:
    """Measure what is lost where layers are skipped, without training.

    The loss is the cross-entropy of the tokens of real images, teacher-forced, in nats per token. It is measured

    - with only scale k at depth d (`Gapped.only`): scale k runs the model's subnet of d layers, all other scales run
      all layers. Later scales see, at a layer that scale k skipped, the tokens of the other scales alone, as cached
      generation with a gap in that layer's cache would;
    - from scale k on at depth d: the schedule d@(k - 1), all layers before it;
    - without one layer, at the scales after the bridge, and at all scales.

    data: as `distill` takes it, the embedded model's own by default; num_images: of it, those that a training run
    holds out first; depths: by default those that the model was trained for, or 16, 8, 4 and 2.
    reference: also scores `scored_images` of `full`, and of each depth at only scale k and from scale k on, on the
    Frechet distance of the features that fit the model, against what `evaluate` takes or a source by name (digits).
    Returns a dict that JSON can hold, whose fields `results.SensitivityResult` names. Every loss has its standard
    error over the images; those of an increase are of the differences image by image.
    Raises InputError for data, a depth or a reference that does not fit the model, and for a batch that does not fit
    the memory.
    """
    started = time.monotonic()
    check_scoring(model, reference, scored_images)
    full = model.schedule("full")
    depths = candidate_depths(model, depths)
    subnets = {depth: model.schedule(f"d{depth}").layers[-1] for depth in depths}
    only, onwards = schedules_by_scale(full, subnets)
    without = {layer: without_layer(full, layer, model.bridge) for layer in range(full.depth)} if full.depth > 1 else {}
    source, samples = read_tokens(model, data, num_images, progress=progress, note=note)
    asked = {full, *only.values(), *onwards.values(), *(one for pair in without.values() for one in pair.values())}
    losses = ImageLosses(model, samples, batch_size, total=len(asked), progress=progress)
    full_work = predict(model, full)["flops_without_decoder"]

    def cell(schedule: Schedule) -> dict:
        return increase(losses, schedule, full) | {
            "saved": 1 - predict(model, schedule)["flops_without_decoder"] / full_work
        }

    result = {
        "kind": SENSITIVITY,
        "schema": SCHEMA,
        **conditions(model),
        "data": {"name": source.name, "digest": source.digest, "images": len(losses)},
        "patch_nums": list(full.patch_nums),
        "bridge": model.bridge,
        "depths": depths,
        "subnets": {str(depth): list(layers) for depth, layers in subnets.items()},
        "full": increase(losses, full, full),
        "only": [{"depth": d, "scale": k + 1, **cell(one)} for (d, k), one in only.items()],
        "from": [{"depth": d, "scale": k + 1, **cell(one)} for (d, k), one in onwards.items()],
        "layers": [
            {"layer": layer, **{where: cell(schedule) for where, schedule in pair.items()}}
            for layer, pair in without.items()
        ],
        "scored": None,
    }
    if reference is not None:
        scored = scores_of(
            model,
            list(dict.fromkeys((full, *only.values(), *onwards.values()))),
            reference=reference,
            num_images=scored_images,
            batch_size=batch_size,
            progress=progress,
        )
        found = scored.pop("scores")
        for row in (result["full"], *result["only"], *result["from"]):
            row["score"] = found[row["schedule"]]
        result["scored"] = scored
    result["seconds"] = time.monotonic() - started
    return result


def candidate_depths(model: ElasticVAR, depths: Sequence[int] | None = None) -> list[int]:
    """Depths below the model's own, from large to small. Raises InputError for one that is no subnet's."""
    depth = model.var.config.depth
    if depths is None:
        depths = [len(schedule.layers[-1]) for schedule in model.default_schedules()[1:]]
    chosen = sorted({*depths} - {depth}, reverse=True)
    if outside := [d for d in chosen if not 2 <= d < depth]:
        raise InputError(f"depth {outside[0]}: a subnet of {depth} layers has 2 to {depth} of them")
    if not chosen:
        raise InputError(f"a model of {depth} layers has no shallower depth of its own: name some with --depth")
    return chosen


def schedules_by_scale(
    full: Schedule, subnets: dict[int, tuple[int, ...]]
) -> tuple[dict[tuple[int, int], Schedule], dict[tuple[int, int], Schedule]]:
    """{(depth, scale from 0): the schedule} with that depth at only that scale, and from that scale on.

    At the last scale they are the same.
    """
    scales, shape = len(full.patch_nums), {"depth": full.depth, "patch_nums": full.patch_nums}
    onwards = {
        (depth, k): Schedule.after_bridge(layers, bridge=k, **shape)
        for depth, layers in subnets.items()
        for k in range(scales)
    }
    only = {
        (depth, k): Gapped.only(k, subnets[depth], full) if k + 1 < scales else schedule
        for (depth, k), schedule in onwards.items()
    }
    return only, onwards


def without_layer(full: Schedule, layer: int, bridge: int) -> dict[str, Schedule]:
    """The schedules that run all layers but one, after the bridge and everywhere."""
    rest, shape = (
        tuple(i for i in range(full.depth) if i != layer),
        {"depth": full.depth, "patch_nums": full.patch_nums},
    )
    return {
        "after_bridge": Schedule.after_bridge(rest, bridge=bridge, **shape),
        "everywhere": Schedule.after_bridge(rest, bridge=0, **shape),
    }
