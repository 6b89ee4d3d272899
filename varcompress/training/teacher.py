"""The teacher: the network that a run starts from, frozen, and what it says of the next tokens.

Every schedule learns its distributions over the codebook (arXiv 1503.02531). The network in training is no teacher:
what it has lost it would teach.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from varcompress.data.tokens import DONE, PENDING, Rows, Samples, TokenData
from varcompress.distributed import Ranks
from varcompress.errors import InputError
from varcompress.files import disk_errors, write_json
from varcompress.fingerprint import weights_digest
from varcompress.hardware import to_numpy
from varcompress.models.transformer import VAR, VARConfig, to_dtype
from varcompress.progress import Progress
from varcompress.schedule import Schedule
from varcompress.training.losses import Distribution
from varcompress.training.parallel import parallelize

META, STATES, LOG_PROBS, TOKENS = "teacher.json", "states.npy", "log_probs.npy", "tokens.npy"


class Teacher:
    """A frozen copy of a transformer, whose logits of the full network are the targets.

    dtype: "float32" or "bfloat16", of its weights; guided: whether its logits are those that generation with
    classifier-free guidance draws from; compiled: whether its layers run by torch.compile.
    """

    def __init__(
        self, var: VAR, full: Schedule, *, dtype: str = "float32", guided: bool = False, compiled: bool = False
    ) -> None:
        self._var, self._full, self._guided = copy.deepcopy(var).requires_grad_(False), full, guided
        to_dtype(self._var, getattr(torch, dtype))
        if compiled:
            self._var.compile_layers()

    @cached_property
    def digest(self) -> str:
        """Of its weights: seconds for a large model."""
        return weights_digest(self._var)

    def parallelize(self, how: str, ranks: Ranks) -> None:
        """Distribute its weights over the processes, which must all call it equally often from now on."""
        parallelize(self._var, how, ranks)

    @torch.no_grad()
    def __call__(self, samples: Samples, teacher_input: Tensor, cfg: Tensor | None = None) -> Distribution:
        """The distributions at each token of images: teacher_input (B, L - p_1^2, z_channels) of their tokens.

        cfg: (B,) float32, the weight of guidance at the last scale, where the teacher is guided.
        """
        labels = samples.labels.to(teacher_input.device)
        if not self._guided:
            return Distribution(self._logits(labels, teacher_input).log_softmax(-1))
        null = torch.full_like(labels, self._var.config.classes)
        both = self._logits(torch.cat((labels, null)), torch.cat((teacher_input, teacher_input)))
        return Distribution(guided_logits(*both.chunk(2), cfg, self._var.layout.scale).log_softmax(-1))

    def _logits(self, labels: Tensor, teacher_input: Tensor) -> Tensor:
        return self._var(labels, teacher_input, self._full)


class StoredTeacher:
    """What a teacher says of every token of a data set, computed once: its largest probabilities, in a directory.

    teacher.json says whose they are; log_probs.npy (images, views, labels, L, k + 1) float16 and tokens.npy (..., k)
    hold the k largest of each token and the rest, for the image's own label and, where labels are dropped, for the
    null class; states.npy says which images are done. Computing may stop at any moment and goes on where it stopped;
    several processes may share the work. The network itself is not needed any more.
    """

    def __init__(
        self, path: Path, data: TokenData, config: VARConfig, *, top: int, digest: str, settings: dict
    ) -> None:
        self.path, self._data, self._null = path, data, config.classes
        labels = 2 if settings["label_drop"] else 1
        images, views, tokens = data.tokens.shape
        self._shape, self._top = (images, views, labels, tokens), min(top, config.vocab)
        self._type = np.uint16 if config.vocab <= 2**16 else np.uint32
        self._meta = {"format": 1, "teacher": digest, "top": top, **settings}

    def create(self) -> None:
        """Make an empty store, or find the one that is there. Raises InputError where it is of another teacher."""
        if (self.path / META).is_file():
            try:
                found = dict(json.loads((self.path / META).read_text()))
            except (ValueError, TypeError) as error:
                raise InputError(f"{self.path / META}: damaged; delete {self.path} to compute anew") from error
            if other := [key for key in self._meta if found.get(key) != self._meta[key]]:
                raise InputError(
                    f"{self.path}: holds what a teacher said under another {' and another '.join(other)}: delete it, "
                    "or choose another directory for the tokens (--tokens)"
                )
            return
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            np.save(self.path / STATES, np.full(self._shape[0], PENDING, dtype=np.uint8))
            for name, dtype, count in ((LOG_PROBS, np.float16, self._top + 1), (TOKENS, self._type, self._top)):
                shape = (*self._shape, count)
                np.lib.format.open_memmap(self.path / name, mode="w+", dtype=dtype, shape=shape)
            write_json(self.path / META, self._meta)

    def compute(
        self, say: Callable[[Samples], Distribution], rank: int, ranks: int, progress: Progress, *, at_a_time: int
    ) -> None:
        """Compute this process's share of what is not done yet, some images at a time. say: their distributions."""
        states, rows = np.load(self.path / STATES), self._data.rows
        chunks = [range(i, min(i + at_a_time, len(rows))) for i in range(0, len(rows), at_a_time)]
        _, views, labels, _ = self._shape
        with (
            disk_errors(self.path),
            Rows(self.path / LOG_PROBS) as log_probs,
            Rows(self.path / TOKENS) as tokens,
            Rows(self.path / STATES) as marks,
        ):
            for chunk in chunks[rank::ranks]:
                if (states[rows[chunk.start : chunk.stop]] == DONE).all():
                    continue
                parts = [
                    [self._largest(say, np.array(chunk), view, null=bool(label)) for label in range(labels)]
                    for view in range(views)
                ]
                for file, part in ((log_probs, 0), (tokens, 1)):
                    values = np.stack([np.stack([found[part] for found in view], 1) for view in parts], 1)
                    for row, value in zip(rows[chunk.start : chunk.stop], values, strict=True):
                        file.write(int(row), value[None])
                for row in rows[chunk.start : chunk.stop]:
                    marks.write(int(row), np.array([DONE], dtype=np.uint8))
                progress(chunk.stop, len(rows), "teacher: what it says of the images")

    def _largest(
        self, say: Callable[[Samples], Distribution], places: np.ndarray, view: int, *, null: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        labels = np.full_like(places, self._null) if null else None
        found = say(self._data.samples(places, np.full_like(places, view), labels)).largest(self._top)
        return to_numpy(found.log_probs.half()), to_numpy(found.tokens).astype(self._type)

    def open(self) -> None:
        """Read from now on, memory-mapped."""
        self._log_probs, self._tokens = (np.load(self.path / name, mmap_mode="r") for name in (LOG_PROBS, TOKENS))

    def __call__(self, samples: Samples, teacher_input: Tensor, cfg: Tensor | None = None) -> Distribution:
        """The distributions at each token of images of the data set, as `Teacher` gives them but for the smallest."""
        null = (samples.labels == self._null).numpy().astype(np.int64)
        at = samples.rows, samples.views, null
        log_probs, tokens = torch.from_numpy(self._log_probs[at]), torch.from_numpy(self._tokens[at].astype(np.int64))
        device = teacher_input.device
        return Distribution(log_probs.to(device).float().log_softmax(-1), tokens.to(device))  # they were rounded


def guided_logits(conditional: Tensor, unconditional: Tensor, cfg: Tensor, scale: Tensor) -> Tensor:
    """What guided generation draws from: logits (B, L, V), twice, cfg (B,) and each token's scale (L,) -> (B, L, V).

    t = cfg k / (K - 1) at scale k of K, from 0, as `Sampling.guidance` has it; (1 + t) conditional - t unconditional.
    """
    weight = cfg[:, None] * (scale / scale[-1].clamp_min(1))
    return torch.lerp(unconditional, conditional, 1 + weight[..., None])
