"""Data sets on the Hub: images in parquet files, read where they lie, or a token store that was pushed."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from varcompress.data.crops import CROPS, crops
from varcompress.data.interface import Source
from varcompress.data.row_groups import RowGroups, file_hashes, open_remote, read_column
from varcompress.data.tokens import FILES, META, StoredTokens, finished_store
from varcompress.errors import InputError
from varcompress.hub import hub_client, hub_errors, reachable
from varcompress.images import open_rgb

if TYPE_CHECKING:
    from datasets import Features
    from pyarrow import ChunkedArray

PREFIX, SPLIT = "hf:", "train"
PARQUET, CONVERTED = ".parquet", "refs/convert/parquet"
ADDRESS = re.compile(
    r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w.-]+))?(?:@(?P<revision>[^:]+))?(?::(?P<split>.+))?"
)
IMAGE_NAMES, LABEL_NAMES = ("image", "img", "jpg"), ("label", "labels", "cls")  # decide between several columns
READERS = 16  # files whose labels are read at the same time


@dataclass(frozen=True)
class HubImages:
    """The images of one split: a `Source`. They are fetched while they are read, and none is kept on the disk."""

    name: str
    images: RowGroups
    labels: np.ndarray  # (N,) int64
    digest: str  # of the hashes of all files, the column that is read, and the labels
    preprocessing = CROPS

    def __len__(self) -> int:
        return len(self.labels)

    def item(self, index: int) -> str:
        return f"image {index}"

    def read(self, index: int, size: int, views: int) -> np.ndarray | None:
        """Views of one image, as `crops` makes them. Raises InputError where it cannot be fetched."""
        content = self.images.read(index)
        return crops(open_rgb(io.BytesIO(content)) if content else None, index, size, views)


def open_hub(address: str) -> Source:
    """A data set by its address, hf:OWNER/NAME[/CONFIG][@REVISION][:SPLIT]; the split is train unless it is named.

    Raises InputError for an address that is none, and for whatever the Hub refuses, or does not hold.
    """
    match = ADDRESS.fullmatch(address)
    if not match:
        raise InputError(f"{address}: write a data set on the Hub as hf:OWNER/NAME, hf:OWNER/NAME:validation or such")
    online = reachable()
    return _stored(address, match["repo"], match["revision"], online) or _images(address, online, **match.groupdict())


# -- tokens -------------------------------------------------------------------------------------


def _stored(address: str, repo: str, revision: str | None, online: bool) -> StoredTokens | None:
    """The token store that a repository holds, downloaded; None where it holds something else."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError

    with hub_client(f"cannot load {address}", revision):
        options = {"repo_type": "dataset", "local_files_only": not online}
        try:
            meta = Path(hf_hub_download(repo, META, revision=revision, **options))
        except EntryNotFoundError:  # on the Hub, or, where that cannot be asked, among what lies here
            return None
        commit = meta.parent.name  # all files come from that one
        folder = snapshot_download(repo, revision=commit, allow_patterns=list(FILES), **options)
    return finished_store(folder, address)


# -- images -------------------------------------------------------------------------------------


def _images(
    address: str, online: bool, *, repo: str, config: str | None, revision: str | None, split: str | None
) -> HubImages:
    """A split of a data set of images, of which nothing but the labels is read here."""
    try:
        import datasets
        import pyarrow as pa
        from pyarrow.parquet import read_schema
    except ImportError as error:
        raise InputError(f"{address}: needs the datasets package: pip install 'varcompress[data]'") from error

    with hub_client(f"cannot load {address}", revision):
        if not online:
            raise ConnectionError
        where = {"data_dir": config or "default"} if revision == CONVERTED else {"name": config}
        builder = datasets.load_dataset_builder(repo, revision=revision, **where)  # which knows how to read the card
        converted = f"{PREFIX}{repo}/{builder.config.name}@{CONVERTED}:{split or SPLIT}"
        urls = _parquet(address, builder.config.data_files, split or SPLIT, converted)
        features = builder.info.features
        if features is None:
            with open_remote(urls[0]) as file:
                features = datasets.Features.from_arrow_schema(read_schema(file))
    image = _column(address, features, "image", IMAGE_NAMES, lambda kind: isinstance(kind, datasets.Image))
    label = _column(
        address, features, "label", LABEL_NAMES, lambda kind: isinstance(kind, datasets.ClassLabel), _is_integer
    )
    with hub_errors(f"cannot load {address}", revision), ThreadPoolExecutor(READERS) as pool:
        hashes = file_hashes(urls)
        metadata, columns = zip(*pool.map(partial(read_column, column=label), urls), strict=True)
        column = pa.chunked_array([chunk for part in columns for chunk in part.cast(pa.int64()).chunks], pa.int64())
    if column.null_count:
        raise InputError(f"{address}: image {_first_null(column)} has no label: choose another split")
    labels = column.to_numpy()
    digest = hashlib.sha256("\0".join([*hashes, image, ""]).encode() + labels.tobytes())
    return HubImages(address, RowGroups(address, urls, metadata, image), labels, digest.hexdigest())


def _parquet(address: str, files: Mapping[str, Sequence[str]], split: str, converted: str) -> tuple[str, ...]:
    """The URLs of a split's files, at one commit, in the order of their images. converted: where else to look."""
    if split not in files:
        raise InputError(f"{address}: has no split {split!r}, only {', '.join(map(str, files))}")
    urls = tuple(files[split])
    remedy = "download it, and give its folder or tar shards"
    if any("/partial-" in url for url in urls):
        raise InputError(f"{address}: is no more than the first part of a data set: {remedy}")
    if other := next((url for url in urls if not url.endswith(PARQUET)), None):
        name = other.rpartition("/")[2]
        raise InputError(f"{address}: is stored as {name}, not as parquet: try the Hub's own, {converted}, or {remedy}")
    return urls


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
