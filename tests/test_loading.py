"""Loading by path, by name and by Hub id. The client is the real one."""

from __future__ import annotations

import pytest
import torch

from tests import test_card
from tests.conftest import RECIPE
from tests.hub_server import Repo
from varcompress import InputError
from varcompress.data.digits import FOLDER as DIGITS_FOLDER
from varcompress.fingerprint import fingerprint
from varcompress.loading import NAMED, OFFICIAL_REPO, OFFICIAL_VAE, load
from varcompress.publish import push


def test_official_files(tiny, tiny_files):
    model = load(tiny_files / "var.pth", vae=tiny_files / "vae.pth", device="cpu")
    assert model.dtype is torch.float32
    assert torch.equal(model.generate([1, 2], "d4", seed=3), tiny.generate([1, 2], "d4", seed=3))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", torch.float16])
def test_half_precision_weights_quantise_in_float32(dtype, tiny, tiny_files, tmp_path):
    for name in ("var.pth", "vae.pth"):
        state = torch.load(tiny_files / name)
        torch.save({key: v.half() if v.is_floating_point() else v for key, v in state.items()}, tmp_path / name)
    model = load(tmp_path / "var.pth", vae=tmp_path / "vae.pth", device="cpu", dtype=dtype)
    expected = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    temperatures = {name for name, _ in model.var.named_parameters() if "scale_mul" in name}
    assert {p.dtype for name, p in model.var.named_parameters() if name not in temperatures} == {expected}
    assert {p.dtype for name, p in model.var.named_parameters() if name in temperatures} == {torch.float32}
    assert {p.dtype for p in model.tokenizer.decoder.parameters()} == {expected}
    for part in (model.tokenizer.encoder, model.tokenizer.quantize, model.tokenizer.quant_conv):
        assert {p.dtype for p in part.parameters()} == {torch.float32}
    assert model.generate([1], "d2", seed=0).dtype is torch.float32
    assert model.encode(torch.rand(1, 3, 8, 8)).shape == (1, 30)


def test_elastic_directory(elastic, tiny):
    model = load(str(elastic), device="cpu")
    assert (model.depths, model.bridge, model.provenance.recipe) == ((4, 2), 2, RECIPE)
    assert torch.equal(model.generate([5], "d2", seed=1), tiny.generate([5], "d2@2", seed=1))


@pytest.mark.skipif(not (DIGITS_FOLDER / "var_digits.pth").is_file(), reason="the digits are not trained yet")
def test_embedded_digits_whatever_lies_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    model = load("digits", device="cpu")
    assert (model.provenance.name, model.var.config.depth, model.var.config.classes) == ("digits", 30, 10)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("source", "options", "told"),
    [
        ("var-d31", {}, "did you mean var-d3"),
        ("digit", {}, "did you mean digits?"),
        ("nonsense", {}, "A model is a .pth file, an elastic directory"),
        ("gone.pth", {}, "gone.pth: no such checkpoint file"),
        ("some/where/gone.pth", {}, "no such checkpoint file"),
        ("gone.pth", {"vae": "vae.pth"}, "gone.pth: no such checkpoint file"),
        ("digits", {"vae": "x.pth"}, "--vae"),
        ("a/b/c", {}, "no such model"),
        ("digits", {"revision": "main"}, "only models on the Hub"),
        ("digits", {"vae": "vae.pth"}, "only a transformer .pth"),
        ("digits", {"dtype": "float8"}, "use auto, float32, bfloat16, float16"),
        ("digits", {"dtype": torch.int64}, "use auto, float32, bfloat16, float16"),
        ("digits", {"device": "gpu"}, "use cpu, cuda or cuda:1"),
        ("digits", {"device": "meta"}, "use cpu or cuda"),
        ("digits", {"device": "cuda:99"}, "CUDA devices here"),
        ("gone.pth", {"kernels": "cuda"}, "use auto, torch, triton"),  # before a model is looked for
        ("gone.pth", {"cache_dtype": "int4"}, "use int8 or float8"),
        ("gone.pth", {"device": "cpu", "offload": "all"}, "offload 'all' is unknown: use bridge"),
        ("gone.pth", {"device": "cpu", "offload": "bridge"}, "spares the memory of a GPU"),
    ],
)
def test_what_cannot_be_loaded(source, options, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        load(source, **options)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_transformer_without_its_tokenizer(tiny_files):
    with pytest.raises(InputError, match=r"give vae_ch160v4096z32.pth as vae"):
        load(tiny_files / "var.pth")
    with pytest.raises(InputError, match="only models on the Hub"):
        load(tiny_files / "var.pth", vae=tiny_files / "vae.pth", revision="main")


def test_only_what_a_model_needs_is_downloaded(hub, tiny, elastic):
    push(elastic, "ann/tiny", results=[{**test_card.PROFILE, "weights": fingerprint(tiny)}])
    hub.log.clear()
    load("ann/tiny", device="cpu")
    names = {request.rsplit("/", 1)[1] for request in hub.requests("GET .*/resolve/")}
    assert names == {"config.json", "recipe.yaml", "README.md"}
    assert len(hub.requests("GET /storage/")) == 1  # the weights; neither results nor plots


def test_official_checkpoint_by_name(hub, tiny, tiny_files):
    hub.repos[OFFICIAL_REPO] = Repo(private=False)
    names = {NAMED["var-d16"].weights: "var.pth", OFFICIAL_VAE: "vae.pth"}
    hub.repos[OFFICIAL_REPO].commit({name: (tiny_files / file).read_bytes() for name, file in names.items()})
    model = load("var-d16", device="cpu")
    assert torch.equal(model.generate([1], seed=0), tiny.generate([1], seed=0))
    assert (model.provenance.base_model, model.provenance.license) == ("FoundationVision/var", "mit")
    assert push(model, "ann/copy")["files"] == ["README.md", "config.json", "model.safetensors"]


@pytest.mark.parametrize("config", [None, b"{}", b"[1]", b"{", b'{"model_type": "bert"}'])
def test_repository_without_an_elastic_model(hub, config):
    hub.repos["ann/bert"] = Repo(private=False)
    weights = {"model.safetensors": b"0" * 1000, **({"config.json": config} if config else {})}
    hub.repos["ann/bert"].commit(weights)
    with pytest.raises(InputError, match="ann/bert: holds no elastic model"):
        load("ann/bert")
    assert not hub.requests("safetensors")  # what it holds instead was not downloaded
