"""Runs that can be trusted: signals, one writer, states, checkpoints of what is not finished."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future

import numpy as np
import pytest
import torch
from PIL import Image

from tests.test_processes import ENVIRONMENT, ended, wait_for_steps
from tests.test_processes import start as start
from tests.test_training import SMALL, STEPS, Interrupt, changed, interrupt_at, losses, weights
from tests.test_training import images as images
from tests.test_training import undisturbed as undisturbed
from varcompress.checkpoint import load_elastic
from varcompress.errors import InputError, Stopped
from varcompress.fingerprint import weights_digest
from varcompress.images import pixels, to_uint8
from varcompress.training import distill, loop, states
from varcompress.training.batches import Batches
from varcompress.training.budget import state_bytes
from varcompress.training.log import read_steps
from varcompress.training.state import RunDirectory
from varcompress.training.states import States

pytestmark = pytest.mark.usefixtures("one_thread")


# -- signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_with_its_state_saved(undisturbed, images, tiny_files, tmp_path, number, status):
    out, recipe = tmp_path / "run", tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({**SMALL.to_dict(), "checkpoint_every": 1000}))
    model = [tiny_files / "var.pth", "--vae", tiny_files / "vae.pth"]
    command = [sys.executable, "-m", "varcompress", "distill", *model, "--recipe", recipe, "--data", images]
    command = [*map(str, command), "--out", str(out)]
    process = subprocess.Popen(command, env=ENVIRONMENT, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    wait_for_steps(out, 6, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    done = len(losses(out))
    line = err.splitlines()[-1]
    assert f"stopped after step {done} of 20, whose state is saved: go on with varcompress distill" in line
    assert line.endswith("--resume")
    assert "Traceback" not in err
    subprocess.run([*command, "--resume"], env=ENVIRONMENT, check=True, capture_output=True, timeout=120)
    assert losses(out) == losses(undisturbed)


def test_a_signal_to_all_processes_of_a_run_leaves_its_state(undisturbed, start, tmp_path):
    """As launchers send it: to those that read batches too."""
    out = tmp_path / "run"
    process = start(changed(workers=2, checkpoint_every=1000), out, start_new_session=True)
    wait_for_steps(out, 6, process)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert "Stopped: stopped after step" in err.splitlines()[-1]
    assert RunDirectory(out).step() == len(losses(out)) > 5
    ended(start(SMALL, out))
    assert losses(out) == losses(undisturbed)


# -- the directory --------------------------------------------------------------------------------


def test_a_second_writer_is_refused_by_the_name_of_the_first(start, tiny, images, tmp_path):
    out, recipe = tmp_path / "run", changed(epochs_ramp=200)
    process = start(recipe, out)
    try:
        wait_for_steps(out, 4, process)
        with pytest.raises(InputError, match=f"process {process.pid} on .* is writing there"):
            distill(copy.deepcopy(tiny), recipe, data=images, out=out, resume=True, note=str)
    finally:
        process.kill()
        process.communicate()
    further = interrupt_at(RunDirectory(out).step() + 2)
    with pytest.raises(Interrupt):  # the lock of a process that is dead is no obstacle
        distill(copy.deepcopy(tiny), recipe, data=images, out=out, resume=True, note=str, progress=further)


@pytest.mark.parametrize("keep", [1, 3])
def test_the_last_states_are_kept(tiny, images, tmp_path, keep):
    with pytest.raises(Interrupt):
        distill(copy.deepcopy(tiny), changed(keep=keep), data=images, out=tmp_path / "o", progress=interrupt_at(13))
    assert RunDirectory(tmp_path / "o").states.steps == [5, 6, 9, 12][-keep:]


def test_a_disk_without_room_for_the_next_state_is_said_before_the_step(
    undisturbed, tiny, images, tmp_path, monkeypatch
):
    out = tmp_path / "out"

    def fill(done, total, what):
        if what.startswith("distill"):
            leave_room(patch, 2**18)

    too_little = pytest.raises(InputError, match=r"0 MiB are free, and what is saved next needs \d+: free some")
    with monkeypatch.context() as patch, too_little:
        distill(copy.deepcopy(tiny), SMALL, data=images, out=out, progress=fill)
    assert len(losses(out)) == 2
    distill(copy.deepcopy(tiny), SMALL, data=images, out=out)
    assert weights(out) == weights(undisturbed)


def leave_room(patch, size_bytes):
    """Stands for a disk on which so much is free."""
    patch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": size_bytes}))


def test_a_disk_without_room_for_the_states_is_said_before_anything_is_begun(tiny, images, tmp_path, monkeypatch):
    out, state, kept = tmp_path / "new" / "out", state_bytes(tiny, SMALL), changed(keep=3)
    encoded = 40 * 2 * 30 * 2  # images, views, tokens, bytes
    for recipe, count in ((SMALL, SMALL.keep + 1), (kept, 4), (changed(keep=50, checkpoint_every=10), 4)):
        with monkeypatch.context() as patch:  # of the last there are four: 5, 10, 15, 20
            leave_room(patch, count * state + encoded - 1)
            with pytest.raises(InputError, match=r"MiB are free, and the run needs \d.* for states\): free some"):
                distill(copy.deepcopy(tiny), recipe, data=images, out=out)
            assert not out.parent.exists()
            leave_room(patch, count * state + encoded)
            with pytest.raises(Interrupt):
                distill(copy.deepcopy(tiny), recipe, data=images, out=out, progress=interrupt_at(13))
        shutil.rmtree(out.parent)


def test_a_run_that_goes_on_needs_no_room_for_what_is_there(tiny, images, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(Interrupt):
        distill(copy.deepcopy(tiny), SMALL, data=images, out=out, progress=interrupt_at(13))
    leave_room(monkeypatch, state_bytes(tiny, SMALL))
    with pytest.raises(Interrupt):
        distill(copy.deepcopy(tiny), SMALL, data=images, out=out, resume=True, note=str, progress=interrupt_at(14))


def test_a_state_that_fails_in_the_background_ends_the_run_at_once(tiny, images, tmp_path, monkeypatch):
    failed, reached = Future(), []
    failed.set_exception(OSError(28, "No space left on device"))
    monkeypatch.setattr("varcompress.training.states.dcp.async_save", lambda *_, **__: failed)
    with pytest.raises(InputError, match="No space left on device"):
        distill(
            copy.deepcopy(tiny),
            SMALL,
            data=images,
            out=tmp_path / "out",
            progress=lambda done, total, what: reached.append(done) if what.startswith("distill") else None,
        )
    assert reached[-1] <= SMALL.checkpoint_every


@pytest.mark.parametrize("meanwhile", ["gradients", "take_step"])
def test_a_reader_that_is_killed_costs_no_step(undisturbed, tiny, images, tmp_path, monkeypatch, meanwhile):
    """Whatever the run does meanwhile: the weights may be about to move."""
    out, doing = tmp_path / "out", getattr(loop, meanwhile)

    def killing(run, step, *rest):
        if step.number == 8:
            for reader in multiprocessing.active_children():
                reader.kill()
                os.waitid(os.P_PID, reader.pid, os.WEXITED | os.WNOWAIT)  # unreaped, so that torch would see it
        return doing(run, step, *rest)

    monkeypatch.setattr(loop, meanwhile, killing)
    with pytest.raises(InputError, match=r"step \d+: a process that read batches has died: the state of") as caught:
        distill(copy.deepcopy(tiny), changed(workers=2, checkpoint_every=1000), data=images, out=out)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert 7 < RunDirectory(out).step() == len(losses(out)) < STEPS
    distill(copy.deepcopy(tiny), SMALL, data=images, out=out, resume=True, note=str)
    assert weights(out) == weights(undisturbed)


def test_a_compiler_that_dies_of_the_signal_meant_for_the_run_costs_no_step(
    undisturbed, tiny, images, tmp_path, monkeypatch
):
    out, gradients = tmp_path / "out", loop.gradients

    def failing(run, step, *rest):
        if step.number < 8:
            return gradients(run, step, *rest)
        os.kill(os.getpid(), signal.SIGTERM)
        raise InputError("torch.compile fails here")

    recipe = changed(checkpoint_every=1000)
    monkeypatch.setattr(loop, "gradients", failing)
    with pytest.raises(Stopped, match="stopped after step 7 of 20"):
        distill(copy.deepcopy(tiny), recipe, data=images, out=out)
    monkeypatch.undo()
    assert RunDirectory(out).step() == 7
    distill(copy.deepcopy(tiny), recipe, data=images, out=out, resume=True)
    assert weights(out) == weights(undisturbed)


class Dying(Batches):
    """Kills the process that reads the first batch, as the system does for want of memory."""

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_run_that_ends_before_its_first_step_claims_no_state(undisturbed, tiny, images, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def failing(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        raise InputError("torch.compile fails here")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "gradients", failing)
        with pytest.raises(Stopped, match=r"^stopped before the first step, with nothing trained yet$"):
            distill(copy.deepcopy(tiny), SMALL, data=images, out=out)
    nothing = r"has died: nothing was trained yet: start the command again, with fewer workers where memory was short$"
    monkeypatch.setattr(loop, "Batches", Dying)
    with pytest.raises(InputError, match=nothing):
        distill(copy.deepcopy(tiny), changed(workers=1), data=images, out=out)
    monkeypatch.undo()
    distill(copy.deepcopy(tiny), SMALL, data=images, out=out)
    assert weights(out) == weights(undisturbed)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_while_images_are_encoded_loses_none(tmp_path, number, status):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "varcompress", "distill", "digits", "--out", str(out), "--device=cpu"]
    process = subprocess.Popen(command, env=ENVIRONMENT, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    states = out / ".training" / "tokens" / "states.npy"
    while not states.is_file() or not np.any(encoded := np.load(states)):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert err.splitlines()[-1] == (
        "interrupted, and what is encoded or saved is kept: go on with "
        f"varcompress distill digits --out {out} --device=cpu --resume"
    )
    assert len(losses(out)) == 0
    assert np.load(states)[encoded > 0].all()


def test_what_is_no_whole_state_counts_as_none(tiny, images, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Interrupt):
        distill(copy.deepcopy(tiny), SMALL, data=images, out=out, progress=interrupt_at(7))
    before, last = RunDirectory(out).states.steps
    (out / ".training" / f"step-{last}" / ".metadata").unlink()  # which is written last
    assert RunDirectory(out).step() == before < last


@pytest.mark.parametrize("line", [b"[1, 2]", b"\xff\xfe", b'{"epoch": 1}', b'{"step": "x"}'])
def test_a_damaged_log_is_read_as_far_as_it_goes(tmp_path, line):
    path = tmp_path / "steps.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    assert read_steps(path) == [{"step": 1}]


def test_a_state_is_what_was_when_it_was_saved(tiny, images, tmp_path):
    """Writing goes on in the background while the next steps change the weights."""
    seen = {}

    def progress(done, total, what):
        if what.startswith("distill"):
            seen[done] = {name: value.clone() for name, value in model.var.named_parameters()}
            if done == 7:
                raise Interrupt

    model = copy.deepcopy(tiny)
    with pytest.raises(Interrupt):
        distill(model, changed(checkpoint_every=1, keep=5), data=images, out=tmp_path / "out", progress=progress)
    for step in (4, 5, 6):
        found = dict(RunDirectory(tmp_path / "out").unfinished(step).var.named_parameters())
        assert all(torch.equal(found[name], value) for name, value in seen[step].items())


def test_batches_read_ahead_by_processes_are_the_same(undisturbed, tiny, images, tmp_path):
    distill(copy.deepcopy(tiny), changed(workers=2), data=images, out=tmp_path / "out")
    assert losses(tmp_path / "out") == losses(undisturbed)


def test_a_phase_whose_checkpoint_was_cut_off_is_written_again(undisturbed, tiny, images, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Interrupt):
        distill(copy.deepcopy(tiny), SMALL, data=images, out=out, progress=interrupt_at(4))
    (out / "phase-full").mkdir()
    (out / "phase-full" / "model.safetensors").write_bytes(b"half")
    distill(copy.deepcopy(tiny), SMALL, data=images, out=out, resume=True, note=str)
    assert weights(out / "phase-full") == weights(undisturbed / "phase-full")
    assert weights(out) == weights(undisturbed)


# -- pictures -------------------------------------------------------------------------------------


def test_a_run_is_drawn(undisturbed, tmp_path, run):
    status, printed, _ = run("plot", undisturbed, "--out", tmp_path / "run.png")
    assert (status, printed.split()) == (0, [str(tmp_path / "run.png")])
    with Image.open(tmp_path / "run.png") as picture:
        assert picture.width > 400
    status, _, err = run("plot", undisturbed, "--out", tmp_path / "run.txt")
    assert (status, err) == (2, f"error: {tmp_path / 'run.txt'}: the name must end in .png\n")
    assert not (tmp_path / "run.txt").exists()
    status, _, err = run("plot", tmp_path)
    assert (status, "holds no step of a run" in " ".join(err.split())) == (2, True)


# -- checkpoints before the end -------------------------------------------------------------------


def test_samples_are_drawn_on_the_way_and_change_nothing(undisturbed, tiny, images, tmp_path):
    out, remarks = tmp_path / "out", []
    model = distill(copy.deepcopy(tiny), changed(samples_every=8), data=images, out=out, note=remarks.append)
    assert weights(out) == weights(undisturbed)
    assert sorted(path.name for path in out.glob("samples/*")) == ["step-16.png", "step-20.png", "step-8.png"]
    grids = [np.array(Image.open(out / "samples" / f"step-{step}.png")) for step in (8, 20)]
    assert grids[0].shape == grids[1].shape == (3 * 68 - 4, 8 * 68 - 4, 3)  # full, d4, d2 of eight classes
    assert not np.array_equal(*grids)
    last = model.generate([9], "d2", first_index=7)  # the last class, under the last schedule
    assert np.array_equal(grids[1][-64::8, -64::8], pixels(to_uint8(last))[0])
    assert remarks == []


def test_samples_that_cannot_be_drawn_end_no_run(undisturbed, tiny, images, tmp_path):
    out, remarks = tmp_path / "out", []

    def spoil(done, total, what):
        if what.startswith("distill") and done == 1:
            (out / "samples").write_text("no directory")

    recipe = changed(samples_every=10)
    distill(copy.deepcopy(tiny), recipe, data=images, out=out, note=remarks.append, progress=spoil)
    assert [remark.partition(":")[0] for remark in remarks] == ["step 10", "step 20"]
    assert weights(out) == weights(undisturbed)


def test_the_end_of_each_phase_is_a_checkpoint(undisturbed, tiny):
    digests = [weights_digest(load_elastic(undisturbed / name)) for name in ("phase-full", "phase-ramp", ".")]
    assert len({weights_digest(tiny), *digests}) == 4


def test_export_makes_a_checkpoint_of_an_unfinished_run(tiny, images, tmp_path, run):
    out = tmp_path / "out"
    with pytest.raises(Interrupt):
        distill(copy.deepcopy(tiny), SMALL, data=images, out=out, progress=interrupt_at(13))
    status, printed, _ = run("export", out, "--out", tmp_path / "last")
    assert (status, "step 12 of" in printed) == (0, True)
    status, printed, _ = run("export", out, "--out", tmp_path / "nine", "--step", 9, "--json")
    assert json.loads(printed)["step"] == 9
    last, nine = load_elastic(tmp_path / "last"), load_elastic(tmp_path / "nine")
    assert weights_digest(last) != weights_digest(nine)
    assert weights_digest(last.tokenizer) == weights_digest(tiny.tokenizer)
    assert (last.bridge, last.depths, last.provenance.recipe["name"]) == (2, (4, 2), "small")
    for arguments, message in (
        ((out, "--out", tmp_path / "x", "--step", 5), "has no state of step 5: there is 9, 12"),
        ((tmp_path / "last", "--out", tmp_path / "x"), "holds no state of an unfinished run"),
        ((out, "--out", out), "holds something else already"),
    ):
        status, _, err = run("export", *arguments)
        assert (status, message in " ".join(err.split())) == (2, True), err
    (out / ".training" / "step-12" / ".metadata").write_bytes(b"half")
    status, _, err = run("export", out, "--out", tmp_path / "x")
    assert (status, "step-12: damaged; delete it" in " ".join(err.split())) == (2, True)


def test_export_takes_the_next_state_where_the_run_takes_one_away(tiny, images, tmp_path, run, monkeypatch, caplog):
    out, load = tmp_path / "out", states.dcp.load
    with pytest.raises(Interrupt):
        distill(copy.deepcopy(tiny), SMALL, data=images, out=out, progress=interrupt_at(13))
    nine, twelve = (out / ".training" / f"step-{step}" for step in (9, 12))
    expected, aside = weights_digest(RunDirectory(out).unfinished(12)), out / ".training" / "aside"

    def rotating(*given, **options):
        if aside.exists():
            aside.rename(twelve)
            States(nine.parent)._drop(9)
        return load(*given, **options)

    monkeypatch.setattr(states.dcp, "load", rotating)
    twelve.rename(aside)
    status, printed, err = run("export", out, "--out", tmp_path / "last")
    assert (status, err) == (0, "")
    assert "step 12 of" in printed
    assert weights_digest(load_elastic(tmp_path / "last")) == expected
    twelve.rename(nine)
    shutil.copytree(nine, aside)
    status, _, err = run("export", out, "--out", tmp_path / "nine", "--step", 9)
    assert (status, err.count("\n"), "step-9: is gone" in err) == (2, 1, True)
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []  # torch's tracebacks


def test_export_takes_no_checkpoints_place(tiny, elastic, images, tmp_path, run):
    out, place = tmp_path / "out", shutil.copytree(elastic, tmp_path / "elastic")
    with pytest.raises(Interrupt):
        distill(copy.deepcopy(tiny), SMALL, data=images, out=out, progress=interrupt_at(4))
    before = weights(place)
    status, _, err = run("export", out, "--out", place)
    assert (status, err) == (2, f"error: {place}: holds a checkpoint already: choose another --out\n")
    assert weights(place) == before
