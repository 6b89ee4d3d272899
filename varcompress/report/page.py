"""One page of HTML that shows a model and what was measured on it, in one file that loads nothing.

Its text is in page.html.jinja, where everything is escaped. What is shown of a directory is a `Subject`; each part is
there only where there is something to show.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from varcompress import __version__
from varcompress.errors import InputError
from varcompress.metrics import METRICS, Metric
from varcompress.report.card import recipe_text
from varcompress.report.charts import Point, bars_chart, curves_chart, front_chart, front_of
from varcompress.report.comparable import check_comparable, check_one_model
from varcompress.report.format import (
    MIB,
    NOT_GIVEN,
    count,
    drawn_with,
    joined,
    kept_to,
    label,
    mebibytes,
    number,
    percent,
    public,
    score,
    short,
    where,
    within_noise,
)
from varcompress.report.plots import smoothed
from varcompress.report.published import PUBLISHED, why_apart
from varcompress.results import EVAL, PROFILE, SENSITIVITY, intact
from varcompress.sampling import cfg_text, checked_cfg

PAGE = "report.html"  # its name beside a model
TEMPLATE = "page.html.jinja"
# what a quality is shown against: field of a row, its name, the unit of its axis, and by what it is divided for that
COSTS = (
    ("latency_ms", "latency", "latency of a batch, ms", 1),
    ("peak_bytes", "memory", "peak memory, MiB", MIB),
    ("cache_bytes", "cache", "KV cache, MiB", MIB),
)
PUBLISHED_SERIES = 5  # the colour of what papers print


@dataclass(frozen=True)
class Subject:
    """What is known of one directory.

    name: what it is called; model: what `describe` says of the model there, and its `weights`; results: file name ->
    profile or eval result; steps: lines of a run's log; samples: schedule -> images of `classes`, as WebP, all from
    the same random streams; picture: a PNG of samples; sensitivity: the result of that name.
    """

    name: str
    model: dict | None = None
    results: Mapping[str, dict] = field(default_factory=dict)
    steps: Sequence[dict] = ()
    samples: Mapping[str, Sequence[bytes]] = field(default_factory=dict)
    classes: Sequence[int] = ()
    picture: bytes | None = None
    sensitivity: dict | None = None

    @property
    def measured(self) -> dict[str, dict]:
        """Where it is from -> every result, the sensitivity among them."""
        maps = {f"{SENSITIVITY}.json": self.sensitivity} if self.sensitivity else {}
        return {f"{self.name}/{file}": result for file, result in (*self.results.items(), *maps.items())}

    @property
    def weights(self) -> list[str]:
        """The fingerprints of all weights that it shows something of."""
        shown = [self.model, *self.measured.values()]
        return [str(each["weights"]) for each in shown if each and each.get("weights")]


def render(subjects: Sequence[Subject], *, drawn_without: str | None = None) -> str:
    """The page as HTML. drawn_without: why there are no samples, where they were left out.

    Raises InputError for results that cannot be compared, which says why, and for damaged ones.
    """
    measured = [each.measured for each in subjects]
    for each in measured:
        check_one_model(each)
    check_comparable({source: result for each in measured for source, result in each.items()})
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"data_uri": _data_uri, "breakable": _breakable}
    evals, profiles = (
        [(subject, file, result) for subject in subjects for file, result in subject.results.items()
         if result["kind"] == kind]
        for kind in (EVAL, PROFILE)
    )  # fmt: skip
    return environment.get_template(TEMPLATE).render(
        version=__version__,
        title=joined(subject.name for subject in subjects),
        weights=" ".join(dict.fromkeys(name for subject in subjects for name in subject.weights)),
        several=len(subjects) > 1,
        most=max((len(each.samples) for each in subjects), default=0),
        models=[{"name": each.name, **_model(each.model)} for each in subjects if each.model],
        quality=_quality(evals) if evals else None,
        profiles=[_profile(*each) for each in profiles],
        samples=[each for each in subjects if each.samples],
        pictures=[each for each in subjects if each.picture],
        drawn_without=drawn_without,
        runs=[{"name": each.name, **_run(each)} for each in subjects if each.steps],
        sensitivities=[{"name": each.name, **_sensitivity(each)} for each in subjects if each.sensitivity],
        origins=[_origin(source, result) for each in measured for source, result in each.items()],
    )


def _data_uri(content: bytes, kind: str) -> Markup:
    return Markup(f"data:image/{kind};base64,{base64.b64encode(content).decode()}")


def _breakable(name: str) -> Markup:
    """The name of a schedule, which may be broken behind a comma or a plus."""
    return Markup("<wbr>").join(re.split(r"(?<=[,+])", str(name)))


@contextmanager
def _sound(source: str, result: dict) -> Iterator[None]:
    """`intact`, also for numbers that no float holds, and for zeros to divide by."""
    with intact(source, result):
        try:
            yield
        except ArithmeticError as error:
            raise ValueError(str(error)) from error


# -- the model ----------------------------------------------------------------------------------


def _model(found: dict) -> dict:
    """What a model is: facts by name, and its recipe as YAML."""
    transformer, tokenizer = (found["parameters"][part] / 1e6 for part in ("transformer", "tokenizer"))
    distilled, recipe = checked_cfg(found["distilled_cfg"]), found["recipe"]
    facts = {
        "model": found["model"],
        "made from": found["base_model"],
        "weights": f"{found['weights']} (fingerprint)",
        "trained for": f"depths {joined(found['depths'])} of {found['depth']}" if found["depths"] else "full alone",
        "transformer": f"{found['depth']} layers, width {found['width']}, {found['heads']} heads, "
        f"{number(transformer)} M parameters" + ", shared AdaLN" * found["shared_aln"],
        "tokenizer": f"{number(tokenizer)} M parameters, codebook of {found['codebook'][0]:,} x {found['codebook'][1]}",
        "scales": f"{joined(found['patch_nums'])}: {found['tokens']:,} tokens",
        "bridge": f"{found['bridge']} of {len(found['patch_nums'])} scales run all layers",
        "images": f"{found['image_size']} x {found['image_size']} pixels, {found['classes']:,} classes",
        "guidance": None if distilled is None else f"distilled into the weights for {cfg_text(distilled)}",
        "licence": found["license"],
        "recipe": recipe and (recipe.get("name") or "its own"),
    }
    shown = {name: fact for name, fact in facts.items() if fact is not None}
    return {"facts": shown, "recipe": recipe and recipe_text(recipe)}


# -- quality ------------------------------------------------------------------------------------


def _quality(evals: Sequence[tuple[Subject, str, dict]]) -> dict:
    """Charts of the first score against each cost, and tables of all scores and costs.

    The evals are comparable, so that what the first says of protocol, reference and batch holds for all.
    """
    lines: list[dict] = []
    for series, (subject, file, result) in enumerate(evals):
        with _sound(f"{subject.name}/{file}", result):
            lines += [{"of": subject.name, "series": series, "row": row, **_line(row)} for row in result["schedules"]]
    subject, file, first = evals[0]
    with _sound(f"{subject.name}/{file}", first):
        shown = {key: metric for key, metric in METRICS.items() if any(key in line["row"]["scores"] for line in lines)}
        key = next(iter(shown))
        features = first["features"]["name"]
        name = f"{shown[key].name(features)} ({shown[key].better} is better)"
        return {
            "charts": [_front(lines, key, cost, name) for cost in COSTS],
            "legend": [(series, subject.name) for series, (subject, *_) in enumerate(evals)],
            "beside": any(line["beside"] for line in lines),
            "scores": {each: _heading(metric, features) for each, metric in shown.items()},
            "lines": lines,
            "differences": any("difference" in found for line in lines for found in line["row"]["scores"].values()),
            "batch_size": first["batch_size"],
            "device": f"{first['device']}, {first['dtype']}",
            "protocol": _protocol(first),
            "notes": list(dict.fromkeys(note for *_, result in evals for note in result.get("notes", []))),
            **_published(evals, lines, key),
        }


def _line(row: dict) -> dict:
    """A line of the tables of scores and costs."""
    found = row["scores"]
    return {
        "label": label(row),
        "beside": "model" in row,
        "scores": {key: _score(each) for key, each in found.items()},
        "costs": [number(row["latency_ms"]), number(row["images_per_second"])]
        + [mebibytes(row[name]) for name in ("peak_bytes", "cache_bytes")],
        "fronts": [],
    }


def _score(found: dict) -> dict:
    low, high = found["interval"]
    said = {"text": score(found), "interval": f"{number(low)} to {number(high)}", "difference": None}
    if "difference" in found:
        low, high = found["difference_interval"]
        sign = "−" if found["difference"] < 0 else "+"
        said |= {"difference": sign + number(abs(found["difference"])), "between": f"{number(low)} to {number(high)}"}
    return said | {"noise": within_noise(found)}


def _heading(metric: Metric, features: str) -> str:
    return f"{metric.name(features)}\N{NO-BREAK SPACE}{'↑' if metric.more_is_better else '↓'}"


def _front(lines: Sequence[dict], key: str, cost: tuple[str, str, str, float], name: str) -> dict:
    """The chart of a score against a cost. The lines that are on the front are told so."""
    field_, word, axis, unit = cost
    shown = [line for line in lines if key in line["row"]["scores"]]
    at = [(line["row"][field_] / unit, line["row"]["scores"][key]["value"]) for line in shown]
    points = []
    for line, (x, y), front in zip(shown, at, front_of(at, more_is_better=METRICS[key].more_is_better), strict=True):
        line["fronts"] += [word] * front
        marker = "s" if line["beside"] else "o"
        points.append(Point(line["label"], x, y, line["row"]["scores"][key]["interval"], line["series"], front, marker))
    title = f"{name} against {axis}"
    return {"title": title, "svg": front_chart(points, cost=axis, score=name, title=title)}


def _protocol(result: dict) -> dict:
    reference = public(result)["reference"]
    images = count(result["settings"]["images"], "image")
    return {
        "name": result["protocol"],
        "deviations": result["deviations"],
        "against": f"{images} a schedule against {reference}, features {result['features']['printed']}",
        "drawn": drawn_with(result["settings"]),
    }


def _published(evals: Sequence[tuple[Subject, str, dict]], lines: Sequence[dict], key: str) -> dict:
    """The points of papers, and a chart of them beside these; or why they are not shown."""
    for subject, _, result in evals:
        if why := why_apart(result, subject.model and subject.model["base_model"]):
            return {"published": None, "why_apart": why}
    points = []
    for series, rows in groupby((line for line in lines if key in line["row"]["scores"]), lambda line: line["series"]):
        rows = list(rows)
        full = next((line["row"] for line in rows if line["row"]["schedule"] == "full"), rows[0]["row"])
        for line in rows:
            found = line["row"]["scores"][key]
            speedup = full["latency_ms"] / line["row"]["latency_ms"]
            points.append(Point(line["label"], speedup, found["value"], found["interval"], series, front=False))
    fronts = front_of([(-point.cost, point.score) for point in points], more_is_better=False)
    points = [point._replace(front=front) for point, front in zip(points, fronts, strict=True)]
    theirs = [
        Point(f"{each.method.partition(',')[0]} *", each.speedup, each.fid, None, PUBLISHED_SERIES, False, "D")
        for each in PUBLISHED
        if each.speedup is not None
    ]
    title = "FID against speed-up, with published points"
    chart = front_chart([*points, *theirs], cost="speed-up over full", score="FID (less is better)", title=title)
    rows = [
        [each.method, number(each.fid), number(each.inception_score), number(each.speedup), each.memory, each.cache]
        for each in PUBLISHED
    ]
    sources = [each.source for each in PUBLISHED]
    return {"published": {"chart": chart, "rows": list(zip(rows, sources, strict=True))}, "why_apart": None}


# -- speed and memory ---------------------------------------------------------------------------


def _profile(subject: Subject, file: str, result: dict) -> dict:
    """Measured beside predicted: two charts and a table."""
    with _sound(f"{subject.name}/{file}", result):
        rows = result["schedules"]
        return {
            "name": subject.name,
            "caption": f"{where(result)}, batch of {result['batch_size']}, median of {count(result['runs'], 'run')}",
            "charts": [
                bars_chart(
                    [(row["schedule"], row["speedup"], row["speedup_predicted"]) for row in rows],
                    unit="speed-up over full",
                    title=f"Speed-up of {subject.name}, measured (bar) and predicted (tick)",
                ),
                bars_chart(
                    [(row["schedule"], row["peak_bytes"] / MIB, row["peak_bytes_predicted"] / MIB) for row in rows],
                    unit="peak memory, MiB",
                    title=f"Peak memory of {subject.name}, measured (bar) and predicted (tick)",
                ),
            ],
            "rows": [_profiled(row) for row in rows],
        }


def _profiled(row: dict) -> dict:
    pairs = (
        ("speedup", 1),
        ("speedup_without_decoder", 1),
        ("flops", 1e9),
        ("weight_bytes", MIB),
        ("peak_bytes", MIB),
        ("cache_bytes", MIB),
    )
    low, high = row["latency_spread_ms"]
    return {
        "schedule": row["schedule"],
        "latency": number(row["latency_ms"]),
        "spread": f"{number(low)} to {number(high)}",
        "parts": [number(row[f"{part}_ms"]) for part in ("transformer", "sampling", "decoder")],
        "pairs": [(number(row[name] / unit), number(row[f"{name}_predicted"] / unit)) for name, unit in pairs],
        "shares": [percent(row[name]) for name in ("memory_ratio", "cache_ratio")],
    }


# -- training -----------------------------------------------------------------------------------


def _run(subject: Subject) -> dict:
    """Losses of a run by depth, of its steps and of images held out."""
    trained: dict[str, list[tuple[int, float]]] = {}
    heldout: dict[str, list[tuple[int, float]]] = {}
    try:
        for step in subject.steps:
            for found, losses in ((trained, step.get("losses")), (heldout, step.get("heldout", {}).get("losses"))):
                for schedule, loss in (losses or {}).items():
                    found.setdefault(schedule, []).append((step["step"], float(loss)))
        names = list({**heldout, **trained})
        drawn = {name: np.array(trained[name]).T for name in names if name in trained}
        curves = {name: (steps, smoothed(losses)) for name, (steps, losses) in drawn.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{subject.name}: the log of its training is damaged: take steps.jsonl away") from error
    charts = [("Loss of the steps, smoothed", curves_chart(curves, title=f"Loss of the steps of {subject.name}"))]
    if heldout:
        held = {name: tuple(np.array(heldout[name]).T) for name in names if name in heldout}
        chart = curves_chart(held, title=f"Loss on images held out from {subject.name}", dots=True)
        charts.append(("Loss on images held out", chart))
    return {"names": names, "charts": charts, "steps": f"{len(subject.steps):,}"}


# -- sensitivity --------------------------------------------------------------------------------


def _sensitivity(subject: Subject) -> dict:
    """Heat maps: depths x scales, at only one scale and from one on; and layers left out."""
    result = subject.sensitivity
    with _sound(f"{subject.name}/{SENSITIVITY}.json", result):
        scales = range(1, len(result["patch_nums"]) + 1)
        maps = []
        for which, title in (("only", "Fewer layers at only one scale"), ("from", "Fewer layers from one scale on")):
            at = {(row["depth"], row["scale"]): row["increase"] for row in result[which]}
            rows = [(f"d{depth}", [at.get((depth, scale)) for scale in scales]) for depth in result["depths"]]
            maps.append({"title": title, "columns": scales, "head": "scale", "rows": _shaded(rows)})
        if layers := result["layers"]:
            places = {"after_bridge": f"after scale {result['bridge']}", "everywhere": "everywhere"}
            rows = [(said, [row[place]["increase"] for row in layers]) for place, said in places.items()]
            columns = [row["layer"] for row in layers]
            maps.append({"title": "Without one layer", "columns": columns, "head": "layer", "rows": _shaded(rows)})
        return {
            "caption": f"{where(result)}; {count(result['data']['images'], 'image')} of {result['data']['name']}",
            "full": number(result["full"]["loss"]),
            "maps": maps,
        }


def _shaded(rows: Sequence[tuple[str, list[float | None]]]) -> list[tuple[str, list[tuple[str, int]]]]:
    """Each value with its shade, percent of the map's largest."""
    largest = max((value for _, values in rows for value in values if value is not None), default=0) or 1

    def shaded(value: float | None) -> tuple[str, int]:
        return (NOT_GIVEN, 0) if value is None else (short(value), round(100 * max(0.0, min(1.0, value / largest))))

    return [(head, [shaded(value) for value in values]) for head, values in rows]


# -- where it all comes from --------------------------------------------------------------------


def _origin(source: str, result: dict) -> dict:
    """All that is needed to have a result again."""
    with _sound(source, result):
        shown = public(result)
        facts = {
            "model": f"{shown['model']}, weights {shown['weights']}",
            "hardware": shown["device"],
            "dtype": shown["dtype"],
            "kernels": shown["kernels"] + ", packed weights" * bool(shown["packed_weights"]),
            "cache": shown["cache_dtype"],
            "offload": shown["offload"],
            "guided": "yes" if shown["guided"] else "no: one pass an image",
            "versions": f"varcompress {shown['varcompress']}, torch {shown['torch']}",
        }
        if result["kind"] == EVAL:
            facts["versions"] += f", torch-fidelity {shown['torch_fidelity']}"
            facts |= {
                "batch size": str(shown["batch_size"]),
                "protocol": kept_to(shown),
                "reference": shown["reference"],
                **{f"reference, {name}": value for name, value in shown["reference_details"].items()},
                "features": f"{shown['features']['printed']}, SHA-256 {shown['features']['sha256']}",
                "settings": drawn_with(shown["settings"]),
                "images": f"{shown['settings']['images']:,}",
                "took": f"{number(shown['seconds'])} s, processes: {shown['processes']}",
            }
        elif result["kind"] == SENSITIVITY:
            facts |= {
                "data": f"{shown['data']['name']}, digest {shown['data']['digest']}",
                "images": f"{shown['data']['images']:,}",
                "depths": joined(shown["depths"]),
                "took": f"{number(shown['seconds'])} s" if "seconds" in shown else None,
            }
        else:
            facts |= {
                "batch size": str(shown["batch_size"]),
                "settings": joined(f"{name} {value}" for name, value in shown["settings"].items()),
            }
        return {
            "title": source,
            "command": shown.get("command"),
            "facts": {name: value for name, value in facts.items() if value is not None},
        }
