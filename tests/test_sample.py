"""Image files, and the command that draws them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import OnDevice
from varcompress.drawing import draw_images
from varcompress.errors import InputError
from varcompress.fingerprint import fingerprint
from varcompress.images import GAP_PIXELS, grid, pixels, save_images, to_uint8
from varcompress.sampling import Sampling


@pytest.fixture
def model_arguments(tiny_files):
    return ["sample", tiny_files / "var.pth", "--vae", tiny_files / "vae.pth", "--device", "cpu"]


def test_batches_draw_what_one_call_draws(tiny):
    labels = [0, 1, 2, 3, 4]
    whole = to_uint8(tiny.generate(labels, "d2@2", seed=3))
    for size in (1, 2, 5, 9):
        drawn = draw_images(tiny, labels, "d2@2", batch_size=size, sampling=Sampling(seed=3))
        assert int((drawn.int() - whole.int()).abs().max()) <= 1  # a rounding may tip


def test_draw_reports_progress(tiny):
    steps = []
    draw_images(tiny, [1, 2, 3], batch_size=2, progress=lambda *step: steps.append(step))
    assert steps == [(2, 3, "full: images"), (3, 3, "full: images")]


def test_a_batch_beyond_the_memory_is_named(tiny, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("varcompress.models.strips.decode", full)
    with pytest.raises(InputError, match=r"a batch of 2 images does not fit in the memory of .*: choose a smaller one"):
        draw_images(tiny, [1, 2, 3], batch_size=2)


def test_grid_goes_row_by_row_and_enlarges_by_a_whole_factor():
    images = torch.arange(0, 250, 50, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 20, 20)
    sheet = grid(images, columns=3)
    step = 80 + GAP_PIXELS
    assert sheet.shape == (step + 80, 2 * step + 80, 3)
    for index in range(5):
        row, column = divmod(index, 3)
        cell = sheet[row * step : row * step + 80, column * step : column * step + 80]
        assert (cell == index * 50).all()
    assert (sheet[step:, 2 * step :] == 255).all()
    assert (sheet[80:step] == 255).all()


def test_large_images_keep_their_pixels():
    images = torch.randint(256, (2, 3, 70, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sheet = grid(images, columns=2)
    assert (
        np.concatenate([sheet[:, :70], sheet[:, -70:]], axis=1) == np.concatenate(list(pixels(images)), axis=1)
    ).all()


def test_images_of_any_device_are_written(tmp_path):
    plain = torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8)
    images = plain.clone().as_subclass(OnDevice)
    with pytest.raises(TypeError, match="can't convert"):
        np.asarray(images.permute(0, 2, 3, 1))
    assert np.array_equal(pixels(images), plain.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(grid(images, columns=2), grid(plain, columns=2))
    for name in ("grid.png", "arrays.npz"):
        save_images(tmp_path / name, images, [0, 1, 2], columns=2)


@pytest.mark.parametrize("name", ["grid.png", "arrays.npz"])
def test_a_failed_write_keeps_the_old_file(tmp_path, name, monkeypatch):
    path = tmp_path / name
    path.write_text("old")
    for target in ("PIL.Image.Image.save", "numpy.savez"):
        monkeypatch.setattr(target, refuse)
    with pytest.raises(InputError, match="could not be written"):
        save_images(path, torch.zeros(1, 3, 8, 8, dtype=torch.uint8), [0], columns=1)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == [name]


def refuse(*_, **__):
    raise OSError(28, "No space left on device")


def test_sample_writes_a_grid(run, model_arguments, tmp_path):
    out = tmp_path / "new" / "grid.png"
    outcome = run(*model_arguments, "--classes", "1,2,9", "--count", 4, "-s", "d2@2", "--out", out)
    assert outcome.exit_code == 0, outcome.stderr
    assert "12 images under d2@2" in outcome.stdout
    with Image.open(out) as image:
        assert image.size == (4 * 64 + 3 * GAP_PIXELS, 3 * 64 + 2 * GAP_PIXELS)  # a row for each class


def test_sample_writes_arrays_and_replaces_them(run, model_arguments, tiny, tmp_path):
    out = tmp_path / "arrays.npz"
    out.write_text("old")
    outcome = run(
        *model_arguments, "--classes", "1-2,9", "--count", 2, "--out", out, "--seed", 5, "--batch-size", 4, "--cfg", 2,
        "--json", "--rounding", "truncate",
    )  # fmt: skip
    assert outcome.exit_code == 0, outcome.stderr
    result = json.loads(outcome.stdout)
    assert result["rounding"] == "truncate"
    assert result["labels"] == [1, 1, 2, 2, 9, 9]
    assert (result["cfg"], result["seed"], result["out"]) == (2, 5, str(out))
    assert (result["dtype"], result["kernels"], result["cache_dtype"]) == ("float32", "torch", "float32")
    assert result["weights"] == fingerprint(tiny)
    with np.load(out, allow_pickle=False) as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert (images.shape, images.dtype) == ((6, 8, 8, 3), np.uint8)
    assert (labels.tolist(), labels.dtype) == ([1, 1, 2, 2, 9, 9], np.int64)
    drawn = tiny.generate(result["labels"], seed=5, cfg=2)
    expected, rounded = (pixels(to_uint8(drawn, rounding)) for rounding in ("truncate", "round"))
    assert np.abs(images.astype(int) - expected).max() <= 1  # a rounding may tip
    assert (images == expected).mean() > 0.99 > (images == rounded).mean()
    assert [path.name for path in tmp_path.iterdir()] == ["arrays.npz"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--classes", "1", "--out", "images.jpg"], "must end in .png"),
        (["--classes", "1", "--out", "folder.png"], "is a directory"),
        (["--classes", "1", "--out", "a.png", "--rounding", "up"], "rounding 'up' is unknown: use round or truncate"),
        (["--classes", "1;2", "--out", "a.png"], "not understood"),
        (["--classes", "", "--out", "a.png"], "not understood"),
        (["--classes", "1,,2", "--out", "a.png"], "not understood"),
        (["--classes", "5-2", "--out", "a.png"], "not understood"),
        (["--classes", "-1", "--out", "a.png"], "not understood"),
        (["--classes", "3,10", "--out", "a.png"], "class 10 is unknown: this model has classes 0 to 9"),
        (["--classes", "0-99999999999", "--out", "a.png"], "class 99999999999 is unknown"),
        (["--classes", "1", "--out", "a.png", "-s", "d9"], "6"),
    ],
)
def test_bad_input_writes_nothing(run, model_arguments, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    outcome = run(*model_arguments, *arguments)
    assert outcome.exit_code == 2
    assert message in outcome.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]
