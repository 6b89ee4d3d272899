"""What generated images are compared with: a folder of images, an .npz of images, or one of statistics.

An .npz in the ADM layout holds mu (D,) and sigma (D, D) of Inception features, and may hold images
arr_0 (N, H, W, 3) uint8 beside them (VIRTUAL_imagenet256_labeled.npz does). Then mu and sigma give
FID, and the images give KID, precision and recall.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics

from varcompress.data.interface import Source
from varcompress.errors import InputError
from varcompress.evaluation.features import Extractor, Features
from varcompress.hardware import to_numpy
from varcompress.images import EXTENSIONS, fit, image_files, read_image, skipped_note, to_uint8
from varcompress.progress import Progress, silent

MIN_IMAGES = 10  # Inception Score is a mean over 10 groups; precision needs 4 images, a covariance 2
ARRAYS = "an .npz of images holds arr_0 (N, H, W, 3) uint8, one of statistics mu (D,) and sigma (D, D)"
DIGEST_DIGITS = 16
OF_IMAGES, OF_FILE = "of its images", "mu and sigma of its file"  # where the statistics behind FID come from


@dataclass
class Reference:
    """What schedules are compared with.

    name: as printed; statistics: mu (D,) and sigma (D, D); vectors: features (N, D), None if only statistics are;
    digest: 16 hex digits of the pixels as the network saw them, and of statistics that came with them; notes: for a
    reader; statistics_from: OF_IMAGES or OF_FILE.
    """

    name: str
    statistics: dict[str, np.ndarray]
    vectors: Tensor | None = None
    digest: str = ""
    statistics_from: str = OF_IMAGES
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of_images(
        cls,
        name: str,
        batches: Iterator[Tensor],
        total: int,
        extractor: Extractor,
        progress: Progress,
        statistics: dict[str, np.ndarray] | None = None,
    ) -> Reference:
        """The reference that images (B, 3, H, W) uint8 make, with `statistics` in place of their own where given.

        Raises InputError when there are too few.
        """
        parts: list[Features] = []
        digest = hashlib.sha256(_bytes(statistics or {}))
        done = 0
        for batch in batches:
            parts.append(extractor(batch))
            digest.update(to_numpy(batch).tobytes())
            done += len(batch)
            progress(done, total, "reference: images")
        if done < MIN_IMAGES:
            raise InputError(f"{name}: readable images: {done}, but a reference needs at least {MIN_IMAGES}")
        vectors = Features.join(parts).vectors
        source = OF_FILE if statistics else OF_IMAGES
        return cls(
            name, statistics or fid_features_to_statistics(vectors), vectors, digest.hexdigest()[:DIGEST_DIGITS], source
        )

    @classmethod
    def of_statistics(cls, name: str, statistics: dict[str, np.ndarray]) -> Reference:
        """The reference that gives FID alone."""
        digest = hashlib.sha256(_bytes(statistics)).hexdigest()[:DIGEST_DIGITS]
        return cls(name, statistics, None, digest, OF_FILE)

    @property
    def details(self) -> dict[str, str | int | None]:
        """What a result says of it beside its name. images: how many were read, None where it holds none."""
        count = None if self.vectors is None else len(self.vectors)
        return {"digest": self.digest, "images": count, "statistics": self.statistics_from}


def _bytes(statistics: dict[str, np.ndarray]) -> bytes:
    return b"".join(statistics[name].tobytes() for name in sorted(statistics))


def read_reference(
    source: str | Path | Source, extractor: Extractor, *, size: int, batch_size: int, progress: Progress = silent
) -> Reference:
    """Read a reference once, for all schedules. source: a folder of images, an .npz, or a source of training images.

    size: side of the model's images; images of another size are cropped to their centre square and resized.
    Raises InputError for a source that is missing, damaged, empty or of other features.
    """
    if not isinstance(source, str | Path):
        batches = _of_source(source, size, batch_size)
        return Reference.of_images(source.name, batches, len(source), extractor, progress)
    path = Path(source)
    if path.is_dir():
        return _of_folder(path, extractor, size, batch_size, progress)
    if not path.is_file():
        raise InputError(f"{path}: no such reference: give a folder of images or an .npz")
    try:
        return _of_npz(path, extractor, size, batch_size, progress)
    except InputError:
        raise
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: not a readable .npz ({str(error).splitlines()[0]}): {ARRAYS}") from error


def _of_source(source: Source, size: int, batch_size: int) -> Iterator[Tensor]:
    """The first view of every image that can be read, (B, 3, size, size) uint8."""
    views = (source.read(index, size, 1) for index in range(len(source)))
    images = (torch.from_numpy(view[0]) for view in views if view is not None)
    for batch in iter(lambda: list(islice(images, batch_size)), []):
        stacked = torch.stack(batch)
        yield stacked if stacked.dtype is torch.uint8 else to_uint8(stacked)


# -- a folder -----------------------------------------------------------------------------------


def _of_folder(folder: Path, extractor: Extractor, size: int, batch_size: int, progress: Progress) -> Reference:
    files = image_files(folder)
    if not files:
        raise InputError(f"{folder}: holds no image ({', '.join(sorted(EXTENSIONS))}): give another folder")
    skipped: list[Path] = []
    resized: list[Path] = []
    images = _readable(files, size, skipped, resized)
    batches = (torch.stack(batch) for batch in iter(lambda: list(islice(images, batch_size)), []))
    reference = Reference.of_images(str(folder), batches, len(files), extractor, progress)
    if skipped:
        names = [path.relative_to(folder).as_posix() for path in skipped]
        reference.notes.append(f"reference: {skipped_note(names, len(files))}")
    if resized:
        reference.notes.append(_resized(len(resized), size))
    return reference


def _readable(files: list[Path], size: int, skipped: list[Path], resized: list[Path]) -> Iterator[Tensor]:
    """Images (3, size, size) uint8; files that are no images go to `skipped`, files of another size to `resized`."""
    for path in files:
        found = read_image(path, size)
        if found is None:
            skipped.append(path)
            continue
        image, changed = found
        if changed:
            resized.append(path)
        yield image


def _resized(count: int, size: int) -> str:
    return f"reference images cropped to their centre and resized to {size} x {size}: {count:,}"


# -- an .npz ------------------------------------------------------------------------------------


def _of_npz(path: Path, extractor: Extractor, size: int, batch_size: int, progress: Progress) -> Reference:
    """Raises InputError, or what zipfile and numpy raise for a damaged file."""
    with zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
    statistics = _statistics(path, extractor) if {"mu", "sigma"} <= set(names) else None
    images = "arr_0" if "arr_0" in names else names[0] if len(names) == 1 else None
    if images is None:
        if statistics is None:
            raise InputError(f"{path}: holds {', '.join(names) or 'no array'}: {ARRAYS}")
        return Reference.of_statistics(str(path), statistics)
    count, side = _image_shape(path, images)
    batches = (fit(pixels, size) for pixels in _batches(path, images, batch_size))
    reference = Reference.of_images(str(path), batches, count, extractor, progress, statistics)
    if side != (size, size):
        reference.notes.append(_resized(count, size))
    return reference


def _statistics(path: Path, extractor: Extractor) -> dict[str, np.ndarray]:
    """mu and sigma in the types that torch-fidelity computes its own in, since it compares only like with like."""
    with np.load(path, allow_pickle=False) as file:
        mu, sigma = file["mu"].astype(np.float32), file["sigma"].astype(np.float64)
    width = extractor.width
    if mu.shape != (width,) or sigma.shape != (width, width):
        raise InputError(
            f"{path}: statistics of shapes {mu.shape} and {sigma.shape}: the {extractor.spec.name} features need "
            f"mu ({width},) and sigma ({width}, {width})"
        )
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise InputError(f"{path}: mu or sigma holds numbers that are not finite")
    return {"mu": mu, "sigma": sigma}


def _open_array(path: Path, name: str, archive: zipfile.ZipFile) -> tuple[zipfile.ZipExtFile, tuple[int, ...]]:
    """An array of images opened at its first byte, and its shape. Pickled arrays are never loaded."""
    file = archive.open(f"{name}.npy")
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read_header(file)
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran or 0 in shape:
        raise InputError(f"{path}: {name} is {dtype} of shape {shape}: {ARRAYS}")
    return file, shape


def _image_shape(path: Path, name: str) -> tuple[int, tuple[int, int]]:
    with zipfile.ZipFile(path) as archive:
        shape = _open_array(path, name, archive)[1]
    return shape[0], shape[1:3]


def _batches(path: Path, name: str, batch_size: int) -> Iterator[np.ndarray]:
    """Images (B, H, W, 3) uint8 from an .npz, read as they are needed: 50,000 of 256 pixels would fill 9 GiB."""
    with zipfile.ZipFile(path) as archive:
        file, (count, *shape) = _open_array(path, name, archive)
        for start in range(0, count, batch_size):
            wanted = (min(batch_size, count - start), *shape)
            data = file.read(int(np.prod(wanted)))
            yield np.frombuffer(data, np.uint8).reshape(wanted)  # ValueError where the file ends early
