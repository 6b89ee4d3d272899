"""Image folders and token stores: what is read, what is refused, and that stopping changes nothing."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import random_model
from varcompress.data.images import read_views, scan
from varcompress.data.streams import fractions, words
from varcompress.data.tokens import DONE, PENDING, Epoch, TokenData, TokenStore, encode_images
from varcompress.errors import InputError
from varcompress.fingerprint import weights_digest

CLASSES = 10


@pytest.fixture
def images(tmp_path):
    """Ten class folders of four images of various shapes, two of them unreadable."""
    rng = np.random.default_rng(0)
    for label in range(CLASSES):
        folder = tmp_path / "images" / f"class{label}"
        folder.mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 255, (9 + 3 * i, 12 + label, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    (tmp_path / "images" / "class3" / "1.png").write_bytes(b"")
    whole = (tmp_path / "images" / "class7" / "2.png").read_bytes()
    (tmp_path / "images" / "class7" / "2.png").write_bytes(whole[: len(whole) // 2])
    return tmp_path / "images"


def filled(path, images, model, views=2) -> TokenData:
    store = TokenStore(path, scan(images, CLASSES), model, views)
    store.create()
    store.encode()
    return store.read()


def test_streams_are_uniform_and_apart():
    first, second, *_ = words(0, 1, 0, 20000)
    for other in (words(1, 1, 0, 20000), words(0, 2, 0, 20000), words(0, 1, 1, 20000), (second,)):
        assert abs(np.corrcoef(fractions(first), fractions(other[0]))[0, 1]) < 0.03
    assert abs(fractions(first).mean() - 0.5) < 0.01
    assert torch.equal(first[:10], words(0, 1, 0, 10)[0])


def test_classes_are_the_sorted_folders(images):
    folder = scan(images, CLASSES)
    assert len(folder.files) == 40
    assert folder.files[4] == "class1/0.png"
    assert folder.labels.tolist() == [label for label in range(CLASSES) for _ in range(4)]


def test_scan_names_what_does_not_fit(images, tmp_path):
    with pytest.raises(InputError, match="10 class folders, but the model has 1000 classes"):
        scan(images, 1000)
    with pytest.raises(InputError, match="no such directory"):
        scan(tmp_path / "none", CLASSES)
    for file in (images / "class5").iterdir():
        file.unlink()
    with pytest.raises(InputError, match="class5: holds no images"):
        scan(images, CLASSES)


def test_the_first_view_is_the_centre_at_the_right_scale(tmp_path):
    ramp = np.tile(np.arange(180, dtype=np.uint8)[None, :, None], (90, 1, 3))
    (tmp_path / "c").mkdir()
    Image.fromarray(ramp).save(tmp_path / "c" / "a.png")
    folder = scan(tmp_path, 1)
    views = read_views(folder, 0, size=80, views=4)
    assert views.shape == (4, 3, 80, 80)
    assert views.dtype == np.uint8
    # 90 x 180 is 1.125 x 80 already: nothing is resized, and the centre starts at column 50 or 51
    assert views[0, 0, 0, 0] in (50, 51)
    assert (np.diff(views[0, 0, 0].astype(int)) == 1).all()
    assert len({view.tobytes() for view in views}) == 4
    assert np.array_equal(views, read_views(folder, 0, size=80, views=4))
    assert np.array_equal(views[:2], read_views(folder, 0, size=80, views=2))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "I;16"])
def test_every_mode_of_image_becomes_rgb(tmp_path, mode):
    (tmp_path / "c").mkdir()
    image = Image.new(mode, (5, 30))
    image.save(tmp_path / "c" / ("a.tiff" if mode == "CMYK" else "a.png"))
    assert read_views(scan(tmp_path, 1), 0, size=16, views=1).shape == (1, 3, 16, 16)


def test_a_store_holds_the_tokens_and_names_the_unreadable(tiny, images, tmp_path):
    data = filled(tmp_path / "store", images, tiny)
    assert data.skipped == ("class3/1.png", "class7/2.png")
    assert len(data) == 38
    assert data.tokens.dtype == np.uint16
    folder = scan(images, CLASSES)
    for place in (0, 12, 30):
        row = data.rows[place]
        views = torch.from_numpy(read_views(folder, row, size=8, views=2)).float() / 255
        assert np.array_equal(data.tokens[row], tiny.encode(views).numpy())
        assert data.labels[place] == folder.labels[row]


def test_encoding_may_stop_anywhere_and_be_shared(tiny, images, tmp_path):
    whole = filled(tmp_path / "whole", images, tiny)

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    store = TokenStore(tmp_path / "parts", scan(images, CLASSES), tiny, 2)
    store.create()
    with pytest.raises(Stop):
        store.encode(rank=1, ranks=2, progress=stop)
    states = np.load(store.path / "states.npy")
    assert set(states[:32]) == {PENDING}
    assert set(states[32:]) == {DONE}
    before = np.load(store.path / "tokens.npy")[32:].copy()
    store.create()  # finds what is there
    store.encode(rank=0, ranks=2)
    assert np.array_equal(np.load(store.path / "tokens.npy")[32:], before)
    data = store.read()
    assert np.array_equal(data.tokens, whole.tokens)
    assert data.skipped == whole.skipped


def test_a_store_of_something_else_is_refused(tiny, images, tmp_path):
    path = tmp_path / "store"
    filled(path, images, tiny)
    with pytest.raises(InputError, match="made with another views"):
        filled(path, images, tiny, views=3)
    with pytest.raises(InputError, match="made with another tokenizer"):
        filled(path, images, random_model(seed=1))
    (images / "class0" / "more.png").write_bytes((images / "class0" / "0.png").read_bytes())
    with pytest.raises(InputError, match="made with another images"):
        filled(path, images, tiny)
    with pytest.raises(InputError, match="holds something else"):
        filled(images, images, tiny)
    (path / "store.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        filled(path, images, tiny)


def test_a_folder_without_one_readable_image_is_refused(tiny, tmp_path):
    for label in range(CLASSES):
        (tmp_path / "images" / str(label)).mkdir(parents=True)
        (tmp_path / "images" / str(label) / "notes.txt").write_text("no image")
    with pytest.raises(InputError, match="none of its 10 files is a readable image"):
        filled(tmp_path / "store", tmp_path / "images", tiny)


def test_encode_images_keeps_views_apart(tiny):
    def load(view):
        generator = torch.Generator().manual_seed(view)
        return torch.rand(5, 3, 8, 8, generator=generator), torch.arange(5)

    data = encode_images(tiny, load, 3)
    assert data.tokens.shape == (5, 3, 30)
    assert np.array_equal(data.tokens[:, 2], tiny.encode(load(2)[0]).numpy())


def test_an_epoch_is_a_permutation_of_its_own():
    rows = np.delete(np.arange(2001), 7)
    tokens = np.broadcast_to(np.arange(2001, dtype=np.uint16)[:, None, None], (2001, 4, 1))
    data = TokenData(tokens, rows, rows % 10)
    draw = {"seed": 3, "label_drop": 0.1, "null": 10}
    first, second = Epoch.draw(data, epoch=0, **draw), Epoch.draw(data, epoch=1, **draw)
    labels, drawn = first.samples(slice(0, 2000))
    assert sorted(drawn[:, 0].tolist()) == rows.tolist()
    dropped = labels == 10
    assert torch.equal(labels[~dropped], drawn[~dropped, 0] % 10)
    assert 0.07 < dropped.float().mean() < 0.13
    assert np.bincount(first.views, minlength=4).min() > 400
    assert not np.array_equal(first.order, second.order)
    again = Epoch.draw(data, epoch=0, **draw)
    assert torch.equal(again.samples(slice(100, 120))[1], drawn[100:120])


def test_the_digest_is_of_every_weight():
    model = random_model()
    before = weights_digest(model)
    assert before == weights_digest(random_model())
    with torch.no_grad():
        model.tokenizer.decoder.conv_out.bias[1] += 1e-6
    assert weights_digest(model) != before


@pytest.mark.parametrize("shape", [(65_000, 1), (1, 65_000)])
def test_a_very_long_image_is_cropped_before_it_is_resized(tmp_path, monkeypatch, shape):
    (tmp_path / "c").mkdir()
    ramp = (np.arange(65_000) // 256).astype(np.uint8).reshape(*shape, 1)  # 0 to 253 from end to end
    Image.fromarray(np.tile(ramp, (1, 1, 3))).save(tmp_path / "c" / "a.png")
    sizes, resize = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda *args, **more: sizes.append(args[1]) or resize(*args, **more))
    views = read_views(scan(tmp_path, 1), 0, size=16, views=2)
    assert views.shape == (2, 3, 16, 16)
    assert set(np.unique(views)) <= {126, 127}  # of the middle
    assert max(sizes[0]) == 16 * 18


def test_ordinary_images_are_resized_whole(tmp_path):
    (tmp_path / "c").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (20, 300, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "c" / "a.png")
    whole = np.asarray(Image.fromarray(pixels).resize((270, 18), Image.Resampling.LANCZOS))
    view = read_views(scan(tmp_path, 1), 0, size=16, views=1)[0].transpose(1, 2, 0)
    left = int(0.5 * (270 - 16 + 1))
    assert np.array_equal(view, whole[1:17, left : left + 16])


@pytest.mark.parametrize("error", [struct.error, TypeError, MemoryError, IndexError])
def test_whatever_a_decoder_raises_the_image_is_skipped(tiny, images, tmp_path, monkeypatch, error):
    convert = Image.Image.convert

    def broken(image, mode):
        if image.filename.endswith("class5/3.png"):
            raise error("broken")
        return convert(image, mode)

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.convert", broken)
    assert filled(tmp_path / "store", images, tiny).skipped == ("class3/1.png", "class5/3.png", "class7/2.png")
