"""What generated images are compared with: a folder of images, an .npz of images, or one of statistics.

An .npz in the ADM layout holds mu (D,) and sigma (D, D) of Inception features, and may hold images
arr_0 (N, H, W, 3) uint8 beside them (VIRTUAL_imagenet256_labeled.npz does). Then mu and sigma give
FID, and the images give KID, precision and recall.
"""

from __future__ import annotations

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

from varcompress.data import digits
from varcompress.errors import InputError
from varcompress.evaluation.features import Extractor, Features
from varcompress.images import EXTENSIONS, fit, image_files, read_image, skipped_note, to_uint8
from varcompress.progress import Progress, silent

MIN_IMAGES = 10  # Inception Score is a mean over 10 groups; precision needs 4 images, a covariance 2
ARRAYS = "an .npz of images holds arr_0 (N, H, W, 3) uint8, one of statistics mu (D,) and sigma (D, D)"


@dataclass
class Reference:
    """name: as printed; statistics: mu (D,) and sigma (D, D); vectors: features (N, D), None if only statistics are."""

    name: str
    statistics: dict[str, np.ndarray]
    vectors: Tensor | None = None
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of_images(
        cls, name: str, batches: Iterator[Tensor], total: int, extractor: Extractor, progress: Progress
    ) -> Reference:
        """The reference that images (B, 3, H, W) uint8 make. Raises InputError when there are too few."""
        parts: list[Features] = []
        done = 0
        for batch in batches:
            parts.append(extractor(batch))
            done += len(batch)
            progress(done, total, "reference: images")
        if done < MIN_IMAGES:
            raise InputError(f"{name}: readable images: {done}, but a reference needs at least {MIN_IMAGES}")
        vectors = Features.join(parts).vectors
        return cls(name, fid_features_to_statistics(vectors), vectors)


def read_reference(
    source: str | Path | None, extractor: Extractor, *, size: int, batch_size: int, progress: Progress = silent
) -> Reference:
    """Read a reference once, for all schedules. source None: the embedded digits.

    size: side of the model's images; images of another size are cropped to their centre square and resized.
    Raises InputError for a source that is missing, damaged, empty or of other features.
    """
    if source is None:
        images = to_uint8(digits.load_digits()[0])
        return Reference.of_images("embedded digits", images.split(batch_size), len(images), extractor, progress)
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


# -- a folder -----------------------------------------------------------------------------------


def _of_folder(folder: Path, extractor: Extractor, size: int, batch_size: int, progress: Progress) -> Reference:
    files = image_files(folder)
    if not files:
        raise InputError(f"{folder}: holds no image ({', '.join(sorted(EXTENSIONS))})")
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
        return Reference(str(path), statistics)
    count, side = _image_shape(path, images)
    batches = (fit(pixels, size) for pixels in _batches(path, images, batch_size))
    reference = Reference.of_images(str(path), batches, count, extractor, progress)
    reference.statistics = statistics or reference.statistics
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
            f"{path}: statistics of shapes {mu.shape} and {sigma.shape}: the {extractor.kind} features need "
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
