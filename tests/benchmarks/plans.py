"""The table of docs/training.md that says what a run of every recipe costs by arithmetic, as `distill --plan` has it.

python -m tests.benchmarks.plans
"""

from __future__ import annotations

from tests.benchmarks.tables import DOCS, write_section
from varcompress.data.digits import Digits
from varcompress.loading import load, outline
from varcompress.models.elastic import ElasticVAR
from varcompress.training.budget import GPUS, IMAGENET, UTILISATION, budget
from varcompress.training.recipe import MADE_FOR, load_recipe

PAGE, GPU = DOCS / "training.md", "h100"
# columns of memory, and the parts that each adds up
MEMORY = {
    "weights": ("parameters",),
    "gradients": ("gradients",),
    "moments": ("moments",),
    "teacher": ("teacher",),
    "a pass": ("activations", "logits and loss", "buffers"),
}


def table() -> str:
    """A row for each recipe, on the machine that it is made for."""
    lines = [
        f"In GB; time at {UTILISATION:.0%} of an H100's {GPUS[GPU].flops_per_second / 1e12:,.0f} TFLOP/s a device.\n",
        f"| recipe | made for | steps | FLOPs | {' | '.join(MEMORY)} | all | disk | time |",
        f"|---|---|---|---|{'---|' * len(MEMORY)}---|---|---|",
    ]
    for model, names in MADE_FOR.items():
        shape = outline(model) or load(model, device="cpu")
        lines += [_row(shape, name) for name in names]
    return "\n".join(lines)


def _row(model: ElasticVAR, name: str) -> str:
    recipe = load_recipe(name)
    on_cpu = recipe.machine == "cpu"
    speed = None if on_cpu else GPUS[GPU].flops_per_second
    result = budget(model, recipe, images=len(Digits()) if on_cpu else IMAGENET, flops_per_second=speed)
    memory = result["memory"]
    parts = [_gigabytes(sum(memory.get(part, 0) for part in parts)) for parts in MEMORY.values()]
    cells = [f"`{name}`", recipe.machine, f"{result['steps']:,}", f"{sum(result['flops'].values()):.2g}", *parts]
    cells += [_gigabytes(result["memory_bytes"]), _gigabytes(result["disk_bytes"])]
    cells += [f"{result['seconds'] / 86400:.2g} days" if result["seconds"] else ""]
    return f"| {' | '.join(cells)} |"


def _gigabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.3g}" if size_bytes else ""


if __name__ == "__main__":
    write_section(PAGE, "plans", table())
