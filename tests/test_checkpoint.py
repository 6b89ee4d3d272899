"""Checkpoints in and out: bit-equal round trips, and one clear line for every file that is none."""

from __future__ import annotations

import copy
import errno
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tests.conftest import random_model
from varcompress.checkpoint import (
    build_tokenizer,
    build_var,
    check_fit,
    check_output,
    load_elastic,
    load_official,
    save_elastic,
)
from varcompress.errors import InputError
from varcompress.files import disk_errors
from varcompress.fingerprint import fingerprint
from varcompress.models.elastic import ElasticVAR, Provenance

OFFICIAL = json.loads((Path(__file__).parent / "golden" / "official_checkpoints.json").read_text())
RECIPE = {"depths": [4, 2], "learning_rate": 1e-4}


def refused(told: str, call, *arguments) -> str:
    """Assert that a call raises an InputError of one line that matches; return the line."""
    with pytest.raises(InputError, match=told) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_equal_weights(a: ElasticVAR, b: ElasticVAR) -> None:
    for (name, x), (other, y) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert name == other
        assert x.dtype == y.dtype
        assert torch.equal(x, y), name


@pytest.fixture
def elastic(tiny, tmp_path):
    provenance = Provenance("tiny", "FoundationVision/var", "mit", RECIPE)
    model = ElasticVAR(tiny.var, tiny.tokenizer, bridge=2, depths=(4, 2), provenance=provenance)
    return model, save_elastic(model, tmp_path / "elastic")


# -- round trips ----------------------------------------------------------------------------------


def test_official_round_trip(tiny, tiny_files):
    model = load_official(tiny_files / "var.pth", tiny_files / "vae.pth")
    assert (model.var.config, model.tokenizer.config) == (tiny.var.config, tiny.tokenizer.config)
    assert_equal_weights(model, tiny)
    assert (model.provenance.name, model.depths) == ("var", ())


@pytest.mark.parametrize("shared_aln", [False, True])
def test_elastic_round_trip(shared_aln, tmp_path):
    model = random_model(shared_aln=shared_aln, patch_nums=(1, 2, 4), seed=1)
    model.bridge, model.depths, model.subnets = 1, (3, 2), {2: (0, 4)}
    model.provenance = Provenance("mine", "someone/base", "apache-2.0", RECIPE)
    again = load_elastic(save_elastic(model, tmp_path / "new" / "folder"))
    assert_equal_weights(model, again)
    assert (again.bridge, again.depths, again.subnets) == (1, (3, 2), {2: (0, 4)})
    assert again.provenance == model.provenance
    assert [str(schedule) for schedule in again.default_schedules()] == ["full", "d3@1", "d2@1,0+4"]
    assert torch.equal(model.generate([1, 2], "d2", seed=5), again.generate([1, 2], "d2", seed=5))


def test_a_checkpoint_from_before_subnets_has_none_of_its_own(elastic):
    _, folder = elastic
    rewrite(folder, subnets="remove")
    assert load_elastic(folder).subnets == {}


def test_dtype_survives(tiny, tmp_path):
    half = random_model(seed=2).cast(torch.bfloat16)
    assert_equal_weights(load_elastic(save_elastic(half, tmp_path / "half")), half)


def test_the_training_scripts_wrapper(tiny, tiny_files, tmp_path):
    state = torch.load(tiny_files / "var.pth")
    torch.save({"epoch": 3, "trainer": {"var_wo_ddp": state}}, tmp_path / "ckpt.pth")
    assert_equal_weights(load_official(tmp_path / "ckpt.pth", tiny_files / "vae.pth"), tiny)


def test_legacy_file_format(tiny, tiny_files, tmp_path):
    state = torch.load(tiny_files / "var.pth")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_equal_weights(load_official(tmp_path / "old.pth", tiny_files / "vae.pth"), tiny)


def test_saving_again_replaces_the_model_and_nothing_else(elastic):
    _, folder = elastic
    (folder / "README.md").write_text("my own words")
    (folder / "notes.json").write_text("{}")
    other = random_model(seed=3)
    assert_equal_weights(load_elastic(save_elastic(other, folder)), other)
    assert (folder / "README.md").read_text() == "my own words"
    assert (folder / "notes.json").read_text() == "{}"
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("kind", ["profile", "eval"])
def test_results_never_come_to_lie_beside_other_weights(elastic, kind):
    _, folder = elastic
    (folder / "mine.json").write_text(json.dumps({"kind": kind, "weights": fingerprint(load_elastic(folder))}))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    refused("mine.json there would belong to other weights", save_elastic, random_model(seed=3), folder)
    refused("other weights", save_elastic, load_elastic(folder).cast(torch.bfloat16), folder)
    refused("other weights", save_elastic, load_elastic(folder).cast(torch.bfloat16).cast(torch.float32), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    save_elastic(load_elastic(folder), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_result_that_says_not_of_which_weights_it_is(elastic):
    _, folder = elastic
    (folder / "profile.json").write_text('{"kind": "profile"}')
    refused("profile.json there would belong to other weights", save_elastic, load_elastic(folder), folder)


# -- which weights ----------------------------------------------------------------------------------


def test_fingerprint_of_the_same_weights(tiny, tiny_files, elastic):
    _, folder = elastic
    known = fingerprint(tiny)
    assert re.fullmatch("[0-9a-f]{16}", known)
    assert known == fingerprint(load_official(tiny_files / "var.pth", tiny_files / "vae.pth"))
    assert known == fingerprint(load_elastic(folder))
    assert known == fingerprint(random_model().double())


@pytest.mark.parametrize("name", ["var.head.bias", "var.blocks.3.ffn.fc1.weight", "tokenizer.decoder.conv_out.bias"])
def test_fingerprint_of_other_weights(tiny, name):
    changed = random_model()
    with torch.no_grad():
        changed.state_dict()[name].add_(1e-6)
    assert fingerprint(changed) != fingerprint(tiny)


@pytest.mark.parametrize(
    "move", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.to("cpu", torch.half)]
)
def test_a_change_of_dtype_by_torchs_own_means_is_a_cast(tiny, move):
    """The fingerprint stays, and so does float32 where tokens must be exact."""
    model = move(random_model())
    assert fingerprint(model) == fingerprint(tiny)
    assert model.dtype == model.tokenizer.decoder.conv_in.weight.dtype != torch.float32
    exact = (model.tokenizer.quantize.embedding.weight, model.tokenizer.encoder.conv_in.weight)
    assert {weight.dtype for weight in exact} == {torch.float32}
    assert model.var.blocks[0].attn.scale_mul_1H11.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fingerprint_of_rounded_weights_until_they_change(tiny, tmp_path, dtype):
    model = random_model().cast(dtype)
    assert fingerprint(model) == fingerprint(copy.deepcopy(model)) == fingerprint(tiny)
    saved = load_elastic(save_elastic(model, tmp_path / "rounded"))
    assert (fingerprint(saved) == fingerprint(tiny)) == (dtype is torch.float32)
    rounded = fingerprint(saved)
    assert fingerprint(saved.cast(torch.float32)) == rounded  # more bits change nothing
    with torch.no_grad():
        model.var.head.weight.mul_(1.1)
    assert fingerprint(model) not in (fingerprint(tiny), rounded)


def test_the_recipe_of_an_earlier_model_does_not_stay(elastic):
    _, folder = elastic
    save_elastic(random_model(seed=3), folder)
    assert load_elastic(folder).provenance.recipe is None


# -- the five real checkpoints, without their weights -----------------------------------------------


def meta_state(name: str) -> dict[str, torch.Tensor]:
    """The state dict of a real checkpoint: its keys and shapes, on no memory, but its level buffer in full."""
    entry, state = OFFICIAL[name], {}
    for key, shape in entry["keys"].items():
        for layer in range(entry["depth"]) if "*" in key else [0]:
            state[key.replace("*", str(layer))] = torch.empty(shape, device="meta")
    if "lvl_1L" in state:
        sides = torch.tensor(entry["patch_nums"])
        state["lvl_1L"] = torch.arange(len(sides)).repeat_interleave(sides**2)[None]
    return state


@pytest.mark.parametrize("name", [name for name in OFFICIAL if name.startswith("var")])
def test_real_checkpoints_are_accepted(name):
    entry = OFFICIAL[name]
    state = meta_state(name)
    var = build_var(state)
    config = var.config
    assert (config.depth, config.width, config.heads) == (entry["depth"], entry["width"], entry["heads"])
    assert (list(config.patch_nums), config.shared_aln) == (entry["patch_nums"], entry["shared_aln"])
    assert (config.vocab, config.z_channels, config.classes, config.mlp_ratio) == (4096, 32, 1000, 4)
    assert sum(p.numel() for p in var.parameters()) == entry["parameters"]
    assert all(p.device.type == "meta" for p in var.parameters())
    tokenizer = build_tokenizer(meta_state("vae_ch160v4096z32"), config.patch_nums)
    check_fit(config, tokenizer.config)
    assert tokenizer.config.image_size == 16 * entry["patch_nums"][-1]


def test_the_real_tokenizer_is_accepted():
    tokenizer = build_tokenizer(meta_state("vae_ch160v4096z32"), (1, 2, 16))
    config = tokenizer.config
    assert (config.channels, config.channel_multipliers, config.res_blocks) == (160, (1, 1, 2, 2, 4), 2)
    assert (config.z_channels, config.vocab, config.phis, config.downsampling) == (32, 4096, 4, 16)
    assert sum(p.numel() for p in tokenizer.parameters()) == OFFICIAL["vae_ch160v4096z32"]["parameters"]


# -- files that are none ----------------------------------------------------------------------------


def run_code() -> None:
    raise AssertionError("a checkpoint ran code")


class Bomb:
    def __reduce__(self):
        return run_code, ()


def test_missing(tiny_files, tmp_path):
    refused("gone.pth: no such checkpoint file", load_official, tmp_path / "gone.pth", tiny_files / "vae.pth")
    refused("gone.pth: no such checkpoint file", load_official, tiny_files / "var.pth", tmp_path / "gone.pth")
    refused("not an elastic directory: it lacks config.json", load_elastic, tmp_path)


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.99])
def test_truncated(kept, tiny_files, tmp_path):
    whole = (tiny_files / "var.pth").read_bytes()
    (tmp_path / "var.pth").write_bytes(whole[: int(kept * len(whole))])
    refused("var.pth: not a readable PyTorch checkpoint", load_official, tmp_path / "var.pth", tiny_files / "vae.pth")


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(pickle.dumps(Bomb())),
        lambda path: torch.save({"weight": torch.zeros(1), "model": Bomb()}, path),
        lambda path: path.write_text("<html>404</html>"),
    ],
)
def test_foreign_files_are_not_run(write, tiny_files, tmp_path):
    write(tmp_path / "var.pth")
    refused("not a readable PyTorch checkpoint", load_official, tmp_path / "var.pth", tiny_files / "vae.pth")


@pytest.mark.parametrize(
    "content", [{}, [torch.zeros(1)], torch.zeros(1), {"epoch": 1}, {"trainer": {"step": 1}}, {"trainer": {}}]
)
def test_no_state_dict(content, tiny_files, tmp_path):
    torch.save(content, tmp_path / "var.pth")
    refused("holds no state dict of tensors", load_official, tmp_path / "var.pth", tiny_files / "vae.pth")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda state: state.pop("lvl_1L"), "lacks 'lvl_1L'"),
        (lambda state: state.pop("head.weight"), "lacks 'head.weight'"),
        (lambda state: state.pop("blocks.3.attn.proj.bias"), "blocks.3.attn.proj.bias"),
        (lambda state: state.update({"blocks.2.extra": torch.zeros(1)}), "blocks.2.extra"),
        (lambda state: state.update({"head.bias": torch.zeros(7)}), "head.bias"),
        (lambda state: state.update(lvl_1L=torch.tensor([[0, 1, 1, 1]])), "not squares"),
        (lambda state: state.update(lvl_1L=torch.tensor([[-1, 0]])), "not a VAR transformer"),
        (lambda state: state.update({"head.weight": torch.zeros(3)}), "not a VAR transformer"),
    ],
)
def test_state_dict_of_another_model(change, told, tiny_files, tmp_path):
    state = torch.load(tiny_files / "var.pth")
    change(state)
    torch.save(state, tmp_path / "var.pth")
    refused(told, load_official, tmp_path / "var.pth", tiny_files / "vae.pth")


def test_files_the_wrong_way_round(tiny_files):
    refused("vae.pth: not a VAR transformer", load_official, tiny_files / "vae.pth", tiny_files / "var.pth")
    refused("var.pth: not a VQVAE tokenizer", load_official, tiny_files / "var.pth", tiny_files / "var.pth")


def test_wrong_tokenizer(tiny_files, tmp_path):
    torch.save(random_model(vocab=24).tokenizer.state_dict(), tmp_path / "vae.pth")
    line = refused("wrong tokenizer", load_official, tiny_files / "var.pth", tmp_path / "vae.pth")
    assert "24 x 8" in line
    assert "40 x 8" in line


# -- damaged elastic directories ----------------------------------------------------------------------


def rewrite(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "remove"}))


def shorten(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def drop_a_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["var.head.bias"]
    save_file({key: value.clone() for key, value in weights.items()}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda f: rewrite(f, format=99), "format 99 is not known: update varcompress"),
        (lambda f: rewrite(f, format="remove"), "lacks 'format'"),
        (lambda f: rewrite(f, bridge="remove"), "lacks 'bridge'"),
        (lambda f: rewrite(f, bridge="wide"), "damaged elastic directory"),
        (lambda f: rewrite(f, bridge=9), "bridge 9 .* do not fit a model of 6 layers and 4 scales"),
        (lambda f: rewrite(f, depths=[40]), r"depths \[40\] do not fit"),
        (lambda f: rewrite(f, subnets={"2": [0, 6]}), r"subnet 2 of layers \[0, 6\] does not fit a model of 6 layers"),
        (lambda f: rewrite(f, subnets={"2": [-1, 0]}), r"subnet 2 of layers \[-1, 0\] does not fit"),
        (lambda f: rewrite(f, subnets={"2": [4, 0]}), r"subnet 2 of layers \[4, 0\] does not fit"),
        (lambda f: rewrite(f, subnets={"2": [4, 4]}), r"subnet 2 of layers \[4, 4\] does not fit"),
        (lambda f: rewrite(f, subnets={"3": [0, 4]}), r"subnet 3 of layers \[0, 4\] does not fit"),
        (lambda f: rewrite(f, subnets={"0": []}), r"subnet 0 of layers \[\] does not fit"),
        (lambda f: rewrite(f, subnets={"2": [0, 4.5]}), r"subnet 2 of layers \[0, 4.5\] does not fit"),
        (lambda f: rewrite(f, subnets={"2": [0, "4"]}), r"subnet 2 of layers \[0, '4'\] does not fit"),
        (lambda f: rewrite(f, subnets={"2": [False, True]}), "subnet 2 of layers .* does not fit"),
        (lambda f: rewrite(f, subnets={"2": [[0], [4]]}), "subnet 2 of layers .* does not fit"),
        (lambda f: rewrite(f, subnets={"two": [0, 4]}), "damaged elastic directory"),
        (lambda f: rewrite(f, subnets={"2": 4}), "damaged elastic directory"),
        (lambda f: rewrite(f, subnets=[2, 4]), "damaged elastic directory"),
        (lambda f: rewrite(f, subnets=None), "damaged elastic directory"),
        (lambda f: rewrite(f, var=None), "damaged elastic directory"),
        (lambda f: rewrite(f, var={"patch_nums": [1, 2]}), "not a VAR transformer"),
        (lambda f: (f / "config.json").write_text("{"), "damaged elastic directory"),
        (lambda f: (f / "config.json").write_text("[]"), "damaged elastic directory"),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "damaged elastic directory"),
        (lambda f: (f / "recipe.yaml").write_text("a: [1\nb: 2"), "damaged elastic directory"),
        (shorten, "damaged elastic directory"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "damaged elastic directory"),
        (drop_a_tensor, "var.head.bias|head.bias"),
        (lambda f: (f / "model.safetensors").unlink(), "lacks config.json or model.safetensors"),
    ],
)
def test_damaged_elastic_directory(damage, told, elastic):
    _, folder = elastic
    damage(folder)
    refused(told, load_elastic, folder)


# -- outputs that must not be touched -------------------------------------------------------------------


def test_output_that_holds_something_else(tiny, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    refused("holds something else already", save_elastic, tiny, tmp_path)
    refused("is a file, not a directory", save_elastic, tiny, tmp_path / "thesis.tex")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("thesis.tex", "years of work")]
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty")
    check_output(tmp_path / "new")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (PermissionError(errno.EACCES, "x", "/a/.tmp"), r"^model: could not be written \(Permission denied\)$"),
        (OSError(errno.ENOSPC, "x"), r"\(No space left on device\); [\d,]+ MiB are free there$"),
        (SafetensorError("Error: I/O error: x (os error 28)"), r"\(No space left on device\); .* MiB are free there$"),
        (SafetensorError("Error: I/O error: x (os error 30)"), r"\(Read-only file system\)$"),
    ],
)
def test_free_room_is_told_where_it_is_the_reason(error, told):
    def write():
        with disk_errors(Path("model")):
            raise error

    refused(told, write)


FULL_DISK = """
import resource, sys
from tests.conftest import random_model
from varcompress.checkpoint import save_elastic
from varcompress.errors import InputError
from varcompress.files import disk_errors
from varcompress.fingerprint import fingerprint

model = random_model(seed=9)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    save_elastic(model, sys.argv[1])
except InputError as error:
    sys.exit(f"one line: {error}")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits of file size are a thing of POSIX")
@pytest.mark.parametrize("limit_bytes", [100, 100_000])
def test_a_disk_that_fills_leaves_the_earlier_model_whole(limit_bytes, elastic):
    model, folder = elastic
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(folder), str(limit_bytes)],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("one line: ")
    assert "could not be written" in done.stderr
    assert "MiB are free there" in done.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert_equal_weights(load_elastic(folder), model)
