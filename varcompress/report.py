"""Results for people: tables for the terminal, plots as PNG, and files beside the model.

Everything here works on the plain dicts that `profile`, `evaluate` and `describe` return.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from varcompress.errors import InputError
from varcompress.files import disk_errors, replacing, write_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MIB = 2**20
NOT_GIVEN = "\N{EN DASH}"
# key of a score: its name, and whether more is better. The digits' own features never give an FID or an IS proper.
METRICS = {
    "fid": ("FID", False),
    "is": ("IS", True),
    "kid": ("KID", False),
    "precision": ("precision", True),
    "recall": ("recall", True),
    "digits_fd": ("digits FD", False),
    "digits_is": ("digits IS", True),
    "digits_kid": ("digits KID", False),
    "digits_precision": ("digits precision", True),
    "digits_recall": ("digits recall", True),
}
Rows = list[dict]


# -- tables -------------------------------------------------------------------------------------


def profile_table(result: dict) -> RenderableType:
    """What `profile` measured: time, work and memory per schedule, predictions in brackets."""
    rows = result["schedules"]
    batch = f"batch of {result['batch_size']}"
    head = (
        f"{_where(result)}, {batch}, median of {_count(result['runs'], 'run')}\n"
        "In brackets: what arithmetic predicts; the speed-up is that of FLOPs."
    )
    time = _table(
        f"Time of a {batch}, ms",
        {
            "latency": lambda r: _number(r["latency_ms"]),
            "quartiles": lambda r: "-".join(map(_number, r["latency_spread_ms"])),
            "images/s": lambda r: _number(r["images_per_second"]),
            "trans-\nformer": lambda r: _number(r["transformer_ms"]),
            "sampling": lambda r: _number(r["sampling_ms"]),
            "decoder": lambda r: _number(r["decoder_ms"]),
        },
        rows,
    )
    work = _table(
        "Speed-up over full, and work (predicted)",
        {
            "speed-up": lambda r: _beside(r, "speedup"),
            "without decoder": lambda r: _beside(r, "speedup_without_decoder"),
            "GFLOP": lambda r: _beside(r, "flops", 1e9),
            "weights, MiB": lambda r: _beside(r, "weight_bytes", MIB),
        },
        rows,
    )
    memory = _table(
        "Memory (predicted)",
        {
            "peak, MiB": lambda r: _beside(r, "peak_bytes", MIB),
            "of full": lambda r: f"{r['memory_ratio']:.0%}",
            "cache, MiB": lambda r: _beside(r, "cache_bytes", MIB),
            "of full ": lambda r: f"{r['cache_ratio']:.0%}",
        },
        rows,
    )
    rounded = [row for row in rows if "logit_error" in row]
    effect = _table(
        f"What a cache in {result.get('cache_dtype')} does to the logits of the same tokens",
        {
            "error": lambda r: f"{r['logit_error']:.2%}",
            "same largest logit": lambda r: f"{r['same_top_token']:.1%}",
        },
        rounded,
    )
    return _stacked(head, time, work, memory, *([effect] if rounded else []))


def eval_table(result: dict) -> RenderableType:
    """What `evaluate` measured: scores per schedule, and what the same run cost."""
    rows, settings = result["schedules"], result["settings"]
    head = (
        f"{_where(result)}, batch of {result['batch_size']}\n"
        f"{_count(settings['images'], 'image')} against {result['reference']}, features {result['features']}\n"
        f"cfg {settings['cfg']}, top-k {settings['top_k']}, top-p {settings['top_p']}, seed {settings['seed']}, "
        f"rounded to {settings['rounding']}"
    )
    scores = {
        f"{name} {'↑' if rising else '↓'}".replace("digits ", "digits\n"): lambda r, key=key: _score(r, key)
        for key, (name, rising) in METRICS.items()
        if any(key in row for row in rows)
    }
    cost = {
        "latency, ms": lambda r: _number(r["latency_ms"]),
        "images/s": lambda r: _number(r["images_per_second"]),
        "peak, MiB": lambda r: _number(r["peak_bytes"] / MIB),
        "cache, MiB": lambda r: _number(r["cache_bytes"] / MIB),
    }
    notes = [Text(note) for note in result.get("notes", [])]
    return _stacked(head, _table("Scores", scores, rows), _table("Cost of the same run", cost, rows), *notes)


def demo_table(result: dict) -> RenderableType:
    """What the demo showed: each schedule's score before and after distilling, and what the schedule saves."""
    name, rising = METRICS[result["score"]]
    better = "more" if rising else "less"
    head = f"{result['device']}; {name} of {_count(result['images'], 'image')} ({better} is better)"
    columns = {
        "untrained": lambda r: _number(r["untrained"]),
        "distilled": lambda r: _number(r["distilled"]),
        "latency, ms": lambda r: _number(r["latency_ms"]),
        "speed-up": lambda r: _number(r["speedup"]),
        "cache, MiB": lambda r: _number(r["cache_bytes"] / MIB),
        "peak, MiB": lambda r: _number(r["peak_bytes"] / MIB),
    }
    title = f"{name} of untrained and distilled subnets, and the cost of a batch of {result['batch_size']}"
    return _stacked(head, _table(title, columns, result["schedules"]))


def inspect_table(result: dict) -> RenderableType:
    """What `describe` says of a model: its shape, its schedules' layers, and their cost by arithmetic."""
    rows = result["schedules"]
    cost = _table(
        f"Cost of one guided image in {result['dtype']}, by arithmetic",
        {
            "cache, MiB": lambda r: _number(r["cache_bytes"] / MIB),
            "of full": lambda r: f"{r['cache_ratio']:.0%}",
            "GFLOP": lambda r: _number(r["flops"] / 1e9),
            "speed-up": lambda r: _number(r["speedup_predicted"]),
            "without decoder": lambda r: _number(r["speedup_without_decoder_predicted"]),
        },
        rows,
    )
    return Group(_facts(result), _layers(rows), cost)


def _facts(result: dict) -> Table:
    parameters, recipe = result["parameters"], result["recipe"]
    entries, size = result["codebook"]
    trained = f"trained for depths {_list(result['depths'])}" if result["depths"] else "untouched, no subnet trained"
    facts = {
        "model": f"{result['model']}: {result['checkpoint']} checkpoint, {trained}",
        "transformer": f"{result['depth']} layers, width {result['width']}, {result['heads']} heads, "
        f"{_number(parameters['transformer'] / 1e6)} M parameters" + (", shared AdaLN" * result["shared_aln"]),
        "tokenizer": f"{_number(parameters['tokenizer'] / 1e6)} M parameters, codebook {entries:,} x {size}",
        "scales": f"{_list(result['patch_nums'])}: {result['tokens']:,} tokens",
        "images": f"{result['image_size']} x {result['image_size']} pixels, {result['classes']:,} classes",
        "bridge": f"{_count(result['bridge'], 'scale')} of {len(result['patch_nums'])} run all layers",
        "base model": result["base_model"],
        "licence": result["license"],
        "recipe": recipe and ", ".join(f"{key} {_value(value)}" for key, value in recipe.items()),
    }
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, fact in facts.items():
        if fact is not None:
            table.add_row(name, Text(fact))
    return table


def _layers(rows: Rows) -> Table:
    """Schedule, scales, and the layers that run there."""
    table = Table(title="Layers that run", title_justify="left", box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    table.add_column("schedule", no_wrap=True)
    table.add_column("scales", no_wrap=True)
    table.add_column("count", justify="right", no_wrap=True)
    table.add_column("layers", overflow="fold")
    for row in rows:
        for number, segment in enumerate(row["segments"]):
            scales, layers = segment["scales"], segment["layers"]
            table.add_row(
                "" if number else _folded(row["schedule"]), _span(*scales), str(len(layers)), Text(_runs(layers))
            )
    return table


def _table(title: str, columns: dict, rows: Rows) -> Table:
    """A table of one line per schedule. columns: heading -> text of a row."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    table.add_column("schedule", no_wrap=True)
    for heading in columns:
        table.add_column(heading, justify="right", overflow="fold")
    for row in rows:
        table.add_row(_folded(row["schedule"]), *(Text(cell(row)) for cell in columns.values()))
    return table


def _stacked(head: str, *parts: RenderableType) -> Group:
    return Group(Text(head), "", *parts)


def _where(result: dict) -> str:
    ways = {"kernels": "torch", "cache_dtype": result["dtype"], "offload": None}  # what goes without saying
    said = [
        f"{name.replace('_', ' ')} {result[name]}" for name, usual in ways.items() if result.get(name, usual) != usual
    ]
    if result.get("packed_weights"):
        said.append("packed weights")
    return ", ".join([f"{result['model']} on {result['device']}", result["dtype"], *said])


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _number(value: float | None) -> str:
    """Three figures, or all before the point."""
    if value is None:
        return NOT_GIVEN
    places = next((places for limit, places in ((100, 0), (10, 1), (1, 2), (0.1, 3)) if abs(value) >= limit), None)
    return f"{value:.3g}" if places is None else f"{value:,.{places}f}"


def _beside(row: dict, key: str, unit: float = 1) -> str:
    """What was measured, then in brackets what was predicted."""
    return f"{_number(row[key] / unit)} ({_number(row[f'{key}_predicted'] / unit)})"


def _score(row: dict, key: str) -> str:
    spread = row.get(f"{key}_std")
    return _number(row.get(key)) + (f" ± {_number(spread)}" if spread is not None else "")


def _list(values: Sequence) -> str:
    return ", ".join(map(str, values))


def _value(value: object) -> str:
    return _list(value) if isinstance(value, list | tuple) else str(value)


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _runs(layers: Sequence[int]) -> str:
    """Ascending indices, unbroken runs of three or more written as a span: 0-29, or 0 4 8 12."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return " ".join(_span(run[0], run[-1]) if len(run) > 2 else " ".join(map(str, run)) for run in runs)


# -- plots --------------------------------------------------------------------------------------

COLOURS = {"transformer": "#33658a", "sampling": "#f6ae2d", "decoder": "#86bbd8"}
MEMORY_COLOURS = {"peak": "#8a7ca8", "cache": "#55a630"}
SPEED_COLOUR = "#33658a"
PREDICTED = {"marker": "|", "color": "black", "markersize": 14, "markeredgewidth": 2, "linestyle": "none", "zorder": 3}
LONG_NAME = 16


def plot_profile(result: dict, path: str | Path) -> Path:
    """A PNG of three panels: the split of the latency, the memory, the speed-up."""
    rows = result["schedules"]
    figure, axes = _figure(width=13, height=1.9 + 0.5 * len(rows), panels=3)
    _plot_time(axes[0], rows)
    _plot_memory(axes[1], rows)
    _plot_speedup(axes[2], rows)
    axes[0].set_yticks(range(len(rows)), [_folded(row["schedule"]) for row in rows])
    axes[0].invert_yaxis()
    figure.suptitle(f"{_where(result)}, batch of {result['batch_size']}", fontsize=11)
    return _save(figure, path)


def plot_eval(result: dict, path: str | Path) -> Path:
    """A PNG of the first score that was given against speed-up; each point is a schedule, with its cache."""
    rows = result["schedules"]
    key = next(key for key in METRICS if any(row.get(key) is not None for row in rows))
    name, rising = METRICS[key]
    baseline = next((row for row in rows if row["schedule"] == "full"), rows[0])
    figure, (axis,) = _figure(width=8.5, height=5, panels=1)
    scored = sorted((row for row in rows if row[key] is not None), key=lambda row: row["latency_ms"])
    for number, row in enumerate(scored):  # labels alternate above and below, so that neighbours stay readable
        point = (baseline["latency_ms"] / row["latency_ms"], row[key])
        label = f"{_folded(row['schedule'])}\ncache {row['cache_bytes'] / baseline['cache_bytes']:.0%}"
        axis.scatter(*point, s=45, color=SPEED_COLOUR, zorder=2)
        place = {"xytext": (0, 8), "va": "bottom"} if number % 2 == 0 else {"xytext": (0, -8), "va": "top"}
        axis.annotate(label, point, textcoords="offset points", ha="center", fontsize=9, **place)
    axis.margins(x=0.15, y=0.25)
    axis.grid(alpha=0.3)
    axis.set_xlabel(f"speed-up over {baseline['schedule']}, batch of {result['batch_size']}")
    axis.set_ylabel(f"{name} ({'more' if rising else 'less'} is better)")
    axis.set_title(f"{_where(result)}\n{_count(result['settings']['images'], 'image')}", fontsize=10, loc="left")
    return _save(figure, path)


def _plot_time(axis: Axes, rows: Rows) -> None:
    left = [0.0] * len(rows)
    for phase, colour in COLOURS.items():
        widths = [row[f"{phase}_ms"] for row in rows]
        axis.barh(range(len(rows)), widths, left=left, height=0.62, color=colour, label=phase)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    _finish(axis, "time of a batch, ms", [_number(total) for total in left], left)


def _plot_memory(axis: Axes, rows: Rows) -> None:
    for offset, (kind, colour) in zip((-0.17, 0.17), MEMORY_COLOURS.items(), strict=True):
        at = [i + offset for i in range(len(rows))]
        measured = [row[f"{kind}_bytes"] / MIB for row in rows]
        predicted = [row[f"{kind}_bytes_predicted"] / MIB for row in rows]
        axis.barh(at, measured, height=0.31, color=colour, label=kind)
        axis.plot(predicted, at, label="predicted" if kind == "cache" else None, **PREDICTED | {"markersize": 8})
        for y, value, tick in zip(at, measured, predicted, strict=True):
            _label(axis, max(value, tick), y, _number(value))
    _finish(axis, "memory, MiB")


def _plot_speedup(axis: Axes, rows: Rows) -> None:
    measured = [row["speedup"] for row in rows]
    predicted = [row["speedup_predicted"] for row in rows]
    bars = axis.barh(range(len(rows)), measured, height=0.62, color=SPEED_COLOUR, label="measured")
    axis.bar_label(bars, [f"{_number(value)}x" for value in measured], label_type="center", color="white", fontsize=9)
    axis.plot(predicted, range(len(rows)), label="predicted", **PREDICTED)
    _finish(axis, "speed-up over full")


def _figure(width: float, height: float, panels: int) -> tuple[Figure, Sequence[Axes]]:
    """Panels side by side that share what is upright. Drawn without a display, on no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, panels, sharey=True, squeeze=False)[0]


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


def _folded(name: str) -> str:
    """A long schedule name on several lines, broken at its commas."""
    lines = [""]
    for part in name.split(","):
        glue = "," if lines[-1] else ""
        if len(lines[-1]) + len(part) > LONG_NAME:
            lines[-1] += glue
            lines.append(part)
        else:
            lines[-1] += glue + part
    return "\n".join(lines)


def _save(figure: Figure, path: str | Path) -> Path:
    path = Path(path)
    with disk_errors(path), replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return path


# -- files --------------------------------------------------------------------------------------

PLOTS = {"profile": plot_profile, "eval": plot_eval}


def check_results(folder: str | Path, kind: str) -> Path:
    """The folder for results of `kind`. Raises InputError where writing would take the place of something else."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file, not a directory: choose another --out")
    present = folder / f"{kind}.json"
    if present.exists() and _kind(present) != kind:
        raise InputError(f"{present}: is there and holds something else: choose another --out")
    return folder


def write_results(result: dict, folder: str | Path) -> list[Path]:
    """Write KIND.json and KIND.png of a profile or eval result; return their paths.

    An earlier result of the same kind is kept as KIND.json.old, which `push` passes over.
    Raises InputError where something else would be, or a disk is full.
    """
    kind = result["kind"]
    folder = check_results(folder, kind)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        present = folder / f"{kind}.json"
        if present.exists():
            present.replace(folder / f"{kind}.json.old")
        write_json(present, result)
    return [folder / f"{kind}.json", PLOTS[kind](result, folder / f"{kind}.png")]


def _kind(path: Path) -> object:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content.get("kind") if isinstance(content, dict) else None
