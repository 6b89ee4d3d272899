"""Sources of images beside folders: tar shards, data sets on the Hub, finished token stores."""

from __future__ import annotations

import io
import json
import pickle
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.conftest import random_model
from tests.hub_server import HANG_UP, TOKEN, HubServer, Repo, point_client_at
from varcompress.data import row_groups, tokens
from varcompress.data.crops import crops
from varcompress.data.row_groups import AHEAD
from varcompress.data.shards import index_shards
from varcompress.data.sources import open_source
from varcompress.data.tokens import TokenStore
from varcompress.errors import InputError

CLASSES = 10


def encoded(seed: int, kind: str = "PNG", size: int = 12) -> bytes:
    """An image file of noise."""
    pixels = np.random.default_rng(seed).integers(0, 255, (size - 3 + seed % 5, size, 3), dtype=np.uint8)
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

    def push(features: dict, *, files: int = 1, group: int | None = None, **splits: dict) -> None:
        stored = {}
        for split, columns in splits.items():
            made = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
            for number in range(files):
                part = made.shard(files, number, contiguous=True)
                part.to_parquet(str(tmp_path / "part.parquet"), batch_size=group)
                stored[f"data/{split}-{number:05}.parquet"] = (tmp_path / "part.parquet").read_bytes()
        hub.repos["datasets/ann/pictures"] = Repo(private=False)
        hub.repos["datasets/ann/pictures"].commit(stored)

    return push


def pictures(*numbers: int, content: bytes | None = None) -> list[dict]:
    return [{"bytes": encoded(number) if content is None else content, "path": None} for number in numbers]


def features(**more: object) -> dict:
    import datasets

    return {"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=CLASSES), **more}


def test_a_data_set_on_the_hub(push_images, tiny):
    train = {"image": pictures(0, 1, 2) + pictures(3, content=b"no image") + [None], "label": [3, 1, 2, 9, 0]}
    push_images(features(), train=train, test={"image": pictures(7), "label": [4]})
    source = open_source("hf:ann/pictures", tiny)
    assert (len(source), source.labels.tolist(), source.name) == (5, [3, 1, 2, 9, 0], "hf:ann/pictures")
    assert np.array_equal(source.read(2, 8, 3), crops(Image.open(io.BytesIO(encoded(2))), 2, 8, 3))
    assert source.read(3, 8, 1) is source.read(4, 8, 1) is None
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
    assert (source.images.column, source.labels.tolist()) == ("jpg", [5])


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
        "hf:ann/pictures:val": "hf:ann/pictures:val: has no split 'val', only train",
        "hf:ann/pictures/large": "cannot load hf:ann/pictures/large: BuilderConfig 'large' not found",
    }.items():
        with pytest.raises(InputError, match=message) as caught:
            open_source(address, tiny)
        assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"needs the datasets package: pip install 'varcompress\[data\]'"):
        open_source("hf:ann/pictures", tiny)


def test_without_a_connection_a_data_set_is_one_line(push_images, tiny, monkeypatch):
    push_images(features(), train={"image": pictures(1, 2), "label": [3, 4]})
    with HubServer() as gone:
        pass
    point_client_at(gone.endpoint, monkeypatch)
    with pytest.raises(InputError, match=r"cannot load hf:ann/pictures: .* cannot be reached: check the connection"):
        open_source("hf:ann/pictures", tiny)


def test_what_is_not_stored_as_parquet_is_refused_with_the_way_out(hub, push_images, tiny):
    push_images(features(), train={"image": pictures(1, 2), "label": [3, 4]})
    repo, (content,) = hub.repos["datasets/ann/pictures"], hub.files("datasets/ann/pictures").values()
    repo.commit({"train/3/1.png": encoded(1), "train/4/2.png": encoded(2)})
    with pytest.raises(InputError, match=r"is stored as .\.png, not as parquet: try the Hub's own, hf:") as caught:
        open_source("hf:ann/pictures", tiny)
    address = "hf:ann/pictures/default@refs/convert/parquet:train"
    assert address in str(caught.value)
    repo.commit({f"{config}/train/0000.parquet": content for config in ("default", "more")}, "refs/convert/parquet")
    assert open_source(address, tiny).labels.tolist() == [3, 4]
    repo.commit({"default/partial-train/0000.parquet": content}, "refs/convert/parquet")
    with pytest.raises(InputError, match="is no more than the first part of a data set: download it"):
        open_source(address, tiny)


def test_a_gated_data_set_needs_access(hub, push_images, tiny):
    push_images(features(), train={"image": pictures(1), "label": [3]})
    hub.repos["datasets/meta/gated"] = Repo(private=False, gated=True)
    hub.repos["datasets/meta/gated"].commit(hub.files("datasets/ann/pictures"))
    with pytest.raises(InputError, match="cannot load hf:meta/gated: access is restricted: ask for it on its page"):
        open_source("hf:meta/gated", tiny)
    hub.tokens[TOKEN].add("meta")
    assert open_source("hf:meta/gated", tiny).read(0, 8, 1) is not None


# -- data sets that are too large to keep ---------------------------------------------------------

COUNT, GROUP = 80, 10  # images, and how many of them are fetched at a time


@pytest.fixture
def large(push_images, hub, tiny, monkeypatch):
    """A data set in two files of four row groups, opened, and what has been fetched of it since."""
    monkeypatch.setattr(tokens, "CHUNK", 4)
    monkeypatch.setattr(row_groups, "SPREAD", 16)
    content = [encoded(number, size=120) for number in range(COUNT)]
    content[7] = b"no image"
    images = [{"bytes": image, "path": None} for image in content]
    push_images(features(), files=2, group=GROUP, train={"image": images, "label": [i % CLASSES for i in range(COUNT)]})
    return open_source("hf:ann/pictures", tiny)


def fetched(hub: HubServer) -> int:
    """Bytes that were read of large files since the last call."""
    count = sum(end - first for _, first, end in hub.fetched)
    hub.fetched.clear()
    return count


def settle(images: row_groups.RowGroups) -> None:
    """Wait for what is fetched ahead."""
    for future in images._kept.values():
        future.exception()


def stored(source, model, path: Path, ranks: int = 1) -> dict[str, bytes]:
    """The files of a store that was made by several processes, one after another."""
    store = TokenStore(path, source, model, 2)
    store.create()
    assert sum(store.encode(rank, ranks) for rank in range(ranks)) == COUNT
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_of_the_images_nothing_is_fetched_before_they_are_read(large, hub):
    whole = sum(map(len, hub.files("datasets/ann/pictures").values()))
    assert large.labels.tolist() == [i % CLASSES for i in range(COUNT)]
    assert fetched(hub) < 0.06 * whole  # three footers, mostly, of which the client reads 64 KiB each
    large.read(35, 8, 1)
    settle(large.images)
    assert fetched(hub) < (1 + AHEAD + 0.05) * whole * GROUP / COUNT


def test_every_image_is_fetched_once_and_the_tokens_are_those_of_other_sources(large, hub, tiny, tmp_path):
    whole = sum(map(len, hub.files("datasets/ann/pictures").values()))
    fetched(hub)
    alone = stored(large, tiny, tmp_path / "alone")
    assert 0.95 * whole < fetched(hub) < whole
    content = {f"{number:03}.png": encoded(number, size=120) for number in range(COUNT)} | {"007.png": b"no image"}
    content |= {f"{number:03}.cls": str(number % CLASSES).encode() for number in range(COUNT)}
    tar = index_shards(write_tar(tmp_path / "a.tar", content), CLASSES)
    local = stored(tar, tiny, tmp_path / "local")
    assert {name for name in alone if alone[name] != local[name]} == {"store.json"}  # which names the images' digest
    assert np.load(tmp_path / "alone" / "states.npy").tolist().count(tokens.UNREADABLE) == 1


def test_several_processes_fetch_little_twice(large, hub, tiny, tmp_path):
    alone = stored(large, tiny, tmp_path / "alone")
    settle(large.images)
    once = fetched(hub)
    sent = [pickle.loads(pickle.dumps(large)) for _ in range(3)]
    store = TokenStore(tmp_path / "shared", large, tiny, 2)
    store.create()
    for rank, source in enumerate(sent):
        TokenStore(store.path, source, tiny, 2).encode(rank, 3)
        settle(source.images)
    assert {file.name: file.read_bytes() for file in store.path.iterdir()} == alone
    assert fetched(hub) < once * (1 + 2 * (AHEAD + 1) * GROUP / COUNT)


def test_a_connection_that_fails_marks_no_image_and_later_it_goes_on(large, hub, tiny, tmp_path, monkeypatch):
    """The client tries again, by its own count; then nothing more is tried, and what is done stays done."""
    alone = stored(large, tiny, tmp_path / "alone")
    settle(large.images)
    once = fetched(hub)
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    store = TokenStore(tmp_path / "store", pickle.loads(pickle.dumps(large)), tiny, 2)
    store.create()
    write = tokens.Rows.write

    def disconnected(rows, first, values):
        if first == 20 and not hub.refusals:
            hub.refuse("GET /storage/", HANG_UP)
        write(rows, first, values)

    monkeypatch.setattr(tokens.Rows, "write", disconnected)
    with pytest.raises(InputError, match="cannot read hf:ann/pictures: ") as caught:
        store.encode()
    monkeypatch.setattr(tokens.Rows, "write", write)
    assert "\n" not in str(caught.value)
    assert 5 <= len(waited) <= 5 * (1 + AHEAD)
    states = np.load(store.path / "states.npy")
    assert np.flatnonzero(states == tokens.UNREADABLE).tolist() == [7]
    done = int(np.count_nonzero(states))
    assert 0 < done < COUNT

    hub.refusals.clear()
    again = TokenStore(store.path, open_source("hf:ann/pictures", tiny), tiny, 2)
    fetched(hub)
    hub.refuse("GET /storage/", 503)
    monkeypatch.setattr("time.sleep", lambda seconds: hub.refusals.clear())  # so that the second attempt succeeds
    again.create()
    assert again.encode() == COUNT - done
    assert fetched(hub) < once * (COUNT - done + GROUP) / COUNT
    assert {file.name: file.read_bytes() for file in store.path.iterdir()} == alone


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, COUNT - 1), min_size=1, max_size=40))
def test_images_are_found_in_any_order_and_few_are_kept(large, order):
    read = pickle.loads(pickle.dumps(large)).images
    for index in order:
        assert read.read(index) == (b"no image" if index == 7 else encoded(index, size=120))
        assert len(read._kept) <= read.most < COUNT // GROUP


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
