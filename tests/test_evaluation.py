"""Features, references and scores."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import pickle
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import Dataset
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics
from torchvision import transforms

from tests.conftest import official_state
from varcompress.data.digits import load_digits
from varcompress.errors import InputError
from varcompress.evaluation import evaluate, inception, scores
from varcompress.evaluation.digits import DIGITS, DigitsFeatures
from varcompress.evaluation.features import Extractor, Features
from varcompress.evaluation.inception import INCEPTION, inception_weights
from varcompress.evaluation.reference import read_reference
from varcompress.fingerprint import fingerprint
from varcompress.hardware import _precision_settings
from varcompress.images import fit, to_uint8
from varcompress.images import pixels as as_pixels
from varcompress.metrics import score, score_fields
from varcompress.models.autoencoder import TokenizerConfig
from varcompress.models.elastic import ElasticVAR, Provenance
from varcompress.models.tokenizer import VQVAE
from varcompress.publish import save
from varcompress.sampling import PUBLISHED, Sampling

CPU = torch.device("cpu")
SIZE = 16
COUNT = 23


@pytest.fixture(scope="module")
def model(tiny) -> ElasticVAR:
    """The tiny transformer with a tokenizer of 16 x 16 pixels, under the embedded model's name."""
    torch.manual_seed(1)
    tokenizer = VQVAE(TokenizerConfig(32, (1, 1, 1), 1, 8, 40, 4, 3, (1, 2, 3, 4)))
    return ElasticVAR(tiny.var, tokenizer, provenance=Provenance(name="digits"))


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


def read(source, extractor, batch_size=10):
    return read_reference(source, extractor, size=SIZE, batch_size=batch_size)


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


def test_inception_from_a_file(inception_file, monkeypatch):
    monkeypatch.setattr(inception, "INCEPTION_SHA256", hashlib.sha256(inception_file.read_bytes()).hexdigest())
    vectors, logits = Extractor(INCEPTION, inception_file, CPU)(torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8))
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


def test_batches_do_not_change_a_reference(tmp_path, pixels, extractor):
    path = write_npz(tmp_path / "images.npz", arr_0=pixels)
    for batch_size in (1, COUNT, 100):
        torch.testing.assert_close(read(path, extractor, batch_size).vectors, read(path, extractor).vectors)


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


def test_npz_images_of_another_size(tmp_path, pixels, extractor):
    doubled = pixels.repeat(2, axis=1).repeat(2, axis=2)
    reference = read(write_npz(tmp_path / "large.npz", arr_0=doubled), extractor)
    assert reference.notes == ["reference images cropped to their centre and resized to 16 x 16: 23"]


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
    assert read(write_npz(tmp_path / "sorted.npz", arr_0=pixels[order]), extractor).details == folder.details
    assert read(tmp_path / "images.npz", extractor, batch_size=7).details == arrays.details
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
        "text for numbers": (write_npz(folder / "t.npz", mu=np.array(["a"]), sigma=sigma), "not a readable .npz"),
    }


def test_bad_references_get_one_line(tmp_path, pixels, extractor):
    for what, (path, message) in bad_references(tmp_path, pixels).items():
        with pytest.raises(InputError, match=message) as caught:
            read(path, extractor)
        assert str(path) in str(caught.value), what
        assert "\n" not in str(caught.value), what
    assert not (tmp_path / "opened").exists()
    assert pickle.dumps(Opened(tmp_path))  # the trap itself is sound


# -- scores -------------------------------------------------------------------------------------


class Images(Dataset):
    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images[index]


def test_scores_equal_torch_fidelity(model, tmp_path, pixels):
    reference = write_npz(tmp_path / "images.npz", arr_0=pixels)
    result = evaluate(model, ["d2@2"], reference=reference, num_images=30, batch_size=8, sampling=Sampling(seed=4))
    labels = scores.balanced_labels(30, 10)
    drawn = torch.cat([model.generate(labels[i : i + 8], "d2@2", seed=4, first_index=i) for i in range(0, 30, 8)])
    expected = torch_fidelity.calculate_metrics(
        input1=Images(to_uint8(drawn)),
        input2=Images(torch.from_numpy(pixels).permute(0, 3, 1, 2)),
        feature_extractor="varcompress-digits",
        **dict.fromkeys(("isc", "fid", "kid", "prc"), True),
        kid_subset_size=COUNT,
        cuda=False,
        batch_size=8,
        save_cpu_ram=True,
        verbose=False,
        cache=False,
    )
    (row,) = result["schedules"]
    names = {
        "digits_fd": "frechet_inception_distance",
        "digits_is": "inception_score_mean",
        "digits_is_std": "inception_score_std",
        "digits_kid": "kernel_inception_distance_mean",
        "digits_kid_std": "kernel_inception_distance_std",
        "digits_precision": "precision",
        "digits_recall": "recall",
    }
    assert {ours: row[ours] for ours in names} == pytest.approx({o: expected[t] for o, t in names.items()}, rel=1e-9)


def test_evaluate_says_all_that_a_score_depends_on(model):
    seen = []
    result = evaluate(model, ["full", "d2@2"], num_images=40, batch_size=16, progress=lambda *step: seen.append(step))
    assert json.loads(json.dumps(result)) == result
    assert (result["kind"], result["weights"]) == ("eval", fingerprint(model))
    assert result["features"] == "digits"
    assert result["reference"] == "embedded digits"
    details = result["reference_details"]
    assert (details["images"], details["statistics"], len(details["digest"])) == (1797, "of its images", 16)
    assert result["settings"] == {
        "cfg": 1.5, "top_k": 900, "top_p": 0.96, "seed": 0, "images": 40, "rounding": "round",
    }  # fmt: skip
    assert any("not FID" in note for note in result["notes"])
    assert "KID in subsets of 40 images instead of 1,000" in result["notes"]
    full, subnet = result["schedules"]
    assert [full["schedule"], subnet["schedule"]] == ["full", "d2@2"]
    for row in (full, subnet):
        assert set(row) == {
            "schedule", *score_fields(DIGITS.name), "latency_ms", "images_per_second", "peak_bytes", "cache_bytes",
        }  # fmt: skip
        assert "fid" not in row
        assert row["images_per_second"] == pytest.approx(16 / row["latency_ms"] * 1e3)
        assert row["peak_bytes"] > row["cache_bytes"] > 0
    assert subnet["cache_bytes"] < full["cache_bytes"]
    assert full["cache_bytes"] == model.schedule("full").cache_bytes(batch=16, token_bytes=32 * 4, guided=True)
    assert seen[-1] == (40, 40, "d2@2: images")
    assert any(what == "reference: images" for _, _, what in seen)


def test_scores_do_not_depend_on_the_batch_size(model, tmp_path, pixels):
    reference = write_npz(tmp_path / "images.npz", arr_0=pixels)
    rows = [
        evaluate(model, ["full"], reference=reference, num_images=20, batch_size=size)["schedules"][0]
        for size in (3, 50)
    ]
    for name in score_fields(DIGITS.name):  # but for a pixel that rounding tips the other way
        if name != "digits_fd_std":  # which was not asked for
            assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-3, abs=1e-6)


def test_rounding_is_in_the_result_and_in_the_scores(model, tmp_path, pixels):
    reference = write_npz(tmp_path / "images.npz", arr_0=pixels)
    options = {"reference": reference, "num_images": 20, "batch_size": 20}
    results = [evaluate(model, ["full"], rounding=rounding, **options) for rounding in ("round", "truncate")]
    assert [result["settings"]["rounding"] for result in results] == ["round", "truncate"]
    labels = scores.balanced_labels(20, 10)
    extractor = Extractor(DIGITS, None, CPU)
    drawn = extractor(to_uint8(model.generate(labels), "truncate"))
    expected = score(scores.compare(drawn, labels, read(reference, extractor), CPU), DIGITS.name)
    (rounded,), (truncated,) = (result["schedules"] for result in results)
    assert truncated["digits_fd"] == pytest.approx(expected["digits_fd"], rel=1e-6)
    assert truncated["digits_fd"] != pytest.approx(rounded["digits_fd"], rel=1e-6)


def test_distances_between_all_images_are_computed_on_the_device(monkeypatch):
    """A stand-in, because no device but the CPU is everywhere: meta tensors have a device and no numbers."""
    seen = []

    def distances(generated, real, **_):
        seen.extend([generated.device.type, real.device.type])
        return {"precision": 1.0, "recall": 1.0}

    monkeypatch.setattr("torch_fidelity.metric_prc.prc_features_to_metric", distances)
    monkeypatch.setattr("varcompress.metrics.exact_float32", contextlib.nullcontext)  # meta knows no autocast
    vectors, logits = torch.randn(20, 64), torch.randn(20, 10)
    reference = scores.Reference("r", fid_features_to_statistics(vectors), vectors)
    score(scores.compare(Features(vectors, logits), torch.zeros(20), reference, torch.device("meta")), DIGITS.name)
    assert seen == ["meta", "meta"]


def test_the_spread_of_a_distance_is_that_of_other_images(model, tmp_path, pixels):
    """Of scores from ten seeds: the bootstrap says nearly what drawing again does."""
    reference = write_npz(tmp_path / "images.npz", arr_0=pixels)
    options = {"reference": reference, "num_images": 60, "batch_size": 60}
    (row,) = evaluate(model, ["full"], resamples=50, **options)["schedules"]
    assert evaluate(model, ["full"], **options)["schedules"][0]["digits_fd_std"] is None
    drawn = [
        evaluate(model, ["full"], sampling=Sampling(seed=seed), **options)["schedules"][0]["digits_fd"]
        for seed in range(10)
    ]
    assert 0.4 < row["digits_fd_std"] / np.std(drawn, ddof=1) < 2.5
    (few,) = evaluate(model, ["full"], resamples=20, **options | {"num_images": 10})["schedules"]
    assert few["digits_fd_std"] > 1  # one image a class, which resampled within the class is the same one
    with pytest.raises(InputError, match="resamples 1: a spread needs at least 2"):
        evaluate(model, ["full"], resamples=1, **options)


def test_statistics_give_no_kid_precision_or_recall(model, tmp_path, extractor, pixels):
    whole = read(write_npz(tmp_path / "images.npz", arr_0=pixels), extractor)
    path = write_npz(tmp_path / "statistics.npz", **whole.statistics)
    result = evaluate(model, ["full"], reference=path, num_images=20)
    (row,) = result["schedules"]
    assert [row[name] for name in score_fields(DIGITS.name)[4:]] == [None] * 4
    assert "the reference holds statistics only: no KID, precision or recall" in result["notes"]
    (with_images,) = evaluate(model, ["full"], reference=tmp_path / "images.npz", num_images=20)["schedules"]
    assert row["digits_fd"] == pytest.approx(with_images["digits_fd"], rel=1e-6)


def test_equal_images_score_as_equal(tmp_path, pixels, extractor):
    reference = read(write_npz(tmp_path / "images.npz", arr_0=pixels), extractor)
    same = extractor(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    row = score(scores.compare(same, torch.zeros(len(same.vectors)), reference, CPU), DIGITS.name)
    assert row["digits_fd"] == pytest.approx(0, abs=1e-3)
    assert row["digits_precision"] == row["digits_recall"] == 1
    noise = extractor(torch.randint(256, (COUNT, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(0)).byte())
    worse = score(scores.compare(noise, torch.zeros(len(noise.vectors)), reference, CPU), DIGITS.name)
    assert worse["digits_fd"] > 100 * abs(row["digits_fd"])
    assert worse["digits_kid"] > row["digits_kid"]


@given(num_images=st.integers(1, 3000), classes=st.integers(1, 1200))
def test_labels_are_balanced(num_images, classes):
    counts = scores.balanced_labels(num_images, classes).bincount(minlength=classes)
    assert len(counts) == classes
    assert int(counts.sum()) == num_images
    assert int(counts.max() - counts.min()) <= 1


def test_notes_name_what_is_not_as_published(tiny):
    reference = scores.Reference("statistics", {})
    notes = scores._notes(INCEPTION, reference, 1000, Sampling(cfg=4.0, seed=3), guided=True)
    assert notes[0] == "FID at 1,000 images is not comparable with the published figures at 50,000"
    assert notes[1] == "not the published sampling settings: cfg 4.0"
    assert scores._notes(INCEPTION, reference, 50_000, replace(PUBLISHED, seed=3), guided=True) == [
        "the reference holds statistics only: no KID, precision or recall"
    ]
    distilled = scores._notes(INCEPTION, reference, 50_000, PUBLISHED, guided=False)
    assert distilled[0] == "guidance with cfg 1.5 is distilled into the weights: nothing ran unconditionally"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "a reference is needed"),
        ({"reference": "x", "features": "digits"}, "images of 16 pixels"),
        ({"reference": "x", "features": "clip"}, "'clip' are unknown"),
        ({"reference": "x", "num_images": 9}, "at least 10"),
        ({"reference": "x", "batch_size": 0}, "batches of 0"),
        ({"reference": "x", "rounding": "up"}, "rounding 'up' is unknown: use round or truncate"),
    ],
)
def test_bad_arguments(tiny, arguments, message):
    with pytest.raises(InputError, match=message):
        evaluate(tiny, ["full"], **arguments)


def test_inception_weights_do_not_fit_the_digits_features(model, tmp_path):
    with pytest.raises(InputError, match="--features inception"):
        evaluate(model, ["full"], num_images=10, feature_weights=tmp_path)


def test_images_that_are_not_finite_are_refused(model, tmp_path):
    broken = ElasticVAR(model.var, VQVAE(model.tokenizer.config), provenance=Provenance(name="digits"))
    torch.nn.init.constant_(broken.tokenizer.decoder.conv_out.bias, float("nan"))
    with pytest.raises(InputError, match=r"schedule d2@2 draws images that are not finite in torch\.float32"):
        evaluate(broken, ["d2@2"], num_images=10)


# -- the command --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    """The arguments that open the model from official files, on digits features."""
    folder = tmp_path_factory.mktemp("digits")
    var, vae = official_state(model)
    torch.save(var, folder / "var.pth")
    torch.save(vae, folder / "vae.pth")
    return [folder / "var.pth", "--vae", folder / "vae.pth", "--features", "digits", "--images", 12, "--device", "cpu"]


def test_eval_prints_json(run, files, tmp_path, pixels):
    reference = write_folder(tmp_path / "images", pixels)
    outcome = run(
        "eval", *files, "-s", "full", "-s", "d2@2", "--reference", reference, "--json", "--out", tmp_path / "results"
    )
    assert outcome.exit_code == 0, outcome.stderr
    result = json.loads(outcome.stdout)
    assert [row["schedule"] for row in result["schedules"]] == ["full", "d2@2"]
    assert result["reference"] == str(reference)
    assert json.loads((tmp_path / "results" / "eval.json").read_text()) == result
    assert Image.open(tmp_path / "results" / "eval.png").width > 100


def test_eval_prints_a_table_and_leaves_no_litter(run, files, tmp_path, pixels, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reference = write_npz(tmp_path / "images.npz", arr_0=pixels)
    outcome = run("eval", *files, "-s", "full", "--reference", reference)
    assert outcome.exit_code == 0, outcome.stderr
    assert "FD ↓" in outcome.stdout
    assert "Nothing was written" in outcome.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["images.npz"]


def test_eval_writes_into_an_elastic_directory(run, model, tmp_path):
    save(model, tmp_path / "elastic")
    outcome = run("eval", tmp_path / "elastic", "--images", 12, "-s", "d2@2", "--device", "cpu", "--json")
    assert outcome.exit_code == 0, outcome.stderr
    assert "### Image quality" in (tmp_path / "elastic" / "README.md").read_text()
    assert {"eval.json", "eval.png"} <= {path.name for path in (tmp_path / "elastic").iterdir()}
    assert json.loads(outcome.stdout)["reference"] == "embedded digits"
