"""What the command line says of calls that cannot work: one line, and an exit code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from varcompress import __version__
from varcompress.cli.output import say
from varcompress.publish import save

SAMPLE = ["sample", "digits", "--classes", "1", "--out", "a.png"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["smaple"], "'smaple': did you mean sample?"),
        (["zzz"], "there are demo, inspect, sample"),
        (["recipes", "shw"], "'shw': did you mean show?"),
        (["recipes", "show", "digit"], "or give a YAML file): did you mean digits?"),
        ([*SAMPLE, "--cgf", "2"], "--cgf"),
        (["--verison"], "--verison"),
        (["sample", "digits"], "'--classes': see varcompress sample --help"),
        (["sample"], "'MODEL'"),
        ([*SAMPLE, "--top-p", "1.5"], "'--top-p'"),
        ([*SAMPLE, "--batch-size", "0"], "'--batch-size'"),
        ([*SAMPLE, "--seed", "one"], "'--seed'"),
        ([*SAMPLE, "more"], "more"),
        (["inspect", "digits", "--device", "cpu"], "--device"),
        (["inspect", "[red]none"], "[red]none: no such model"),
        (["inspect", "gone.pth", "--vae", "vae.pth"], "gone.pth: no such checkpoint file"),
        (["inspect", "digits", "--vae", "vae.pth"], "leave out vae (--vae)"),
    ],
)
def test_bad_calls_are_one_line_and_exit_code_2(arguments, told, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert told in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [[], ["recipes"]])
def test_without_a_command_there_is_help_alone(arguments, run):
    code, out, err = run(*arguments)
    assert code in (0, 2)  # by the version of typer
    assert "Usage: varcompress" in out + err
    assert "error" not in err


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (OSError(5, "Input/output error", "a/file"), 2, "error: a/file: Input/output error\n"),
        (OSError("no route"), 2, "error: no route\n"),
    ],
)
def test_what_no_command_foresaw(error, code, told, monkeypatch, run):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("varcompress.training.recipe.recipe_text", fail)
    assert run("recipes", "show", "digits") == (code, "", told)


def test_module():
    done = subprocess.run(
        [sys.executable, "-m", "varcompress", "--version"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, f"varcompress {__version__}\n")


def test_a_tilde_is_the_home_directory_in_every_option(tiny, tiny_files, tmp_path, monkeypatch, run):
    monkeypatch.setenv("HOME", str(tiny_files))
    code, out, err = run("inspect", "~/var.pth", "--vae=~/vae.pth", "--json")
    assert code == 0, err
    assert json.loads(out)
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tiny, tmp_path / "model")
    profile = ["--device=cpu", "--runs=1", "--batch-size=1", "-s", "d2"]
    assert run("profile", "~/model", *profile)[0] == 0
    assert (tmp_path / "model" / "profile.json").is_file()
    assert run("profile", "~/model", "--out=~/other", *profile)[0] == 0
    assert (tmp_path / "other" / "profile.json").is_file()
    monkeypatch.chdir(tmp_path)
    assert run("recipes", "copy", "digits", "~/r.yaml")[0] == 0
    assert (tmp_path / "r.yaml").is_file()
    assert not (tmp_path / "~").exists()


def test_paths_are_no_markup(capsys):
    path = f"/runs/[bold]x[/bold]/{'long/' * 40}"
    say(path)
    assert capsys.readouterr().out == f"{path}\n"


def test_defaults_are_told(run):
    code, out, _ = run("distill", "--help")
    assert code == 0
    assert "drop them" in re.sub(r"[\s│]+", " ", out)
    assert "-m varcompress distill" in re.sub(r"[\s│]+", " ", out)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="needs permissions that bind")
def test_a_directory_that_cannot_be_written_to(tmp_path, run):
    Path(tmp_path / "locked").mkdir(mode=0o500)
    code, _, err = run("sample", "digits", "--classes=1", f"--out={tmp_path / 'locked' / 'a.png'}")
    assert (code, err.count("\n")) == (2, 1)


def test_an_output_below_a_file_is_refused_before_anything_is_loaded(tmp_path, run):
    (tmp_path / "file").write_text("mine")
    code, _, err = run("sample", "nonsense", "--classes=1", f"--out={tmp_path / 'file' / 'new' / 'a.png'}")
    assert code == 2
    assert f"{tmp_path / 'file'} is no directory" in err


@pytest.mark.parametrize("arguments", [["profile", "digits"], SAMPLE])
def test_what_does_not_share_its_work_is_refused_under_torchrun(run, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err == (
        f"error: {arguments[0]} runs in one process, and WORLD_SIZE is 2: start it without torchrun, "
        "which only distill, tokenize and eval can share work under\n"
    )
    monkeypatch.setenv("RANK", "1")
    assert run(*arguments) == (2, "", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["sample", "profile", "eval"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--kernels", "fast"), "kernels 'fast' are unknown: use auto, torch, triton"),
        (("--cache-dtype", "int4"), "cache dtype 'int4' is unknown: use int8 or float8"),
        (("--offload", "bridge", "--device", "cpu"), "spares the memory of a GPU, and the device is cpu"),
        (("--dtype", "int8"), "use auto, float32, bfloat16, float16"),
    ],
)
def test_ways_of_generating_that_cannot_be_are_refused(run, tmp_path, command, options, message):
    more = ("--classes", "1", "--out", tmp_path / "a.png") if command == "sample" else ()
    outcome = run(command, "digits", *options, *more)
    assert outcome.exit_code == 2
    assert message in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_a_cache_in_eight_bits_and_a_dtype_of_the_devices_choice(run, tmp_path):
    out = tmp_path / "a.png"
    options = ("--cache-dtype", "float8", "--dtype", "auto", "--kernels", "torch", "--device", "cpu")
    assert run("sample", "digits", "--classes", "0-9", "-s", "d4", "--out", out, *options).exit_code == 0
    assert out.stat().st_size > 0
