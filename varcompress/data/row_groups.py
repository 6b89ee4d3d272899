"""Parquet files on the Hub, read where they lie: one column whole, another row by row."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from varcompress.errors import InputError
from varcompress.hub import hub_errors

if TYPE_CHECKING:
    from fsspec.spec import AbstractBufferedFile
    from huggingface_hub import HfFileSystem
    from pyarrow import ChunkedArray
    from pyarrow.parquet import FileMetaData

AHEAD = 2  # row groups that are fetched before they are read
SPREAD = 256  # how many images apart the threads may be that read at the same time


def file_hashes(urls: Sequence[str]) -> list[str]:
    """What identifies the contents of files on the Hub: Git's hash, of a large file that of its SHA-256."""
    return [_hub().info(url)["blob_id"] for url in urls]


def open_remote(url: str) -> AbstractBufferedFile:
    """A file on the Hub by its URL, hf://…: what is read of it is fetched, and nothing else."""
    return _hub().open(url, cache_type="none")


def _hub() -> HfFileSystem:
    from huggingface_hub import HfFileSystem, constants

    return HfFileSystem(endpoint=constants.ENDPOINT)  # each thread's own, which knows what others listed


def read_column(url: str, column: str) -> tuple[FileMetaData, ChunkedArray]:
    """What a file says of itself, and one of its columns."""
    from pyarrow.parquet import ParquetFile

    with open_remote(url) as file:
        parquet = ParquetFile(file)
        return parquet.metadata, parquet.read(columns=[column]).column(column)


class RowGroups:
    """Encoded images in a column of parquet files, which are fetched by row groups while they are read.

    Several threads may read, best in ascending order. The row groups read last stay in memory, and the next ones come
    before they are asked for. Once one could not be fetched, however often the client tried, all others fail alike.
    """

    def __init__(self, name: str, urls: tuple[str, ...], metadata: tuple[FileMetaData, ...], column: str) -> None:
        self.name, self.urls, self.metadata, self.column = name, urls, metadata, column
        self._places = [(file, group) for file, meta in enumerate(metadata) for group in range(meta.num_row_groups)]
        rows = [metadata[file].row_group(group).num_rows for file, group in self._places]
        self._firsts = np.cumsum([0, *rows])
        # those ahead, those that the threads are in, and one for each end that lies inside a row group
        self.most = AHEAD + 2 + SPREAD * len(rows) // max(1, sum(rows))
        self._kept: OrderedDict[int, Future[ChunkedArray]] = OrderedDict()
        self._lock, self._pool = threading.Lock(), ThreadPoolExecutor(1 + AHEAD)
        self._failure: InputError | None = None

    def __reduce__(self) -> tuple:
        return RowGroups, (self.name, self.urls, self.metadata, self.column)

    def read(self, index: int) -> bytes | None:
        """The file of image `index`, None where there is none. Raises InputError where it cannot be fetched."""
        group = int(np.searchsorted(self._firsts, index, side="right")) - 1
        return self._fetched(group).result()[int(index - self._firsts[group])].as_py()

    def _fetched(self, group: int) -> Future[ChunkedArray]:
        """A row group that is here or on its way, as are the next ones then."""
        with self._lock:
            for wanted in range(group, min(group + AHEAD + 1, len(self._places))):
                if wanted not in self._kept:
                    self._kept[wanted] = self._pool.submit(self._fetch, wanted)
                self._kept.move_to_end(wanted)
            while len(self._kept) > self.most:
                self._kept.popitem(last=False)
            return self._kept[group]

    def _fetch(self, group: int) -> ChunkedArray:
        import pyarrow as pa
        import pyarrow.compute as pc
        from datasets import Image
        from pyarrow.parquet import ParquetFile

        if self._failure:
            raise self._failure
        file, place = self._places[group]
        try:
            with hub_errors(f"cannot read {self.name}"), open_remote(self.urls[file]) as opened:
                parquet = ParquetFile(opened, metadata=self.metadata[file], pre_buffer=True)
                images = parquet.read_row_group(place, columns=[self.column]).column(self.column)
                stored = [pc.struct_field(Image().cast_storage(chunk), "bytes") for chunk in images.chunks]
                return pa.chunked_array(stored, pa.binary())
        except InputError as error:
            self._failure = error
            raise
