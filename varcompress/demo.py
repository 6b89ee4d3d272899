"""The whole path on the embedded model: score it, distil it, score it again, measure what each schedule saves."""

from __future__ import annotations

import time
import warnings
from pathlib import Path

import torch

from varcompress.evaluation import evaluate
from varcompress.files import disk_errors, replacing, write_json
from varcompress.hub import load
from varcompress.images import to_uint8
from varcompress.models.elastic import ElasticVAR
from varcompress.profiling import profile
from varcompress.progress import Note, Progress, silent
from varcompress.report import plot_eval, plot_profile
from varcompress.training import distill
from varcompress.training.recipe import load_recipe
from varcompress.training.state import RunDirectory

SCORE = "digits_fd"


def run_demo(
    out: str | Path,
    *,
    images: int = 1000,
    batch_size: int = 100,
    progress: Progress = silent,
    note: Note = warnings.warn,
) -> dict:
    """Distil, profile and evaluate `digits` into the elastic directory `out`.

    A demo that was interrupted goes on with the distillation where it stopped; a finished one only measures again.
    Returns a JSON-able dict: per schedule the score of the untouched and of the distilled weights,
    and speed, cache and peak memory; plus the files written. Raises InputError when `out` holds
    something else.
    """
    out, started = Path(out), time.monotonic()
    resume = out.is_dir() and any(out.iterdir())
    RunDirectory(out).check(resume=resume)
    recipe = load_recipe("digits")
    model = load("digits")
    model.bridge, model.depths = recipe.bridge, recipe.depths
    settings = {"images": images, "batch_size": batch_size, "progress": progress}
    samples = {"untrained subnets": sample_rows(model)}
    before = evaluate(model, **settings)
    model = distill(model, recipe, out=out, resume=resume, progress=progress, note=note)
    samples["distilled subnets"] = sample_rows(model)
    after = evaluate(model, **settings)
    costs = profile(model, batch_size=64, runs=9, progress=progress)
    result = {
        "kind": "demo",
        "device": costs["device"],
        "score": SCORE,
        "images": images,
        "batch_size": 64,
        "schedules": [
            {
                "schedule": cost["schedule"],
                "untrained": untrained[SCORE],
                "distilled": distilled[SCORE],
                **{key: cost[key] for key in ("latency_ms", "speedup", "cache_bytes", "peak_bytes")},
            }
            for untrained, distilled, cost in zip(
                before["schedules"], after["schedules"], costs["schedules"], strict=True
            )
        ],
        "untrained": before,  # not a file of its own: `push` would take it for a result of the distilled weights
        "seconds": time.monotonic() - started,
    }
    files = {"eval": after, "profile": costs, "demo": result}
    for name, content in files.items():
        with disk_errors(out / f"{name}.json"):
            write_json(out / f"{name}.json", content)
    plot_eval(after, out / "eval.png")
    plot_profile(costs, out / "profile.png")
    plot_samples(samples, result, out / "samples.png")
    result["files"] = sorted(str(path) for path in out.iterdir() if not path.name.startswith("."))
    return result


def sample_rows(model: ElasticVAR) -> dict[str, torch.Tensor]:
    """One image of every class under every schedule, from the same random streams: {schedule: (10, 3, H, W)}."""
    classes = range(model.var.config.classes)
    return {str(schedule): model.generate(classes, schedule, seed=1) for schedule in model.default_schedules()}


def plot_samples(samples: dict[str, dict[str, torch.Tensor]], result: dict, path: Path) -> None:
    """A picture of rows of samples, one panel per state of the weights, with what each schedule saves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = result["schedules"]
    figure, axes = pyplot.subplots(len(rows), len(samples), figsize=(13, 0.72 * len(rows) + 0.5), layout="constrained")
    for column, (title, images) in zip(axes.T, samples.items(), strict=True):
        column[0].set_title(title, fontsize=12)
        for axis, row in zip(column, rows, strict=True):
            strip = torch.cat(list(to_uint8(images[row["schedule"]])), dim=2)
            axis.imshow(strip.permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
    for axis, row in zip(axes[:, 0], rows, strict=True):
        axis.set_ylabel(row["schedule"], rotation=0, ha="right", va="center", fontsize=11)
    for axis, row in zip(axes[:, -1], rows, strict=True):
        axis.yaxis.set_label_position("right")
        cache = row["cache_bytes"] / rows[0]["cache_bytes"]
        label = f"{row['speedup']:.1f}× speed\n{cache:.0%} cache"
        axis.set_ylabel(label, rotation=0, ha="left", va="center", fontsize=10)
    with disk_errors(path), replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    pyplot.close(figure)
