"""A training step of an official model under each of its recipes: seconds and peak memory, random weights and tokens.

    python -m tests.benchmarks.step --size d30

Times a pass of every set of depths that a recipe runs, and the optimiser, as one of --devices has them. Averaging
gradients over devices is not in it. Writes docs/benchmarks/step/NAME.json, and the table of all such files into
docs/training.md; with --out another folder, where the page stays as it is.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from tests.benchmarks.generation import commit, random_weights
from tests.benchmarks.tables import DOCS, write_section
from varcompress.data.tokens import Samples
from varcompress.hardware import choose_device, device_name, timed
from varcompress.memory import LiveTensors
from varcompress.models.elastic import ElasticVAR
from varcompress.schedule import Together
from varcompress.training.objective import Objective
from varcompress.training.optimizer import optimizer_of
from varcompress.training.recipe import FULL, MADE_FOR, Recipe, load_recipe
from varcompress.training.strategy import plan, schedules_of
from varcompress.training.teacher import Teacher

FOLDER, PAGE = DOCS / "benchmarks" / "step", DOCS / "training.md"
DRAWS = 6  # steps of a recipe that draws its depths
GIB = 2**30


def sets_of_depths(recipe: Recipe) -> list[tuple]:
    """What the steps of a recipe run: each depth by itself, or the first draws."""
    if not recipe.depth_probability:
        return [(FULL,), *((depth,) for depth in recipe.depths)]
    return [step.depths for step in plan(recipe, DRAWS)[:DRAWS]]


def measure(model: ElasticVAR, recipe: Recipe, devices: int, runs: int) -> dict:
    """One recipe's passes and its optimiser's step on this device."""
    model.bridge, model.depths = recipe.bridge, recipe.depths
    guided = recipe.guidance == "none"
    taught = recipe.teacher != "none"
    teacher = Teacher(model.var, model.schedule(FULL), dtype=recipe.teacher_dtype, guided=guided) if taught else None
    objective, optimizer = Objective(model, recipe, teacher), optimizer_of(model.var, recipe)
    images, config = recipe.pass_size(devices), model.var.config
    random = torch.Generator().manual_seed(0)
    samples = Samples(
        torch.randint(config.classes, (images,), generator=random),
        torch.randint(config.vocab, (images, config.tokens), generator=random),
        None,
        None,
    )
    optimizer_ms, rows = [], []
    for depths in sets_of_depths(recipe):
        schedules = list(schedules_of(model, depths).values())
        together = Together(tuple(schedules))
        one_pass = partial(objective.backward, samples, slice(0, images), 1, schedules)
        times, peaks = [], []
        for _ in range(runs + 1):  # the first warms up
            elapsed_ms, peak_bytes = _spent(model.device, one_pass)
            times.append(elapsed_ms)
            peaks.append(peak_bytes)
            optimizer_ms.append(timed(model.device, partial(optimizer.step, recipe.learning_rate))[1])
        full = model.schedule(FULL)
        work = sum(sum(together.seen(layer)) for layer in together.layers) / (full.depth * full.ends[-1])
        rows.append({"depths": list(depths), "layers_x_tokens": work, "pass_ms": statistics.median(times[1:]),
                     "peak_bytes": max(peaks)})  # fmt: skip
        print(recipe.name, rows[-1], flush=True)
    pass_ms = statistics.mean(row["pass_ms"] for row in rows)
    optimizer_ms = statistics.median(optimizer_ms[1:])
    state = [tensor for p in model.var.parameters() for tensor in optimizer.state(p).values()]
    return {
        "recipe": recipe.name,
        "images": images,
        "accumulation": recipe.accumulation,
        "weights_bytes": sum(p.nbytes for p in model.var.parameters()),
        "state_bytes": sum(tensor.nbytes for tensor in state),
        "optimizer_ms": optimizer_ms,
        "step_ms": recipe.accumulation * pass_ms + optimizer_ms,
        "passes": rows,
    }


def _spent(device: torch.device, call: Callable[[], object]) -> tuple[float, int]:
    """Milliseconds and peak bytes of a call; on a CPU those of the tensors that it makes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        elapsed_ms = timed(device, call)[1]
        return elapsed_ms, torch.cuda.max_memory_allocated(device)
    with LiveTensors() as tensors:
        elapsed_ms = timed(device, call)[1]
    return elapsed_ms, tensors.peak_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="d30")
    parser.add_argument("--recipes", nargs="+", help="by default those made for the size")
    parser.add_argument("--devices", type=int, default=8, help="that share the batch")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--device")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of the recipes")
    parser.add_argument("--name")
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args()
    device = choose_device(options.device)
    model = random_weights(int(options.size[1:]), device)
    model.tokenizer.requires_grad_(False)
    content = {
        "size": options.size,
        "device": device_name(device),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "devices": options.devices,
        "set": options.set,
        "runs": options.runs,
        "results": [],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{options.name or f'{device.type}-{options.size}'}.json"
    for name in options.recipes or MADE_FOR[f"var-{options.size}"]:
        recipe = replace(load_recipe(name, options.set), learning_rate=1e-30)  # weights stay what they are
        content["results"].append(measure(model, recipe, options.devices, options.runs))
        model.var.zero_grad()
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(table(path))
    if options.out.resolve() == FOLDER:
        write_section(PAGE, "step", tables())


def tables() -> str:
    return "\n\n".join(map(table, sorted(FOLDER.glob("*.json"))))


def table(path: Path) -> str:
    """One file's results: a step of each recipe, and its passes."""
    content = json.loads(path.read_text(encoding="utf-8"))
    lines = [
        f"VAR-{content['size']}, {content['device']}, one of {content['devices']} that share a batch, torch "
        f"{content['torch']}, {content['date']} ([{path.name}](benchmarks/step/{path.name})). Medians of "
        f"{content['runs']} after a warm-up.\n",
        "| recipe | depths of a pass | layers x tokens, of `full` | images | pass, ms | peak, GiB | optimiser, ms "
        "| step, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in content["results"]:
        passes = {tuple(row["depths"]): row for row in result["passes"]}  # a draw that came again once
        for depths, row in passes.items():
            names = " ".join(depth if depth == FULL else f"d{depth}" for depth in depths)
            cells = [f"`{result['recipe']}`", names, f"{row['layers_x_tokens']:.2f}", str(result["images"])]
            lines.append("| " + " | ".join([*cells, f"{row['pass_ms']:,.0f}", _gib(row)]) + " | | |")
        cells = [f"`{result['recipe']}`", "mean of a step", "", f"{result['images']} x {result['accumulation']}", ""]
        peak = _gib(max(result["passes"], key=lambda row: row["peak_bytes"]))
        lines.append(
            f"| {' | '.join(cells)} | {peak} | {result['optimizer_ms']:,.0f} | {result['step_ms'] / 1e3:.2f} |"
        )
    return "\n".join(lines)


def _gib(row: dict) -> str:
    return f"{row['peak_bytes'] / GIB:.1f}"


if __name__ == "__main__":
    main()
