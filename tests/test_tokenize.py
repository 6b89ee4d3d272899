"""`tokenize` and what a token store is good for: kills, shared work, runs without images, the Hub and back."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import random
import resource
import socket
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import DatasetCard

from tests.conftest import random_model
from tests.test_sources import encoded, samples, write_tar
from varcompress.cli.app import main
from varcompress.data import tokens
from varcompress.data.sources import open_source
from varcompress.data.tokens import FILES, PENDING, Epoch, TokenData, TokenStore, tokenizer_digest
from varcompress.errors import InputError
from varcompress.publish import push
from varcompress.tokenizing import tokenize
from varcompress.training import distill
from varcompress.training.recipe import Recipe

SMALL = Recipe("small", (4, 2), 2, epochs_full=1, epochs_subnet=1, batch_size=4, learning_rate=1e-3, dtype="float32")
COUNT = 40


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A tar file of 40 samples."""
    return write_tar(tmp_path_factory.mktemp("images") / "train.tar", samples(*range(COUNT)))


@pytest.fixture(scope="module")
def store(images, tiny, tmp_path_factory):
    """Their finished store, in one view."""
    path = tmp_path_factory.mktemp("stores") / "store"
    tokenize(tiny, images, path)
    return path


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


# -- the command ----------------------------------------------------------------------------------


@pytest.fixture
def command(tiny_files):
    """`tokenize` of the tiny model, without DATA and --out."""
    return ["tokenize", str(tiny_files / "var.pth"), f"--vae={tiny_files / 'vae.pth'}", "--device=cpu"]


def test_the_command_says_what_it_made_and_does_it_once(command, images, store, tmp_path, run):
    code, out, err = run(*command, images, "--out", tmp_path / "store", "--json")
    result = json.loads(out)
    assert code == 0, err
    assert (result["images"], result["views"], result["encoded"], result["skipped"]) == (COUNT, 1, COUNT, [])
    assert result["tokens"] == COUNT * 30
    assert result["bytes"] == sum(map(len, content(store).values()))
    assert content(tmp_path / "store") == content(store)
    code, out, err = run(*command, images, "--out", tmp_path / "store")
    assert (code, err) == (0, "")
    for line in (f"{COUNT} of {images}", "1,200", "0 images", f"--data {tmp_path / 'store'} --out DIR"):
        assert line in out.replace("\n", "") or line in out
    assert content(tmp_path / "store") == content(store)


def test_what_cannot_be_read_is_named_and_counted(command, tmp_path, run):
    path = write_tar(tmp_path / "a.tar", samples(1, 2) | {"x.png": encoded(3)[:40], "x.cls": b"1"})
    code, out, err = run(*command, path, "--out", tmp_path / "store", "--views=3")
    assert code == 0
    assert "skipped 1 of 3 images that could not be read: a.tar/x" in err
    assert "1 that could not be read" in out
    assert "--set views=3" in out
    code, out, _ = run(*command, path, "--out", tmp_path / "store", "--views=3", "--json")
    assert (code, json.loads(out)["skipped"]) == (0, ["a.tar/x"])


def test_bad_input_is_one_line_and_exit_code_2(command, images, store, tmp_path, run):
    write_tar(tmp_path / "unlabelled.tar", {"a.png": encoded(1)})
    write_tar(tmp_path / "large.tar", {"a.png": encoded(1), "a.cls": b"10"})
    (tmp_path / "cut.tar").write_bytes(images.read_bytes()[:5000])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("mine")
    for data, out, message in (
        (tmp_path / "unlabelled.tar", "new", "sample a has no cls"),
        (tmp_path / "large.tar", "new", "large.tar/a has label 10, but the model has classes 0 to 9"),
        (tmp_path / "cut.tar", "new", "cut.tar: "),
        (tmp_path / "none", "new", "no such directory of images"),
        (store, "new", "holds tokens already: give images"),
        ("digits", "new", "embedded digits: 10 classes in 16 pixels"),
        ("hf:pictures", "new", "write a data set on the Hub as hf:OWNER/NAME"),
        (images, "other", "holds something else already"),
        (write_tar(tmp_path / "more.tar", samples(1, 2)), store, "made with another images: choose another directory"),
    ):
        code, stdout, err = run(*command, data, "--out", tmp_path / out)
        assert (code, stdout, err.count("\n")) == (2, "", 1)
        assert err.startswith("error: ")
        assert message in err
    assert not (tmp_path / "new").exists()


def test_a_full_disk_is_one_line_and_loses_nothing(command, images, store, tmp_path, run, monkeypatch):
    limits, write = resource.getrlimit(resource.RLIMIT_FSIZE), tokens.Rows.write

    def limited(rows, first, values):
        """The disk takes the first chunk and no more."""
        limit = limits if first == 0 else (1, limits[1])
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        try:
            write(rows, first, values)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with monkeypatch.context() as patch:
        patch.setattr(tokens.Rows, "write", limited)
        code, _, err = run(*command, images, "--out", tmp_path / "store")
    assert code == 2
    assert "store: could not be written (File too large); " in err.splitlines()[-1]
    assert np.count_nonzero(np.load(tmp_path / "store" / "states.npy")) == tokens.CHUNK
    code, out, _ = run(*command, images, "--out", tmp_path / "store", "--json")
    assert (code, json.loads(out)["encoded"]) == (0, COUNT - tokens.CHUNK)
    assert content(tmp_path / "store") == content(store)


# -- in several processes, and killed ------------------------------------------------------------


def encode_in_small_chunks(images: Path, out: Path) -> None:
    torch.set_num_threads(1)
    tokens.CHUNK = 2
    tokenize(random_model(), images, out, views=2)


@pytest.fixture(scope="module")
def processes():
    """What starts a process that has imported all it needs, in no time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_tokenize"])
    return context


def run_as_rank(rank: int, port: int, arguments: list[str], out: Path) -> None:
    """The command as one of two processes of torchrun."""
    torch.set_num_threads(1)
    there = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in there.items()})
    with out.open("w") as sys.stdout:
        main(arguments)


def test_two_processes_share_the_work(command, images, store, tmp_path, processes):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    arguments = [*command, str(images), "--json", "--out", str(tmp_path / "store")]
    printed = [tmp_path / f"rank{rank}" for rank in range(2)]
    ranks = [processes.Process(target=run_as_rank, args=(rank, port, arguments, printed[rank])) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(180)
    assert [process.exitcode for process in ranks] == [0, 0]
    assert printed[1].read_text() == ""
    assert json.loads(printed[0].read_text())["encoded"] == COUNT  # of both
    assert content(tmp_path / "store") == content(store)


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(images, tmp_path, processes):
    def started(out: Path) -> multiprocessing.Process:
        process = processes.Process(target=encode_in_small_chunks, args=(images, out))
        process.start()
        return process

    def begun(out: Path) -> bool:
        return (out / "store.json").is_file()  # the last of its files

    def finished(out: Path) -> bool:
        return begun(out) and PENDING not in np.load(out / "states.npy")

    started(tmp_path / "warm").join()
    began = time.monotonic()
    started(tmp_path / "whole").join()
    seconds, moments = time.monotonic() - began, random.Random(0)
    in_the_middle = 0
    for trial in range(3):
        out = tmp_path / f"killed{trial}"
        for kill in range(4):
            process = started(out)
            while kill == 0 and process.is_alive() and not begun(out):
                time.sleep(0.001)  # one of the kills comes as soon as there is something to lose
            process.join(moments.uniform(0, seconds) if kill else 0)
            process.kill()
            process.join()
            in_the_middle += begun(out) and not finished(out)
        process = started(out)
        process.join()
        assert process.exitcode == 0
        assert content(out) == content(tmp_path / "whole")
    assert set(content(tmp_path / "whole")) == set(FILES)
    assert in_the_middle


# -- in place of the images -----------------------------------------------------------------------


def weights(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


def test_a_run_from_a_store_is_the_run_from_its_images(hub, images, store, tiny, tmp_path):
    push(store, "ann/tokens")
    for name, data in {"images": images, "store": store, "hub": "hf:ann/tokens"}.items():
        distill(copy.deepcopy(tiny), SMALL, data=data, out=tmp_path / name)
    assert weights(tmp_path / "images") == weights(tmp_path / "store") == weights(tmp_path / "hub")
    assert set(content(store)) == set(FILES)


def test_what_a_teacher_says_goes_into_the_run_not_into_the_store(store, tiny, tmp_path):
    taught = Recipe.from_dict(
        SMALL.to_dict() | {"loss": "kl", "teacher": "frozen", "teacher_logits": "stored", "teacher_top": 4}
    )
    distill(copy.deepcopy(tiny), taught, data=store, out=tmp_path / "run")
    assert set(content(store)) == set(FILES)


def test_a_store_does_not_go_with_another(store, tiny, tmp_path):
    with pytest.raises(InputError, match="is a token store itself"):
        distill(copy.deepcopy(tiny), SMALL, data=store, tokens=tmp_path / "tokens", out=tmp_path / "run")
    other = random_model(seed=1)
    with pytest.raises(InputError, match="made with another tokenizer: encode the images anew with this model"):
        distill(other, SMALL, data=store, out=tmp_path / "other")
    assert set(content(store)) == set(FILES)
    assert [path.name for path in tmp_path.iterdir()] == []  # nothing was begun


def test_a_view_for_each_epoch(images, tiny, tmp_path):
    recipe = Recipe.from_dict(SMALL.to_dict() | {"views": "epochs"})
    assert recipe.num_views == 2
    distill(copy.deepcopy(tiny), recipe, data=images, out=tmp_path / "run", tokens=tmp_path / "tokens")
    assert np.load(tmp_path / "tokens" / "tokens.npy").shape == (COUNT, 2, 30)
    rows = np.arange(20)
    data = TokenData(np.broadcast_to(np.arange(5)[None, :, None], (20, 5, 1)), rows, rows % 10)
    for epoch in range(5):
        drawn = Epoch.draw(data, seed=3, epoch=epoch, label_drop=0.1, null=10, own_view=True)
        assert set(drawn.samples(slice(0, 20)).tokens.flatten().tolist()) == {epoch}
        other = Epoch.draw(data, seed=3, epoch=epoch, label_drop=0.1, null=10)
        assert np.array_equal(drawn.order, other.order)
        assert np.array_equal(drawn.labels, other.labels)


# -- to the Hub -----------------------------------------------------------------------------------


def test_a_store_is_pushed_as_a_data_set(hub, images, store, tiny, run):
    code, out, err = run("push", store, "ann/tokens", "--license=mit", "--json")
    done = json.loads(out)
    assert code == 0, err
    assert (done["url"], done["files"]) == (f"{hub.endpoint}/datasets/ann/tokens", sorted(["README.md", *FILES]))
    files = hub.files("datasets/ann/tokens")
    assert {name: files[name] for name in FILES} == content(store)
    card = DatasetCard(files["README.md"].decode())
    assert card.data.license == "mit"
    said = [tokenizer_digest(tiny), open_source(images, tiny).digest, "40 images, 1 view", "--data hf:ann/tokens --out"]
    assert all(part in card.text for part in said)
    assert str(images.parent) not in files["README.md"].decode() + files["store.json"].decode()
    source = open_source("hf:ann/tokens", tiny)
    assert (source.name, source.digest, len(source)) == ("hf:ann/tokens", open_source(store, tiny).digest, COUNT)
    assert push(store, "ann/secret", private=True)["private"]


def test_a_push_of_a_store_that_cannot_be(hub, images, store, tiny, tmp_path, run):
    TokenStore(tmp_path / "empty", open_source(images, tiny), tiny, 1).create()
    for arguments, message in (
        ([tmp_path / "empty"], "40 of its 40 images are not encoded yet"),
        ([store, "--vae=vae.pth"], "is a token store, which has no vae: leave it out"),
        ([store, "--base-model=a/b"], "is a token store, which has no base model: leave it out"),
        ([store, "--results=profile.json"], "is a token store, which has no results: leave it out"),
    ):
        code, out, err = run("push", *arguments, "ann/tokens")
        assert (code, out) == (2, "")
        assert message in err.splitlines()[-1]
    assert not hub.requests("POST")


def test_a_card_that_a_person_wrote_goes_with_the_store(hub, images, tiny, tmp_path):
    tokenize(tiny, images, tmp_path / "store")
    (tmp_path / "store" / "README.md").write_text("---\nlicense: mit\n---\nmine")
    assert push(tmp_path / "store", "ann/tokens")["card"] == "own"
    assert hub.files("datasets/ann/tokens")["README.md"].decode().endswith("mine")
    assert tokenize(tiny, images, tmp_path / "store")["encoded"] == 0
