"""The token store: a data set as the tokenizer sees it, encoded once and read many times."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from varcompress.data.sources import Source
from varcompress.data.streams import HOLDOUT, SAMPLE, fractions, words
from varcompress.errors import InputError
from varcompress.files import disk_errors, write_json
from varcompress.fingerprint import weights_digest
from varcompress.images import to_numpy
from varcompress.models.elastic import ElasticVAR
from varcompress.progress import Progress, silent

CHUNK = 32  # images encoded at a time
AHEAD = 2  # chunks that are read while one is encoded
META, TOKENS, STATES = "store.json", "tokens.npy", "states.npy"
PENDING, DONE, UNREADABLE = 0, 1, 2


class Samples(NamedTuple):
    """Images to train on: labels (B,) and tokens (B, L), int64, and their rows and views (B,) in the store."""

    labels: Tensor
    tokens: Tensor
    rows: np.ndarray
    views: np.ndarray


@dataclass(frozen=True)
class TokenData:
    """Tokens and labels of a data set.

    tokens: (images, views, L) uint16 or wider, perhaps memory-mapped; rows: (N,) the images that
    could be read; labels: (N,) int64; skipped: names of the images that could not.
    """

    tokens: np.ndarray
    rows: np.ndarray
    labels: np.ndarray
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def samples(self, places: np.ndarray, views: np.ndarray, labels: np.ndarray | None = None) -> Samples:
        """The images at these places of `rows`, in these views; labels: in place of their own."""
        rows = self.rows[places]
        tokens = torch.from_numpy(self.tokens[rows, views].astype(np.int64))
        return Samples(torch.from_numpy(self.labels[places] if labels is None else labels), tokens, rows, views)

    def split(self, count: int) -> tuple[TokenData, TokenData]:
        """Two parts of the data: all but `count` images, and those, which are the same for runs of every seed."""
        order = words(0, HOLDOUT, 0, len(self))[0].argsort(stable=True).numpy()
        held, kept = np.split(order, [count])
        return tuple(
            replace(self, rows=self.rows[part], labels=self.labels[part]) for part in map(np.sort, (kept, held))
        )


class TokenStore:
    """The tokens of a source's images, in a directory that several runs may share.

    store.json says what was encoded by which tokenizer, states.npy which images are done, tokens.npy
    holds (images, views, L). Encoding may stop at any moment and goes on where it stopped; several
    processes may encode their shares of one store at a time.
    """

    def __init__(self, path: str | Path, source: Source, model: ElasticVAR, views: int) -> None:
        self.path, self.source, self.model, self.views = Path(path), source, model, views

    def create(self) -> None:
        """Make an empty store, or find the one that is there.

        Raises InputError when the directory holds something else, or the tokens of other images,
        another preprocessing, another tokenizer or other views.
        """
        meta = {
            "format": 1,
            "images": self.source.digest,
            "preprocessing": self.source.preprocessing,
            "tokenizer": weights_digest(self.model.tokenizer),
            "image_size": self.model.tokenizer.config.image_size,
            "views": self.views,
        }
        if (self.path / META).is_file():
            try:
                found = json.loads((self.path / META).read_text())
            except ValueError as error:
                raise InputError(f"{self.path / META}: damaged; delete {self.path} to encode anew") from error
            other = [key for key, value in meta.items() if found.get(key) != value]
            if other:
                raise InputError(
                    f"{self.path}: holds tokens made with another {' and another '.join(other)}; "
                    "choose another directory for the tokens"
                )
            return
        if self.path.exists() and not (self.path.is_dir() and self._is_ours()):
            raise InputError(f"{self.path}: holds something else already: choose another directory for the tokens")
        count, length = len(self.source), self.model.var.config.tokens
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            np.save(self.path / STATES, np.full(count, PENDING, dtype=np.uint8))
            shape = (count, self.views, length)
            np.lib.format.open_memmap(self.path / TOKENS, mode="w+", dtype=_token_type(self.model), shape=shape)
            write_json(self.path / META, meta)

    def _is_ours(self) -> bool:
        """Whether the directory is empty, but for what a killed process leaves before it writes store.json."""
        return all(file.name in (TOKENS, STATES) or file.suffix == ".tmp" for file in self.path.iterdir())

    def encode(self, rank: int = 0, ranks: int = 1, progress: Progress = silent) -> None:
        """Encode this process's share of the images that are not done yet."""
        states = np.load(self.path / STATES)
        chunks = [range(i, min(i + CHUNK, len(states))) for i in range(0, len(states), CHUNK)]
        todo = [chunk for chunk in chunks[rank::ranks] if (states[chunk.start : chunk.stop] == PENDING).any()]
        size = self.model.tokenizer.config.image_size
        done = len(chunks[rank::ranks]) - len(todo)
        with disk_errors(self.path), Rows(self.path / TOKENS) as tokens, Rows(self.path / STATES) as marks:
            read = partial(self.source.read, size=size, views=self.views)
            for chunk, images in _read_ahead(todo, read):
                readable = [i for i, image in enumerate(images) if image is not None]
                rows = np.zeros((len(chunk), self.views, self.model.var.config.tokens), dtype=_token_type(self.model))
                for view in range(self.views if readable else 0):
                    pixels = torch.from_numpy(np.stack([images[i][view] for i in readable])).to(self.model.device)
                    encoded = self.model.encode(pixels.float() / 255 if pixels.dtype is torch.uint8 else pixels)
                    rows[readable, view] = to_numpy(encoded)  # which narrows them
                tokens.write(chunk.start, rows)
                state = [UNREADABLE if image is None else DONE for image in images]
                marks.write(chunk.start, np.array(state, dtype=np.uint8))
                done += 1
                progress(min(done * CHUNK * ranks, len(states)), len(states), "encode: images to tokens")

    def read(self) -> TokenData:
        """The finished store, memory-mapped. Raises InputError when no image could be read."""
        states = np.load(self.path / STATES)
        rows = np.flatnonzero(states == DONE)
        if not len(rows):
            raise InputError(
                f"{self.source.name}: none of its {len(states)} files is a readable image: "
                "check that the folder is the right one"
            )
        skipped = tuple(self.source.item(i) for i in np.flatnonzero(states == UNREADABLE))
        return TokenData(np.load(self.path / TOKENS, mmap_mode="r"), rows, self.source.labels[rows], skipped)


class Rows:
    """Writes rows of a .npy file in place. Plain writes, because a full disk kills the writer of a memory map."""

    def __init__(self, path: Path) -> None:
        array = np.load(path, mmap_mode="r")
        self._start, self._row_bytes = array.offset, array.itemsize * int(np.prod(array.shape[1:]))
        self._file = path.open("r+b", buffering=0)

    def __enter__(self) -> Rows:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, first: int, rows: np.ndarray) -> None:
        data = memoryview(np.ascontiguousarray(rows)).cast("B")
        self._file.seek(self._start + first * self._row_bytes)
        while data:
            data = data[self._file.write(data) :]


def _read_ahead(chunks: Iterable[range], read: Callable[[int], np.ndarray | None]) -> Iterator[tuple[range, list]]:
    """Each chunk with its images, read by threads while earlier chunks are encoded."""
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        waiting: deque = deque()
        for chunk in chunks:
            waiting.append((chunk, [pool.submit(read, i) for i in chunk]))
            if len(waiting) > AHEAD:
                first, futures = waiting.popleft()
                yield first, [future.result() for future in futures]
        for first, futures in waiting:
            yield first, [future.result() for future in futures]


def _token_type(model: ElasticVAR) -> type:
    return np.uint16 if model.var.config.vocab <= 2**16 else np.uint32


@dataclass(frozen=True)
class Epoch:
    """One pass over a data set: an order of the images, the view of each, and the label it is trained with."""

    data: TokenData
    order: np.ndarray  # (N,) places in data.rows
    views: np.ndarray  # (N,)
    labels: np.ndarray  # (N,) int64, dropped ones replaced by the null class

    @classmethod
    def draw(cls, data: TokenData, *, seed: int, epoch: int, label_drop: float, null: int) -> Epoch:
        """The pass that belongs to (seed, epoch). An image's view and dropped label do not depend on the others."""
        order, view, drop, _ = words(seed, SAMPLE, epoch, len(data))
        order = order.argsort(stable=True).numpy()
        labels = np.where((fractions(drop) < label_drop).numpy(), null, data.labels)
        views = (fractions(view) * data.tokens.shape[1]).long().numpy()
        return cls(data, order, views[order], labels[order])

    def samples(self, places: slice) -> Samples:
        """The images at these places of the pass."""
        return self.data.samples(self.order[places], self.views[places], self.labels[places])
