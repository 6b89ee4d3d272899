"""The whole path on the embedded model: score it, let it teach its subnets, score them, measure what each saves."""

from __future__ import annotations

import time
import warnings
from pathlib import Path

import numpy as np

from varcompress.drawing import draw_images
from varcompress.evaluation import evaluate
from varcompress.images import pixels
from varcompress.loading import load
from varcompress.models.elastic import ElasticVAR
from varcompress.profiling import profile
from varcompress.progress import Note, Progress, silent
from varcompress.publish import SAMPLES, record
from varcompress.report.plots import plot_samples
from varcompress.results import DEMO, DemoCost, DemoResult, EvalRow, ProfileRow, write_result
from varcompress.sampling import Sampling
from varcompress.training import distill
from varcompress.training.recipe import load_recipe
from varcompress.training.state import RunDirectory

SCORE, NUM_IMAGES = "fd", 2000
PER_CLASS = 2  # samples in the picture
BATCH_SIZE = 64  # of the profile


def run_demo(out: str | Path, *, progress: Progress = silent, note: Note = warnings.warn) -> DemoResult:
    """Distil, profile and evaluate `digits` into the elastic directory `out`.

    A demo that was interrupted goes on with the distillation where it stopped; a finished one only measures again.
    Returns a JSON-able dict: the teacher, and per schedule the score of the untouched and of the distilled weights with
    its interval over the choice of images, speed beside the teacher's, cache and peak memory; plus the files written.
    Raises InputError when `out` holds something else.
    """
    out, started = Path(out), time.monotonic()
    resume = out.is_dir() and any(out.iterdir())
    RunDirectory(out).check(resume=resume)
    recipe = load_recipe("digits")
    model = load("digits")
    model.bridge, model.depths = recipe.bridge, recipe.depths
    settings = {"num_images": NUM_IMAGES, "batch_size": 100, "progress": progress}
    speed = {"batch_size": BATCH_SIZE, "runs": 5, "progress": progress}
    samples = {"before: the teacher (full) and its subnets, untrained": sample_rows(model)}
    before, (teacher,) = evaluate(model, **settings), profile(model, ["full"], **speed)["schedules"]
    model = distill(model, recipe, out=out, resume=resume, progress=progress, note=note)
    samples["after: one set of weights for all depths, guidance distilled"] = sample_rows(model)
    after, costs = evaluate(model, **settings), profile(model, **speed)
    result: DemoResult = {
        "kind": DEMO,
        "device": costs["device"],
        "score": SCORE,
        "features": before["features"]["name"],
        "images": NUM_IMAGES,
        "batch_size": BATCH_SIZE,
        "teacher": _row(before["schedules"][0], teacher, teacher),
        "schedules": [
            {
                "untrained": untrained["scores"][SCORE],
                **_row(distilled, cost, teacher),
            }
            for untrained, distilled, cost in zip(
                before["schedules"], after["schedules"], costs["schedules"], strict=True
            )
        ],
        "untrained": before,  # not a file of its own: `push` would take it for a result of the distilled weights
        "seconds": time.monotonic() - started,
    }
    plot_samples(samples, result, out / SAMPLES)
    for measured in (after, costs):
        record(measured, out)
    write_result(result, out)
    result["files"] = sorted(str(path) for path in out.iterdir() if not path.name.startswith("."))
    return result


def _row(scores: EvalRow, cost: ProfileRow, teacher: ProfileRow) -> DemoCost:
    """A schedule's score, and its cost with its speed-up over the teacher."""
    return {
        "schedule": cost["schedule"],
        "score": scores["scores"][SCORE],
        **{key: cost[key] for key in ("latency_ms", "cache_bytes", "peak_bytes")},
        "speedup": teacher["latency_ms"] / cost["latency_ms"],
    }


def sample_rows(model: ElasticVAR) -> dict[str, np.ndarray]:
    """Images of all classes, twice, under every schedule, from the same random streams: {schedule: (20, H, W, 3)}."""
    classes = [*range(model.var.config.classes)] * PER_CLASS
    return {
        str(schedule): pixels(draw_images(model, classes, schedule, sampling=Sampling(seed=1)))
        for schedule in model.default_schedules()
    }
