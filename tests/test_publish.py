"""Saving with a card, recording what was measured, and publishing. The Hub's client is the real one."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from tests import test_card
from tests.conftest import random_model
from tests.hub_server import HANG_UP, TOKEN, HubServer
from varcompress import InputError
from varcompress.fingerprint import fingerprint
from varcompress.loading import load
from varcompress.publish import push, record, save
from varcompress.report.card import is_generated, model_card
from varcompress.results import SCHEMA

WEIGHTS = fingerprint(random_model())  # of the tiny model
PROFILE, EVAL = {**test_card.PROFILE, "weights": WEIGHTS}, {**test_card.EVAL, "weights": WEIGHTS}


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# -- saving with a card ---------------------------------------------------------------------------


def test_a_generated_card_goes_with_its_model(elastic, tmp_path):
    folder = save(load(elastic, device="cpu"), tmp_path / "model")
    assert "d4" in (folder / "README.md").read_text()
    other = random_model(seed=3)
    other.provenance.name = "another"
    save(other, folder)
    assert (folder / "README.md").read_text() == model_card(other)


def test_a_generated_card_is_known_whatever_the_model_beside_it(elastic, tmp_path):
    folder = save(load(elastic, device="cpu"), tmp_path / "model")
    (folder / "config.json").write_text("{")  # damaged: saving mends it, and its card with it
    other = random_model(seed=3)
    save(other, folder)
    assert (folder / "README.md").read_text() == model_card(other)


def test_an_edited_card_stays(elastic, tmp_path):
    folder = save(load(elastic, device="cpu"), tmp_path / "model")
    (folder / "README.md").write_text("my own words")
    save(random_model(seed=3), folder)
    assert (folder / "README.md").read_text() == "my own words"


def test_saving_the_same_weights_again_changes_nothing(elastic, tmp_path):
    folder = save(load(elastic, device="cpu"), tmp_path / "model")
    record(PROFILE, folder)
    before = snapshot(folder)
    save(load(folder, device="cpu"), folder)
    assert snapshot(folder) == before


# -- recording what was measured ------------------------------------------------------------------


def test_the_card_beside_a_model_shows_what_was_measured(elastic, tmp_path):
    folder = save(load(elastic, device="cpu"), tmp_path / "model")
    assert "Not measured." in (folder / "README.md").read_text()
    (folder / "samples.png").write_bytes(b"a picture")
    written = [record(PROFILE, folder), record({**EVAL, "reference": "/home/ann/cats"}, folder)]
    assert [[path.name for path in paths] for paths in written] == [
        ["profile.json", "profile.png", "README.md"],
        ["eval.json", "eval.png", "README.md"],
    ]
    card = (folder / "README.md").read_text()
    assert is_generated(card)
    assert "Not measured." not in card
    assert "/home/ann" not in card
    for part in (
        "### Speed and memory",
        "### Image quality",
        "](profile.png)",
        "](eval.png)",
        "![Samples](samples.png)",
    ):
        assert card.count(part) == 1, part
    assert json.loads((folder / "eval.json").read_text())["reference"] == "/home/ann/cats"


def test_the_card_shows_no_result_of_other_weights_and_none_that_is_damaged(elastic, tmp_path):
    folder = save(load(elastic, device="cpu"), tmp_path / "model")
    before = (folder / "README.md").read_text()
    assert [path.name for path in record({**EVAL, "weights": "0" * 16}, folder)] == ["eval.json", "eval.png"]
    assert (folder / "README.md").read_text() == before
    (folder / "profile-2.json").write_text(json.dumps({"kind": "profile", "schema": SCHEMA, "weights": WEIGHTS}))
    record(PROFILE, folder)
    card = (folder / "README.md").read_text()
    assert card.count("### Speed and memory") == 1
    assert "### Image quality" not in card


def test_recording_leaves_an_edited_card_and_other_folders_alone(elastic, tmp_path):
    folder = save(load(elastic, device="cpu"), tmp_path / "model")
    (folder / "README.md").write_text("my own words")
    assert [path.name for path in record(PROFILE, folder)] == ["profile.json", "profile.png"]
    assert (folder / "README.md").read_text() == "my own words"
    record(PROFILE, tmp_path / "elsewhere")
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == ["profile.json", "profile.png"]


def test_what_was_measured_in_bfloat16_is_shown_beside_the_stored_weights(elastic, tmp_path):
    folder = save(load(elastic, device="cpu"), tmp_path / "model")
    rounded = load(folder, device="cpu", dtype="bfloat16")
    assert record({**PROFILE, "weights": fingerprint(rounded)}, folder)[-1].name == "README.md"


# -- push and load back ---------------------------------------------------------------------------


def test_push_then_load_back(hub, elastic, tmp_path):
    (tmp_path / "profile.json").write_text(json.dumps(PROFILE))
    before, steps = snapshot(elastic), []
    done = push(
        elastic, "ann/tiny", results=[tmp_path / "profile.json", EVAL], progress=lambda *step: steps.append(step)
    )
    assert snapshot(elastic) == before
    assert steps[-1][:2] == (3, 3)

    files = hub.files("ann/tiny")
    pictures = {"profile.png", "eval.png"}
    assert done["files"] == sorted(
        {"README.md", "config.json", "model.safetensors", "recipe.yaml", "profile.json", "eval.json"} | pictures
    )
    assert set(files) == {*done["files"], ".gitattributes"}
    assert (done["commit"], done["private"]) == (hub.repos["ann/tiny"].refs["main"], False)
    assert len(hub.requests("POST .*/commit/")) == 1
    assert len(hub.requests("PUT /storage/")) == 3  # weights and two plots: the protocol for large files was spoken
    assert all(files[name].startswith(b"\x89PNG") for name in pictures)
    assert files["model.safetensors"] == before["model.safetensors"]
    assert json.loads(files["profile.json"]) == PROFILE
    assert json.loads(files["eval.json"])["reference"] == "VIRTUAL_imagenet256_labeled.npz"  # without its folder
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model == "FoundationVision/var"
    assert 'varcompress.load("ann/tiny")' in card.text

    mine, theirs = load(elastic, device="cpu"), load("ann/tiny", device="cpu")
    for (name, a), (_, b) in zip(mine.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert theirs.provenance == mine.provenance
    assert torch.equal(mine.generate([3, 4], "d2", seed=7), theirs.generate([3, 4], "d2", seed=7))


def test_a_revision_stays_what_it_was(hub, tiny, elastic):
    first = push(elastic, "ann/tiny", results=[PROFILE])["commit"]
    changed = load(elastic, device="cpu")
    with torch.no_grad():
        changed.var.head.bias.add_(1)
    changed.provenance.recipe = None
    push(changed, "ann/tiny")
    assert torch.equal(load("ann/tiny", device="cpu").var.head.bias, tiny.var.head.bias + 1)
    assert torch.equal(load("ann/tiny", device="cpu", revision=first).var.head.bias, tiny.var.head.bias)
    # measurements and recipe of the first model do not lie beside the second
    assert {"profile.json", "profile.png", "recipe.yaml"}.isdisjoint(hub.files("ann/tiny"))
    assert {"profile.json", "profile.png", "recipe.yaml"} < set(hub.files("ann/tiny", first))


def test_official_files_are_published_as_an_elastic_model(hub, tiny, tiny_files):
    push(tiny_files / "var.pth", "ann/tiny", vae=tiny_files / "vae.pth")
    assert torch.equal(load("ann/tiny", device="cpu").var.head.weight, tiny.var.head.weight)


def test_results_beside_the_weights_come_along_once(hub, elastic, tmp_path):
    model = load(elastic, device="cpu")
    folder = save(model, tmp_path / "model")
    (folder / "eval.json").write_text(json.dumps(EVAL))
    (folder / "notes.json").write_text("[1, 2]")
    done = push(folder, "ann/tiny", results=[folder / "eval.json", PROFILE, {**PROFILE, "batch_size": 2}])
    assert [n for n in done["files"] if n.endswith(".json")] == [
        "config.json",
        "eval.json",
        "profile-2.json",
        "profile.json",
    ]
    assert "| `full` | 12.3 ± 1 |" in hub.files("ann/tiny")["README.md"].decode()


def test_an_edited_card_is_published_as_it_is(hub, elastic, tmp_path):
    folder = save(load(elastic, device="cpu"), tmp_path / "model")
    done = push(folder, "ann/tiny", results=[PROFILE])
    assert done["card"] == "generated"
    assert "ann/tiny" in hub.files("ann/tiny")["README.md"].decode()
    mine = (folder / "README.md").read_text() + "\nTrained on a rainy day.\n"
    (folder / "README.md").write_text(mine)
    done = push(folder, "ann/tiny", results=[PROFILE])
    assert done["card"] == "own"
    assert hub.files("ann/tiny")["README.md"].decode() == mine
    assert push(load(folder, device="cpu"), "ann/tiny")["card"] == "generated"


def test_paths_of_the_publisher_stay_private(hub, elastic, tmp_path):
    command = f"varcompress eval {tmp_path}/model --reference=/home/ann/cats.npz --save-images 'my cats/a.npz' -s full"
    push(elastic, "ann/tiny", results=[{**EVAL, "command": command}])
    told = json.loads(hub.files("ann/tiny")["eval.json"])["command"]
    assert told == "varcompress eval model --reference=cats.npz --save-images a.npz -s full"


def test_a_model_on_the_hub_goes_on_with_its_results_and_samples(hub, elastic, tmp_path):
    folder = save(load(elastic, device="cpu"), tmp_path / "model")
    (folder / "samples.png").write_bytes(b"a picture")
    first = push(folder, "ann/tiny", results=[PROFILE, EVAL, {**PROFILE, "batch_size": 2}])
    load("ann/tiny", device="cpu")  # whose lean snapshot is no obstacle
    done = push(
        "ann/tiny", "ann/second", results=[{**EVAL, "reference": "/another/home/" + Path(EVAL["reference"]).name}]
    )
    assert (done["files"], done["card"]) == (first["files"], "generated")
    before, after = hub.files("ann/tiny"), hub.files("ann/second")
    for name in set(done["files"]) - {"README.md"}:
        assert before[name] == after[name], name
    card = after["README.md"].decode()
    assert 'varcompress.load("ann/second")' in card
    assert "ann/tiny" not in card
    assert "![Samples](samples.png)" in card


def test_an_edited_card_on_the_hub_goes_on_as_it_is(hub, elastic):
    push(elastic, "ann/tiny", results=[PROFILE])
    files = hub.files("ann/tiny")
    mine = files["README.md"] + b"\nTrained on a rainy day.\n"
    hub.repos["ann/tiny"].commit({**files, "README.md": mine})
    assert push("ann/tiny", "ann/second")["card"] == "own"
    assert hub.files("ann/second")["README.md"] == mine


def test_source_revision_and_target_branch(hub, elastic):
    first = push(elastic, "ann/tiny", results=[PROFILE])["commit"]
    push(elastic, "ann/tiny")
    hub.repos["ann/tiny"].refs["next"] = hub.repos["ann/tiny"].refs["main"]
    push("ann/tiny", "ann/tiny", revision=first, branch="next")
    assert "profile.json" in hub.files("ann/tiny", "next")
    assert "profile.json" not in hub.files("ann/tiny", "main")
    with pytest.raises(InputError, match="no revision 'v9'"):
        push("ann/tiny", "ann/tiny", revision="v9")
    for options in ({"revision": "main"}, {"vae": "vae.pth"}):
        with pytest.raises(InputError, match="can be loaded with one"):
            push(load("ann/tiny", device="cpu"), "ann/tiny", **options)
    with pytest.raises(InputError, match=r"only a transformer \.pth"):
        push("ann/tiny", "ann/tiny", vae="vae.pth")


def test_what_a_file_was_made_from_can_be_said(hub, tiny_files, tmp_path):
    source = {"model": tiny_files / "var.pth", "vae": tiny_files / "vae.pth"}
    push(**source, repo="ann/tiny")
    card = ModelCard(hub.files("ann/tiny")["README.md"].decode())
    assert "Base model: the checkpoint `var`." in card.text
    assert card.data.base_model is None
    for options, licence in (({}, "mit"), ({"license": "apache-2.0"}, "apache-2.0")):
        push(**source, repo="ann/tiny", base_model="FoundationVision/var", **options)
        card = ModelCard(hub.files("ann/tiny")["README.md"].decode())
        assert (card.data.base_model, card.data.license) == ("FoundationVision/var", licence)
        origin = load("ann/tiny", device="cpu").provenance
        assert (origin.base_model, origin.license) == ("FoundationVision/var", licence)
    for wrong in ("var_d16.pth", ""):
        with pytest.raises(InputError, match=f"base model '{wrong}' is no Hub id: write one such as"):
            push(**source, repo="ann/tiny", base_model=wrong)


def test_samples_of_an_earlier_model_do_not_stay(hub, elastic, tmp_path):
    folder = save(load(elastic, device="cpu"), tmp_path / "model")
    (folder / "samples.png").write_bytes(b"a picture")
    assert "samples.png" in push(folder, "ann/tiny")["files"]
    push(elastic, "ann/tiny")
    assert "samples.png" not in hub.files("ann/tiny")
    assert "![Samples]" not in hub.files("ann/tiny")["README.md"].decode()


def test_a_full_disk_while_the_card_is_written(hub, elastic, monkeypatch):
    write = Path.write_text

    def full(path, *arguments, **options):
        if path.name == "README.md":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InputError, match=r"README.md: could not be written \(No space left"):
        push(elastic, "ann/tiny")
    assert not hub.requests("POST .*/commit/")


def test_private(hub, elastic, monkeypatch):
    assert push(elastic, "ann/secret", private=True)["private"]
    assert hub.repos["ann/secret"].private
    load("ann/secret", device="cpu")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "/nowhere")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(elastic.parent / "another-cache"))
    with pytest.raises(InputError, match=r"no such repository, or it is private.*hf auth login"):
        load("ann/secret", device="cpu")


def test_a_private_push_does_not_go_to_a_public_repository(hub, elastic):
    push(elastic, "ann/tiny")
    with pytest.raises(InputError, match="is public"):
        push(elastic, "ann/tiny", private=True)
    assert len(hub.requests("POST .*/commit/")) == 1


@pytest.mark.parametrize(
    ("pattern", "status", "headers", "told"),
    [
        ("POST /api/repos/create", 401, {}, "cannot create ann/tiny on the Hub: .* run `hf auth login`"),
        ("POST /api/repos/create", 403, {"X_Error_Message": "no rights"}, r"does not allow it \(no rights\)"),
        ("POST .*/preupload/", 403, {}, "cannot upload to ann/tiny; nothing was published: your token"),
        ("PUT /storage/", 403, {}, "cannot upload to ann/tiny; nothing was published"),
        ("POST .*/commit/", 503, {}, "nothing was published: the Hub answered 503: try again later"),
        ("POST .*/commit/", HANG_UP, {}, "nothing was published: http://127.0.0.1:.* cannot be reached"),
    ],
)
def test_a_refused_push_loses_nothing(hub, elastic, pattern, status, headers, told):
    before = snapshot(elastic)
    hub.refuse(pattern, status, **headers)
    with pytest.raises(InputError, match=told) as caught:
        push(elastic, "ann/tiny")
    assert "\n" not in str(caught.value)
    assert snapshot(elastic) == before
    if "ann/tiny" in hub.repos:
        assert set(hub.files("ann/tiny")) == {".gitattributes"}
    hub.refusals.clear()
    assert push(elastic, "ann/tiny")["commit"]  # the same command mends it


def test_pushing_to_someone_else(hub, elastic):
    with pytest.raises(InputError, match=r"does not allow it .*rights to create a model under bob"):
        push(elastic, "bob/tiny")
    with pytest.raises(InputError, match="organisation/name"):
        push(elastic, "ann/a/b")
    with pytest.raises(InputError, match="no revision 'gone'"):
        push(elastic, "ann/tiny", branch="gone")
    with pytest.raises(InputError, match="only models on the Hub"):
        push(elastic, "ann/tiny", revision="main")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "not a readable JSON file"),
        ('{"kind": "sample"}', "not a result: give what profile or eval wrote"),
        ('{"kind": "profile"}', "of another version of varcompress: measure it again with `varcompress profile`"),
        (
            json.dumps({"kind": "profile", "schema": SCHEMA}),
            "not measured on these weights: measure them with `varcompress profile`",
        ),
        (json.dumps({**EVAL, "weights": "0" * 16}), "not measured on these weights: measure them with"),
        (
            json.dumps({"kind": "profile", "schema": SCHEMA, "weights": WEIGHTS}),
            "the profile result lacks 'batch_size': measure it again",
        ),
        (json.dumps({**EVAL, "schedules": [1]}), "the eval result is damaged: measure it again"),
    ],
)
def test_results_that_are_none(hub, elastic, tmp_path, content, told):
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(InputError, match=f"result.json: .*{told}") as caught:
        push(elastic, "ann/tiny", results=[tmp_path / "result.json"])
    assert "\n" not in str(caught.value)
    assert hub.log == []


def test_a_result_that_is_not_there(hub, elastic, tmp_path):
    with pytest.raises(InputError, match=r"gone.json: not a readable JSON file \(No such file or directory\)"):
        push(elastic, "ann/tiny", results=[tmp_path / "gone.json"])


def test_results_of_other_weights_beside_the_model(hub, elastic, tmp_path):
    folder = save(load(elastic, device="cpu"), tmp_path / "model")
    (folder / "eval.json").write_text(json.dumps({**EVAL, "weights": fingerprint(random_model(seed=1))}))
    with pytest.raises(InputError, match=r"model/eval.json: was not measured on these weights"):
        push(folder, "ann/tiny")
    assert hub.log == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_was_measured_of_rounded_weights(hub, elastic, tiny_files, tmp_path, dtype):
    sources = {"elastic": {"model": elastic}, "pth": {"model": tiny_files / "var.pth", "vae": tiny_files / "vae.pth"}}
    for name, source in sources.items():
        options = {key: value for key, value in source.items() if key != "model"}
        rounded = load(source["model"], dtype=dtype, device="cpu", **options)
        result = {**PROFILE, "weights": fingerprint(rounded)}
        assert result == PROFILE
        push(source["model"], f"ann/{name}", results=[result], **options)
        push(rounded, f"ann/{name}-rounded", results=[result])  # its weights are published rounded
        published = json.loads(hub.files(f"ann/{name}-rounded")["profile.json"])
        assert published["weights"] == fingerprint(load(f"ann/{name}-rounded", device="cpu")) != WEIGHTS
        assert "profile.json" in push(f"ann/{name}-rounded", "ann/again")["files"]


# -- the command, as a user runs it ---------------------------------------------------------------


def run_push(hub, *arguments, **environment):
    command = "import sys; from varcompress.cli.app import main; main(sys.argv[1:])"
    return subprocess.run(
        [sys.executable, "-c", command, "push", *map(str, arguments)],
        env={**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_command(hub, elastic, tmp_path):
    (tmp_path / "p.json").write_text(json.dumps(PROFILE))
    options = ["--private", "--results", tmp_path / "p.json", "--base-model", "ann/base", "--license", "mit", "--json"]
    done = run_push(hub, elastic, "ann/tiny", *options, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert ModelCard(hub.files("ann/tiny")["README.md"].decode()).data.base_model == "ann/base"
    assert json.loads(done.stdout)["url"] == f"{hub.endpoint}/ann/tiny"
    assert hub.repos["ann/tiny"].private
    assert hub.files("ann/tiny")["model.safetensors"] == (elastic / "model.safetensors").read_bytes()
    assert load_file(elastic / "model.safetensors")


def test_command_without_a_connection_says_so_once(elastic, tmp_path):
    with HubServer() as gone:
        pass
    done = run_push(gone, elastic, "ann/tiny", HF_TOKEN=TOKEN, HF_HOME=str(tmp_path))
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if "(0/3)" not in line and "(1/3)" not in line] == [
        f"error: cannot create ann/tiny on the Hub: {gone.endpoint} cannot be reached: "
        "check the connection, HF_ENDPOINT and HF_HUB_OFFLINE"
    ]


def test_command_without_a_login(hub, elastic, tmp_path):
    done = run_push(hub, elastic, "ann/tiny", HF_TOKEN="", HF_HOME=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: cannot create ann/tiny on the Hub: ")
    assert "hf auth login" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGTERM")
def test_a_push_that_is_ended_leaves_nothing_behind(elastic, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes requests and never answers
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with subprocess.Popen(
            [sys.executable, "-m", "varcompress", "push", str(elastic), "ann/tiny"],
            env={**os.environ, "HF_ENDPOINT": endpoint, "HF_TOKEN": TOKEN, "TMPDIR": str(tmp_path)},
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            told = [process.stderr.readline()]
            while "(1/3)" not in told[-1]:
                told.append(process.stderr.readline())
            with silent.accept()[0]:
                assert list(tmp_path.glob("varcompress.*"))
                process.terminate()
                rest = process.communicate(timeout=60)[1]
        assert (process.returncode, rest.strip()) == (143, "interrupted")
    assert not list(tmp_path.glob("varcompress.*"))
