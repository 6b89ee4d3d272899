"""The token store: a data set as the tokenizer sees it, encoded once and read many times."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from varcompress.data.interface import Source
from varcompress.data.streams import HOLDOUT, SAMPLE, fractions, words
from varcompress.errors import InputError
from varcompress.files import disk_errors, write_json
from varcompress.fingerprint import weights_digest
from varcompress.images import to_numpy
from varcompress.models.elastic import ElasticVAR
from varcompress.progress import Progress, silent

CHUNK = 32  # images encoded at a time
AHEAD = 2  # chunks that are read while one is encoded
FORMAT = 2  # 1 held no labels
META, TOKENS, STATES, LABELS = FILES = "store.json", "tokens.npy", "states.npy", "labels.npy"
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
        held, kept = np.split(holdout_order(len(self)), [count])
        return tuple(
            replace(self, rows=self.rows[part], labels=self.labels[part]) for part in map(np.sort, (kept, held))
        )


def holdout_order(count: int) -> np.ndarray:
    """The order in which images of a data set are held out of training: (count,) places, the same in every run."""
    return words(0, HOLDOUT, 0, count)[0].argsort(stable=True).numpy()


class TokenStore:
    """The tokens of a source's images, in a directory that several runs may share.

    store.json says what was encoded by which tokenizer, states.npy which images are done, labels.npy their classes;
    tokens.npy holds (images, views, L). Encoding may stop at any moment and goes on where it stopped; several
    processes may encode their shares of one store at a time. A finished store needs its images no more: it is a
    source itself, `StoredTokens`. What is computed from the tokens has its place in `aside`.
    """

    def __init__(
        self, path: str | Path, source: Source, model: ElasticVAR, views: int, *, aside: Path | None = None
    ) -> None:
        self.path, self.source, self.model, self.views = Path(path), source, model, views
        self.aside = aside or self.path

    @cached_property
    def _meta(self) -> dict:
        """What store.json says."""
        config = self.model.tokenizer.config
        return {
            "format": FORMAT,
            "images": self.source.digest,
            "preprocessing": self.source.preprocessing,
            "tokenizer": tokenizer_digest(self.model),
            "image_size": config.image_size,
            "patch_nums": list(config.patch_nums),
            "views": self.views,
        }

    def check(self) -> None:
        """Raises InputError when the directory holds something else, or the tokens of other images, another
        preprocessing, another tokenizer or other views."""
        if is_store(self.path):
            self._compare(self._meta)
        elif self.path.exists() and not (self.path.is_dir() and self._is_ours()):
            raise InputError(f"{self.path}: holds something else already: choose another directory for the tokens")

    def create(self) -> None:
        """Make an empty store, or find the one that is there. Raises InputError as `check` does."""
        self.check()
        if is_store(self.path):
            return
        count, length = len(self.source), self.model.var.config.tokens
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            np.save(self.path / STATES, np.full(count, PENDING, dtype=np.uint8))
            np.save(self.path / LABELS, self.source.labels)
            shape = (count, self.views, length)
            np.lib.format.open_memmap(self.path / TOKENS, mode="w+", dtype=_token_type(self.model), shape=shape)
            write_json(self.path / META, self._meta)

    def _compare(self, meta: dict) -> None:
        """Refuse a store that holds anything else than these tokens, and say what is other."""
        found, stored = read_meta(self.path), isinstance(self.source, StoredTokens)
        other = [key for key, value in meta.items() if found.get(key) != value]
        if other == ["views"]:
            raise InputError(
                f"{self.path}: holds tokens with views {found['views']}, not {self.views}: ask for {found['views']} "
                "(views in a recipe, --views of tokenize), or encode the images anew"
            )
        if other:
            remedy = "encode the images anew with this model" if stored else "choose another directory for the tokens"
            raise InputError(f"{self.path}: holds tokens made with another {' and another '.join(other)}: {remedy}")

    def _is_ours(self) -> bool:
        """Whether the directory is empty, but for what a killed process leaves before it writes store.json."""
        return all(file.name in FILES or file.suffix == ".tmp" for file in self.path.iterdir())

    def encode(self, rank: int = 0, ranks: int = 1, progress: Progress = silent) -> int:
        """Encode what is not done yet of this process's share, one stretch of the images, read in ascending order.

        Returns how many images it encoded. Raises InputError where they could no longer be read, or written.
        """
        states = _array(self.path, STATES)
        chunks = [range(i, min(i + CHUNK, len(states))) for i in range(0, len(states), CHUNK)]
        share = chunks[len(chunks) * rank // ranks : len(chunks) * (rank + 1) // ranks]
        todo = [chunk for chunk in share if (states[chunk.start : chunk.stop] == PENDING).any()]
        if not todo:  # of a store that may lie where nothing can be written
            return 0
        size = self.model.tokenizer.config.image_size
        done = len(share) - len(todo)
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
        return sum(map(len, todo))

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return _size(self.path)

    def read(self) -> TokenData:
        """The finished store, memory-mapped. Raises InputError when no image could be read, or a file is damaged."""
        states, labels, tokens = _arrays(self.path)
        rows = np.flatnonzero(states == DONE)
        if not len(rows):
            raise InputError(
                f"{self.source.name}: none of its {len(states)} files is a readable image: "
                "check that the folder is the right one"
            )
        skipped = tuple(self.source.item(i) for i in np.flatnonzero(states == UNREADABLE))
        return TokenData(tokens, rows, labels[rows], skipped)


@dataclass(frozen=True)
class StoredTokens:
    """A finished token store as a `Source`: its tokens are all that is left of the images."""

    name: str
    path: Path
    digest: str
    preprocessing: str
    labels: np.ndarray  # (N,) int64, of unreadable images too

    def __len__(self) -> int:
        return len(self.labels)

    def item(self, index: int) -> str:
        return f"image {index}"

    def read(self, index: int, size: int, views: int) -> np.ndarray | None:
        """Raises InputError: of the images there is nothing but tokens."""
        raise InputError(f"{self.name}: holds the tokens of its images, not the images")


def is_store(path: str | Path) -> bool:
    """Whether a directory is a token store, finished or not."""
    return (Path(path) / META).is_file()


def read_meta(path: Path) -> dict:
    """What store.json says. Raises InputError for a file that is damaged or of another version."""
    try:
        meta = dict(json.loads((path / META).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path / META}: damaged; delete {path} to encode anew") from error
    if meta.get("format") != FORMAT:
        raise InputError(
            f"{path}: holds tokens in format {meta.get('format')}, and this version of varcompress reads {FORMAT}: "
            "delete it, or choose another directory, and encode the images anew"
        )
    return meta


def finished_store(path: str | Path, name: str | None = None) -> StoredTokens:
    """A finished store as a source, under the name that messages are to use.

    Raises InputError for one that is damaged, of another version, or not finished.
    """
    path = Path(path)
    meta, (states, labels, _) = read_meta(path), _arrays(path)
    if missing := int((states == PENDING).sum()):
        raise InputError(
            f"{name or path}: {missing:,} of its {len(states):,} images are not encoded yet: finish it with "
            "varcompress tokenize and the images, or give these"
        )
    return StoredTokens(name or str(path), path, meta["images"], meta["preprocessing"], labels)


def store_facts(path: Path) -> dict:
    """What there is to say of a finished store: all of store.json, and "num_images", "skipped", "labels", "length" (of
    a view, in tokens), "bytes". Raises InputError as `finished_store` does."""
    finished_store(path)
    states, labels, tokens = _arrays(path)
    return {
        **read_meta(path),
        "num_images": int((states == DONE).sum()),
        "skipped": int((states == UNREADABLE).sum()),
        "labels": len(np.unique(labels)),
        "length": tokens.shape[-1],
        "bytes": _size(path),
    }


def _size(path: Path) -> int:
    return sum((path / name).stat().st_size for name in FILES)


def store_of(source: Source, model: ElasticVAR, views: int, *, path: str | Path | None, work: Path) -> TokenStore:
    """The store of a source's tokens: at `path`, else in the directory `work`.

    A source that is a store keeps its own: an InputError where `path` names another.
    """
    if not isinstance(source, StoredTokens):
        return TokenStore(path or work, source, model, views)
    if path is not None:
        raise InputError(
            f"{source.name}: is a token store itself, which has its own place: leave out tokens (--tokens)"
        )
    return TokenStore(source.path, source, model, views, aside=work)


def tokenizer_digest(model: ElasticVAR) -> str:
    """SHA-256 of what makes tokens of images: encoder and quantiser, whatever dtype the decoder runs in."""
    tokenizer = model.tokenizer
    return weights_digest(nn.ModuleList([tokenizer.encoder, tokenizer.quant_conv, tokenizer.quantize]))


def _arrays(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """States (N,), labels (N,) and tokens (N, views, L) of a store, the last memory-mapped. InputError if damaged."""
    states, labels, tokens = (_array(path, name) for name in (STATES, LABELS, TOKENS))
    if states.ndim != 1 or labels.shape != states.shape or tokens.ndim != 3 or len(tokens) != len(states):
        raise InputError(f"{path}: damaged: its files are of different numbers of images; encode the images anew")
    return states, labels, tokens


def _array(path: Path, name: str) -> np.ndarray:
    try:
        return np.load(path / name, mmap_mode="r" if name == TOKENS else None)
    except (OSError, EOFError, ValueError) as error:
        raise InputError(f"{path / name}: damaged; delete {path} to encode anew") from error


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
    def draw(
        cls, data: TokenData, *, seed: int, epoch: int, label_drop: float, null: int, own_view: bool = False
    ) -> Epoch:
        """The pass that belongs to (seed, epoch). An image's view and dropped label do not depend on the others.

        own_view: every image is seen in the view whose number is the epoch's, not in one of all that is drawn.
        """
        order, view, drop, _ = words(seed, SAMPLE, epoch, len(data))
        order = order.argsort(stable=True).numpy()
        labels = np.where((fractions(drop) < label_drop).numpy(), null, data.labels)
        views = np.full(len(data), epoch) if own_view else (fractions(view) * data.tokens.shape[1]).long().numpy()
        return cls(data, order, views[order], labels[order])

    def samples(self, places: slice) -> Samples:
        """The images at these places of the pass."""
        return self.data.samples(self.order[places], self.views[places], self.labels[places])
