"""Results as tables for the terminal, made from the plain dicts that `profile`, `evaluate` and `describe` return."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from varcompress.metrics import METRICS, Metric
from varcompress.report.format import (
    MIB,
    count,
    drawn_with,
    folded,
    joined,
    kept_to,
    label,
    mebibytes,
    number,
    percent,
    plain,
    score,
    settings,
    where,
)
from varcompress.results import DemoResult, EvalResult, ProfileResult, SearchResult, SensitivityResult
from varcompress.sampling import cfg_text, checked_cfg

Rows = Sequence[dict]
SCORES_WIDE = 4  # scores in a line of the terminal
# columns of what arithmetic says that a schedule saves: heading -> text of a row
SAVED = {
    "cache of full": lambda r: percent(r["cache_ratio"]),
    "speed-up": lambda r: number(r["speedup_predicted"]),
    "without decoder": lambda r: number(r["speedup_without_decoder_predicted"]),
}


def profile_table(result: ProfileResult) -> RenderableType:
    """What `profile` measured: time, work and memory per schedule, predictions in brackets."""
    rows = result["schedules"]
    batch = f"batch of {result['batch_size']}"
    head = (
        f"{where(result)}, {batch}, median of {count(result['runs'], 'run')}\n"
        "In brackets: what arithmetic predicts; the speed-up is that of FLOPs."
    )
    time = _table(
        f"Time of a {batch}, ms",
        {
            "latency": lambda r: number(r["latency_ms"]),
            "quartiles": lambda r: "-".join(map(number, r["latency_spread_ms"])),
            "images/s": lambda r: number(r["images_per_second"]),
            "trans-\nformer": lambda r: number(r["transformer_ms"]),
            "sampling": lambda r: number(r["sampling_ms"]),
            "decoder": lambda r: number(r["decoder_ms"]),
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
            "of full": lambda r: percent(r["memory_ratio"]),
            "cache, MiB": lambda r: _beside(r, "cache_bytes", MIB),
            "of full ": lambda r: percent(r["cache_ratio"]),
        },
        rows,
    )
    rounded = [row for row in rows if "logit_error" in row]
    effect = _table(
        f"What a cache in {result.get('cache_dtype')} does to the logits of the same tokens",
        {
            "error": lambda r: percent(r["logit_error"], 2),
            "same largest logit": lambda r: percent(r["same_top_token"], 1),
        },
        rounded,
    )
    unguided = [{"schedule": row["schedule"], **row["beside_guided"]} for row in rows if "beside_guided" in row]
    saved = _table("Beside guided calls of full, by arithmetic", SAVED, unguided)
    return _stacked(head, time, work, memory, *([saved] if unguided else []), *([effect] if rounded else []))


def eval_table(result: EvalResult) -> RenderableType:
    """What `evaluate` measured: scores per schedule, and what the same run cost."""
    rows, settings = [{**row, "schedule": label(row)} for row in result["schedules"]], result["settings"]
    features = result["features"]
    head = (
        f"{where(result)}, batch of {result['batch_size']}\n"
        f"{count(settings['images'], 'image')} against {result['reference']}, features {features['printed']}\n"
        f"{drawn_with(settings)}\n{kept_to(result)}"
    )
    scores = {
        _heading(metric, features["name"]): lambda r, key=key: score(r["scores"].get(key))
        for key, metric in METRICS.items()
        if any(key in row["scores"] for row in rows)
    }
    cost = {
        "latency, ms": lambda r: number(r["latency_ms"]),
        "images/s": lambda r: number(r["images_per_second"]),
        "peak, MiB": lambda r: mebibytes(r["peak_bytes"]),
        "cache, MiB": lambda r: mebibytes(r["cache_bytes"]),
    }
    notes = [Text(note) for note in result.get("notes", [])]
    return _stacked(
        head, *_tables("Scores", scores, rows, SCORES_WIDE), _table("Cost of the same run", cost, rows), *notes
    )


def demo_table(result: DemoResult) -> RenderableType:
    """What the demo showed: each schedule's score before and after distilling, and what the schedule saves."""
    metric, features, teacher = METRICS[result["score"]], result["features"], result["teacher"]
    head = (
        f"{result['device']}; {metric.name(features)} of {count(result['images'], 'image')} "
        f"({metric.better} is better)\n± half of the 95 % interval over the choice of images"
    )
    columns = {
        "before": lambda r: plain(r["untrained"]),
        "after": lambda r: plain(r["score"]),
        "of the teacher's": lambda r: _beside_teacher(r, teacher),
        "speed-up": lambda r: number(r["speedup"]),
        "cache, MiB": lambda r: mebibytes(r["cache_bytes"]),
        "peak, MiB": lambda r: mebibytes(r["peak_bytes"]),
    }
    title = f"{metric.name(features)} before and after, and the cost of a batch of {result['batch_size']}"
    first = {**teacher, "schedule": "teacher", "untrained": teacher["score"], "score": None}
    foot = (
        "The teacher is the pretrained network, guided; what it taught needs no guidance.\n"
        "noise: the intervals of the two scores overlap. Another training seed moves a\n"
        "score as well: see docs/training.md."
    )
    return _stacked(head, _table(title, columns, [first, *result["schedules"]]), Text(foot))


def _beside_teacher(row: dict, teacher: dict) -> str:
    """A score over the teacher's, and whether their intervals overlap."""
    if row["score"] is None:
        return "1.00"
    (low, high), (least, most) = row["score"]["interval"], teacher["score"]["interval"]
    ratio = row["score"]["value"] / teacher["score"]["value"]
    return f"{ratio:.2f}" + (", noise" if low <= most and least <= high else "")


def protocols_table(protocols: Iterable[dict]) -> RenderableType:
    """The protocols of `eval`, a line each."""
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("protocol", no_wrap=True)
    table.add_column("what it is for", overflow="fold")
    for protocol in protocols:
        table.add_row(protocol["name"], protocol["about"])
    return table


def protocol_table(protocol: dict) -> RenderableType:
    """One protocol, a line for each of its settings."""
    facts = {key.replace("_", " "): _value(value) for key, value in protocol.items() if value is not None}
    return _grid(facts)


def distill_table(result: dict) -> RenderableType:
    """What `distill` did: the loss of each schedule at its first and last steps, and on images kept aside."""
    recipe, heldout = result["recipe"], (result["heldout"] or {}).get("losses", {})
    columns = {
        "steps": lambda r: f"{r['steps']:,}",
        "first loss": lambda r: f"{r['loss_first']:.3f}",
        "last loss": lambda r: f"{r['loss_last']:.3f}",
        "at step": lambda r: f"{r['last_step']:,}",
        **({"held out": lambda r: f"{heldout[r['schedule']]:.3f}"} if heldout else {}),
    }
    title = f"Loss ({_value(recipe['loss'])}), nats per token"
    return _table(title, columns, result["schedules"])


def tokenize_table(result: dict) -> RenderableType:
    """What `tokenize` made of which images, and how fast."""
    facts = {
        "images": f"{result['images']:,} of {result['data']}",
        "skipped": f"{len(result['skipped']):,} that could not be read" if result["skipped"] else None,
        "views": str(result["views"]),
        "tokens": f"{result['tokens']:,}",
        "bytes": f"{result['bytes']:,}",
        "encoded now": f"{count(result['encoded'], 'image')}"
        + f" in {number(result['seconds'])} s, {number(result['images_per_s'])} images/s" * bool(result["encoded"]),
        "store": result["out"],
    }
    return _grid(facts)


def plan_table(result: dict) -> RenderableType:
    """What a run would cost, as `training.budget.budget` says: work, time, memory by part, disk by part."""
    recipe, flops = result["recipe"], result["flops"]
    work = joined(f"{what} {number(value / sum(flops.values()) * 100)} %" for what, value in flops.items() if value)
    facts = {
        "run": f"{result['model']}, recipe {recipe['name']}, {count(result['images'], 'image')}",
        "devices": f"{result['devices']}; passes of each in a step: {recipe['accumulation']}, of "
        + count(result["images_per_pass"], "image"),
        "steps": f"{result['steps']:,} of {count(recipe['batch_size'], 'image')}, {result['tokens']:,} tokens",
        "work": f"{sum(flops.values()):.3g} FLOPs: {work}",
        "time": _time_estimate(result),
        "fits": _fits(result),
        "host": f"{number(result['host_bytes'] / 1e9)} GB of a node's memory while a state is written",
    }
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, fact in facts.items():
        table.add_row(name, Text(fact))
    return Group(
        table,
        _parts("Memory, GB", result["memory"], result["memory_bytes"]),
        _parts("Disk, GB", result["disk"], result["disk_bytes"]),
    )


def _time_estimate(result: dict) -> str:
    if result["seconds"] is None:
        return "not estimated: name a --gpu"
    hours = result["seconds"] / 3600
    spent = f"{number(hours)} hours" if hours < 48 else f"{number(hours / 24)} days"
    return (
        f"{spent} at {percent(result['utilisation'])} of {number(result['flops_per_second'] / 1e12)} TFLOP/s a device, "
        "reading and encoding images not included"
    )


def _fits(result: dict) -> str:
    if result["fits"] is None:
        return "no memory named: --device-memory"
    memory, change = f"{number(result['device_memory_bytes'] / 1e9)} GB", result["change"]
    if result["fits"]:
        return f"yes, in {memory}"
    if change:
        more = result["change_disk_bytes"] - result["disk_bytes"]
        disk = f", and {number(more / 1e9)} GB more on the disk" if more > 0 else ""
        return f"not in {memory}: it does with {settings(change)}{disk}"
    kept = sum(result["memory"].get(part, 0) for part in ("parameters", "gradients", "moments", "teacher", "tokenizer"))
    return f"not in {memory}, whatever the recipe's keys: what is kept beside a pass takes {number(kept / 1e9)}"


def _parts(title: str, parts: dict[str, int], total: int) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right")
    for part, size in {**parts, "together": total}.items():
        table.add_row(part, number(size / 1e9))
    return table


def inspect_table(result: dict) -> RenderableType:
    """What `describe` says of a model: its shape, its schedules' layers, and their cost by arithmetic."""
    rows, image = result["schedules"], f"image in {result['dtype']}, by arithmetic"
    columns = {
        "cache, MiB": lambda r: mebibytes(r["cache_bytes"]),
        "GFLOP": lambda r: number(r["flops"] / 1e9),
        **SAVED,
    }
    if result["guided"]:
        cost = _table(f"Cost of one guided {image}", columns, rows)
        unguided = _table("Unguided (cfg 0), beside the guided full", columns, result["unguided"])
        return Group(_facts(result), _layers(rows), cost, unguided)
    return Group(_facts(result), _layers(rows), _table(f"One unguided {image}, beside a guided full", columns, rows))


def _facts(result: dict) -> Table:
    parameters, recipe = result["parameters"], result["recipe"]
    entries, size = result["codebook"]
    distilled = checked_cfg(result["distilled_cfg"])
    trained = f"trained for depths {joined(result['depths'])}" if result["depths"] else "untouched, no subnet trained"
    facts = {
        "model": f"{result['model']}: {result['checkpoint']} checkpoint, {trained}",
        "transformer": f"{result['depth']} layers, width {result['width']}, {result['heads']} heads, "
        f"{number(parameters['transformer'] / 1e6)} M parameters" + (", shared AdaLN" * result["shared_aln"]),
        "tokenizer": f"{number(parameters['tokenizer'] / 1e6)} M parameters, codebook {entries:,} x {size}",
        "scales": f"{joined(result['patch_nums'])}: {result['tokens']:,} tokens",
        "images": f"{result['image_size']} x {result['image_size']} pixels, {result['classes']:,} classes",
        "bridge": f"{count(result['bridge'], 'scale')} of {len(result['patch_nums'])} run all layers",
        "guidance": None if distilled is None else f"distilled into the weights for {cfg_text(distilled)}",
        "base model": result["base_model"],
        "licence": result["license"],
        "recipe": recipe and "; ".join(f"{key} {_value(value)}" for key, value in recipe.items() if _said(key, value)),
    }
    return _grid(facts)


def _grid(facts: dict[str, str | None]) -> Table:
    """What there is to say, a line each; of None nothing is said."""
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
        for place, segment in enumerate(row["segments"]):
            scales, layers = segment["scales"], segment["layers"]
            table.add_row(
                "" if place else folded(row["schedule"]), _span(*scales), str(len(layers)), Text(_runs(layers))
            )
    return table


def _table(title: str, columns: dict, rows: Rows) -> Table:
    """A table of one line per schedule. columns: heading -> text of a row."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    table.add_column("schedule", no_wrap=True)
    for heading in columns:
        table.add_column(heading, justify="right", overflow="fold")
    for row in rows:
        table.add_row(folded(row["schedule"]), *(Text(cell(row)) for cell in columns.values()))
    return table


def _heading(metric: Metric, features: str) -> str:
    name = metric.name(features)
    return f"{name} {'↑' if metric.more_is_better else '↓'}".replace(" ", "\n", name.count(" "))


def _tables(title: str, columns: dict, rows: Rows, width: int) -> list[Table]:
    """A table in pieces of at most `width` columns, so that it stays readable on a terminal."""
    items = list(columns.items())
    pieces = [dict(items[start : start + width]) for start in range(0, len(items), width)]
    return [_table("" if number else title, piece, rows) for number, piece in enumerate(pieces)]


def _stacked(head: str, *parts: RenderableType) -> Group:
    return Group(Text(head), "", *parts)


def _beside(row: dict, key: str, unit: float = 1) -> str:
    """What was measured, then in brackets what was predicted."""
    return f"{number(row[key] / unit)} ({number(row[f'{key}_predicted'] / unit)})"


def _said(key: str, value: object) -> bool:
    """Whether a key of a recipe says something: not where it is as if it were not there."""
    return key != "origin" and value not in (None, False, 0)


def _value(value: object) -> str:
    if isinstance(value, dict):
        return joined(f"{key} {_value(item)}" for key, item in value.items())
    return joined(map(_value, value)) if isinstance(value, list | tuple) else str(value)


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


# -- where depth hurts --------------------------------------------------------------------------


def sensitivity_table(result: SensitivityResult) -> RenderableType:
    """What `sensitivity` measured: depths x scales, then the layers that are missed most and least."""
    full, scored = result["full"], result["scored"]
    head = (
        f"{where(result)}; {count(result['data']['images'], 'image')} of {result['data']['name']}\n"
        f"Teacher-forced loss of full, nats per token, every scale weighing the same: {number(full['loss'])}\n"
        "± one standard error over the images"
        + (f"; of {scored['metric']} half of the 95 % interval; ≈: within noise of full" if scored else "")
    )
    parts = []
    for which, title in (("only", "at only one scale"), ("from", "from one scale on")):
        parts.append(_by_scale(f"Depth {title}: loss above full's", result[which], _increase))
        if which == "only":
            per_percent = "The same for each percent of full's FLOPs that is saved"
            parts.append(_by_scale(per_percent, result[which], lambda r: number(r["increase"] / (100 * r["saved"]))))
        if scored:
            title = f"Depth {title}: {scored['metric']} (full: {score(full['score'])})"
            parts.append(_by_scale(title, result[which], lambda r: score(r["score"])))
    layers = sorted(result["layers"], key=lambda row: row["after_bridge"]["increase"])
    if layers:
        columns = {
            "after the bridge": lambda r: _increase(r["after_bridge"]),
            "everywhere": lambda r: _increase(r["everywhere"]),
        }
        shown = [{"schedule": f"layer {row['layer']}", **row} for row in (*layers[-3:][::-1], *layers[:3][::-1])]
        parts.append(_table("Without one layer: the three missed most, and least, after the bridge", columns, shown))
    return _stacked(head, *parts)


def search_table(result: SearchResult) -> RenderableType:
    """What `search` found, beside full and the best equidistant schedule within the budget."""
    budget = joined(f"{name} {share:g}" for name, share in result["budget"].items())
    head = (
        f"{where(result)}; {count(result['data']['images'], 'image')} of {result['data']['name']} to search by, "
        f"{result['images_apart']:,} to compare on\n"
        f"budget {budget} of full's: {result['within_budget']:,} of {count(result['candidates'], 'candidate')}\n"
        "Losses are teacher-forced, nats per token, every scale weighing the same."
    )
    if result["scored"]:
        metric = result["scored"]["metric"]
        head += f"\n{metric}: ± half of the 95 % interval; ≈: the difference to equidistant is within its interval"
    rows = [result[name] for name in ("full", "equidistant", "found")]
    columns = {
        **{name: lambda r, name=name: percent(r["costs"][name], 1) for name in rows[0]["costs"]},
        "loss,\npredicted": lambda r: number(r["predicted"]),
        "measured": lambda r: number(r["loss"]),
        "on others": lambda r: f"{number(r['loss_apart'])} ± {r['loss_apart_error']:.1g}",
    }
    if any("latency_ms" in row for row in rows):
        columns["measured,\nms"] = lambda r: number(r["latency_ms"])
    if result["scored"]:
        columns[result["scored"]["metric"]] = lambda r: score(r["score"])
    found, rival = result["found"], result["equidistant"]
    if found["schedule"] == rival["schedule"]:
        said = [f"Found: {found['schedule']}, which is equidistant."]
    else:
        said = [f"Found: {found['schedule']}; the best equidistant one: {rival['schedule']}."]
        said.append("Their difference, image by image:")
        said.append(_difference("loss", result["difference"]["value"], result["difference"]["interval"]))
        if "difference_interval" in found.get("score", {}):
            own = found["score"]
            said.append(_difference(result["scored"]["metric"], own["difference"], own["difference_interval"]))
    best = {heading: columns[heading] for heading in ("loss,\npredicted", "measured")}
    if result["scored"] and any("score" in row for row in result["finalists"]):
        best[result["scored"]["metric"]] = lambda r: score(r.get("score"))
    tables = (
        _table("The best by prediction, measured", best, result["finalists"]),
        _table("The best of the equidistant ones", best, result["others"][:5]),
    )
    return _stacked(head, _table("Costs as shares of full's, and losses", columns, rows), *map(Text, said), "", *tables)


def _difference(name: str, value: float, interval: Sequence[float]) -> str:
    """A difference and its 95 % interval, and what that says."""
    low, high = interval
    verdict = "within noise" if low <= 0 <= high else "less" if high < 0 else "more"
    return f"  {name} {value:.3g}, 95 % interval {low:.3g} to {high:.3g}: {verdict}"


def _by_scale(title: str, rows: Rows, cell: Callable[[dict], str]) -> Table:
    """A table of depths x scales. cell: the text of a row of a sensitivity result."""
    depths = dict.fromkeys(row["depth"] for row in rows)
    at = {(row["depth"], row["scale"]): row for row in rows}
    columns = {
        f"scale {scale}": lambda r, scale=scale: cell(at[r["depth"], scale])
        for scale in dict.fromkeys(row["scale"] for row in rows)
    }
    return _table(title, columns, [{"schedule": f"d{depth}", "depth": depth} for depth in depths])


def _increase(row: dict) -> str:
    return f"{number(row['increase'])} ± {row['increase_error']:.1g}"
