"""What lies in elastic directories, run directories and folders of results, as one page."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from varcompress.checkpoint import is_elastic
from varcompress.cost import describe
from varcompress.drawing import draw_images
from varcompress.errors import InputError
from varcompress.files import disk_errors, write_text
from varcompress.fingerprint import fingerprint
from varcompress.images import pixels
from varcompress.loading import load
from varcompress.models.elastic import ElasticVAR
from varcompress.progress import Progress, silent
from varcompress.publish import SAMPLES
from varcompress.report.page import PAGE, Subject, render
from varcompress.results import (
    DEMO,
    MEASURED,
    SCHEMA,
    SENSITIVITY,
    check_result,
    check_weights,
    read_result,
    results_in,
)
from varcompress.training.log import read_steps
from varcompress.training.state import RunDirectory

PAGE_SUFFIX = ".html"
NUM_SAMPLES = 10
LOSSLESS_PIXELS = 64  # the side up to which a sample keeps every bit
PICTURE_PIXELS = 2400  # the side of the largest picture that is taken in


def write_report(
    folders: Sequence[str | Path],
    out: str | Path | None = None,
    *,
    samples: int = NUM_SAMPLES,
    device: str | None = None,
    progress: Progress = silent,
) -> Path:
    """Write one page of HTML about what lies in some directories, side by side. Returns its path.

    folders: elastic directories, run directories, under way or finished, and folders of results; out: by default
    report.html in the directory where there is one alone, else here; samples: images that are drawn under each
    schedule of each model, from the same random streams, 0 for none; device: on which.
    Raises InputError for a directory that holds nothing to show, for results of other weights than the model beside
    them, for results that cannot be compared with each other, and for damaged ones. Nothing is written then.
    """
    paths = list({Path(folder).expanduser().resolve(): None for folder in folders})
    out = Path(out).expanduser() if out else (paths[0] / PAGE if len(paths) == 1 else Path(PAGE))
    if out.suffix != PAGE_SUFFIX or out.is_dir():
        raise InputError(f"{out}: name a file that ends in {PAGE_SUFFIX}")
    found = {path: _read(path, _name(path, paths)) for path in paths}
    elastic = [path for path in paths if is_elastic(path)]
    if samples and elastic:
        render(
            [*chain(*found.values())]
        )  # what cannot be shown is refused before images are drawn, which may take long
    for path in elastic:
        found[path][0] = _with_model(found[path][0], load(path, device=device), samples, progress)
    subjects = [*chain(*found.values())]
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, render(subjects, drawn_without=_why_none(subjects, samples)))
    return out


def _name(path: Path, paths: Sequence[Path]) -> str:
    """What a directory is called on the page: no more of its path than tells it from the others."""
    tails = (path.parts[-count:] for count in range(1, len(path.parts) + 1))
    return "/".join(next(tail for tail in tails if sum(other.parts[-len(tail) :] == tail for other in paths) == 1))


def _why_none(subjects: Sequence[Subject], samples: int) -> str | None:
    if not any(subject.model for subject in subjects):
        return "there is no model to draw them with"
    return None if samples else "they were left out with --samples 0"


# -- reading ------------------------------------------------------------------------------------


def _read(path: Path, name: str) -> list[Subject]:
    """What lies in a directory, without what needs its model; and, of a demo, the model before it was distilled."""
    if not path.is_dir():
        raise InputError(f"{path}: no such directory")
    for file in path.glob("*.json"):
        if file.stem.partition("-")[0] in MEASURED:
            read_result(file)  # which says what is wrong with it, where `results_in` leaves it out
    demo, sensitivity = _json(path / f"{DEMO}.json", DEMO), _json(path / f"{SENSITIVITY}.json", SENSITIVITY)
    found = Subject(
        name,
        results={file.name: each for file, each in results_in(path).items()},
        steps=read_steps(RunDirectory(path).steps_path),
        picture=_picture(path / SAMPLES),
        sensitivity=sensitivity,
    )
    if not (found.results or found.steps or found.sensitivity or is_elastic(path)):
        raise InputError(
            f"{path}: holds no model, no result and no log of a run: give what save, eval or distill wrote"
        )
    if demo is None:
        return [found]
    before = check_result(f"{name}/{DEMO}.json", demo.get("untrained"))
    return [found, Subject(f"{name} (before distilling)", results={f"{DEMO}.json": before})]


def _json(path: Path, kind: str) -> dict | None:
    """The result of a kind in a file; None where there is none. Raises InputError for something else."""
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict) or content.get("kind") != kind or content.get("schema", SCHEMA) != SCHEMA:
        raise InputError(
            f"{path}: damaged, or of another version of varcompress: run `varcompress {kind}` again, or take it away"
        )
    return content


def _picture(path: Path) -> bytes | None:
    """A picture, written anew, so that nothing but its pixels comes along; None where there is none."""
    try:
        with Image.open(path) as image:
            image.thumbnail((PICTURE_PIXELS, PICTURE_PIXELS))
            return _encoded(image.convert("RGB"), "PNG", optimize=True)
    except (OSError, ValueError, Image.DecompressionBombError):
        return None


# -- the model ----------------------------------------------------------------------------------


def _with_model(subject: Subject, model: ElasticVAR, samples: int, progress: Progress) -> Subject:
    """What needs the model: what it is, that all results are of it, and images that it draws."""
    weights = fingerprint(model)
    for source, result in subject.measured.items():
        check_weights(source, result, [weights])
    found = replace(subject, model={**describe(model), "weights": weights})
    if not samples:
        return found
    classes = torch.linspace(0, model.var.config.classes - 1, samples).round().long().tolist()
    drawn = {
        str(schedule): [_webp(image) for image in pixels(draw_images(model, classes, schedule, progress=progress))]
        for schedule in model.default_schedules()
    }
    return replace(found, samples=drawn, classes=classes, picture=None)


def _webp(image: np.ndarray) -> bytes:
    """An image (H, W, 3) uint8: every bit of a small one, a large one as good as the eye can tell."""
    return _encoded(Image.fromarray(image), "WEBP", lossless=max(image.shape) <= LOSSLESS_PIXELS, quality=92)


def _encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=form, **options)
    return buffer.getvalue()
