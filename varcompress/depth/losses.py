"""Teacher-forced losses of single images under a schedule, scale by scale: what sensitivity and search go by."""

from __future__ import annotations

import math

import numpy as np
import torch

from varcompress.data.interface import Source
from varcompress.data.selection import Selection
from varcompress.data.sources import open_source
from varcompress.data.tokens import Samples, StoredTokens, read_meta, store_of
from varcompress.errors import InputError
from varcompress.evaluation.intervals import NORMAL
from varcompress.files import scratch_folder
from varcompress.hardware import fitting_memory
from varcompress.images import skipped_note
from varcompress.models.elastic import ElasticVAR
from varcompress.progress import Note, Progress, Steps
from varcompress.results import Increase
from varcompress.schedule import Schedule
from varcompress.training.losses import CrossEntropy, Targets

MIN_IMAGES = 2  # without a second one there is no standard error


def read_tokens(
    model: ElasticVAR, data: object, num_images: int, *, progress: Progress, note: Note
) -> tuple[Source, Samples]:
    """A source of images, as `open_source` takes it, and the tokens of `num_images` of them, or of all if there are
    fewer.

    They are those that a training run holds out first. Raises InputError for data that does not fit the model, and
    where too few images are left.
    """
    source = open_source(data, model)
    with scratch_folder() as folder:
        if isinstance(source, StoredTokens):
            store = store_of(source, model, read_meta(source.path)["views"], path=None, work=folder / "tokens")
        else:
            store = store_of(Selection.held_out(source, num_images), model, 1, path=None, work=folder / "tokens")
        store.create()
        store.encode(progress=progress)
        found = store.read()
        if found.skipped:
            note(skipped_note(found.skipped, len(store.source)))
        chosen = found.split(min(num_images, len(found)))[1]
        if len(chosen) < MIN_IMAGES:
            raise InputError(f"{source.name}: {len(chosen)} image is too few: a standard error needs {MIN_IMAGES}")
        first_view = np.zeros(len(chosen), dtype=np.int64)
        return source, chosen.samples(np.arange(len(chosen)), first_view)


class ImageLosses:
    """The cross-entropy of images' own tokens under schedules, teacher-forced. What was asked before is remembered.

    progress: of `total` schedules; batch_size: images in a pass.
    """

    def __init__(
        self, model: ElasticVAR, samples: Samples, batch_size: int, *, total: int = 0, progress: Progress
    ) -> None:
        self.model, self.samples, self.batch_size = model, samples, batch_size
        self._steps, self._found = Steps(progress, total), {}

    def __len__(self) -> int:
        return len(self.samples.labels)

    def __call__(self, schedule: Schedule) -> np.ndarray:
        """Nats per token of each image at each scale: (N, K) float64. Raises InputError where one is not a number."""
        if schedule not in self._found:
            self._found[schedule] = self._measure(schedule)
            if not np.isfinite(self._found[schedule]).all():
                raise InputError(f"the loss under {schedule} is not a number: the weights, or the data, are bad")
            self._steps.step(f"losses: {schedule}")
        return self._found[schedule]

    def of_image(self, schedule: Schedule) -> np.ndarray:
        """`whole` of each image: (N,) float64."""
        return whole(self(schedule))

    @torch.no_grad()
    def _measure(self, schedule: Schedule) -> np.ndarray:
        labels, tokens, _, _ = self.samples
        counts, parts = [side**2 for side in schedule.patch_nums], []
        with fitting_memory(self.model.device, self.batch_size, "choose a smaller --batch-size"):
            for few in zip(labels.split(self.batch_size), tokens.split(self.batch_size), strict=True):
                few_labels, few_tokens = (part.to(self.model.device) for part in few)
                log_probs = self.model.forward(few_labels, few_tokens, schedule).log_softmax(-1)
                losses = CrossEntropy()(log_probs, Targets(few_tokens)).double()
                parts.append(torch.stack([scale.mean(1) for scale in losses.split(counts, dim=1)], dim=1).cpu())
        return torch.cat(parts).numpy()


def whole(losses: np.ndarray) -> np.ndarray:
    """Losses per token at each scale (..., K) -> of the image (...): every scale weighs the same.

    Each covers the whole image, so that a token weighs as much as the part of the image that it decides. By number of
    tokens, as in training, the first six of ten scales would be an eighth of the loss, and on the embedded model the
    loss would say less of the scores (docs/evaluation.md).
    """
    return losses.mean(-1)


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """The mean over images (N,) and its standard error."""
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def interval(mean: float, error: float) -> list[float]:
    """The 95 % interval of a mean over many images."""
    return [mean - NORMAL * error, mean + NORMAL * error]


def increase(losses: ImageLosses, schedule: Schedule, full: Schedule) -> Increase:
    """The loss under a schedule, and by how much it is more than under `full`, image by image."""
    found = {"schedule": str(schedule)}
    more = losses(schedule) - losses(full)
    for name, values in (("loss", losses(schedule)), ("increase", more)):
        found[name], found[f"{name}_error"] = mean_and_error(whole(values))
        scales = [mean_and_error(scale) for scale in values.T]
        found[f"{name}_per_scale"], found[f"{name}_per_scale_error"] = map(list, zip(*scales, strict=True))
    return found
