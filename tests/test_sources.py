"""Sources of images beside folders: tar shards, data sets on the Hub, finished token stores."""

from __future__ import annotations

import errno
import io
import json
import pickle
import sys
import tarfile
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.conftest import random_model
from tests.hub_server import HubServer, Repo, point_client_at
from varcompress.data.crops import crops
from varcompress.data.shards import index_shards
from varcompress.data.sources import open_source
from varcompress.data.tokens import TokenStore
from varcompress.errors import InputError

CLASSES = 10


def encoded(seed: int, kind: str = "PNG") -> bytes:
    """An image file of noise."""
    pixels = np.random.default_rng(seed).integers(0, 255, (9 + seed % 5, 12, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind)
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes | None], mode: str = "w") -> Path:
    """A tar file; what has no content is a folder."""
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE if content is None else tarfile.REGTYPE
            info.size = len(content or b"")
            tar.addfile(info, io.BytesIO(content or b""))
    return path


def samples(*numbers: int) -> dict[str, bytes]:
    """Members of samples whose image and class follow from their number."""
    found = {}
    for number in numbers:
        found |= {f"{number:06}.png": encoded(number), f"{number:06}.cls": str(number % CLASSES).encode()}
    return found


@pytest.fixture
def shards(tmp_path):
    """Three tar files of 4, 5 and 3 samples."""
    (tmp_path / "shards").mkdir()
    for shard, numbers in enumerate([range(4), range(4, 9), range(9, 12)]):
        write_tar(tmp_path / "shards" / f"train-{shard:04}.tar", samples(*numbers))
    return tmp_path / "shards"


# -- tar shards -----------------------------------------------------------------------------------


def test_every_sample_is_read_where_it_lies(shards):
    source = index_shards(shards, CLASSES)
    assert (len(source), source.labels.tolist()) == (12, [i % CLASSES for i in range(12)])
    for index in (11, 0, 5, 3):
        expected = crops(Image.open(io.BytesIO(encoded(index))), index, 8, 3)
        assert np.array_equal(source.read(index, 8, 3), expected)
    assert source.item(10) == "train-0002.tar/000010"
    assert np.array_equal(pickle.loads(pickle.dumps(source)).read(7, 8, 1), source.read(7, 8, 1))


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("train-{0000..0002}.tar", 12),
        ("train-000{0,2}.tar", 7),
        ("train-{0000..0000}.tar", 4),
        ("train-*.tar", 12),
        ("train-000[12].tar", 8),
        ("{train,train}-0001.tar", 10),
        ("train-0002.tar", 3),
    ],
)
def test_shards_by_pattern(shards, pattern, count, tiny):
    assert len(open_source(shards / pattern, tiny)) == count


def test_a_folder_of_classes_is_one_though_a_tar_lies_in_it(shards, tiny):
    for label in range(CLASSES):
        (shards / str(label)).mkdir()
        (shards / str(label) / "a.png").write_bytes(encoded(label))
    assert open_source(shards, tiny).item(3) == "3/a.png"


def test_the_digest_is_of_names_sizes_and_labels(shards, tmp_path):
    before = index_shards(shards, CLASSES).digest
    shards.rename(tmp_path / "elsewhere")
    assert index_shards(tmp_path / "elsewhere", CLASSES).digest == before
    changed = samples(*range(4)) | {"000002.cls": b"7"}
    write_tar(tmp_path / "elsewhere" / "train-0000.tar", changed)
    assert index_shards(tmp_path / "elsewhere", CLASSES).digest != before


def test_what_is_no_image_and_no_class_is_passed_over(tmp_path):
    more = {"a": None, "a/1.json": b"{}", "a/1.seg.png": b"", "a/.1.png": b"hidden", "a/README": b"", "a/2.txt": b""}
    pictures = {"a/1.JPEG": encoded(1, "JPEG"), "a/1.cls": b"3\n", "2.cls": b"04", "2.webp": encoded(2, "WEBP")}
    source = index_shards(write_tar(tmp_path / "a.tar", {**more, **pictures}), CLASSES)
    assert (source.keys, source.labels.tolist()) == (("a/1", "2"), [3, 4])
    assert all(source.read(index, 8, 1) is not None for index in range(2))


def test_an_image_that_cannot_be_read_is_skipped_and_named(tiny, tmp_path):
    path = write_tar(tmp_path / "a.tar", samples(1, 2) | {"x.png": encoded(3)[:40], "x.cls": b"1"})
    store = TokenStore(tmp_path / "store", index_shards(path, CLASSES), tiny, 1)
    store.create()
    store.encode()
    assert store.read().skipped == ("a.tar/x",)


@pytest.fixture(scope="module")
def whole_tar(tmp_path_factory):
    return write_tar(tmp_path_factory.mktemp("tar") / "whole.tar", samples(1, 2, 3))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_tar_that_is_cut_off_anywhere_is_refused(tmp_path, whole_tar, data):
    content = whole_tar.read_bytes()
    end = len(content.rstrip(b"\0"))  # what follows is padding and the marks of the end
    cut = data.draw(st.one_of(st.integers(0, end), st.integers(0, end // 512).map(lambda block: block * 512)))
    (tmp_path / "a.tar").write_bytes(content[:cut])
    with pytest.raises(InputError, match=r"a\.tar: (is cut off|not a whole tar file)"):
        index_shards(tmp_path / "a.tar", CLASSES)


BAD_TARS = {
    "sample b has no cls: add b.cls": {"a.png": encoded(1), "a.cls": b"1", "b.png": encoded(2)},
    r"sample b has no image \(jpg, jpeg, png, webp\)": {"b.cls": b"1", "b.txt": b""},
    "sample a is there twice": {"a.png": encoded(1), "a.cls": b"1", "a.jpg": encoded(2)},
    "sample a has the label 'cat'": {"a.png": encoded(1), "a.cls": b"cat"},
    "sample a has the label ''": {"a.png": encoded(1), "a.cls": b""},
    "bad.tar/a has label 10, but the model has classes 0 to 9": {"a.png": encoded(1), "a.cls": b"10"},
    "bad.tar/a has label -1": {"a.png": encoded(1), "a.cls": b"-1"},
    "holds no images": {"a.txt": b"nothing"},
}


@pytest.mark.parametrize("message", BAD_TARS)
def test_samples_that_do_not_fit_are_named(tmp_path, message):
    path = write_tar(tmp_path / "bad.tar", BAD_TARS[message])
    with pytest.raises(InputError, match=message):
        index_shards(path, CLASSES)


def test_files_that_are_no_shards_are_refused(shards, tmp_path, tiny):
    write_tar(tmp_path / "packed.tar", samples(1), "w:gz")
    with pytest.raises(InputError, match=r"not a whole tar file .*must not be compressed"):
        open_source(tmp_path / "packed.tar", tiny)
    with pytest.raises(InputError, match=r"train-0003.tar: could not be read .No such file"):
        open_source(shards / "train-{0000..0003}.tar", tiny)
    with pytest.raises(InputError, match="no tar file has such a name"):
        open_source(shards / "val-*.tar", tiny)
    source = open_source(shards, tiny)
    (shards / "train-0001.tar").unlink()
    with pytest.raises(InputError, match=r"train-0001.tar: could not be read"):
        source.read(5, 8, 1)


# -- data sets on the Hub -------------------------------------------------------------------------


@pytest.fixture
def push_images(hub, tmp_path, monkeypatch):
    """Puts a data set on the Hub, split by split, as parquet: columns by name, and their features."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.endpoint)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))

    def push(features: dict, **splits: dict) -> None:
        files = {}
        for split, columns in splits.items():
            made = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
            made.to_parquet(str(tmp_path / "split.parquet"))
            files[f"data/{split}-00000.parquet"] = (tmp_path / "split.parquet").read_bytes()
        hub.repos["datasets/ann/pictures"] = Repo(private=False)
        hub.repos["datasets/ann/pictures"].commit(files)

    return push


def pictures(*numbers: int, content: bytes | None = None) -> list[dict]:
    return [{"bytes": encoded(number) if content is None else content, "path": None} for number in numbers]


def features(**more: object) -> dict:
    import datasets

    return {"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=CLASSES), **more}


def test_a_data_set_on_the_hub(push_images, tiny):
    train = {"image": pictures(0, 1, 2) + pictures(3, content=b"no image"), "label": [3, 1, 2, 9]}
    push_images(features(), train=train, test={"image": pictures(7), "label": [4]})
    source = open_source("hf:ann/pictures", tiny)
    assert (len(source), source.labels.tolist(), source.name) == (4, [3, 1, 2, 9], "hf:ann/pictures")
    assert np.array_equal(source.read(2, 8, 3), crops(Image.open(io.BytesIO(encoded(2))), 2, 8, 3))
    assert source.read(3, 8, 1) is None
    assert np.array_equal(pickle.loads(pickle.dumps(source)).read(1, 8, 1), source.read(1, 8, 1))
    other = open_source("hf:ann/pictures@main:test", tiny)
    assert (len(other), other.labels.tolist()) == (1, [4])
    assert other.digest != source.digest


def test_columns_are_found_by_their_types(push_images, tiny):
    from datasets import Image as ImageFeature
    from datasets import Value

    kinds = {"height": Value("int32"), "cls": Value("int64"), "jpg": ImageFeature(), "depth": ImageFeature()}
    push_images(kinds, train={"height": [9], "cls": [5], "jpg": pictures(1), "depth": pictures(2)})
    source = open_source("hf:ann/pictures", tiny)
    assert (source.column, source.labels.tolist()) == ("jpg", [5])


def bad_columns() -> dict[str, tuple[dict, dict]]:
    from datasets import ClassLabel, Value

    both = {"fine": ClassLabel(num_classes=9), "coarse": ClassLabel(num_classes=3), "image": features()["image"]}
    return {
        r"no column of images, only text \(string\), label \(int64\)": (
            {"text": Value("string"), "label": Value("int64")},
            {"text": ["a"], "label": [1]},
        ),
        "no column of labels": (
            {"image": features()["image"], "text": Value("string")},
            {"image": pictures(1), "text": ["a"]},
        ),
        "any of the columns fine, coarse may hold the labels": (
            both,
            {"image": pictures(1), "fine": [1], "coarse": [2]},
        ),
        "image 1 has label 12, but the model has classes 0 to 9": (
            features(label=Value("int64")),
            {"image": pictures(1, 2), "label": [1, 12]},
        ),
        "image 1 has no label": (features(), {"image": pictures(1, 2), "label": [1, None]}),
    }


@pytest.mark.parametrize("number", range(5))
def test_a_data_set_that_does_not_fit_is_one_line(push_images, tiny, number):
    message, (kinds, columns) = list(bad_columns().items())[number]
    push_images(kinds, train=columns)
    with pytest.raises(InputError, match=message) as caught:
        open_source("hf:ann/pictures", tiny)
    assert "\n" not in str(caught.value)


def test_what_the_hub_refuses_is_one_line(push_images, tiny, monkeypatch):
    push_images(features(), train={"image": pictures(1), "label": [3]})
    for address, message in {
        "hf:pictures": "write a data set on the Hub as hf:OWNER/NAME",
        "hf:ann/none": "cannot load hf:ann/none: there is no such repository",
        "hf:ann/pictures@v9": "it has no revision 'v9'",
        "hf:ann/pictures:val": "cannot load hf:ann/pictures:val: Unknown split",
        "hf:ann/pictures/large": "cannot load hf:ann/pictures/large: BuilderConfig 'large' not found",
    }.items():
        with pytest.raises(InputError, match=message) as caught:
            open_source(address, tiny)
        assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"needs the datasets package: pip install 'varcompress\[data\]'"):
        open_source("hf:ann/pictures", tiny)


def test_a_data_set_that_lies_here_needs_no_connection(push_images, tiny, monkeypatch):
    import datasets

    push_images(features(), train={"image": pictures(1, 2), "label": [3, 4]})
    before = open_source("hf:ann/pictures", tiny)
    with HubServer() as gone:
        pass
    point_client_at(gone.endpoint, monkeypatch)
    for config in (huggingface_hub.constants, datasets.config):  # without HF_HUB_OFFLINE it tries for half a minute
        monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)
    assert open_source("hf:ann/pictures", tiny).digest == before.digest
    with pytest.raises(InputError, match=r"cannot load hf:ann/other: .* cannot be reached: check the connection"):
        open_source("hf:ann/other", tiny)


def test_a_full_disk_while_a_data_set_comes_down(push_images, tiny, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("while generating the dataset") from OSError(errno.ENOSPC, "No space left on device")

    push_images(features(), train={"image": pictures(1), "label": [3]})
    monkeypatch.setattr("datasets.load_dataset", full)
    with pytest.raises(InputError, match="cannot load hf:ann/pictures: no room left on the disk"):
        open_source("hf:ann/pictures", tiny)


# -- finished token stores ------------------------------------------------------------------------


@pytest.fixture
def store(shards, tiny, tmp_path):
    """A finished store of the shards, in two views."""
    made = TokenStore(tmp_path / "store", index_shards(shards, CLASSES), tiny, 2)
    made.create()
    made.encode()
    return made


def test_a_finished_store_is_a_source_without_images(store, shards, tiny):
    before = store.read()
    for shard in shards.iterdir():
        shard.unlink()
    source = open_source(store.path, tiny)
    assert (source.name, source.digest, len(source)) == (str(store.path), store.source.digest, 12)
    again = TokenStore(store.path, source, tiny, 2)
    again.create()
    assert again.encode() == 0
    data = again.read()
    assert np.array_equal(data.tokens, before.tokens)
    assert data.labels.tolist() == [i % CLASSES for i in range(12)]
    with pytest.raises(InputError, match="holds the tokens of its images, not the images"):
        source.read(0, 8, 1)


def test_a_store_of_another_model_or_of_other_views_is_refused(store, tiny):
    other = random_model(seed=1)
    with pytest.raises(InputError, match="made with another tokenizer: encode the images anew with this model"):
        TokenStore(store.path, open_source(store.path, other), other, 2).create()
    with pytest.raises(InputError, match="holds tokens with views 2, not 1: ask for 2"):
        TokenStore(store.path, open_source(store.path, tiny), tiny, 1).create()
    fewer = random_model(classes=4)
    with pytest.raises(InputError, match="image 4 has label 4, but the model has classes 0 to 3"):
        open_source(store.path, fewer)


def test_the_dtype_of_the_decoder_makes_no_other_tokenizer(store, tiny):
    other = random_model()
    other.tokenizer.decoder.bfloat16()
    TokenStore(store.path, open_source(store.path, other), other, 2).create()


def damage(path: Path, what: str) -> None:
    """Spoil a store in one way."""
    meta = json.loads((path / "store.json").read_text())
    tokens, states = (path / "tokens.npy").read_bytes(), np.load(path / "states.npy")
    match what:
        case "old":
            (path / "store.json").write_text(json.dumps(meta | {"format": 1}))
        case "not json":
            (path / "store.json").write_text("[1]")
        case "no labels":
            (path / "labels.npy").unlink()
        case "fewer labels":
            np.save(path / "labels.npy", np.load(path / "labels.npy")[:-1])
        case "short":
            (path / "tokens.npy").write_bytes(tokens[:-1])
        case "empty":
            (path / "states.npy").write_bytes(b"")
        case "unfinished":
            states[3] = 0
            np.save(path / "states.npy", states)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("old", "holds tokens in format 1, and this version of varcompress reads 2: delete it"),
        ("not json", "store.json: damaged"),
        ("no labels", "labels.npy: damaged"),
        ("fewer labels", "its files are of different numbers of images"),
        ("short", "tokens.npy: damaged"),
        ("empty", "states.npy: damaged"),
        ("unfinished", "1 of its 12 images are not encoded yet: finish it with varcompress tokenize"),
    ],
)
def test_a_store_that_is_not_whole_is_refused(store, tiny, what, message):
    damage(store.path, what)
    with pytest.raises(InputError, match=message):
        open_source(store.path, tiny)
