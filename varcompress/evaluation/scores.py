"""Scores of every schedule of a model, all from one run: quality, latency, memory, cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch_fidelity
from torch import Tensor

from varcompress.cost import cache_bytes
from varcompress.data.sources import own_source
from varcompress.distributed import Ranks, joined
from varcompress.drawing import draw_batches
from varcompress.errors import InputError
from varcompress.evaluation.features import Extractor, choose_network
from varcompress.evaluation.intervals import scored
from varcompress.evaluation.measures import KID_SUBSET_SIZE, Compared, Measure, measure
from varcompress.evaluation.network import Features
from varcompress.evaluation.parts import FOLDER, Part, Parts
from varcompress.evaluation.protocols import DISTANCES, Done, Protocol, choose_protocol, deviations
from varcompress.evaluation.reference import MIN_IMAGES, Reference, read_reference
from varcompress.evaluation.saving import ImageOutput, has_pngs, write_npz, write_pngs
from varcompress.files import scratch_folder
from varcompress.fingerprint import fingerprint
from varcompress.images import check_rounding
from varcompress.memory import PeakMemory, fitting_batch
from varcompress.metrics import METRICS
from varcompress.models.elastic import ElasticVAR
from varcompress.profiling import conditions
from varcompress.progress import Progress, silent
from varcompress.results import EVAL, EvalResult, EvalRow
from varcompress.sampling import DEFAULT, Sampling
from varcompress.schedule import Schedule

ROUGH = 1_000  # images below which intervals over them are rough


def evaluate(
    model: ElasticVAR,
    schedules: Sequence[str | Schedule] | None = None,
    *,
    protocol: str | None = None,
    reference: str | Path | None = None,
    num_images: int | None = None,
    batch_size: int = 64,
    sampling: Sampling = DEFAULT,
    seeds: Sequence[int] | None = None,
    rounding: str | None = None,
    features: str | None = None,
    feature_weights: str | Path | None = None,
    distances: str | None = None,
    resize_reference: bool = False,
    beside: Sequence[Callable[[], ElasticVAR]] = (),
    save_images: str | Path | None = None,
    folder: str | Path | None = None,
    progress: Progress = silent,
) -> EvalResult:
    """Generate class-balanced images under each schedule and score them against `reference`.

    protocol: of `protocols.PROTOCOLS`, by default the one that is made for such a model; it says what the others are
    where they are None, and what departs from it is listed in the result. num_images: together, all classes equally
    often; reference: a folder of images, an .npz of images, or one of statistics (ADM layout); may be left out for the
    embedded digits. sampling: by default VAR's published settings, but for a cfg that the model was distilled for;
    seeds: several, for intervals over them, by default that of `sampling`; rounding: how images become bytes, "round"
    to the nearest or "truncate"; features: the name of a network, feature_weights: a file of its weights; distances:
    behind precision and its kin, "exact" or "adm"; resize_reference: take an .npz of images of another size;
    beside: functions that load other models, whose `full` is scored and timed as well; save_images: FILE.npz or a
    folder for what was scored.

    Image i has class i modulo their number and random stream (seed, i), under every schedule, in any batch and process.
    Intervals are over these images, or over seeds, and differences to the first schedule are taken pair by pair.
    folder: where the features of finished batches are kept under .eval, from which the same call goes on after a kill;
    they are the caller's to `forget`. Under torchrun the processes share the images, and rank 0 alone gets the result;
    the others get an empty dict.

    Returns a dict that JSON can hold, whose fields `results.EvalResult` names; latency is the median per batch.
    Raises InputError for a reference, feature weights, schedule or setting that cannot be used.
    """
    started = time.monotonic()
    chosen = model.default_schedules() if schedules is None else [model.schedule(schedule) for schedule in schedules]
    protocol = choose_protocol(protocol, model)
    num_images = num_images or protocol.images_per_class * model.var.config.classes
    seeds = _checked_seeds(seeds, sampling)
    settings = _Settings(
        protocol,
        labels=balanced_labels(_checked_count(num_images, batch_size), model.var.config.classes),
        batch_size=min(batch_size, num_images),
        sampling=sampling,
        seeds=seeds,
        rounding=check_rounding(rounding or protocol.rounding),
        distances=_checked_distances(distances or protocol.distances),
    )
    compared = _checked_reference(reference, protocol, model)
    output = None if save_images is None else ImageOutput(Path(save_images))
    size = model.tokenizer.config.image_size
    if output:
        output.check(chosen, seeds, 1 + len(beside), num_images * len(seeds) * len(chosen) * 3 * size**2)
    names = [_check_beside(load(), model) for load in beside]  # before the work, and one in memory at a time
    if len(set(names)) < len(names):
        raise InputError(f"two of the models beside are called {max(names, key=names.count)}: name each once")
    network = choose_network(features or protocol.features, model)
    extractor = Extractor(network, Path(feature_weights) if feature_weights else None, model.device)
    with ExitStack() as stack:
        ranks = stack.enter_context(joined(model.device))
        progress = progress if ranks.is_rank_zero else silent
        where = Path(folder) / FOLDER if folder else ranks.on_rank_zero(lambda: stack.enter_context(scratch_folder()))
        known: list[Reference] = []  # of rank 0 alone
        options = {"size": size, "resize": resize_reference, "progress": progress}
        ranks.on_rank_zero(lambda: known.append(read_reference(compared, extractor, **options)))
        drawing = _Drawing(settings, extractor, where, output, ranks, progress)
        drawn = [*drawing.schedules(model, chosen), *(drawing.beside(load()) for load in beside)]
        ranks.barrier()  # all parts are there
        if not ranks.is_rank_zero:
            return {}
        drawing.save(drawn)
        rows = _rows(drawn, known[0], settings, extractor, progress)
    return {
        "kind": EVAL,
        **conditions(model, model.sampling(sampling)),
        **_described(settings, known[0], extractor, model),
        "seconds": time.monotonic() - started,
        "processes": ranks.count,
        "notes": _notes(settings, known[0], extractor, model),
        "schedules": rows,
    }


def balanced_labels(num_images: int, classes: int) -> Tensor:
    """Class of every image (num_images,) int64: no class has two images more than another, and neighbours differ.

    Where there are fewer images than classes, the classes are spread over all of them.
    """
    images = torch.arange(num_images)
    return images % classes if num_images >= classes else images * classes // num_images


@dataclass(frozen=True)
class _Settings:
    """What is the same for all schedules. labels: (N,) int64 of the images; sampling: as a user said it."""

    protocol: Protocol
    labels: Tensor
    batch_size: int
    sampling: Sampling
    seeds: tuple[int, ...]
    rounding: str
    distances: str


def _checked_seeds(seeds: Sequence[int] | None, sampling: Sampling) -> tuple[int, ...]:
    found = tuple(replace(sampling, seed=seed).seed for seed in seeds or [sampling.seed])
    if len(set(found)) < len(found):
        raise InputError(f"seeds {', '.join(map(str, found))}: the same twice tells nothing new: name each once")
    return found


def _checked_count(num_images: int, batch_size: int) -> int:
    if num_images < MIN_IMAGES or batch_size < 1:
        raise InputError(f"{num_images} images in batches of {batch_size}: scores need at least {MIN_IMAGES} and 1")
    return num_images


def _checked_distances(distances: str) -> str:
    if distances not in DISTANCES:
        raise InputError(f"distances {distances!r} are unknown: use {' or '.join(DISTANCES)}")
    return distances


def _checked_reference(reference: str | Path | None, protocol: Protocol, model: ElasticVAR) -> object:
    """A path, or the model's own source of images."""
    if reference is not None:
        return reference
    if own := own_source(model):
        return own()
    pinned = protocol.reference
    named = f"; the protocol's {pinned.name} is at {pinned.url}" if pinned else ""
    raise InputError(f"a reference is needed: --reference with a folder of images or an .npz{named}")


def _check_beside(other: ElasticVAR, model: ElasticVAR) -> str:
    """The name of another model. Raises InputError for one that makes other images."""
    (theirs, size), (ours, own_size) = (
        (each.var.config.classes, each.tokenizer.config.image_size) for each in (other, model)
    )
    if (theirs, size) != (ours, own_size):
        raise InputError(
            f"{other.provenance.name}: has {theirs} classes in {size} pixels, and {model.provenance.name} {ours} in "
            f"{own_size}: only models of the same images can be compared"
        )
    return other.provenance.name


# -- drawing ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Drawn:
    """A schedule whose images are drawn: what is known of its row, and its features, seed by seed."""

    row: dict
    parts: list[Parts]


@dataclass(frozen=True)
class _Drawing:
    """Draws what is missing of a schedule's images, this process its share, and keeps their features."""

    settings: _Settings
    extractor: Extractor
    folder: Path
    output: ImageOutput | None
    ranks: Ranks
    progress: Progress

    def schedules(self, model: ElasticVAR, schedules: Sequence[Schedule], name: str | None = None) -> list[_Drawn]:
        """Draw all images of some schedules. name: of a model that another is evaluated beside."""
        sampling = model.sampling(self.settings.sampling)
        with fitting_batch(model, schedules, self.settings.batch_size, guided=model.guided(sampling)):
            return [self._draw(model, schedule, sampling, name) for schedule in schedules]

    def beside(self, other: ElasticVAR) -> _Drawn:
        """Draw all images of another model's `full`."""
        return self.schedules(other, [other.schedule("full")], other.provenance.name)[0]

    def _draw(self, model: ElasticVAR, schedule: Schedule, sampling: Sampling, name: str | None) -> _Drawn:
        """One schedule. The first batch runs once more, before the others, for memory and warm-up."""
        settings = self.settings
        first = settings.labels[: settings.batch_size]
        with PeakMemory(model, schedule) as memory:
            model.generate(first, schedule, sampling, runtime=model.runtime.eager())
        if model.device.type == "cuda":
            model.generate(first, schedule, sampling)  # records the graph that the others replay
        parts = [self._parts(model, schedule, replace(sampling, seed=seed)) for seed in settings.seeds]
        for seed, each in zip(settings.seeds, parts, strict=True):
            pngs = self._png_folder(schedule, seed, name)
            if pngs is not None:
                self.ranks.on_rank_zero(partial(each.claim, pngs))
            self._draw_parts(model, schedule, replace(sampling, seed=seed), each, pngs)
        row = {
            **({} if name is None else {"model": name, "weights": fingerprint(model)}),
            "schedule": str(schedule),
            "peak_bytes": memory.bytes,
            "cache_bytes": cache_bytes(
                model, schedule, settings.batch_size, model.runtime, guided=model.guided(sampling)
            ),
        }
        return _Drawn(row, parts)

    def _parts(self, model: ElasticVAR, schedule: Schedule, sampling: Sampling) -> Parts:
        identity = {
            **conditions(model, sampling),
            "protocol": self.settings.protocol.name,
            "schedule": str(schedule),
            "sampling": asdict(sampling),
            "rounding": self.settings.rounding,
            "features": self.extractor.key,
            "images": str(self.output.path.absolute()) if self.output else None,
        }
        return Parts.under(self.folder, identity, len(self.settings.labels), self.settings.batch_size)

    @property
    def _keeps_images(self) -> bool:
        return self.output is not None and self.output.is_npz

    def _draw_parts(
        self, model: ElasticVAR, schedule: Schedule, sampling: Sampling, parts: Parts, pngs: Path | None
    ) -> None:
        settings, missing = self.settings, parts.missing()
        for wanted in parts.ranges()[self.ranks.rank :: self.ranks.count]:
            if wanted not in missing and (pngs is None or has_pngs(pngs, wanted)):
                continue
            features: list[Features] = []
            times_ms: list[float] = []
            images: list[Tensor] = []
            for batch in draw_batches(
                model,
                settings.labels,
                schedule,
                sampling,
                batch_size=settings.batch_size,
                rounding=settings.rounding,
                progress=self.progress,
                wanted=wanted,
            ):
                features.append(self.extractor(batch.images))
                if len(batch.images) == settings.batch_size:
                    times_ms.append(batch.elapsed_ms)
                if pngs:
                    write_pngs(pngs, batch.first, batch.images)
                elif self._keeps_images:
                    images.append(batch.images.cpu())
            kept = torch.cat(images) if images else None
            parts.write(Part(wanted.start, Features.join(features), times_ms, kept))

    def _png_folder(self, schedule: Schedule, seed: int, name: str | None) -> Path | None:
        if self.output is None or self.output.is_npz:
            return None
        return self.output.folder(str(schedule), seed if len(self.settings.seeds) > 1 else None, name)

    def save(self, drawn: Sequence[_Drawn]) -> None:
        """Put the .npz together whose images the parts keep."""
        if not self._keeps_images:
            return
        images = drawn[0].parts[0].images()
        size = next(drawn[0].parts[0].images()).shape[-1]
        labels = self.settings.labels
        write_npz(self.output.path, images, (len(labels), size, size, 3), labels.numpy())


# -- scoring ------------------------------------------------------------------------------------


def _rows(
    drawn: Sequence[_Drawn], reference: Reference, settings: _Settings, extractor: Extractor, progress: Progress
) -> list[EvalRow]:
    """The lines of the result; differences are to the first."""
    rows: list[EvalRow] = []
    base: list[dict[str, Measure]] | None = None
    groups = settings.protocol.inception_groups
    for number, each in enumerate(drawn):
        progress(number, len(drawn), f"scores: {each.row['schedule']}")
        measured, times_ms = [], []
        for parts in each.parts:
            features, times = parts.read()
            times_ms += times
            measured.append(measure(Compared(features, reference, extractor.device, settings.distances, groups)))
        latency_ms = statistics.median(times_ms)
        rows.append(
            {
                **each.row,
                "scores": scored(measured, settings.labels, base),
                "latency_ms": latency_ms,
                "images_per_second": settings.batch_size / latency_ms * 1e3,
            }
        )
        base = base or measured
    progress(len(drawn), len(drawn), "scores: done")
    return rows


# -- what goes with the scores ------------------------------------------------------------------


def _described(settings: _Settings, reference: Reference, extractor: Extractor, model: ElasticVAR) -> dict:
    """What the scores depend on, and in what that departs from the protocol."""
    sampling, groups = model.sampling(settings.sampling), settings.protocol.inception_groups
    done = Done(
        len(settings.labels),
        model.var.config.classes,
        sampling,
        settings.rounding,
        reference.name,
        reference.sha256,
        extractor.spec.name,
        settings.distances,
        reference.resized,
    )
    return {
        "batch_size": settings.batch_size,
        "protocol": settings.protocol.name,
        "deviations": deviations(settings.protocol, done),
        "reference": reference.name,
        "reference_details": reference.details,
        "features": {
            "name": extractor.spec.name,
            "printed": extractor.spec.printed,
            "version": extractor.spec.version,
            "sha256": extractor.digest,
        },
        "torch_fidelity": torch_fidelity.__version__,
        "settings": {
            **{name: value for name, value in asdict(sampling).items() if name != "seed"},
            "seeds": list(settings.seeds),
            "images": len(settings.labels),
            "rounding": settings.rounding,
            "inception_groups": groups,
            "distances": settings.distances,
        },
    }


def _notes(settings: _Settings, reference: Reference, extractor: Extractor, model: ElasticVAR) -> list[str]:
    """What a reader must know before setting these scores beside others."""
    sampling, count = model.sampling(settings.sampling), len(settings.labels)
    notes = [*reference.notes, *([extractor.spec.note] if extractor.spec.note else [])]
    if sampling.cfg and not model.guided(sampling):
        notes.append(f"guidance with cfg {sampling.cfg} is distilled into the weights: nothing ran unconditionally")
    if reference.vectors is None:
        notes.append("the reference holds statistics only: Frechet distances and IS are all that it gives")
    elif (subset := min(count, len(reference.vectors))) < KID_SUBSET_SIZE:
        name = METRICS["kd"].name(extractor.spec.name)
        notes.append(f"{name} in subsets of {subset} images instead of {KID_SUBSET_SIZE:,}")
    if count < ROUGH and len(settings.seeds) == 1:
        notes.append(f"fewer than {ROUGH:,} images: the intervals are rough, and that of IS is too narrow")
    over = "seeds" if len(settings.seeds) > 1 else "the choice of images"
    notes.append(
        f"±: half of the 95 % interval over {over}; ≈: the difference to the first line is within its interval"
    )
    return notes
