"""Data sets on the Hub: images and labels as the `datasets` package reads them, or a token store that was pushed."""

from __future__ import annotations

import hashlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from varcompress.data.crops import CROPS, crops
from varcompress.data.interface import Source
from varcompress.data.tokens import FILES, META, StoredTokens, finished_store
from varcompress.errors import InputError
from varcompress.hub import hub_client, reachable
from varcompress.images import open_rgb

if TYPE_CHECKING:
    from datasets import Dataset, Features
    from pyarrow import ChunkedArray

PREFIX, SPLIT = "hf:", "train"
ADDRESS = re.compile(
    r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w.-]+))?(?:@(?P<revision>[^:]+))?(?::(?P<split>.+))?"
)
IMAGE_NAMES, LABEL_NAMES = ("image", "img", "jpg"), ("label", "labels", "cls")  # decide between several columns


@dataclass(frozen=True)
class HubImages:
    """The images of one split, which lies here as an Arrow table: a `Source`."""

    name: str
    dataset: Dataset  # a single column, of encoded images
    column: str
    labels: np.ndarray  # (N,) int64
    digest: str  # of the sizes of all images, and of the labels
    preprocessing = CROPS

    def __len__(self) -> int:
        return len(self.dataset)

    def item(self, index: int) -> str:
        return f"image {index}"

    def read(self, index: int, size: int, views: int) -> np.ndarray | None:
        """Views of one image, as `crops` makes them."""
        found = self.dataset[int(index)][self.column] or {}
        content, path = found.get("bytes"), found.get("path")
        if not content and not path:
            return None
        return crops(open_rgb(io.BytesIO(content) if content else Path(path)), index, size, views)


def open_hub(address: str) -> Source:
    """A data set by its address, hf:OWNER/NAME[/CONFIG][@REVISION][:SPLIT]; the split is train unless it is named.

    Raises InputError for an address that is none, and for whatever the Hub refuses, or does not hold.
    """
    match = ADDRESS.fullmatch(address)
    if not match:
        raise InputError(f"{address}: write a data set on the Hub as hf:OWNER/NAME, hf:OWNER/NAME:validation or such")
    return _stored(address, match["repo"], match["revision"]) or _images(address, **match.groupdict())


# -- tokens -------------------------------------------------------------------------------------


def _stored(address: str, repo: str, revision: str | None) -> StoredTokens | None:
    """The token store that a repository holds, downloaded; None where it holds something else."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError

    with hub_client(f"cannot load {address}", revision):
        options = {"repo_type": "dataset", "local_files_only": not reachable()}
        try:
            meta = Path(hf_hub_download(repo, META, revision=revision, **options))
        except EntryNotFoundError:  # on the Hub, or, where that cannot be asked, among what lies here
            return None
        commit = meta.parent.name  # all files come from that one
        folder = snapshot_download(repo, revision=commit, allow_patterns=list(FILES), **options)
    return finished_store(folder, address)


# -- images -------------------------------------------------------------------------------------


def _images(address: str, *, repo: str, config: str | None, revision: str | None, split: str | None) -> HubImages:
    """A split of a data set of images, downloaded."""
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{address}: needs the datasets package: pip install 'varcompress[data]'") from error

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    with hub_client(f"cannot load {address}", revision):
        dataset = datasets.load_dataset(repo, config, split=split or SPLIT, revision=revision)
    image = _column(address, dataset.features, "image", IMAGE_NAMES, lambda kind: isinstance(kind, datasets.Image))
    label = _column(
        address, dataset.features, "label", LABEL_NAMES, lambda kind: isinstance(kind, datasets.ClassLabel), _is_integer
    )
    column = dataset.data.column(label)
    if column.null_count:
        raise InputError(f"{address}: image {_first_null(column)} has no label: choose another split")
    labels = column.to_numpy().astype(np.int64)
    images = dataset.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    digest = hashlib.sha256(labels.tobytes())
    for size in _sizes(images.data.column(image)):
        digest.update(f"{size}\0".encode())
    return HubImages(address, images, image, labels, digest.hexdigest())


def _column(address: str, features: Features, what: str, names: Sequence[str], *tests: Callable[[object], bool]) -> str:
    """The one column whose type passes the first test that any passes; names decide between several."""
    for test in tests:
        found = [name for name, kind in features.items() if test(kind)]
        chosen = found if len(found) == 1 else [name for name in found if name in names]
        if len(chosen) == 1:
            return chosen[0]
        if found:
            raise InputError(f"{address}: any of the columns {', '.join(found)} may hold the {what}s: one must")
    kinds = ", ".join(
        f"{name} ({getattr(kind, 'dtype', None) or type(kind).__name__})" for name, kind in features.items()
    )
    raise InputError(f"{address}: has no column of {what}s, only {kinds}: give a data set of images and their classes")


def _is_integer(kind: object) -> bool:
    return "int" in str(getattr(kind, "dtype", ""))


def _first_null(column: ChunkedArray) -> int:
    return int(np.flatnonzero(column.is_null().to_numpy())[0])


def _sizes(column: ChunkedArray) -> Iterator[int]:
    """Bytes of each encoded image, without reading them: a table holds where each begins, or names its file."""
    import pyarrow.compute as pc

    for chunk in column.chunks:
        paths = pc.struct_field(chunk, "path")
        for size, path in zip(pc.binary_length(pc.struct_field(chunk, "bytes")).to_pylist(), paths, strict=True):
            if size is None and path.is_valid and os.path.isfile(path.as_py()):
                size = os.path.getsize(path.as_py())
            yield size or 0
