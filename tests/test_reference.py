"""Feature networks, and the references that scores compare with."""

from __future__ import annotations

import hashlib
import http.server
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchvision import transforms

from varcompress.data.digits import load_digits
from varcompress.errors import InputError
from varcompress.evaluation import inception
from varcompress.evaluation.digits import DIGITS, DigitsFeatures
from varcompress.evaluation.features import Extractor
from varcompress.evaluation.inception import INCEPTION, inception_weights
from varcompress.evaluation.reference import cache_folder, read_reference
from varcompress.hardware import _precision_settings
from varcompress.images import fit, to_uint8
from varcompress.images import pixels as as_pixels

CPU = torch.device("cpu")
SIZE = 16
COUNT = 23


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return Extractor(DIGITS, None, CPU)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """Digits (23, 16, 16, 3) uint8."""
    return as_pixels(to_uint8(load_digits()[0][:COUNT]))


def write_folder(folder: Path, pixels: np.ndarray) -> Path:
    for index, image in enumerate(pixels):
        path = folder / f"class{index % 3}" / f"{index:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


def write_npz(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


def read(source, extractor, **options):
    return read_reference(source, extractor, size=SIZE, **options)


# -- features -----------------------------------------------------------------------------------


def test_the_embedded_features_know_digits():
    images, labels = load_digits()
    logits = Extractor(DIGITS, None, CPU)(to_uint8(images)).logits
    assert float((logits.argmax(dim=1) == labels).float().mean()) > 0.98


def test_the_embedded_features_stay_small():
    assert sum(parameter.numel() for parameter in DigitsFeatures().parameters()) * 2 < 200 * 1024


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=40))
def test_eight_bit_rounding(values):
    images = torch.tensor(values)
    scaled = np.array(values, np.float32) * np.float32(255)
    assert np.array_equal(to_uint8(images).numpy(), (scaled + np.float32(0.5)).astype(np.uint8))
    assert np.array_equal(to_uint8(images, "truncate").numpy(), scaled.astype(np.uint8))


def test_eight_bits_survive_rounding():
    levels = torch.arange(256)
    assert torch.equal(to_uint8(levels / 255), levels.to(torch.uint8))


class BlankInception(FeatureExtractorInceptionV3):
    """torch-fidelity's Inception with the weights that it is initialised with."""

    def load_state_dict(self, *_):
        pass


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory) -> Path:
    """A file of Inception's shape with random weights."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({}, path)
    network = BlankInception("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))
    torch.save(network.state_dict(), path)
    return path


def test_spatial_features_are_those_of_adm(inception_file):
    """Of mixed_6/conv, after its ReLU, the first 7 channels in the order height, width, channel."""
    network = inception.InceptionFeatures(inception_file)
    images = torch.randint(256, (2, 3, 40, 40), dtype=torch.uint8)
    seen = []
    network.network.Mixed_6d.branch1x1.register_forward_hook(lambda *call: seen.append(call[2]))
    found = network(images)
    assert found.spatial.shape == (2, 17 * 17 * 7)
    expected = seen[0].numpy().transpose(0, 2, 3, 1)[..., :7].reshape(2, -1)
    np.testing.assert_array_equal(found.spatial.numpy(), expected)
    assert found.spatial.min() >= 0


def test_inception_from_a_file(inception_file, monkeypatch):
    monkeypatch.setattr(inception, "INCEPTION_SHA256", hashlib.sha256(inception_file.read_bytes()).hexdigest())
    vectors, logits, _ = Extractor(INCEPTION, inception_file, CPU)(torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8))
    assert vectors.shape == (2, 2048)
    assert logits.shape == (2, 1008)


def test_features_are_computed_in_full_float32(extractor):
    settings, seen = _precision_settings(), []
    before = [read() for read, _, _ in settings]
    hook = extractor.network.register_forward_hook(lambda *_: seen.append([read() for read, _, _ in settings]))
    torch.set_float32_matmul_precision("high")
    try:
        extractor(torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8))
    finally:
        hook.remove()
        for (_, write, _), value in zip(settings, before, strict=True):
            write(value)
    assert seen == [[exact for _, _, exact in settings]]


class Opened:
    """Pickles to something that leaves a trace when it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def test_weights_of_another_digest_are_never_opened(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(Opened(tmp_path / "opened"), path)
    with pytest.raises(InputError, match=r"weights\.pth: not the Inception weights.*6726825d"):
        Extractor(INCEPTION, path, CPU)
    assert not (tmp_path / "opened").exists()


def test_a_missing_weights_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.pth: no such file"):
        inception_weights(tmp_path / "none.pth")


@pytest.fixture
def served(tmp_path, monkeypatch):
    """Bytes behind URL_INCEPTION_V3 on a loopback server, and an empty cache of torch's."""
    content = b"as good as weights" * 1000

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(inception, "URL_INCEPTION_V3", f"http://127.0.0.1:{server.server_port}/weights-0.pth")
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    yield content
    server.shutdown()
    server.server_close()


def test_weights_are_downloaded_once_and_checked(served, tmp_path, monkeypatch):
    monkeypatch.setattr(inception, "INCEPTION_SHA256", hashlib.sha256(served).hexdigest())
    path = inception_weights(None)
    assert path.read_bytes() == served
    monkeypatch.setattr(inception, "URL_INCEPTION_V3", "http://127.0.0.1:9/weights-0.pth")
    assert inception_weights(None) == path


def test_a_download_of_another_digest_is_refused(served, tmp_path):
    with pytest.raises(InputError, match=r"could not be downloaded.*--feature-weights FILE"):
        inception_weights(None)
    assert not any((tmp_path / "hub").rglob("*.pth"))


def test_without_network_one_line_names_the_option(tmp_path, monkeypatch):
    monkeypatch.setattr(inception, "URL_INCEPTION_V3", "http://127.0.0.1:9/weights-0.pth")
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    with pytest.raises(InputError, match="--feature-weights FILE") as caught:
        inception_weights(None)
    assert "\n" not in str(caught.value)


# -- references ---------------------------------------------------------------------------------


def test_folder_and_npz_of_the_same_images_agree(tmp_path, pixels, extractor):
    folder = read(write_folder(tmp_path / "images", pixels), extractor)
    order = sorted(range(COUNT), key=lambda index: (index % 3, index))  # as paths sort
    for key in ("arr_0", "images"):
        arrays = read(write_npz(tmp_path / f"{key}.npz", **{key: pixels[order]}), extractor)
        assert torch.equal(folder.vectors, arrays.vectors)
        np.testing.assert_array_equal(folder.statistics["sigma"], arrays.statistics["sigma"])
    assert not folder.notes
    assert not arrays.notes


def test_a_reference_is_kept_for_the_next_time(tmp_path, pixels, extractor, monkeypatch):
    path, folder = write_npz(tmp_path / "images.npz", arr_0=pixels), write_folder(tmp_path / "images", pixels)
    first = [read(source, extractor) for source in (path, folder)]
    monkeypatch.setattr(extractor, "network", None)  # nothing is computed again
    again = [read(source, extractor) for source in (path, folder)]
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.vectors, other.vectors)
        assert (one.details, one.notes, one.name) == (other.details, other.notes, other.name)
        np.testing.assert_array_equal(one.statistics["sigma"], other.statistics["sigma"])
    changed = pixels.copy()
    changed[0, 0, 0, 0] ^= 1
    with pytest.raises(TypeError, match="not callable"):  # of other bytes it is
        read(write_npz(path, arr_0=changed), extractor)


def test_a_damaged_or_full_cache_is_no_obstacle(tmp_path, pixels, extractor, monkeypatch):
    path = write_npz(tmp_path / "images.npz", arr_0=pixels)
    first = read(path, extractor)
    for file in cache_folder().rglob("*.safetensors"):
        file.write_bytes(b"no tensors")
    assert torch.equal(read(path, extractor).vectors, first.vectors)
    monkeypatch.setenv("VARCOMPRESS_CACHE", str(path))  # a file, in which no folder can be made
    assert "not kept for the next time" in read(path, extractor).notes[-1]


def test_unreadable_images_are_skipped_counted_and_named(tmp_path, pixels, extractor):
    folder = write_folder(tmp_path / "images", pixels)
    (folder / "empty.png").touch()
    (folder / "class0" / "text.JPEG").write_text("no image")
    whole = (folder / "class1" / "001.png").read_bytes()
    (folder / "class1" / "half.png").write_bytes(whole[: len(whole) // 2])
    (folder / "list.txt").write_text("not an image by name: no matter")
    reference = read(folder, extractor)
    assert len(reference.vectors) == COUNT
    (note,) = reference.notes
    assert note.startswith(f"reference: skipped 3 of {COUNT + 3} images that could not be read: ")
    for name in ("empty.png", "class0/text.JPEG", "class1/half.png"):
        assert name in note


def test_images_of_another_size_are_fitted_and_said(tmp_path, pixels, extractor):
    folder = write_folder(tmp_path / "images", pixels)
    wide = np.pad(np.repeat(np.repeat(pixels[0], 2, 0), 2, 1), ((0, 0), (7, 7), (0, 0)), constant_values=255)
    Image.fromarray(wide).convert("L").save(folder / "wide.webp", lossless=True)
    reference = read(folder, extractor)
    assert reference.notes == ["reference images cropped to their centre and resized to 16 x 16: 1"]
    plain = extractor(torch.from_numpy(pixels[:1]).permute(0, 3, 1, 2)).vectors
    distance = (reference.vectors - plain).norm(dim=1)
    assert float(distance[-1]) < 0.5 * float(distance[1:-1].min())  # last by name, and nearest to where it came from


def test_npz_images_of_another_size_are_refused_or_all_is_computed_from_them(tmp_path, pixels, extractor):
    doubled = pixels.repeat(2, axis=1).repeat(2, axis=2)
    path = write_npz(tmp_path / "large.npz", arr_0=doubled, mu=np.zeros(64), sigma=np.eye(64))
    with pytest.raises(InputError, match=r"images of 32 x 32 pixels, and the model makes 16 x 16.*--resize-reference"):
        read(path, extractor)
    found = read(path, extractor, resize=True)
    assert found.notes == ["reference images cropped to their centre and resized to 16 x 16: 23"]
    assert (found.statistics_from, found.resized) == ("of its images", True)
    np.testing.assert_allclose(found.statistics["mu"], found.vectors.mean(dim=0), rtol=1e-5)


def test_the_adm_layout(tmp_path, pixels, extractor):
    mu, sigma = np.full(64, 2.0), np.eye(64)
    statistics = read(write_npz(tmp_path / "statistics.npz", mu=mu, sigma=sigma), extractor)
    assert statistics.vectors is None
    both = read(
        write_npz(tmp_path / "both.npz", arr_0=pixels, mu=mu, sigma=sigma, mu_s=mu[:3], sigma_s=sigma[:3]), extractor
    )
    assert len(both.vectors) == COUNT
    for reference in (statistics, both):
        np.testing.assert_array_equal(reference.statistics["mu"], mu)
        np.testing.assert_array_equal(reference.statistics["sigma"], sigma)


def test_a_reference_says_what_it_is_made_of(tmp_path, pixels, extractor):
    arrays = read(write_npz(tmp_path / "images.npz", arr_0=pixels), extractor)
    assert (arrays.details["images"], arrays.details["statistics"]) == (COUNT, "of its images")
    order = sorted(range(COUNT), key=lambda index: (index % 3, index))  # as paths sort
    folder = read(write_folder(tmp_path / "images", pixels[order][np.argsort(order)]), extractor)
    in_order = read(write_npz(tmp_path / "sorted.npz", arr_0=pixels[order]), extractor)
    assert in_order.digest == folder.digest  # of the same pixels
    assert (len(in_order.sha256), folder.sha256) == (64, None)
    changed = pixels.copy()
    changed[3, 5, 5, 1] ^= 1
    assert read(write_npz(tmp_path / "changed.npz", arr_0=changed), extractor).digest != arrays.digest

    mu, sigma = np.full(64, 2.0), np.eye(64)
    alone = read(write_npz(tmp_path / "statistics.npz", mu=mu, sigma=sigma), extractor)
    assert (alone.details["images"], alone.details["statistics"]) == (None, "mu and sigma of its file")
    both = read(write_npz(tmp_path / "both.npz", arr_0=pixels, mu=mu, sigma=sigma), extractor)
    assert (both.details["images"], both.details["statistics"]) == (COUNT, "mu and sigma of its file")
    assert read(write_npz(tmp_path / "other.npz", mu=mu + 1, sigma=sigma), extractor).digest != alone.digest
    digests = [reference.digest for reference in (arrays, folder, alone, both)]
    assert len(set(digests)) == 4
    assert {len(digest) for digest in digests} == {16}


@pytest.mark.parametrize("shape", [(40, 43), (43, 40), (40, 47), (16, 19), (33, 16)])
def test_images_of_another_size_lose_what_torchvisions_centre_crop_loses(shape):
    image = np.random.default_rng(0).integers(256, size=(*shape, 3), dtype=np.uint8)
    side = min(shape)
    square = np.asarray(transforms.CenterCrop(side)(Image.fromarray(image)))
    assert np.array_equal(fit(image[None], side)[0].permute(1, 2, 0), square)  # nothing to resize
    inner = slice(4, -4)  # further out, Lanczos reaches beyond the square
    shrunk = transforms.Resize(side // 2, transforms.InterpolationMode.LANCZOS)(Image.fromarray(square))
    assert np.array_equal(
        fit(image[None], side // 2)[0].permute(1, 2, 0)[inner, inner], np.asarray(shrunk)[inner, inner]
    )


def truncated(path: Path, share: float) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def damaged(path: Path) -> Path:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    return path


def bad_references(folder: Path, pixels: np.ndarray) -> dict[str, tuple[Path, str]]:
    mu, sigma = np.zeros(64), np.eye(64)
    empty, few, broken = folder / "empty", folder / "few", folder / "broken"
    empty.mkdir()
    write_folder(few, pixels[:3])
    broken.mkdir()
    (broken / "a.png").touch()
    text = folder / "text.npz"
    text.write_text("not an archive")
    array = folder / "array.npz"
    with open(array, "wb") as file:
        np.save(file, pixels)
    pickled = np.array([Opened(folder / "opened")], dtype=object)
    return {
        "missing": (folder / "none.npz", "no such reference"),
        "empty folder": (empty, "holds no image"),
        "three images": (few, "readable images: 3"),
        "no readable image": (broken, "readable images: 0"),
        "text": (text, "not a readable .npz"),
        "npy": (array, "not a readable .npz"),
        "truncated": (truncated(write_npz(folder / "half.npz", arr_0=pixels), 0.5), "not a readable .npz"),
        "damaged": (damaged(write_npz(folder / "damaged.npz", arr_0=pixels)), "not a readable .npz"),
        "pickled images": (write_npz(folder / "p.npz", arr_0=pickled), "arr_0 is object|not a readable .npz"),
        "pickled statistics": (write_npz(folder / "q.npz", mu=pickled, sigma=sigma), "not a readable .npz"),
        "floats": (write_npz(folder / "floats.npz", arr_0=pixels / 255), "arr_0 is float64"),
        "channels first": (
            write_npz(folder / "chw.npz", arr_0=pixels.transpose(0, 3, 1, 2)),
            "arr_0 is uint8 of shape",
        ),
        "no images": (write_npz(folder / "none_in.npz", arr_0=pixels[:0]), "arr_0 is uint8 of shape"),
        "other arrays": (write_npz(folder / "other.npz", a=mu, b=mu), "holds a, b"),
        "Inception's statistics": (write_npz(folder / "d.npz", mu=np.zeros(2048), sigma=np.eye(2)), "need mu"),
        "not finite": (write_npz(folder / "nan.npz", mu=mu * np.nan, sigma=sigma), "not finite"),
        "infinite": (write_npz(folder / "inf.npz", mu=mu, sigma=np.full((64, 64), np.inf)), "not finite"),
        "no covariance": (write_npz(folder / "minus.npz", mu=mu, sigma=sigma - 2), "no covariance: it has the eigen"),
        "complex": (write_npz(folder / "c.npz", mu=mu, sigma=sigma + 0j), "of real numbers"),
        "all zero": (write_npz(folder / "zero.npz", mu=mu, sigma=sigma * 0), "no positive eigenvalue"),
        "not symmetric": (write_npz(folder / "tilted.npz", mu=mu, sigma=np.triu(sigma + 1)), "it is not symmetric"),
        "text for numbers": (write_npz(folder / "t.npz", mu=np.array(["a"] * 64), sigma=sigma), "of real numbers"),
    }


def test_bad_references_get_one_line(tmp_path, pixels, extractor):
    for what, (path, message) in bad_references(tmp_path, pixels).items():
        with pytest.raises(InputError, match=message) as caught:
            read(path, extractor)
        assert str(path) in str(caught.value), what
        assert "\n" not in str(caught.value), what
    assert not (tmp_path / "opened").exists()
    assert pickle.dumps(Opened(tmp_path))  # the trap itself is sound
