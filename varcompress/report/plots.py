"""Results and samples as PNG. Everything is drawn without a display, on no global state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from varcompress.files import disk_errors, replacing
from varcompress.metrics import METRICS
from varcompress.report.format import MIB, count, folded, number, percent, plain, short, where
from varcompress.report.format import label as row_label
from varcompress.results import (
    EVAL,
    PROFILE,
    SEARCH,
    SENSITIVITY,
    DemoResult,
    EvalResult,
    ProfileResult,
    SearchResult,
    SensitivityResult,
)

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
        label = f"{row['schedule']}\n{metric}\n{plain(row['untrained'])}"
        axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=10)
    for axis, row in zip(axes[:, -1], rows, strict=True):
        axis.yaxis.set_label_position("right")
        cache = row["cache_bytes"] / result["teacher"]["cache_bytes"]
        label = f"{metric} {plain(row['score'])}\n{number(row['speedup'])}× speed\n{percent(cache)} cache"
        axis.set_ylabel(label, rotation=0, ha="left", va="center", fontsize=10)
    return _save(figure, path)


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


def plot_sensitivity(result: SensitivityResult, path: str | Path) -> Path:
    """A PNG of heat maps: depths x scales of what is lost, in loss and, where there is one, in score; and layers."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scored = result["scored"]
    kinds = [("loss above full's", lambda row: row["increase"])]
    if scored:
        full = result["full"]["score"]["value"]
        kinds.append((f"{scored['metric']} above full's", lambda row: row["score"]["value"] - full))
    depths, scales = result["depths"], range(1, len(result["patch_nums"]) + 1)
    height = 1.2 + 0.42 * len(depths)
    figure = Figure(figsize=(4 + 1.05 * 3 * len(scales), height * len(kinds) + 2.4), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(len(kinds) + 1, 3, height_ratios=[height] * len(kinds) + [1.3])
    for line, (name, value) in enumerate(kinds):
        panels = (
            ("only", f"only scale k: {name}", value),
            (
                "only",
                "only scale k: the same per percent of FLOPs saved",
                lambda row, value=value: value(row) / (100 * row["saved"]),
            ),
            ("from", f"from scale k on: {name}", value),
        )
        for column, (which, title, of) in enumerate(panels):
            at = {(row["depth"], row["scale"]): of(row) for row in result[which]}
            axis = figure.add_subplot(grid[line, column])
            _heat(axis, [[at[depth, scale] for scale in scales] for depth in depths], title)
            axis.set_xticks(range(len(scales)), scales)
            axis.set_yticks(range(len(depths)), depths)
            axis.set_xlabel("scale k")
            axis.set_ylabel("layers that run (depth)")
    places = {"after_bridge": f"after scale {result['bridge']}", "everywhere": "everywhere"}
    if layers := result["layers"]:
        axis = figure.add_subplot(grid[len(kinds), :])
        values = [[row[where]["increase"] for row in layers] for where in places]
        top = 4 * float(
            np.median(np.abs(values))
        )  # where one layer is worth more than all others, these keep their colours
        _heat(axis, values, "without one layer: loss above full's", top=top, written=len(layers) <= 36)
        axis.set_xticks(range(len(layers)), [row["layer"] for row in layers])
        axis.set_yticks(range(len(places)), places.values())
        axis.set_xlabel("layer that is skipped")
    images = count(result["data"]["images"], "image")
    figure.suptitle(f"{where(result)}; {images}; loss in nats per token, every scale weighing the same", fontsize=11)
    return _save(figure, path)


def plot_search(result: SearchResult, path: str | Path) -> Path:
    """A PNG of loss against the cost that the budget is of: the equidistant schedules, the finalists, and the found."""
    name, limit = next(iter(result["budget"].items()))
    figure, ((axis,),) = _figure(width=8.5, height=5, columns=1)
    groups = (
        ("best by prediction", result["finalists"], {"color": RUN_COLOURS[2], "marker": "D"}),
        ("equidistant, within the budget", result["others"], {"color": RUN_COLOURS[0], "marker": "o"}),
        ("found", [result["found"]], {"color": RUN_COLOURS[3], "marker": "*", "s": 170, "zorder": 3}),
    )
    for label, rows, style in groups:
        axis.scatter([row["costs"][name] for row in rows], [row["loss"] for row in rows], label=label, **style)
    for row, place, side in ((result["equidistant"], 8, "bottom"), (result["found"], -10, "top")):
        label, point = folded(row["schedule"]), (row["costs"][name], row["loss"])
        axis.annotate(label, point, xytext=(0, place), textcoords="offset points", ha="center", va=side, fontsize=9)
    axis.axvline(limit, color="black", linestyle="--", linewidth=1, label=f"budget, {limit:g}")
    axis.axhline(result["full"]["loss"], color="grey", linestyle=":", linewidth=1, label="loss of full")
    axis.margins(x=0.15, y=0.15)
    axis.grid(alpha=0.3)
    axis.set_xlabel(f"{name}, share of full's")
    axis.set_ylabel("loss, nats per token, every scale weighing the same")
    axis.set_title(f"{where(result)}; {count(result['data']['images'], 'image')}", fontsize=10, loc="left")
    axis.legend(fontsize=9)
    return _save(figure, path)


def _heat(
    axis: Axes, values: Sequence[Sequence[float]], title: str, *, top: float | None = None, written: bool = True
) -> None:
    """A heat map of rows of values, each written in its cell. Colours go from 0 to `top`, or to the largest value."""
    from matplotlib.colors import Normalize

    image = axis.imshow(
        np.array(values), cmap="YlOrRd", aspect="auto", norm=Normalize(0, top or max(1e-9, np.max(values)))
    )
    axis.set_title(title, fontsize=10, loc="left")
    if not written:
        axis.figure.colorbar(image, ax=axis)
        return
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            dark = image.norm(value) > 0.6  # ink that stands out from the cell
            axis.text(x, y, short(value), ha="center", va="center", fontsize=8, color="white" if dark else "black")


PLOTS = {PROFILE: plot_profile, EVAL: plot_eval, SENSITIVITY: plot_sensitivity, SEARCH: plot_search}


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
