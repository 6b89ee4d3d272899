"""Ways to train the embedded model, beside each other: held-out KL to the teacher and digits FD, over seeds.

    python -m tests.benchmarks.training ours --seeds 0 1 2
    python -m tests.benchmarks.training --tables

The first trains one row of the table for each seed, which is `varcompress distill digits` with the recipe and settings
that the row names, and writes docs/benchmarks/training/ROW-SEED.json; the second writes the tables of all such files
into docs/training.md. A row takes a single thread, so that two may run side by side on two cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch

from tests.benchmarks.generation import commit
from tests.benchmarks.tables import write_section
from varcompress.data.sources import open_source
from varcompress.data.tokens import TokenStore
from varcompress.evaluation import evaluate
from varcompress.evaluation.intervals import NORMAL
from varcompress.hardware import device_name
from varcompress.loading import load
from varcompress.models.elastic import ElasticVAR
from varcompress.schedule import Together
from varcompress.training import distill
from varcompress.training.objective import Objective
from varcompress.training.recipe import FULL, Recipe, load_recipe
from varcompress.training.strategy import plan
from varcompress.training.teacher import Teacher

ROOT = Path(__file__).parents[2]
FOLDER, PAGE = ROOT / "docs" / "benchmarks" / "training", ROOT / "docs" / "training.md"
NUM_IMAGES = 2000


@dataclass(frozen=True)
class Row:
    """One way to train: a recipe of the package, changed by settings. group: the table that it stands in.

    commit: the version that ran it, where later ones have no such settings any more.
    """

    group: str
    title: str
    recipe: str
    settings: tuple[str, ...] = ()
    commit: str | None = None

    @property
    def command(self) -> str:
        settings = "".join(
            f" --set {setting!r}" if " " in setting else f" --set {setting}" for setting in self.settings
        )
        before = f"git checkout {self.commit} && " if self.commit else ""
        return f"{before}varcompress distill digits --recipe {self.recipe}{settings} --set seed=SEED --out DIR"


def _fixed(p: float) -> tuple[str, ...]:
    return "epochs_full=18", "epochs_ramp=0", "epochs_subnet=0", f"p_start={p}"


def _stored(top: int) -> tuple[str, ...]:
    return "teacher_logits=stored", f"teacher_top={top}"


BEFORE = "4260306"  # the last version with keys that did not help
ONE = "{full: .25, 16: .1, 8: .1, 4: .1, 2: .1}"
KL = ("loss=kl", "teacher=frozen")
ROWS = {
    "teacher": Row("strategy", "the teacher: nothing trained", "digits-guided"),
    "fixed-0.1": Row("strategy", "fixed p = 0.1, cross-entropy", "variant-digits", _fixed(0.1)),
    "fixed-0.5": Row("strategy", "fixed p = 0.5, cross-entropy", "variant-digits", _fixed(0.5)),
    "fixed-1": Row("strategy", "fixed p = 1, cross-entropy", "variant-digits", _fixed(1)),
    "progressive": Row("strategy", "progressive, cross-entropy (VARiant)", "variant-digits"),
    "progressive-kl": Row("strategy", "progressive, KL to the teacher", "variant-digits", KL),
    "guided": Row("strategy", "`digits-guided`: several depths a step, KL to the teacher", "digits-guided"),
    "ours-short": Row(
        "guidance",
        "`digits` in 6 epochs: guidance distilled too, at 1.1 times VARiant's cost",
        "digits",
        ("epochs=6",),
    ),
    "ours": Row("guidance", "`digits`", "digits"),
    "ours-2x": Row("guidance", "the same in 12 epochs, 2.2 times VARiant's cost", "digits", ("epochs=12",)),
    "ours-4x": Row("guidance", "`digits-long`: 24 epochs, 4.4 times VARiant's cost", "digits-long"),
    "adamw": Row("options", "AdamW alone", "digits-guided", ("optimizer=adamw",)),
    "one-by-one": Row("options", "about one depth a step", "digits-guided", (f"depth_probability={ONE}",)),
    "half-kl": Row("options", "half KL, half cross-entropy", "digits-guided", ("loss={kl: 0.5, cross_entropy: 0.5}",)),
    "sensitivity": Row("options", "layers by sensitivity, 98 units more", "digits-guided", ("layers=sensitivity",)),
    "label-drop": Row("options", "the null class for a tenth of the labels", "digits-guided", ("label_drop=0.1",)),
    "bfloat16-teacher": Row("options", "teacher in bfloat16", "digits-guided", ("teacher_dtype=bfloat16",)),
    "stored-16": Row("options", "the teacher's 16 largest logits, stored", "digits-guided", _stored(16)),
    "stored-64": Row("options", "the teacher's 64 largest logits, stored", "digits-guided", _stored(64)),
    "ema": Row("options", "a running mean of the weights, decay 0.98", "digits-guided", ("ema=0.98",), BEFORE),
    "scales": Row("options", "the same weight for each scale", "digits-guided", ("scale_weights=scales",), BEFORE),
    "lognormal": Row("options", "HMAR's weights of scales", "digits-guided", ("scale_weights=lognormal",), BEFORE),
    "drop-path": Row("options", "drop path 0.125", "digits-guided", ("drop_path=0.125",), BEFORE),
}


# -- one run --------------------------------------------------------------------------------------


def run(name: str, seed: int) -> dict:
    """Train a row from one seed and score it."""
    row = ROWS[name]
    recipe = load_recipe(row.recipe, [*row.settings, f"seed={seed}"])
    model, started = load("digits", device="cpu"), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        if name != "teacher":
            model = distill(model, recipe, out=Path(folder) / "run", note=print)
        seconds = time.monotonic() - started
        model.bridge, model.depths = recipe.bridge, recipe.depths
        heldout = held_out(model, recipe, Path(folder) / "tokens")
    scores = evaluate(model, num_images=NUM_IMAGES, batch_size=100)
    fd = {label: line["scores"]["fd"] for label, line in zip(labels(recipe), scores["schedules"], strict=True)}
    return {
        "row": name,
        "seed": seed,
        "recipe": recipe.to_dict(),
        "subnets": {str(depth): list(layers) for depth, layers in model.subnets.items()},  # but for equidistant ones
        "units": 0 if name == "teacher" else units(recipe),
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "device": device_name(model.device),
        "torch": torch.__version__,
        "commit": commit(),
        "heldout": heldout,
        "fd": {label: found["value"] for label, found in fd.items()},
        "fd_std": {label: (found["interval"][1] - found["value"]) / NORMAL for label, found in fd.items()},
    }


def labels(recipe: Recipe) -> list[str]:
    """What the tables call the schedules."""
    return [FULL, *(f"d{depth}" for depth in recipe.depths)]


def held_out(model: ElasticVAR, recipe: Recipe, folder: Path) -> dict[str, dict[str, float]]:
    """KL to the untouched model and cross-entropy of the images that the recipe holds out, in nats per token."""
    teacher, source = load("digits", device="cpu"), open_source(None, model)
    store = TokenStore(folder, source, model, 1)
    store.create()
    store.encode()
    tokens = store.read()
    _, heldout = tokens.split(recipe.held_out(len(tokens)))
    places = np.arange(len(heldout))
    judge = load_recipe("digits" if recipe.guidance == "none" else "digits-guided")
    guided = judge.guidance == "none"
    objective = Objective(model, judge, Teacher(teacher.var, teacher.schedule("full"), guided=guided))
    losses = objective.evaluate(heldout.samples(places, np.zeros_like(places)), model.default_schedules()).mean(-1)
    return {
        kind: dict(zip(labels(recipe), values, strict=True))
        for kind, values in zip(objective.losses, losses.tolist(), strict=True)
    }


def units(recipe: Recipe) -> float:
    """The work of a run in passes of the full network, forward and backward, over 64 images.

    Layers x tokens alone are counted; a forward pass is a third of both.
    """
    model = load("digits", device="cpu")
    model.bridge, model.depths = recipe.bridge, recipe.depths
    if not isinstance(recipe.layers, str):
        model.subnets = dict(zip(recipe.depths, recipe.layers, strict=True))
    images = len(open_source(None, model))
    steps = plan(recipe, (images - recipe.held_out(images)) // recipe.batch_size)
    full = model.schedule(FULL)
    whole = full.depth * full.ends[-1]
    rows = 0.0
    for step in steps:
        together = Together(tuple(model.schedule(FULL if depth == FULL else f"d{depth}") for depth in step.depths))
        rows += sum(sum(together.seen(layer)) for layer in together.layers)
    halves = 2 if recipe.guidance == "none" else 1  # of the teacher's pass, conditional and not
    asked = len(steps) * recipe.batch_size
    if recipe.teacher_logits == "stored":  # each image once in each view, and for the null class
        asked = images * recipe.num_views * (2 if recipe.label_drop else 1)
    taught = asked * halves / 3 if recipe.teacher != "none" else 0
    return (rows / whole * recipe.batch_size + taught) / 64


# -- tables ---------------------------------------------------------------------------------------


def table(group: str) -> str:
    """The rows of a group that were measured, means over seeds with their standard deviation."""
    header = [
        "row",
        "seeds",
        "steps x batch",
        "units",
        *(f"FD {label}" for label in LABELS),
        *(f"KL {label}" for label in LABELS),
    ]
    lines = [header, ["---"] * len(header)]
    lines += [_line(row, found) for name, row in ROWS.items() if row.group == group and (found := _found(name))]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) if len(lines) > 2 else "Not measured."


def _found(name: str) -> list[dict]:
    """What was measured of a row, seed by seed."""
    return [json.loads(path.read_text()) for path in sorted(FOLDER.glob(f"{name}-[0-9].json"))]


LABELS = [FULL, "d16", "d8", "d4", "d2"]


def _line(row: Row, found: list[dict]) -> list[str]:
    known = {item.name for item in fields(Recipe)}  # of keys that have since been taken out, none is at work in a row
    recipe = Recipe.from_dict({key: value for key, value in found[0]["recipe"].items() if key in known})
    steps = len(plan(recipe, (1797 - recipe.held_out(1797)) // recipe.batch_size)) if found[0]["units"] else 0
    fd = [_spread([run["fd"][label] for run in found], 1) for label in LABELS]
    kl = [_spread([run["heldout"]["kl"][label] for run in found], 3) for label in LABELS]
    return [
        "; ".join([row.title, *dict.fromkeys(_layers(run["subnets"]) for run in found if run.get("subnets"))]),
        str(len(found)),
        f"{steps} x {recipe.batch_size}" if steps else "–",
        f"{found[0]['units']:.0f}",
        *fd,
        *kl,
    ]


def _layers(subnets: dict[str, list[int]]) -> str:
    return ", ".join(f"d{depth} {{{', '.join(map(str, layers))}}}" for depth, layers in subnets.items())


def _spread(values: Iterable[float], digits: int) -> str:
    values = list(values)
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def commands() -> str:
    """What each row ran that was measured."""
    return "\n".join(
        f"- {row.title}: `{row.command}`" for name, row in ROWS.items() if name != "teacher" and _found(name)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--missing", action="store_true", help="only what has no file yet")
    parser.add_argument("--tables", action="store_true")
    options = parser.parse_args()
    if unknown := [name for name in options.rows if name not in ROWS]:
        parser.error(f"no row is called {unknown[0]}: there are {', '.join(ROWS)}")
    if gone := [name for name in options.rows if ROWS[name].commit]:
        parser.error(f"{gone[0]} has keys of an earlier version: git checkout {ROWS[gone[0]].commit}")
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in options.rows:
        for seed in options.seeds[:1] if name == "teacher" else options.seeds:
            path = FOLDER / f"{name}-{seed}.json"
            if options.missing and path.is_file():
                continue
            result = run(name, seed)
            path.write_text(json.dumps(result, indent=1) + "\n")
            print(name, seed, {key: round(value, 1) for key, value in result["fd"].items()}, flush=True)
    if options.tables:
        for group in dict.fromkeys(row.group for row in ROWS.values()):
            write_section(PAGE, group, table(group))
        write_section(PAGE, "commands", commands())


if __name__ == "__main__":
    main()
