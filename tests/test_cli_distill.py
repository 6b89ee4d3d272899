"""The commands `distill` and `recipes`, as a person or a machine calls them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import yaml
from PIL import Image

from varcompress.checkpoint import load_elastic

RECIPE = {
    "name": "mine",
    "depths": [4, 2],
    "bridge": 2,
    "epochs_full": 1,
    "epochs_ramp": 1,
    "epochs_subnet": 1,
    "learning_rate": 1e-3,
    "batch_size": 4,
    "dtype": "float32",
}


@pytest.fixture
def arguments(tiny_files, tmp_path):
    """`distill` of the tiny model on ten classes of two images, without --out."""
    rng = np.random.default_rng(0)
    for label in range(10):
        (tmp_path / "images" / str(label)).mkdir(parents=True)
        for i in range(2):
            pixels = rng.integers(0, 255, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / str(label) / f"{i}.png")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(RECIPE))
    options = {"vae": tiny_files / "vae.pth", "recipe": tmp_path / "mine.yaml", "data": tmp_path / "images"}
    return [
        "distill",
        str(tiny_files / "var.pth"),
        "--device=cpu",
        *(f"--{key}={value}" for key, value in options.items()),
    ]


def test_distill_prints_losses_and_what_comes_next(arguments, tmp_path, run):
    code, out, err = run(*arguments, "--out", tmp_path / "run")
    assert code == 0, err
    assert "distill: phase subnet, p 1.00" in err
    assert "15/15" in err
    for word in ("full", "d4@2", "d2@2", "15 steps", f"varcompress push {tmp_path / 'run'} REPO"):
        assert word in out.replace("\n", "") or word in out
    assert load_elastic(tmp_path / "run").depths == (4, 2)


def test_distill_as_json_with_settings(arguments, tmp_path, run):
    settings = ["--set", "depths=3,2", "--set", "seed=5"]
    code, out, _ = run(*arguments, "--out", tmp_path / "run", "--json", *settings)
    result = json.loads(out)
    assert code == 0
    assert (result["kind"], result["steps"], result["out"]) == ("distill", 15, str(tmp_path / "run"))
    assert result["model"] == "var"
    assert (result["recipe"]["depths"], result["recipe"]["seed"]) == ([3, 2], 5)
    assert {row["schedule"] for row in result["schedules"]} <= {"full", "d3@2", "d2@2"}
    assert load_elastic(tmp_path / "run").provenance.recipe == result["recipe"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recipe", "digit"], "did you mean digits?"),
        (["--set", "batchsize=4"], "unknown key 'batchsize': did you mean batch_size?"),
        (["--set", "depths=30"], "depths names 30, but the model has 6 layers"),
        (["--set", "layers=[[0,1,2,3],[0,5]]"], "each list of layers must hold the first and the last layer"),
        (
            [
                "--set",
                "epochs_full=0",
                "--set",
                "epochs_ramp=0",
                "--set",
                "epochs_subnet=0",
                "--set",
                "epochs=1",
                "--set",
                "depth_probability={3: 1}",
            ],
            "depth_probability names 3, which is none of the depths: full, 4, 2",
        ),
        (["--set", "loss=kl"], "the loss kl and a teacher go together"),
        (["--set", "cfg=[2,1]"], "guidance: none and cfg, what is distilled, go together: set both, or neither"),
        (["--set", "cfg=strong"], "cfg must be a number, or two as a range, such as [0.5, 3], not 'strong'"),
        (["--data", "nowhere"], "nowhere: no such directory of images"),
        (["--out", "{images}"], "holds something else already"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, tmp_path, run, options, message):
    options = [option.replace("{images}", str(tmp_path / "images")) for option in options]
    out = [] if "--out" in options else ["--out", tmp_path / "run"]
    code, stdout, err = run(*arguments, *out, *options)
    assert (code, stdout) == (2, "")
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_recipe_made_for_a_model_is_taken_where_none_is_named(tmp_path, run, tiny_files):
    code, out, err = run("distill", "digits", "--out", tmp_path / "run", "--device=cpu", "--set", "batch_size=2000")
    assert code == 2  # before a step: it names more images than there are
    assert err.splitlines()[0].startswith("recipe digits, made for digits (also: digits-long, ")
    model = [str(tiny_files / "var.pth"), f"--vae={tiny_files / 'vae.pth'}", "--device=cpu"]
    code, out, err = run("distill", *model, "--out", tmp_path / "run")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: no recipe is made for var: name one with --recipe (digits, ")
    code, out, err = run("distill", "var-d20", "--out", tmp_path / "run")  # before it is looked for on the Hub
    assert (code, out) == (2, "")
    assert err.startswith("error: no recipe is made for var-d20: name one with --recipe (digits, ")
    assert not (tmp_path / "run").exists()


def test_torchrun_starts_the_command_on_two_processes(arguments, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    module = ["--rdzv-endpoint=localhost:0", "-m", "varcompress"]
    command = [sys.executable, *launcher, *module, *arguments, "--json", "--out", str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 15  # one process alone prints
    assert load_elastic(tmp_path / "run").depths == (4, 2)


def test_recipes_list_show_and_copy(tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run("recipes", "list", "--json")
    names = [recipe["name"] for recipe in json.loads(out)["recipes"]]
    assert (code, {"digits", "variant-d30"} <= set(names)) == (0, True)
    assert "variant-d30" in run("recipes", "list")[1]
    shown = run("recipes", "show", "variant-d30")[1]
    assert yaml.safe_load(shown)["batch_size"] == 1024
    assert json.loads(run("recipes", "show", "digits", "--json")[1])["name"] == "digits"
    assert run("recipes", "copy", "variant-d30")[0] == 0
    assert (tmp_path / "variant-d30.yaml").read_text() == shown
    code, _, err = run("recipes", "copy", "variant-d30")
    assert (code, "stays as it is" in err) == (2, True)
    assert run("recipes", "show", "none")[0] == 2


def test_processes_that_torchrun_did_not_start_are_one_line(run, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    code, _, err = run("distill", "digits", "--recipe=digits", f"--out={tmp_path / 'run'}", "--device=cpu")
    assert code == 2
    assert err.splitlines()[-1].endswith("start the processes with torchrun")
    assert not (tmp_path / "run").exists()
