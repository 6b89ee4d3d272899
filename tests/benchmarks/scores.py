"""Our scores beside torch-fidelity's own command and plain float64, their intervals beside the spread over seeds.

    python -m tests.benchmarks.scores equal
    python -m tests.benchmarks.scores intervals
    python -m tests.benchmarks.scores saving
    python -m tests.benchmarks.scores --tables

Each of the first three measures one thing on the embedded model and writes docs/benchmarks/scores/NAME.json; the last
writes their tables into docs/evaluation.md.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch_fidelity import fidelity as command
from torch_fidelity import version as torch_fidelity_version

from tests import fidelity
from tests.benchmarks.generation import commit
from tests.benchmarks.tables import DOCS, write_section
from varcompress.data.digits import load_digits
from varcompress.evaluation import evaluate
from varcompress.evaluation.digits import DIGITS
from varcompress.evaluation.intervals import NORMAL
from varcompress.evaluation.measures import KID_SUBSET_SIZE, KID_SUBSETS, SEED
from varcompress.evaluation.saving import write_npz, write_pngs
from varcompress.hardware import device_name
from varcompress.images import image_files, read_image, to_uint8
from varcompress.loading import load
from varcompress.metrics import METRICS
from varcompress.report.format import number

FOLDER, PAGE = DOCS / "benchmarks" / "scores", DOCS / "evaluation.md"
SEEDS, FEW = 10, 1_000
LARGE, SIDE, CHUNK = 50_000, 256, 256  # images that are saved
THEIRS = {
    "fd": "frechet_inception_distance",
    "is": "inception_score_mean",
    "kd": "kernel_inception_distance_mean",
    "precision": "precision",
    "recall": "recall",
}


# -- equal to others ------------------------------------------------------------------------------


def equal() -> dict:
    """All scores of `full` on 2,000 digits, by us, by torch-fidelity's command and by numpy in float64."""
    model = load("digits", device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        images, real = Path(folder) / "images", Path(folder) / "real"
        result = evaluate(model, ["full"], save_images=images, batch_size=100)
        write_pngs(real, 0, to_uint8(load_digits()[0]))
        theirs = _command(images / "full", real)
        vectors, logits = zip(*(_features(each) for each in (images / "full", real)), strict=True)
    (row,) = result["schedules"]
    return {
        "ours": {key: found["value"] for key, found in row["scores"].items()},
        "torch_fidelity": {key: theirs[name] for key, name in THEIRS.items()},
        "float64": float64(*vectors, logits[0]),
        "versions": {"torch": torch.__version__, "torch_fidelity": torch_fidelity_version.__version__},
    }


def _command(images: Path, real: Path) -> dict:
    """What `fidelity --json` prints of two folders."""
    folders = ["--input1", str(images), "--input2", str(real)]
    scores = ["--isc", "--fid", "--kid", "--prc", "--feature-extractor", fidelity.NAME]
    how = ["--cpu", "--json", "--silent", "--no-cache", "--save-cpu-ram"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), mock.patch.object(sys, "argv", ["fidelity", *folders, *scores, *how]):
        command.main()
    return json.loads(printed.getvalue())


def _features(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Vectors and logits of a folder's images, computed in float64."""
    network = DIGITS.load(DIGITS.weights(None)).double().eval()
    images = torch.stack([read_image(path, DIGITS.image_size)[0] for path in image_files(folder)])
    with torch.inference_mode():
        found = network(images.double() / 255)
    return found.vectors.numpy(), found.logits.numpy()


def float64(ours: np.ndarray, real: np.ndarray, logits: np.ndarray) -> dict[str, float]:
    """The scores by their definitions, nothing shared with `varcompress.evaluation` but the seed of KID and IS."""
    return {
        "fd": _frechet(ours, real),
        "is": _inception_score(logits),
        "kd": _kernel_distance(ours, real),
        **_neighbours(ours, real),
    }


def _frechet(x: np.ndarray, y: np.ndarray) -> float:
    sigma_x, sigma_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    values, directions = np.linalg.eigh(sigma_y)
    root = directions * np.sqrt(values.clip(0)) @ directions.T
    overlap = np.sqrt(np.linalg.eigvalsh(root @ sigma_x @ root).clip(0)).sum()
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(sigma_x) + np.trace(sigma_y) - 2 * overlap)


def _inception_score(logits: np.ndarray) -> float:
    logits = logits[np.random.RandomState(SEED).permutation(len(logits))]
    probs = np.exp(logits - logits.max(axis=1, keepdims=True))
    probs /= probs.sum(axis=1, keepdims=True)
    groups = np.array_split(probs, 10)
    return float(np.mean([np.exp((g * (np.log(g) - np.log(g.mean(0)))).sum(axis=1).mean()) for g in groups]))


def _kernel_distance(x: np.ndarray, y: np.ndarray) -> float:
    chance, size, found = np.random.RandomState(SEED), min(KID_SUBSET_SIZE, len(x), len(y)), []
    for _ in range(KID_SUBSETS):
        a, b = (part[chance.choice(len(part), size, replace=False)] for part in (x, y))
        aa, bb, ab = ((u @ v.T / u.shape[1] + 1) ** 3 for u, v in ((a, a), (b, b), (a, b)))
        same = sum((part.sum() - np.trace(part)) / (size * (size - 1)) for part in (aa, bb))
        found.append(same - 2 * ab.mean())
    return float(np.mean(found))


def _neighbours(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    def between(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        return np.stack([np.sqrt(((row - v) ** 2).sum(axis=1)) for row in u])

    of_x, of_y, pairs = np.sort(between(x, x), axis=1), np.sort(between(y, y), axis=1), between(x, y)
    return {
        "precision": float((pairs <= of_y[:, 3]).any(axis=1).mean()),
        "recall": float((pairs <= of_x[:, 3][:, None]).any(axis=0).mean()),
        "density": float((pairs < of_y[:, 5]).sum(axis=1).mean() / 5),
        "coverage": float((pairs < of_y[:, 5]).any(axis=0).mean()),
    }


# -- how sure -------------------------------------------------------------------------------------


def intervals() -> dict:
    """Of `full` and d8: half the interval over images, its mean over seeds, beside what the seeds themselves say."""
    model = load("digits", device="cpu")
    rows: dict[str, dict[str, list[dict]]] = {}
    for seed in range(SEEDS):
        result = evaluate(model, ["full", "d8"], seeds=[seed], num_images=FEW, batch_size=100)
        for row in result["schedules"]:
            for key, found in row["scores"].items():
                rows.setdefault(row["schedule"], {}).setdefault(key, []).append(found)
    return {
        "images": FEW,
        "seeds": SEEDS,
        "spread": {
            schedule: {key: _spread(found) for key, found in scores.items()} for schedule, scores in rows.items()
        },
    }


def _spread(found: list[dict]) -> dict[str, float]:
    halves = [(each["interval"][1] - each["interval"][0]) / 2 for each in found]
    values = [each["value"] for each in found]
    told = {
        "value": statistics.fmean(values),
        "half": statistics.fmean(halves),
        "seeds": NORMAL * statistics.stdev(values),
    }
    if "difference" in found[0]:
        differences = [each["difference"] for each in found]
        paired = [(each["difference_interval"][1] - each["difference_interval"][0]) / 2 for each in found]
        told |= {"paired_half": statistics.fmean(paired), "paired_seeds": NORMAL * statistics.stdev(differences)}
    return told


# -- saving ---------------------------------------------------------------------------------------


def saving() -> dict:
    """50,000 images of 256 pixels into one .npz: how long, how large, and how much memory it takes."""
    generator = torch.Generator().manual_seed(0)

    def images() -> Iterator[torch.Tensor]:
        for start in range(0, LARGE, CHUNK):
            count = min(CHUNK, LARGE - start)
            yield torch.randint(256, (count, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)

    next(images())  # what a chunk itself takes is there before
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.npz"
        write_npz(path, images(), (LARGE, SIDE, SIDE, 3), np.arange(LARGE) % 1000)
        seconds, size = time.monotonic() - started, path.stat().st_size
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {"images": LARGE, "side": SIDE, "seconds": seconds, "bytes": size, "memory_bytes": grown}


# -- tables ---------------------------------------------------------------------------------------


def tables() -> None:
    """Write what was measured into docs/evaluation.md."""
    found = {path.stem: json.loads(path.read_text()) for path in FOLDER.glob("*.json")}
    write_section(PAGE, "equal", _equal_table(found["equal"]))
    write_section(PAGE, "intervals", _intervals_table(found["intervals"]))
    write_section(PAGE, "saving", _saving_line(found["saving"]))


def _equal_table(found: dict) -> str:
    lines = ["| digits features | ours | torch-fidelity's command | float64 numpy |", "|---|---|---|---|"]
    for key, ours in found["ours"].items():
        others = (found[name].get(key) for name in ("torch_fidelity", "float64"))
        cells = ["–" if value is None else f"{value:.6f}" for value in others]
        lines.append(f"| {METRICS[key].elsewhere} | {ours:.6f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _intervals_table(found: dict) -> str:
    header = "| | score | ± over images | ± over seeds | difference: ± over pairs of images | ± over seeds |"
    lines = [header, "|---|---|---|---|---|---|"]
    for schedule, scores in found["spread"].items():
        for key, told in scores.items():
            cells = [number(told.get(name)) for name in ("value", "half", "seeds", "paired_half", "paired_seeds")]
            lines.append(f"| {schedule}, {METRICS[key].elsewhere} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _saving_line(found: dict) -> str:
    return (
        f"{found['images']:,} random images of {found['side']} pixels, {found['bytes'] / 2**30:.2f} GiB, were written "
        f"in {found['seconds']:.0f} s, drawing them included, with {found['memory_bytes'] / 2**20:.0f} MiB more memory "
        "than before."
    )


MEASURED = {"equal": equal, "intervals": intervals, "saving": saving}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help=", ".join(MEASURED))
    parser.add_argument("--tables", action="store_true")
    asked = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in asked.what:
        found = {"device": device_name(torch.device("cpu")), "commit": commit(), **MEASURED[name]()}
        (FOLDER / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps(found, indent=1))
    if asked.tables:
        tables()


if __name__ == "__main__":
    main()
