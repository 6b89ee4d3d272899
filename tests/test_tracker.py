"""Runs that are watched: what a tracker draws, once each, and what becomes of a run whose tracker fails."""

from __future__ import annotations

import copy
import re
import sys
import threading
from dataclasses import replace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.event_file_writer import _AsyncWriterThread

from tests.test_training import Interrupt, changed, interrupt_at, losses, weights
from tests.test_training import images as images
from varcompress.training import distill
from varcompress.training.log import read_steps
from varcompress.training.tracker import scalars

pytestmark = pytest.mark.usefixtures("one_thread")
TAUGHT = {"epochs_full": 0, "epochs_ramp": 0, "epochs_subnet": 0, "epochs": 3, "batch_size": 8, "teacher": "frozen"}
TAUGHT |= {"loss": {"kl": 0.75, "cross_entropy": 0.25}, "depth_probability": {"full": 0.5, "4": 0.7, "2": 1}}
UNWATCHED = changed(**TAUGHT, holdout=0.2, holdout_every=4)
WATCHED = replace(UNWATCHED, tracker="tensorboard")
STEPS = 12


@pytest.fixture(scope="module")
def unwatched(tiny, images, tmp_path_factory):
    out = tmp_path_factory.mktemp("unwatched") / "run"
    distill(copy.deepcopy(tiny), UNWATCHED, data=images, out=out)
    return out


def drawn(out) -> dict[int, dict[str, float]]:
    """What TensorBoard shows: by step and name. No point is there twice."""
    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    found = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            values = found.setdefault(event.step, {})
            assert name not in values, f"{name} of step {event.step} is drawn twice"
            values[name] = event.value
    return found


def writing() -> list[threading.Thread]:
    """The threads that write for TensorBoard."""
    return [thread for thread in threading.enumerate() if type(thread) is _AsyncWriterThread]


def test_a_run_is_drawn_once_however_often_it_was_interrupted(tiny, images, unwatched, tmp_path):
    out = tmp_path / "out"
    for step in (2, 5, 8, None):  # before the first state, and twice two steps after one
        try:
            distill(
                copy.deepcopy(tiny),
                WATCHED,
                data=images,
                out=out,
                resume=step != 2,
                note=str,
                **({"progress": interrupt_at(step)} if step else {}),
            )
        except Interrupt:
            assert step
        assert not writing()
    assert weights(out) == weights(unwatched)
    found, lines = drawn(out), read_steps(out / "steps.jsonl")
    assert list(found) == [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line in lines:
        expected = scalars(line, WATCHED, tiny.var.config.patch_nums)
        assert found[line["step"]] == pytest.approx(expected, rel=1e-6)
    assert {path.name for path in out.iterdir()} >= {"tensorboard", "steps.jsonl"}


def test_names_and_means_of_what_is_drawn(tiny, unwatched):
    first, *_, last = read_steps(unwatched / "steps.jsonl")
    values = scalars(last, WATCHED, tiny.var.config.patch_nums)
    assert not any(name.startswith("heldout") for name in scalars(first, WATCHED, tiny.var.config.patch_nums))
    assert {"loss", "learning_rate", "gradient_norm", "seconds", "waited", "epoch", "skipped"} <= set(values)
    assert values["images_per_second"] == 8 / last["seconds"]
    for where in ("", "heldout/"):
        of_depths = [name for name in values if name.startswith(f"{where}loss/")]
        assert values[f"{where}loss"] == pytest.approx(sum(map(values.get, of_depths)) / len(of_depths), rel=1e-5)
        for name in of_depths:  # a mean over tokens: a large scale weighs more
            depth = name.rpartition("/")[2]
            kl, cross_entropy = values[f"{where}kl/{depth}"], values[f"{where}cross_entropy/{depth}"]
            assert values[name] == pytest.approx(0.75 * kl + 0.25 * cross_entropy, rel=1e-5)
    assert {"heldout/loss/full", "heldout/loss/d4", "heldout/loss/d2"} <= set(values)
    assert values["heldout_by_scale/kl/d2/4"] == last["heldout"]["kl"]["d2@2"][3]
    assert all(re.fullmatch(r"[\w./-]+", name) for name in values)  # which TensorBoard leaves as they are


def test_a_step_that_is_skipped_has_no_losses():
    line = {"step": 3, "epoch": 0, "skipped": "the loss is nan", "learning_rate": 1e-3, "seconds": 0.5, "waited": 0.1}
    assert scalars(line, WATCHED, (1, 2, 3, 4)) == {
        "epoch": 0,
        "skipped": 1,
        "learning_rate": 1e-3,
        "seconds": 0.5,
        "waited": 0.1,
        "images_per_second": 16,
    }


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of its thread
def test_a_tracker_whose_disk_is_full_ends_no_run(tiny, images, unwatched, tmp_path):
    notes = []

    def progress(done, total, what):
        if what.startswith("distill") and done == 5:
            assert writing()
            (file,) = (out / "tensorboard").iterdir()
            file.unlink()
            file.symlink_to("/dev/full")

    out = tmp_path / "out"
    distill(copy.deepcopy(tiny), WATCHED, data=images, out=out, progress=progress, note=notes.append)
    (said,) = (note for note in notes if "tracker" in note)
    assert said.startswith("tracker: tensorboard failed ([Errno 28] No space left on device)")
    assert weights(out) == weights(unwatched)
    assert losses(out) == losses(unwatched)


def test_a_run_may_go_on_with_another_tracker_even_one_that_cannot_begin(tiny, images, unwatched, tmp_path):
    out, notes = tmp_path / "out", []
    with pytest.raises(Interrupt):
        distill(copy.deepcopy(tiny), UNWATCHED, data=images, out=out, progress=interrupt_at(7))
    (out / "tensorboard").write_text("in the way")
    distill(copy.deepcopy(tiny), WATCHED, data=images, out=out, resume=True, note=notes.append)
    assert sum("tracker: tensorboard failed" in note for note in notes) == 1
    assert weights(out) == weights(unwatched)


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_said_before_a_download(run, tmp_path, monkeypatch, name):
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, name, None)  # what makes an import fail as that of a missing package does
    arguments = ("var-d30", "--data", tmp_path, "--out", tmp_path / "out", "--set", f"tracker={name}")
    status, _, err = run("distill", *arguments)
    assert status == 2
    assert f"error: tracker: {name} needs the {name} package: pip install {name}" in " ".join(err.split())
    assert not (tmp_path / "out").exists()
