"""Charts of a page, as SVG that takes the page's font and colours, in light and in dark."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from markupsafe import Markup, escape

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours as matplotlib takes them, and what the page's style sheet calls them.
INK, LINE = "#010101", "#020202"
SERIES = tuple(f"#0{i}0{i}0{i}" for i in range(3, 9))
CSS = {INK: "currentColor", LINE: "var(--line)"} | {hex_: f"var(--series-{i})" for i, hex_ in enumerate(SERIES)}
WIDTH_INCHES, HEIGHT_INCHES = 4.7, 3.5  # about a phone's width at one CSS pixel a point
FONT_SIZE = 10.5
LONGEST_LABEL, LONGEST_AXIS = 18, 44
LINEAR_TO = 8  # largest over smallest value
DRAWN = 400  # points of a curve
# where a label may stand beside its point: offset in points, then how it is aligned there
PLACES = (
    ((7, 5), "left", "bottom"),
    ((-7, 5), "right", "bottom"),
    ((7, -5), "left", "top"),
    ((-7, -5), "right", "top"),
    ((0, 12), "center", "bottom"),
    ((0, -12), "center", "top"),
)


class Point(NamedTuple):
    """A schedule in a chart of a score against a cost. front: whether none is better in both; series: its colour."""

    label: str
    cost: float
    score: float
    interval: Sequence[float] | None
    series: int
    front: bool
    marker: str = "o"


def front_of(points: Sequence[tuple[float, float]], *, more_is_better: bool) -> list[bool]:
    """Which of (cost, score) no other beats: as cheap or cheaper, as good or better, and not equal to it in both."""
    signed = [(cost, -score if more_is_better else score) for cost, score in points]
    return [not any(a <= cost and b <= score and (a, b) != (cost, score) for a, b in signed) for cost, score in signed]


def front_chart(points: Sequence[Point], *, cost: str, score: str, title: str) -> Markup:
    """A score with intervals against a cost; the front is filled and joined by a line."""
    with _chart(title) as (figure, axis, made):
        for point in points:
            colour = SERIES[point.series % len(SERIES)]
            if point.interval is not None:
                low, high = point.interval
                axis.plot([point.cost] * 2, [low, high], color=colour, linewidth=1.2)
            face = colour if point.front else "none"
            axis.plot(point.cost, point.score, point.marker, color=colour, markersize=6.5, markerfacecolor=face)
        best = sorted((point.cost, point.score) for point in points if point.front)
        if len(best) > 1:
            axis.plot(*np.array(best).T, color=INK, linewidth=1, linestyle=":", zorder=1)
        axis.margins(x=0.14, y=0.14)
        axis.set_xlabel(cost)
        axis.set_ylabel(_short(score, LONGEST_AXIS))
        _scale(axis, "x", [point.cost for point in points])
        _scale(axis, "y", [value for point in points for value in (point.score, *(point.interval or ()))])
        _label(figure, axis, sorted(points, key=lambda point: not point.front))
    return made[0]


def curves_chart(curves: dict[str, tuple[np.ndarray, np.ndarray]], *, title: str, dots: bool = False) -> Markup:
    """Losses against steps, one line for each name in the order of the series' colours. dots: mark each point."""
    with _chart(title) as (_, axis, made):
        for i, (steps, losses) in enumerate(curves.values()):
            chosen = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), DRAWN)).round().astype(int))
            style = {"marker": "."} if dots else {}
            axis.plot(steps[chosen], losses[chosen], color=SERIES[i % len(SERIES)], linewidth=1.4, **style)
        axis.set_xlabel("step")
        axis.set_ylabel("loss, nats per token")
    return made[0]


def bars_chart(rows: Sequence[tuple[str, float, float]], *, unit: str, title: str) -> Markup:
    """A bar for what was measured and a tick for what was predicted. rows: (label, measured, predicted)."""
    with _chart(title, height=1.0 + 0.34 * len(rows)) as (_, axis, made):
        places = range(len(rows))
        axis.barh(places, [measured for _, measured, _ in rows], height=0.55, color=SERIES[0])
        predicted = [predicted for *_, predicted in rows]
        axis.plot(predicted, places, "|", color=INK, markersize=13, markeredgewidth=2)
        axis.set_yticks(places, [_short(label) for label, *_ in rows])
        axis.invert_yaxis()
        axis.grid(visible=False, axis="y")
        axis.set_xlim(left=0)
        axis.set_xlabel(unit)
    return made[0]


@contextmanager
def _chart(title: str, height: float = HEIGHT_INCHES) -> Iterator[tuple[Figure, Axes, list[Markup]]]:
    """A figure and its axis to draw on; when the block ends, the list holds the chart as an <svg> element."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    how = {"svg.fonttype": "none", "svg.hashsalt": title, "text.parse_math": False, "font.size": FONT_SIZE}
    ink = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), INK)
    lines = dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), LINE)
    with matplotlib.rc_context({**how, **ink, **lines}):
        figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
        FigureCanvasAgg(figure)
        axis = figure.subplots()
        axis.grid(linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        made: list[Markup] = []
        yield figure, axis, made
        made.append(_svg(figure, title))


def _scale(axis: Axes, name: str, values: Sequence[float]) -> None:
    """Ticks of an axis, whose scale is logarithmic where its values reach over more than LINEAR_TO."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    side = {"x": axis.xaxis, "y": axis.yaxis}[name]
    if min(values) > 0 and max(values) / min(values) > LINEAR_TO:
        axis.set(**{f"{name}scale": "log"})
        side.set_major_locator(LogLocator(subs=(1, 2, 5)))
        side.set_minor_locator(NullLocator())
    else:
        side.set_major_locator(MaxNLocator(5))
    side.set_major_formatter(lambda value, _: f"{value:,.6g}")


def _label(figure: Figure, axis: Axes, points: Sequence[Point]) -> None:
    """Write beside each point what it is, where that covers no other label and no point: the first points go first.

    A point without such a place has no label; the tables name it.
    """
    figure.draw_without_rendering()  # settles where the axes are
    renderer, inside = figure.canvas.get_renderer(), axis.get_window_extent()
    at = [axis.transData.transform((point.cost, point.score)) for point in points]
    taken = []
    for point, mine in zip(points, at, strict=True):
        for offset, side, height in PLACES:
            text = axis.annotate(
                _short(point.label),
                (point.cost, point.score),
                xytext=offset,
                textcoords="offset points",
                ha=side,
                va=height,
                fontsize=FONT_SIZE - 1,
            )
            box = text.get_window_extent(renderer)
            free = not any(box.overlaps(other) for other in taken) and not any(
                box.contains(*other) for other in at if other is not mine
            )
            if free and inside.containsx(box.x0) and inside.containsx(box.x1):
                break
            text.remove()
        else:
            continue
        taken.append(box)


def _short(label: str, longest: int = LONGEST_LABEL) -> str:
    return label if len(label) <= longest else f"{label[: longest - 1]}…"


def _svg(figure: Figure, title: str) -> Markup:
    """A figure as an <svg> element of the page: without a prologue, metadata, sizes, ids that nothing names."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue().partition("<svg")[2]
    head, _, body = text.partition(">")
    box = re.search(r'viewBox="([\d. ]+)"', head)[1]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL).replace("xlink:href", "href")
    body = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", body)
    named = set(re.findall(r'(?:href="#|url\(#)([^")]+)', body))
    body = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in named else "", body)
    for colour, name in CSS.items():
        body = body.replace(f": {colour}", f": {name}")
    return Markup(f'<svg viewBox="{box}" role="img" aria-label="{escape(title)}">{body.strip()}')
