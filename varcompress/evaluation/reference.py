"""What generated images are compared with: a folder of images, an .npz of images, or one of statistics.

An .npz in the ADM layout holds mu (D,) and sigma (D, D) of Inception features, mu_s and sigma_s of spatial ones, and
may hold images arr_0 (N, H, W, 3) uint8 beside them (VIRTUAL_imagenet256_labeled.npz does). Then the statistics give
FID and sFID, and the images, which were published with them, the other scores.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics

from varcompress.data.interface import Source
from varcompress.errors import InputError
from varcompress.evaluation.features import Extractor
from varcompress.evaluation.network import Features
from varcompress.files import disk_errors, replacing, sha256
from varcompress.hardware import to_numpy
from varcompress.images import EXTENSIONS, fit, image_files, read_image, skipped_note, to_uint8
from varcompress.progress import Progress, silent

Statistics = dict[str, np.ndarray]  # mu (D,) and sigma (D, D)

MIN_IMAGES = 10  # Inception Score is a mean over 10 groups; density needs 6 images, a covariance 2
ARRAYS = "an .npz of images holds arr_0 (N, H, W, 3) uint8, one of statistics mu (D,) and sigma (D, D)"
DIGEST_DIGITS = 16
EXTRACTED = 64  # images at a time, whatever a user's batch is: so the features of a reference are the same always
ROUNDING = 1e-6  # of the largest eigenvalue: as far as a covariance may fall below 0
OF_IMAGES, OF_FILE = "of its images", "mu and sigma of its file"  # where the statistics behind FID come from


@dataclass
class Reference:
    """What schedules are compared with.

    name: as printed; statistics: of its features, and spatial_statistics: of spatial ones, where the network has them;
    vectors: features (N, D), None if only statistics are; digest: 16 hex digits of the pixels as the network saw them,
    and of statistics that came with them; sha256: of its file, None of anything else; size: side of its images;
    notes: for a reader; statistics_from: OF_IMAGES or OF_FILE.
    """

    name: str
    statistics: Statistics
    spatial_statistics: Statistics | None = None
    vectors: Tensor | None = None
    digest: str = ""
    sha256: str | None = None
    size: int | None = None
    resized: bool = False
    statistics_from: str = OF_IMAGES
    notes: list[str] = field(default_factory=list)

    @property
    def details(self) -> dict[str, str | int | None]:
        """What a result says of it beside its name. images: how many were read, None where it holds none."""
        count = None if self.vectors is None else len(self.vectors)
        return {
            "digest": self.digest,
            "sha256": self.sha256,
            "images": count,
            "size": self.size,
            "statistics": self.statistics_from,
        }


def read_reference(
    source: str | Path | Source,
    extractor: Extractor,
    *,
    size: int,
    resize: bool = False,
    progress: Progress = silent,
) -> Reference:
    """Read a reference once, for all schedules. source: a folder of images, an .npz, or a source of training images.

    size: side of the model's images. Images of a folder that have another are cropped to their centre square and
    resized. Those of an .npz are only with `resize`, and then its statistics, which are of other images, are left
    aside. What a network made of a folder or file is kept in the user's cache, under the digest of all its bytes.
    Raises InputError for a source that is missing, damaged, empty, of other features or of another size.
    """
    if not isinstance(source, str | Path):
        return _of_images(source.name, _of_source(source, size), len(source), extractor, progress)
    path = Path(source)
    if path.is_dir():
        files = image_files(path)
        if not files:
            raise InputError(f"{path}: holds no image ({', '.join(sorted(EXTENSIONS))}): give another folder")
        digest = _folder_digest(path, files)
        return _cached(path, f"{digest} {size}", extractor, lambda: _of_folder(path, files, extractor, size, progress))
    if not path.is_file():
        raise InputError(f"{path}: no such reference: give a folder of images or an .npz")
    digest = sha256(path)
    try:
        found = _cached(
            path, f"{digest} {size} {resize}", extractor, lambda: _of_npz(path, extractor, size, resize, progress)
        )
    except InputError:
        raise
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: not a readable .npz ({str(error).splitlines()[0]}): {ARRAYS}") from error
    found.sha256 = digest
    return found


# -- from images --------------------------------------------------------------------------------


def _of_images(
    name: str,
    batches: Iterator[Tensor],
    total: int,
    extractor: Extractor,
    progress: Progress,
    statistics: tuple[Statistics | None, Statistics | None] = (None, None),
) -> Reference:
    """The reference that images (B, 3, H, W) uint8 make, with `statistics` in place of their own where given.

    Raises InputError when there are too few.
    """
    parts: list[Features] = []
    given = [each for each in statistics if each]
    digest = hashlib.sha256(b"".join(map(_bytes, given)))
    done = 0
    for batch in batches:
        found = extractor(batch)
        parts.append(found._replace(logits=None, spatial=None if statistics[1] else found.spatial))
        digest.update(to_numpy(batch).tobytes())
        done += len(batch)
        progress(done, total, "reference: images")
    if done < MIN_IMAGES:
        raise InputError(f"{name}: readable images: {done}, but a reference needs at least {MIN_IMAGES}")
    joined = Features.join(parts)
    # where only mu and sigma came with the images, spatial ones of the images alone would be of another set
    of_spatial = None if joined.spatial is None or given else fid_features_to_statistics(joined.spatial)
    return Reference(
        name,
        statistics[0] or fid_features_to_statistics(joined.vectors),
        statistics[1] or of_spatial,
        joined.vectors,
        digest.hexdigest()[:DIGEST_DIGITS],
        size=batch.shape[-1],
        statistics_from=OF_FILE if given else OF_IMAGES,
    )


def _bytes(statistics: Statistics) -> bytes:
    return b"".join(statistics[name].tobytes() for name in sorted(statistics))


def _stacked(images: Iterator[Tensor]) -> Iterator[Tensor]:
    for batch in iter(lambda: list(islice(images, EXTRACTED)), []):
        yield torch.stack(batch)


def _of_source(source: Source, size: int) -> Iterator[Tensor]:
    """The first view of every image that can be read, (B, 3, size, size) uint8."""
    views = (source.read(index, size, 1) for index in range(len(source)))
    for batch in _stacked(torch.from_numpy(view[0]) for view in views if view is not None):
        yield batch if batch.dtype is torch.uint8 else to_uint8(batch)


def _of_folder(folder: Path, files: list[Path], extractor: Extractor, size: int, progress: Progress) -> Reference:
    skipped: list[Path] = []
    resized: list[Path] = []
    batches = _stacked(_readable(files, size, skipped, resized))
    reference = _of_images(str(folder), batches, len(files), extractor, progress)
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


def _of_npz(path: Path, extractor: Extractor, size: int, resize: bool, progress: Progress) -> Reference:
    """Raises InputError, or what zipfile and numpy raise for a damaged file."""
    with zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
    images = "arr_0" if "arr_0" in names else names[0] if len(names) == 1 else None
    has_statistics = {"mu", "sigma"} <= set(names)
    if images is None:
        if not has_statistics:
            raise InputError(f"{path}: holds {', '.join(names) or 'no array'}: {ARRAYS}")
        return _of_statistics(path, names, extractor)
    count, side = _image_shape(path, images)
    same = side == (size, size)
    if not (same or resize):
        raise InputError(
            f"{path}: holds images of {side[1]} x {side[0]} pixels, and the model makes {size} x {size}: give a "
            "reference of that size, or --resize-reference to compute everything from its images resized"
        )
    batches = (fit(pixels, size) for pixels in _batches(path, images))
    statistics = _statistics(path, names, extractor) if has_statistics and same else (None, None)
    reference = _of_images(str(path), batches, count, extractor, progress, statistics)
    if not same:
        reference.resized = True
        reference.notes.append(_resized(count, size))
    return reference


def _of_statistics(path: Path, names: list[str], extractor: Extractor) -> Reference:
    """The reference that gives Frechet distances alone."""
    statistics, spatial = _statistics(path, names, extractor)
    digest = hashlib.sha256(b"".join(_bytes(each) for each in (statistics, spatial) if each))
    return Reference(str(path), statistics, spatial, digest=digest.hexdigest()[:DIGEST_DIGITS], statistics_from=OF_FILE)


def _statistics(path: Path, names: list[str], extractor: Extractor) -> tuple[Statistics, Statistics | None]:
    """mu and sigma, and mu_s and sigma_s where the file and the network have them."""
    known = extractor(torch.zeros(1, 3, extractor.spec.image_size or 64, extractor.spec.image_size or 64).byte())
    spatial = known.spatial is not None and {"mu_s", "sigma_s"} <= set(names)
    with np.load(path, allow_pickle=False) as file:
        found = _gaussian(path, file["mu"], file["sigma"], known.vectors.shape[1], extractor.spec.name)
        if not spatial:
            return found, None
        return found, _gaussian(path, file["mu_s"], file["sigma_s"], known.spatial.shape[1], "spatial")


def _gaussian(path: Path, mu: np.ndarray, sigma: np.ndarray, width: int, features: str) -> Statistics:
    """mu and sigma in the types that torch-fidelity computes its own in, since it compares only like with like."""
    if mu.shape != (width,) or sigma.shape != (width, width):
        raise InputError(
            f"{path}: statistics of shapes {mu.shape} and {sigma.shape}: the {features} features need "
            f"mu ({width},) and sigma ({width}, {width})"
        )
    if not all(np.issubdtype(part.dtype, np.floating) for part in (mu, sigma)):
        raise InputError(f"{path}: mu and sigma are {mu.dtype} and {sigma.dtype}: {ARRAYS}, of real numbers")
    mu, sigma = mu.astype(np.float32), sigma.astype(np.float64)
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise InputError(f"{path}: mu or sigma holds numbers that are not finite")
    eigenvalues = np.linalg.eigvalsh(sigma)
    if not np.allclose(sigma, sigma.T, atol=ROUNDING * abs(eigenvalues).max()):
        raise InputError(f"{path}: sigma is no covariance: it is not symmetric")
    if eigenvalues[-1] <= 0:
        raise InputError(f"{path}: sigma is no covariance of images: it has no positive eigenvalue")
    if eigenvalues[0] < -ROUNDING * abs(eigenvalues).max():
        raise InputError(f"{path}: sigma is no covariance: it has the eigenvalue {eigenvalues[0]:.3g}")
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


def _batches(path: Path, name: str) -> Iterator[np.ndarray]:
    """Images (B, H, W, 3) uint8 from an .npz, read as they are needed: 50,000 of 256 pixels would fill 9 GiB."""
    with zipfile.ZipFile(path) as archive:
        file, (count, *shape) = _open_array(path, name, archive)
        for start in range(0, count, EXTRACTED):
            wanted = (min(EXTRACTED, count - start), *shape)
            data = file.read(int(np.prod(wanted)))
            yield np.frombuffer(data, np.uint8).reshape(wanted)  # ValueError where the file ends early


# -- kept in the user's cache -------------------------------------------------------------------


def cache_folder() -> Path:
    """Where references are kept: VARCOMPRESS_CACHE, or varcompress in XDG_CACHE_HOME, by default ~/.cache."""
    own = os.environ.get("VARCOMPRESS_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "varcompress"


def _folder_digest(folder: Path, files: list[Path]) -> str:
    """SHA-256 of the names and bytes of files."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(folder).as_posix()}\0{sha256(path)}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _cached(path: Path, content: str, extractor: Extractor, read: Callable[[], Reference]) -> Reference:
    """What `read` gives, kept for the next time under what it depends on. content: says which bytes and how read."""
    key = hashlib.sha256(f"{content}\0{extractor.key}".encode()).hexdigest()
    file = cache_folder() / "references" / f"{key}.safetensors"
    if file.is_file() and (found := _load(file)):
        found.name = str(path)
        return found
    found = read()
    try:
        with disk_errors(file):
            _store(found, file)
    except InputError as error:  # the cache is a convenience
        found.notes.append(f"the reference is not kept for the next time: {error}")
    return found


def _store(reference: Reference, file: Path) -> None:
    groups = {"": reference.statistics, "spatial.": reference.spatial_statistics or {}}
    arrays = {
        prefix + name: torch.from_numpy(value) for prefix, found in groups.items() for name, value in found.items()
    }
    if reference.vectors is not None:
        arrays["vectors"] = reference.vectors
    said = {name: getattr(reference, name) for name in ("digest", "size", "resized", "statistics_from", "notes")}
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        save_file({name: array.contiguous() for name, array in arrays.items()}, temporary, {"said": json.dumps(said)})


def _load(file: Path) -> Reference | None:
    """What `_store` wrote; None of a damaged file, which is written anew."""
    try:
        with safe_open(file, "pt") as opened:
            said = json.loads(opened.metadata()["said"])
            arrays = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118 - no dict
        vectors = arrays.pop("vectors", None)
        spatial = {name[8:]: arrays.pop(name).numpy() for name in list(arrays) if name.startswith("spatial.")}
        plain = {name: array.numpy() for name, array in arrays.items()}
        return Reference("", plain, spatial or None, vectors, **said)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
