"""Tar shards in the layout of webdataset: the image KEY.jpg beside its class KEY.cls, many of them to a tar file."""

from __future__ import annotations

import glob
import hashlib
import io
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from varcompress.data.crops import CROPS, crops
from varcompress.data.interface import check_labels
from varcompress.errors import InputError
from varcompress.images import open_rgb

SUFFIX, LABEL = ".tar", "cls"
IMAGES = ("jpg", "jpeg", "png", "webp")
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")


class Place(NamedTuple):
    """Where a member of a tar file lies in it."""

    name: str
    offset: int  # of its first byte
    size: int


@dataclass(frozen=True)
class TarShards:
    """The images of tar files, not yet opened: a `Source`. They are read where they lie, in any order."""

    name: str
    files: tuple[Path, ...]
    keys: tuple[str, ...]  # of the samples, in the order of the files and in them
    shards: np.ndarray  # (N,) int32, of which file each image is a part
    offsets: np.ndarray  # (N,) int64, its first byte there
    sizes: np.ndarray  # (N,) int64, in bytes
    labels: np.ndarray  # (N,) int64
    digest: str  # of the names and sizes of all images, and of the labels
    preprocessing = CROPS

    def __len__(self) -> int:
        return len(self.keys)

    def item(self, index: int) -> str:
        return f"{self.files[self.shards[index]].name}/{self.keys[index]}"

    def read(self, index: int, size: int, views: int) -> np.ndarray | None:
        """Views of one image, as `crops` makes them. Raises InputError where its shard is gone."""
        path = self.files[self.shards[index]]
        try:
            with open(path, "rb", buffering=0) as file:
                file.seek(self.offsets[index])
                content = file.read(int(self.sizes[index]))
        except OSError as error:
            raise InputError(f"{path}: could not be read ({error.strerror})") from error
        return crops(open_rgb(io.BytesIO(content)), index, size, views)


def is_shards(data: str | Path) -> bool:
    """Whether this is a tar file, a pattern of tar files, or a folder that holds some and no other folders."""
    path = Path(data)
    if not path.is_dir():
        return path.suffix == SUFFIX
    inside = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
    return any(entry.suffix == SUFFIX for entry in inside) and not any(entry.is_dir() for entry in inside)


def index_shards(data: str | Path, classes: int) -> TarShards:
    """Find all samples of tar files, by one pass over the headers of their members.

    data: a folder of .tar files, one of them, or a pattern, such as train-{0000..0146}.tar or train-*.tar. Raises
    InputError for a file that is missing, compressed, cut off or damaged, a sample that lacks its image or its class,
    and a label that is none of `classes`.
    """
    files, keys, shards, offsets, sizes, labels = _files(data), [], [], [], [], []
    digest = hashlib.sha256()
    for shard, path in enumerate(files):
        for key, image, label in _samples(path):
            keys.append(key)
            shards.append(shard)
            offsets.append(image.offset)
            sizes.append(image.size)
            labels.append(label)
            digest.update(f"{path.name}/{image.name}\0{image.size}\0{label}\0".encode())
    arrays = (np.array(shards, np.int32), *(np.array(column, np.int64) for column in (offsets, sizes, labels)))
    source = TarShards(str(data), files, tuple(keys), *arrays, digest.hexdigest())
    check_labels(source, classes)
    return source


def _files(data: str | Path) -> tuple[Path, ...]:
    if Path(data).is_dir():
        return tuple(sorted(Path(data).glob(f"*{SUFFIX}")))
    found: list[Path] = []
    for pattern in [str(data)] if Path(data).is_file() else _expanded(str(data)):
        paths = sorted(glob.glob(pattern)) if glob.has_magic(pattern) and not Path(pattern).is_file() else [pattern]
        if not paths:
            raise InputError(f"{pattern}: no tar file has such a name")
        found += map(Path, paths)
    return tuple(found)


def _expanded(pattern: str) -> Iterator[str]:
    """The names that a pattern with braces stands for, as in a shell: {0000..0146}, {a,b}."""
    match = BRACES.search(pattern)
    if not match:
        yield pattern
        return
    choices = match[1].split(",")
    if limits := RANGE.fullmatch(match[1]):
        first, last = map(int, limits.groups())
        choices = [f"{number:0{len(limits[1])}}" for number in range(first, last + 1)]
    for choice in choices:
        yield from _expanded(pattern[: match.start()] + choice + pattern[match.end() :])


def _samples(path: Path) -> Iterator[tuple[str, Place, int]]:
    """Key, image and label of each sample of a tar file, in the order in which their keys come up."""
    images: dict[str, Place] = {}
    labels: dict[str, int] = {}
    keys: dict[str, None] = {}
    for key, place, content in _members(path):
        if key in (images if content is None else labels):
            raise InputError(f"{path}: sample {key} is there twice: give each sample a key of its own")
        keys[key] = None
        if content is None:
            images[key] = place
        else:
            labels[key] = _label(content, path, key)
    for key in keys:
        if key not in labels:
            raise InputError(f"{path}: sample {key} has no {LABEL}: add {key}.{LABEL} with the number of its class")
        if key not in images:
            raise InputError(
                f"{path}: sample {key} has no image ({', '.join(IMAGES)}): add it, or take out its {LABEL}"
            )
        yield key, images[key], labels[key]


def _members(path: Path) -> Iterator[tuple[str, Place, bytes | None]]:
    """Key and place of each image and each label in a tar file, and the content of a label."""
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # or it keeps all of them
                folder, slash, base = member.name.rpartition("/")
                stem, _, kind = base.partition(".")
                if member.isreg() and stem and kind.lower() in (LABEL, *IMAGES):
                    content = tar.extractfile(member).read() if kind.lower() == LABEL else None
                    yield f"{folder}{slash}{stem}", Place(member.name, member.offset_data, member.size), content
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # which tarfile takes for the end
                raise InputError(f"{path}: is cut off or damaged at byte {tar.offset:,}: fetch it anew")
    except (tarfile.TarError, EOFError) as error:
        raise InputError(f"{path}: not a whole tar file ({error}); it must not be compressed: fetch it anew") from error
    except OSError as error:
        raise InputError(f"{path}: could not be read ({error.strerror})") from error


def _label(content: bytes, path: Path, key: str) -> int:
    text = content.decode("ascii", errors="replace").strip()
    if not re.fullmatch(r"-?\d{1,18}", text):
        raise InputError(f"{path}: sample {key} has the label {text[:20]!r}: it must be the number of a class")
    return int(text)
