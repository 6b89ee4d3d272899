"""Image folders and token stores: what is read, what is refused, and that stopping changes nothing."""

from __future__ import annotations

import hashlib
import json
import struct

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms

from tests.conftest import random_model
from varcompress.data import digits
from varcompress.data.digits import Digits, load_digits
from varcompress.data.folder import scan
from varcompress.data.sources import open_source
from varcompress.data.streams import fractions, words
from varcompress.data.tokens import DONE, PENDING, Epoch, TokenData, TokenStore
from varcompress.errors import InputError
from varcompress.fingerprint import weights_digest
from varcompress.images import centre
from varcompress.models.autoencoder import TokenizerConfig
from varcompress.models.elastic import ElasticVAR, Provenance
from varcompress.models.tokenizer import VQVAE

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
    views = folder.read(0, size=80, views=4)
    assert views.shape == (4, 3, 80, 80)
    assert views.dtype == np.uint8
    # 90 x 180 is 1.125 x 80 already: nothing is resized, and the centre starts at column 50
    assert views[0, 0, 0, 0] == 50
    assert (np.diff(views[0, 0, 0].astype(int)) == 1).all()
    assert len({view.tobytes() for view in views}) == 4
    assert np.array_equal(views, folder.read(0, size=80, views=4))
    assert np.array_equal(views[:2], folder.read(0, size=80, views=2))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "I;16"])
def test_every_mode_of_image_becomes_rgb(tmp_path, mode):
    (tmp_path / "c").mkdir()
    image = Image.new(mode, (5, 30))
    image.save(tmp_path / "c" / ("a.tiff" if mode == "CMYK" else "a.png"))
    assert scan(tmp_path, 1).read(0, size=16, views=1).shape == (1, 3, 16, 16)


def test_a_store_holds_the_tokens_and_names_the_unreadable(tiny, images, tmp_path):
    data = filled(tmp_path / "store", images, tiny)
    assert data.skipped == ("class3/1.png", "class7/2.png")
    assert len(data) == 38
    assert data.tokens.dtype == np.uint16
    folder = scan(images, CLASSES)
    for place in (0, 12, 30):
        row = data.rows[place]
        views = torch.from_numpy(folder.read(row, size=8, views=2)).float() / 255
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
    with pytest.raises(InputError, match="holds tokens with views 2, not 3: ask for 2"):
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


@pytest.fixture(scope="module")
def digits_model() -> ElasticVAR:
    """Random weights under the embedded model's name and size."""
    tokenizer = VQVAE(TokenizerConfig(32, (1, 1, 1), 1, 8, 40, 4, 3, (1, 2, 3, 4)))
    return ElasticVAR(random_model().var, tokenizer, provenance=Provenance(name="digits"))


def test_digits_are_encoded_like_any_source(digits_model, tmp_path):
    source = open_source(None, digits_model)
    store = TokenStore(tmp_path, source, digits_model, 2)
    store.create()
    store.encode()
    data = store.read()
    assert len(data) == len(source) == 1797
    for view in range(2):
        images, labels = load_digits(view)
        tokens = torch.cat([digits_model.encode(chunk) for chunk in images.split(32)])
        assert np.array_equal(data.tokens[:, view], tokens.numpy())
    assert np.array_equal(data.labels, labels.numpy())


def test_a_source_is_chosen_by_path_by_name_or_by_the_model(tiny, digits_model, images, tmp_path, monkeypatch):
    assert isinstance(open_source(None, digits_model), Digits)
    assert isinstance(open_source("digits", digits_model), Digits)
    assert open_source(images, tiny).name == str(images)
    with pytest.raises(InputError, match="var needs images: give a folder"):
        open_source(None, tiny)
    with pytest.raises(InputError, match="embedded digits: 10 classes in 16 pixels, but the model has 10 in 8"):
        open_source("digits", tiny)
    images.rename(tmp_path / "digits")
    monkeypatch.chdir(tmp_path)
    assert open_source("digits", tiny).name == "digits"  # what lies here goes first


def test_the_digest_of_the_digits_is_of_their_file(tmp_path, monkeypatch):
    before = Digits().digest
    assert before == hashlib.sha256(digits.DATA.read_bytes()).hexdigest()
    with np.load(digits.DATA) as file:
        np.savez(tmp_path / "digits.npz", images=file["images"] // 2, labels=file["labels"])
    monkeypatch.setattr(digits, "DATA", tmp_path / "digits.npz")
    assert Digits().digest != before


def test_an_epoch_is_a_permutation_of_its_own():
    rows = np.delete(np.arange(2001), 7)
    tokens = np.broadcast_to(np.arange(2001, dtype=np.uint16)[:, None, None], (2001, 4, 1))
    data = TokenData(tokens, rows, rows % 10)
    draw = {"seed": 3, "label_drop": 0.1, "null": 10}
    first, second = Epoch.draw(data, epoch=0, **draw), Epoch.draw(data, epoch=1, **draw)
    labels, drawn, *_ = first.samples(slice(0, 2000))
    assert sorted(drawn[:, 0].tolist()) == rows.tolist()
    dropped = labels == 10
    assert torch.equal(labels[~dropped], drawn[~dropped, 0] % 10)
    assert 0.07 < dropped.float().mean() < 0.13
    assert np.bincount(first.views, minlength=4).min() > 400
    assert not np.array_equal(first.order, second.order)
    again = Epoch.draw(data, epoch=0, **draw)
    assert torch.equal(again.samples(slice(100, 120)).tokens, drawn[100:120])


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
    views = scan(tmp_path, 1).read(0, size=16, views=2)
    assert views.shape == (2, 3, 16, 16)
    assert set(np.unique(views)) <= {126, 127}  # of the middle
    assert max(sizes[0]) == 16 * 18


def saved(tmp_path, width, height) -> Image.Image:
    """An image of noise, alone in a folder of one class."""
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    (tmp_path / "c").mkdir(exist_ok=True)
    image.save(tmp_path / "c" / "a.png", compress_level=0)
    return image


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.tuples(st.integers(1, 400), st.integers(1, 400)), st.sampled_from([16, 64, 100, 256]))
@example((640, 427), 256)
@example((257, 301), 256)
@example((500, 375), 256)
@example((300, 20), 16)
def test_the_first_view_is_torchvisions_centre_crop(tmp_path, shape, size):
    assume(max(shape) <= 16 * min(shape))
    image = saved(tmp_path, *shape)
    resize = transforms.Resize(round(1.125 * size), interpolation=transforms.InterpolationMode.LANCZOS)
    expected = transforms.CenterCrop((size, size))(resize(image))
    view = scan(tmp_path, 1).read(0, size=size, views=1)[0]
    assert np.array_equal(view.transpose(1, 2, 0), np.asarray(expected))


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_the_centre_is_torchvisions(length, part):
    assume(part <= length)
    row = torch.arange(length).view(1, 1, length)
    assert transforms.functional.center_crop(row, [1, part])[0, 0, 0] == centre(length, part)


def test_random_crops_lie_anywhere_in_the_resized_image(tmp_path):
    image = saved(tmp_path, 27, 18)
    whole = np.asarray(image)  # 18 is 1.125 x 16 already
    corners = set()
    for view in scan(tmp_path, 1).read(0, size=16, views=400)[1:]:
        places = [(y, x) for y in range(3) for x in range(12) if (whole[y, x] == view[:, 0, 0]).all()]
        corners |= {(y, x) for y, x in places if np.array_equal(whole[y : y + 16, x : x + 16], view.transpose(1, 2, 0))}
    assert corners == {(y, x) for y in range(3) for x in range(12)}


def test_tokens_of_other_crops_are_refused(tiny, images, tmp_path):
    filled(tmp_path / "store", images, tiny)
    meta = json.loads((tmp_path / "store" / "store.json").read_text())
    del meta["preprocessing"]  # as it was before crops were torchvision's
    (tmp_path / "store" / "store.json").write_text(json.dumps(meta))
    with pytest.raises(InputError, match="made with another preprocessing: choose another directory"):
        filled(tmp_path / "store", images, tiny)


@pytest.mark.parametrize("error", [struct.error, TypeError, MemoryError, IndexError])
def test_whatever_a_decoder_raises_the_image_is_skipped(tiny, images, tmp_path, monkeypatch, error):
    convert = Image.Image.convert

    def broken(image, mode):
        if image.filename.endswith("class5/3.png"):
            raise error("broken")
        return convert(image, mode)

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.convert", broken)
    assert filled(tmp_path / "store", images, tiny).skipped == ("class3/1.png", "class5/3.png", "class7/2.png")


def test_images_are_held_out_once_and_for_all():
    rows = np.delete(np.arange(2001), 7)
    data = TokenData(np.zeros((2001, 1, 1), dtype=np.uint16), rows, rows % 10)
    kept, held = data.split(100)
    assert (len(kept), len(held)) == (1900, 100)
    assert sorted([*kept.rows, *held.rows]) == list(rows)
    assert all((part.labels == part.rows % 10).all() for part in (kept, held))
    assert np.array_equal(data.split(100)[1].rows, held.rows)
    assert not np.array_equal(held.rows, np.sort(held.rows)[0] + np.arange(100))
    whole, none = data.split(0)
    assert (np.array_equal(whole.rows, rows), len(none)) == (True, 0)
