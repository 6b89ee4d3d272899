"""How long a step waits for a state to be saved, and how long until that is on the disk.

    python -m tests.benchmarks.saves --sizes 16

Random weights and moments of an official shape. Writes docs/benchmarks/saves/NAME.json, and the table of all such files
into docs/training.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from tests.benchmarks.generation import random_weights
from tests.benchmarks.tables import DOCS, write_section
from varcompress.distributed import Ranks
from varcompress.hardware import choose_device, device_name, synchronize
from varcompress.training.optimizer import optimizer_of
from varcompress.training.recipe import load_recipe
from varcompress.training.states import States, tensors_of

FOLDER, PAGE = DOCS / "benchmarks" / "saves", DOCS / "training.md"


def measure(size: int, runs: int, device: torch.device, folder: Path) -> dict:
    """Seconds of each save of a state: until a step may go on, and until it is on the disk."""
    model = random_weights(size).to(device).float()
    optimizer = optimizer_of(model.var, load_recipe("variant-d30"))
    optimizer.begin(list(model.var.parameters()))
    tensors, states = tensors_of(model.var, optimizer), States(folder)
    stalls, whole = [], []
    with states.writing(Ranks()):
        for number in range(1, runs + 1):
            synchronize(device)
            began = time.perf_counter()
            states.save(number, tensors)
            stalls.append(time.perf_counter() - began)
            states.wait()
            whole.append(time.perf_counter() - began)
    return {"size": size, "bytes": sum(t.nbytes for t in tensors.values()), "stall_s": stalls, "written_s": whole}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[16])
    parser.add_argument("--runs", type=int, default=4, help="the first is not counted")
    parser.add_argument("--device")
    parser.add_argument("--name", help="of the JSON file; by default the device's")
    options = parser.parse_args()
    device = choose_device(options.device)
    with tempfile.TemporaryDirectory() as folder:
        results = [measure(size, options.runs, device, Path(folder) / str(size)) for size in options.sizes]
    content = {"device": device_name(device), "torch": torch.__version__, "results": results}
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{options.name or device.type}.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    write_section(PAGE, "saves", tables())
    print(tables())


def tables() -> str:
    lines = ["| state | size, GB | a step waits, s | on the disk after, s | |", "|---|---|---|---|---|"]
    for path in sorted(FOLDER.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        for row in content["results"]:
            cells = [f"VAR-d{row['size']}, AdamW", f"{row['bytes'] / 1e9:.3g}"]
            cells += [f"{statistics.median(row[key][1:]):.2g}" for key in ("stall_s", "written_s")]
            source = f"{content['device']}, torch {content['torch']} ([{path.name}](benchmarks/saves/{path.name}))"
            lines.append(f"| {' | '.join([*cells, source])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
