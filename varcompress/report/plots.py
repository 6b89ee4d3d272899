"""Results and samples as PNG. Everything is drawn without a display, on no global state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from varcompress.files import disk_errors, replacing
from varcompress.metrics import METRICS
from varcompress.report.format import MIB, count, folded, half, number, percent, where
from varcompress.report.format import label as row_label
from varcompress.results import EVAL, PROFILE, DemoResult, EvalResult, ProfileResult, Score

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[dict]
COLOURS = {"transformer": "#33658a", "sampling": "#f6ae2d", "decoder": "#86bbd8"}
MEMORY_COLOURS = {"peak": "#8a7ca8", "cache": "#55a630"}
PER_LINE = 10  # samples
SPEED_COLOUR, BESIDE_COLOUR = "#33658a", "#d1495b"
RUN_COLOURS = ("#33658a", "#55a630", "#f6ae2d", "#d1495b", "#8a7ca8", "#5c6b73")
PREDICTED = {"marker": "|", "color": "black", "markersize": 14, "markeredgewidth": 2, "linestyle": "none", "zorder": 3}


def plot_profile(result: ProfileResult, path: str | Path) -> Path:
    """A PNG of three panels: the split of the latency, the memory, the speed-up."""
    rows = result["schedules"]
    figure, (axes,) = _figure(width=13, height=1.9 + 0.5 * len(rows), columns=3)
    _plot_time(axes[0], rows)
    _plot_memory(axes[1], rows)
    _plot_speedup(axes[2], rows)
    axes[0].set_yticks(range(len(rows)), [folded(row["schedule"]) for row in rows])
    axes[0].invert_yaxis()
    figure.suptitle(f"{where(result)}, batch of {result['batch_size']}", fontsize=11)
    return _save(figure, path)


def plot_eval(result: EvalResult, path: str | Path) -> Path:
    """A PNG of the first score that was given against speed-up, with intervals; each point is a schedule, with its
    cache, or a model that was scored beside."""
    rows = result["schedules"]
    key = next(key for key in METRICS if any(key in row["scores"] for row in rows))
    metric, baseline = METRICS[key], next((row for row in rows if row["schedule"] == "full"), rows[0])
    figure, ((axis,),) = _figure(width=8.5, height=5, columns=1)
    scored = sorted((row for row in rows if key in row["scores"]), key=lambda row: row["latency_ms"])
    for place, row in enumerate(scored):  # labels alternate above and below, so that neighbours stay readable
        found, beside = row["scores"][key], "model" in row
        point = (baseline["latency_ms"] / row["latency_ms"], found["value"])
        text = f"{folded(row_label(row))}\ncache {percent(row['cache_bytes'] / baseline['cache_bytes'])}"
        spread = [[found["value"] - found["interval"][0]], [found["interval"][1] - found["value"]]]
        colour = BESIDE_COLOUR if beside else SPEED_COLOUR
        axis.errorbar(*point, yerr=spread, fmt="s" if beside else "o", markersize=6, capsize=3, color=colour, zorder=2)
        side = {"xytext": (0, 8), "va": "bottom"} if place % 2 == 0 else {"xytext": (0, -8), "va": "top"}
        edge = found["interval"][1 if place % 2 == 0 else 0]
        axis.annotate(text, (point[0], edge), textcoords="offset points", ha="center", fontsize=9, **side)
    axis.margins(x=0.15, y=0.25)
    axis.grid(alpha=0.3)
    axis.set_xlabel(f"speed-up over {row_label(baseline)}, batch of {result['batch_size']}")
    axis.set_ylabel(f"{metric.name(result['features']['name'])} ({metric.better} is better), 95 % interval")
    head = f"{where(result)}\n{count(result['settings']['images'], 'image')}, protocol {result['protocol']}"
    axis.set_title(head + "*" * bool(result["deviations"]), fontsize=10, loc="left")
    return _save(figure, path)


def plot_samples(samples: dict[str, dict[str, np.ndarray]], result: DemoResult, path: str | Path) -> Path:
    """A PNG of rows of samples, before and after distilling, with scores and what each schedule saves of the teacher.

    samples: title of a panel -> schedule -> images (N, H, W, 3) uint8, ten of which stand in a line.
    """
    rows, metric = result["schedules"], METRICS[result["score"]].name(result["features"])
    shown = len(next(iter(samples.values()))[rows[0]["schedule"]])
    height = (0.1 + 0.62 * -(-shown // PER_LINE)) * len(rows) + 0.4
    figure, axes = _figure(width=13, height=height, columns=len(samples), rows=len(rows))
    for column, (title, images) in zip(axes.T, samples.items(), strict=True):
        column[0].set_title(title, fontsize=12)
        for axis, row in zip(column, rows, strict=True):
            axis.imshow(_lines(images[row["schedule"]]), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
    for axis, row in zip(axes[:, 0], rows, strict=True):
        label = f"{row['schedule']}\n{metric}\n{_plain(row['untrained'])}"
        axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=10)
    for axis, row in zip(axes[:, -1], rows, strict=True):
        axis.yaxis.set_label_position("right")
        cache = row["cache_bytes"] / result["teacher"]["cache_bytes"]
        label = f"{metric} {_plain(row['score'])}\n{number(row['speedup'])}× speed\n{percent(cache)} cache"
        axis.set_ylabel(label, rotation=0, ha="left", va="center", fontsize=10)
    return _save(figure, path)


def _plain(found: Score) -> str:
    return f"{number(found['value'])} ± {half(found)}"


def plot_run(steps: Sequence[dict], title: str, path: str | Path) -> Path:
    """A PNG of a training run's losses by the lines of its log: of its steps, smoothed, and of held-out images."""
    trained: dict[str, list[tuple[int, float]]] = {}
    heldout: dict[str, list[tuple[int, float]]] = {}
    for step in steps:
        for found, losses in ((trained, step.get("losses")), (heldout, step.get("heldout", {}).get("losses"))):
            for schedule, loss in (losses or {}).items():
                found.setdefault(schedule, []).append((step["step"], loss))
    figure, (axes,) = _figure(width=13 if heldout else 7, height=4.5, columns=1 + bool(heldout))
    colours = dict(zip({**heldout, **trained}, RUN_COLOURS * 100, strict=False))
    for axis, name, curves in zip(axes, ("steps, smoothed", "images held out"), (trained, heldout), strict=False):
        for schedule in (schedule for schedule in colours if schedule in curves):
            numbers, losses = np.array(curves[schedule]).T
            style = {"color": colours[schedule], "label": folded(schedule)}
            if curves is trained:
                axis.plot(numbers, smoothed(losses), **style)
            else:
                axis.plot(numbers, losses, marker=".", **style)
        axis.set_xlabel("step")
        axis.set_title(name, fontsize=10, loc="left")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=9)
    axes[0].set_ylabel("loss, nats per token")
    figure.suptitle(title, fontsize=11)
    return _save(figure, path)


def smoothed(values: np.ndarray) -> np.ndarray:
    """The mean of each value and those before it, a fiftieth of all at most."""
    width = max(1, len(values) // 50)
    sums = np.cumsum(np.concatenate(([0.0], values)))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _lines(images: np.ndarray) -> np.ndarray:
    """Images (N, H, W, 3) uint8, PER_LINE of them side by side, and white between the lines."""
    images = np.pad(images, ((0, 0), (0, 1), (0, 0), (0, 0)), constant_values=255)
    lines = np.split(images, range(PER_LINE, len(images), PER_LINE))
    return np.concatenate([np.concatenate(line, axis=1) for line in lines])[:-1]


PLOTS = {PROFILE: plot_profile, EVAL: plot_eval}


# -- panels -------------------------------------------------------------------------------------


def _plot_time(axis: Axes, rows: Rows) -> None:
    left = [0.0] * len(rows)
    for phase, colour in COLOURS.items():
        widths = [row[f"{phase}_ms"] for row in rows]
        axis.barh(range(len(rows)), widths, left=left, height=0.62, color=colour, label=phase)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    _finish(axis, "time of a batch, ms", [number(total) for total in left], left)


def _plot_memory(axis: Axes, rows: Rows) -> None:
    for offset, (kind, colour) in zip((-0.17, 0.17), MEMORY_COLOURS.items(), strict=True):
        at = [i + offset for i in range(len(rows))]
        measured = [row[f"{kind}_bytes"] / MIB for row in rows]
        predicted = [row[f"{kind}_bytes_predicted"] / MIB for row in rows]
        axis.barh(at, measured, height=0.31, color=colour, label=kind)
        axis.plot(predicted, at, label="predicted" if kind == "cache" else None, **PREDICTED | {"markersize": 8})
        for y, value, tick in zip(at, measured, predicted, strict=True):
            _label(axis, max(value, tick), y, number(value))
    _finish(axis, "memory, MiB")


def _plot_speedup(axis: Axes, rows: Rows) -> None:
    measured = [row["speedup"] for row in rows]
    predicted = [row["speedup_predicted"] for row in rows]
    bars = axis.barh(range(len(rows)), measured, height=0.62, color=SPEED_COLOUR, label="measured")
    axis.bar_label(bars, [f"{number(value)}x" for value in measured], label_type="center", color="white", fontsize=9)
    axis.plot(predicted, range(len(rows)), label="predicted", **PREDICTED)
    _finish(axis, "speed-up over full")


def _figure(width: float, height: float, *, columns: int, rows: int = 1) -> tuple[Figure, np.ndarray]:
    """A figure and its panels (rows, columns); those of a single row share what is upright."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, sharey=rows == 1, squeeze=False)


def _label(axis: Axes, x: float, y: float, text: str) -> None:
    axis.annotate(text, (x, y), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9)


def _finish(axis: Axes, title: str, labels: Sequence[str] = (), ends: Sequence[float] = ()) -> None:
    """A title, a figure at the end of each bar, and a legend where it hides no bar."""
    for y, (label, end) in enumerate(zip(labels, ends, strict=True)):
        _label(axis, end, y, label)
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlim(0, axis.dataLim.x1 * 1.2)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, fontsize=9, frameon=False)


def _save(figure: Figure, path: str | Path) -> Path:
    path = Path(path)
    with disk_errors(path), replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return path
