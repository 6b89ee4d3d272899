"""Runs in processes of their own, one or several: they learn what one undisturbed process does, also after a kill."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.test_training import SMALL, Interrupt, changed, interrupt_at, losses, weights
from tests.test_training import images as images
from tests.test_training import undisturbed as undisturbed
from varcompress.checkpoint import load_elastic, load_official
from varcompress.fingerprint import weights_digest
from varcompress.training import distill
from varcompress.training.log import read_steps
from varcompress.training.parallel import mesh_shape
from varcompress.training.state import RunDirectory

pytestmark = pytest.mark.usefixtures("one_thread")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
WORKER = """
import os, sys
from pathlib import Path
import torch
from varcompress.checkpoint import load_official
from varcompress.errors import InputError
from varcompress.fingerprint import weights_digest
from varcompress.training import distill
torch.set_num_threads(1)
if "NODE" in os.environ:  # as many of the processes stand for one machine
    os.environ["LOCAL_WORLD_SIZE"] = os.environ["NODE"]
rank = os.environ.get("RANK", "0")
files, recipe, images, out, *tokens = (Path(path.replace("RANK", rank)) for path in sys.argv[1:])
model = load_official(files / "var.pth", files / "vae.pth")
try:
    distill(model, recipe, data=images, out=out, resume=True, note=print, tokens=tokens[0] if tokens else None)
except InputError as error:  # as the command line does
    print("error:", error, file=sys.stderr)
    sys.exit(2)
(out / f"rank{rank}.txt").write_text(weights_digest(model))
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory, tiny_files, images):
    """Starts a run in processes of its own: start(recipe, out, processes) -> Popen.

    RANK in a path stands for the rank of the process.
    """
    folder = tmp_path_factory.mktemp("worker")
    (folder / "worker.py").write_text(WORKER)

    def run(recipe, out, processes=1, per_node=None, files=tiny_files, tokens=(), **options):
        file = folder / f"{Path(out).name.replace('RANK', '')}.yaml"
        file.write_text(json.dumps(recipe.to_dict()))
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
        launcher += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
        arguments = map(str, (folder / "worker.py", files, file, images, out, *tokens))
        command = [sys.executable, *(launcher if processes > 1 else []), *arguments]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        environment = {**ENVIRONMENT, **({"NODE": str(per_node)} if per_node else {})}
        return subprocess.Popen(command, env=environment, text=True, **pipes, **options)

    return run


def ended(process):
    _, err = process.communicate(timeout=180)
    assert process.returncode == 0, err


def refused(process) -> list[str]:
    """The lines of a command that ends with an error."""
    _, err = process.communicate(timeout=180)
    assert process.returncode
    return [line for line in err.splitlines() if line.startswith("error:")]


def kill(process) -> None:
    """As kill -9 of a launcher and all that it started does."""
    for pid in (process.pid, *children(process.pid)):
        os.kill(pid, signal.SIGKILL)
    process.communicate()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for_steps(out, count, process):
    while len(read_steps(Path(out) / "steps.jsonl")) < count:
        assert process.poll() is None, "the run was over too soon"
        time.sleep(0.01)


def check_close(out, expected, rel=1e-4):
    """Two runs learnt the same but for rounding."""
    for one, two in zip(losses(out), losses(expected), strict=True):
        same = ("step", "epoch", "learning_rate")
        assert [one[key] for key in same] == [two[key] for key in same]
        assert one["loss"] == pytest.approx(two["loss"], rel=rel)
        assert one["gradient_norm"] == pytest.approx(two["gradient_norm"], rel=10 * rel)
        for schedule, per_scale in two["cross_entropy"].items():
            assert one["cross_entropy"][schedule] == pytest.approx(per_scale, rel=10 * rel)
        if "heldout" in two:
            assert one["heldout"]["losses"] == pytest.approx(two["heldout"]["losses"], rel=rel, abs=1e-5)
        assert one.keys() == two.keys()


# -- how a run of several processes ends -----------------------------------------------------------

SLOW_END = """
import sys, time
import torch
from varcompress.cli.app import main
from varcompress.distributed import joined
from varcompress.errors import InputError, Stopped

def refuse():
    raise InputError("the disk is full")

def work(*_, **__):
    with joined(torch.device("cpu")) as ranks:
        try:
            if sys.argv[1] == "refused":
                ranks.on_rank_zero(refuse)
            raise Stopped("stopped after step 7", 15)
        finally:
            if ranks.is_rank_zero:
                time.sleep(2)  # as a tracker that sends its last points

import varcompress.cli.app
varcompress.cli.app.app = work
main([])
"""


@pytest.mark.parametrize(("how", "line"), [("refused", "error: the disk is full"), ("stopped", "stopped after step 7")])
def test_rank_zero_says_why_it_ends_before_torchrun_kills_it(tmp_path, how, line):
    (tmp_path / "slow_end.py").write_text(SLOW_END)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command = [sys.executable, *launcher, "--rdzv-endpoint=localhost:0", str(tmp_path / "slow_end.py"), how]
    done = subprocess.run(command, env=ENVIRONMENT, text=True, capture_output=True, timeout=120, check=False)
    assert done.returncode
    assert done.stderr.splitlines().count(line) == 1, done.stderr
    assert "interrupted" not in done.stderr


# -- several processes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "count", "per_node", "shape"),
    [
        ("ddp", 4, 4, (4, 1)),
        ("ddp", 16, 8, (16, 1)),
        ("fsdp", 3, 3, (3,)),
        ("fsdp", 16, 8, (2, 8)),
        ("fsdp", 10, 4, (10,)),
    ],
)
def test_copies_of_the_weights_and_processes_that_share_one(how, count, per_node, shape):
    assert mesh_shape(how, count, per_node) == shape


TAUGHT = {
    **{"epochs_full": 0, "epochs_ramp": 0, "epochs_subnet": 0, "epochs": 4, "teacher": "frozen", "loss": "kl"},
    **{"depth_probability": {"full": 0.5, "4": 0.7, "2": 1}, "optimizer": "muon", "holdout": 0.2},
    **{"holdout_every": 4, "learning_rate_end": 0.1, "warmup_steps": 2, "tracker": "tensorboard", "samples_every": 5},
}
WAYS = {
    "progressive": {},
    "no bridge": {"bridge": 0},  # a step of a subnet leaves layers out
    "taught": TAUGHT,
    "taught one by one": {**TAUGHT, "together": False},
}


@pytest.fixture(scope="module")
def alone(tiny, images, tmp_path_factory):
    """A recipe by its name in WAYS, and the run of one process under it."""

    def run(way):
        recipe, out = changed(**{"batch_size": 12, **WAYS[way]}), folder / way
        if not out.exists():
            distill(copy.deepcopy(tiny), recipe, data=images, out=out)
        return recipe, out

    folder = tmp_path_factory.mktemp("alone")
    return run


@pytest.mark.parametrize(
    ("way", "how", "processes", "per_node"),
    [
        ("no bridge", "ddp", 2, None),
        ("taught", "ddp", 3, None),
        ("progressive", "ddp", 4, None),
        ("taught", "fsdp", 2, None),
        ("no bridge", "fsdp", 3, None),
        ("taught one by one", "fsdp", 4, 2),  # two machines, each with a copy of the weights in two parts
    ],
)
def test_processes_learn_together_what_one_learns(alone, start, tmp_path, way, how, processes, per_node):
    recipe, expected = alone(way)
    out = tmp_path / "run"
    # in as many passes as leave each of them two or three images
    ended(start(replace(recipe, parallel=how, accumulation=6 // processes), out, processes, per_node))
    check_close(out, expected)
    digests = {(out / f"rank{rank}.txt").read_text() for rank in range(processes)}
    assert digests == {weights_digest(load_elastic(out))}
    assert len(list(out.glob("tensorboard/*"))) == ("tracker" in WAYS[way])  # of rank 0 alone
    drawn = [sorted(path.name for path in run.glob("samples/*")) for run in (out, expected)]
    assert drawn[0] == drawn[1]


def test_a_killed_run_goes_on_with_other_processes(undisturbed, start, tmp_path):
    """Four processes that share the weights, killed; two that each hold all of them, killed; then one."""
    out = tmp_path / "run"
    for processes, how, steps in ((4, "fsdp", 7), (2, "ddp", 13)):
        process = start(changed(parallel=how), out, processes)
        wait_for_steps(out, steps, process)
        kill(process)
        model = RunDirectory(out).unfinished()
        assert model.depths == (4, 2)
        assert model.generate([1, 2], "d2").isfinite().all()
    ended(start(SMALL, out))
    check_close(out, undisturbed)
    assert not (out / ".training").exists()


def test_a_killed_run_is_continued_by_other_processes_exported_and_evaluated(run, tmp_path):
    """By the commands, on the embedded model."""
    out, exported = tmp_path / "run", tmp_path / "exported"
    settings = ("batch_size=8", "checkpoint_every=1", "views=1")
    for processes, how, steps in ((4, "fsdp", 3), (2, "ddp", 6)):
        given = [
            "--recipe",
            "variant-digits",
            *(part for one in (*settings, f"parallel={how}") for part in ("--set", one)),
        ]
        command = ["-m", "varcompress", "distill", "digits", *given, "--out", out, "--resume"]
        launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
        launcher += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        process = subprocess.Popen([*launcher, *map(str, command)], env=ENVIRONMENT, text=True, **pipes)
        wait_for_steps(out, steps, process)
        kill(process)
        assert steps - 2 <= RunDirectory(out).step() <= len(read_steps(out / "steps.jsonl"))
    assert run("export", out, "--out", exported)[0] == 0
    status, printed, _ = run("eval", exported, "-s", "full", "-s", "d2", "--images", 32, "--json")
    assert status == 0
    full, subnet = json.loads(printed)["schedules"]
    assert 0 < full["scores"]["fd"]["value"] < subnet["scores"]["fd"]["value"]


def test_a_reader_that_is_killed_ends_all_processes_with_their_state_saved(start, tmp_path):
    out = tmp_path / "run"
    process = start(changed(workers=1, checkpoint_every=1000, epochs_ramp=200), out, 2)
    wait_for_steps(out, 6, process)
    (reader,) = children(children(process.pid)[1])
    os.kill(reader, signal.SIGKILL)
    (line,) = refused(process)
    assert "a process that read batches has died: the state of step" in line
    assert RunDirectory(out).step() == len(losses(out)) > 5


def test_killed_at_random_moments_it_reaches_the_same_weights(tiny_files, images, start, tmp_path):
    recipe = changed(epochs_ramp=12, epochs_subnet=12, checkpoint_every=7)
    reference = load_official(tiny_files / "var.pth", tiny_files / "vae.pth")
    distill(reference, recipe, data=images, out=tmp_path / "undisturbed")
    out, rng = tmp_path / "killed", random.Random()
    delays = [rng.uniform(0.0, 0.6) for _ in range(3)]
    killed_at = []
    for delay in delays:
        process = start(recipe, out)
        seen = len(read_steps(out / "steps.jsonl"))
        while process.poll() is None and len(read_steps(out / "steps.jsonl")) in (0, seen):
            time.sleep(0.01)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed_at.append(len(read_steps(out / "steps.jsonl")))
    assert not (out / "model.safetensors").exists(), f"the run was over before it was killed: {killed_at}"
    ended(start(recipe, out))
    assert weights(out) == weights(tmp_path / "undisturbed"), f"delays {delays}, killed at {killed_at}"
    assert losses(out) == losses(tmp_path / "undisturbed")


def test_processes_that_opened_different_weights_do_not_train(start, tiny_files, tmp_path):
    """As nodes do whose caches hold different revisions of a model."""
    for rank in range(2):
        shutil.copytree(tiny_files, tmp_path / f"files{rank}")
    other = torch.load(tmp_path / "files1" / "var.pth")
    other["head.bias"][3] += 1e-6
    torch.save(other, tmp_path / "files1" / "var.pth")
    (line,) = refused(start(SMALL, tmp_path / "out", 2, files=tmp_path / "filesRANK"))
    assert "the weights of the model must be the same in all processes, but rank 1 has others than rank 0: open" in line
    assert not (tmp_path / "out").exists()


def test_processes_that_see_different_states_do_not_go_on(start, tiny_files, images, tmp_path):
    """As nodes do whose output directories are not the same one."""
    (tmp_path / "out1").mkdir()
    model = load_official(tiny_files / "var.pth", tiny_files / "vae.pth")
    with pytest.raises(Interrupt):
        distill(model, SMALL, data=images, out=tmp_path / "out0", tokens=tmp_path / "tokens", progress=interrupt_at(4))
    (line,) = refused(start(SMALL, tmp_path / "outRANK", 2, tokens=[tmp_path / "tokens"]))
    assert "the output directory must be the same in all processes, but rank 1 has others" in line
    assert len(losses(tmp_path / "out0")) == 4  # nothing was touched
