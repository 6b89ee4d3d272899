"""`varcompress profile` and `varcompress inspect`, as a person types them."""

from __future__ import annotations

import json

import pytest

from varcompress.fingerprint import fingerprint
from varcompress.models.elastic import ElasticVAR
from varcompress.publish import save


@pytest.fixture
def elastic(tiny, tmp_path):
    return save(tiny, tmp_path / "elastic")


@pytest.fixture
def quick(run):
    return lambda model, *rest: run("profile", model, "--device", "cpu", "--batch-size", 2, "--runs", 1, *rest)


def test_profile_prints_a_table_and_writes_beside_the_model(quick, elastic):
    before = {path.name for path in elastic.iterdir()}
    result = quick(elastic, "-s", "d4@2", "--schedule", "d2")
    assert result.exit_code == 0
    assert "…" not in result.stdout
    assert [result.stdout.count(name) for name in ("d4@2", "d2@2")] == [3, 3]
    assert {path.name for path in elastic.iterdir()} - before == {"profile.json", "profile.png"}
    assert "profile.json" in result.stderr.replace("\n", "")
    assert "Not measured." not in (elastic / "README.md").read_text()
    assert "### Speed and memory" in (elastic / "README.md").read_text()


def test_profile_of_files_writes_where_it_is_told(quick, tiny_files, tmp_path):
    arguments = (tiny_files / "var.pth", "--vae", tiny_files / "vae.pth", "-s", "full")
    result = quick(*arguments)
    assert "Nothing was written" in result.stderr
    assert sorted(path.name for path in tiny_files.iterdir()) == ["vae.pth", "var.pth"]
    quick(*arguments, "--out", tmp_path / "results")
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == ["profile.json", "profile.png"]


def test_profile_json_is_one_object(quick, elastic, tiny):
    settings = {"cfg": 2.0, "top_k": 5, "top_p": 0.9}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    result = quick(elastic, "-s", "d2", "--json", "--dtype", "bfloat16", *options)
    content = json.loads(result.stdout)
    assert content == json.loads((elastic / "profile.json").read_text())
    assert (content["dtype"], content["batch_size"], content["runs"]) == ("bfloat16", 2, 1)
    assert content["weights"] == fingerprint(tiny)
    assert content["settings"] == settings | {"seed": 0}


def test_profile_without_guidance_and_of_distilled_guidance(quick, run, elastic, tiny, tmp_path):
    content = json.loads(quick(elastic, "-s", "d2", "--json", "--cfg", 0).stdout)
    assert (content["guided"], content["settings"]["cfg"]) == (False, 0)
    model = ElasticVAR(tiny.var, tiny.tokenizer, distilled_cfg=2.0)
    distilled = save(model, tmp_path / "distilled")
    content = json.loads(quick(distilled, "-s", "d2", "--json").stdout)
    assert (content["guided"], content["settings"]["cfg"]) == (False, 2)
    assert "unguided" in (distilled / "README.md").read_text()
    refused = quick(distilled, "--cfg", 1.5)
    assert refused.exit_code == 2
    assert "cfg 1.5: the guidance of this model is distilled for cfg 2.0" in " ".join(refused.stderr.split())
    assert "distilled for" in " ".join(run("profile", "--help").stdout.replace("│", " ").split())


def test_profile_refuses_before_it_measures(quick, elastic, tmp_path):
    (elastic / "profile.json").write_text("mine")
    assert "holds something else" in quick(elastic).stderr
    (tmp_path / "file").touch()
    assert "not a directory" in quick(elastic, "--out", tmp_path / "file").stderr
    assert "9 layers" in quick(elastic, "-s", "d9", "--out", tmp_path / "new").stderr
    assert not (tmp_path / "new").exists()
    assert quick(elastic, "--batch-size", 0).exit_code == 2


def test_inspect(run, elastic, tiny_files):
    text = run("inspect", elastic).stdout
    for part in ("6 layers, width 32, 2 heads", "codebook 40 x 8", "30 tokens", "10 classes", "8 x 8 pixels", "d4@2"):
        assert part in text
    assert "d2@3" in run("inspect", tiny_files / "var.pth", "--vae", tiny_files / "vae.pth", "-s", "d2@3").stdout


def test_inspect_json(run, elastic):
    content = json.loads(run("inspect", elastic, "--json", "-s", "d2@1").stdout)
    assert content["kind"] == "inspect"
    assert [row["schedule"] for row in content["schedules"]] == ["d2@1"]


def test_inspect_of_nothing(run, tmp_path):
    outcome = run("inspect", tmp_path / "missing.pth", "--vae", tmp_path / "vae.pth")
    assert outcome.exit_code == 2
    assert "missing.pth: no such checkpoint file" in outcome.stderr
