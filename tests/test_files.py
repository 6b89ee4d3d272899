"""Files that are whole or not there, whatever moment their writer is killed at."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile

import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import random_model
from varcompress import files
from varcompress.checkpoint import load_elastic
from varcompress.distributed import Ranks
from varcompress.training.optimizer import optimizer_of
from varcompress.training.recipe import Recipe
from varcompress.training.state import RunDirectory
from varcompress.training.states import tensors_of

RECIPE = Recipe("small", (4, 2), 2, epochs_full=1)
# the kernel kills whoever writes beyond this size, in the middle of the write
KILLED_WRITING = """
import resource, signal, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from varcompress.files import replacing
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
with replacing(Path(sys.argv[1])) as temporary:
    save_file({"x": torch.zeros(1 << 16)}, temporary)
"""
SCRATCHING = """
import sys, time
from varcompress.files import scratch_folder
with scratch_folder() as folder:
    (folder / "large").write_bytes(bytes(1000))
    print(folder, flush=True)
    time.sleep(600)
"""


def killed_writing(path):
    done = subprocess.run([sys.executable, "-c", KILLED_WRITING, str(path)], check=False, timeout=120)
    assert done.returncode == -signal.SIGXFSZ


@pytest.fixture
def umask():
    """Sets the mask of new files' modes until the test ends."""
    before = os.umask(0o027)
    yield os.umask
    os.umask(before)


def test_what_a_killed_save_left_goes_when_the_run_is_continued(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.begin({}, note=print, resume=False)
    killed_writing(tmp_path / ".training" / "subnets.json")
    (left,) = (tmp_path / ".training").glob(".*")
    assert list(left.iterdir())
    directory.begin({}, note=print, resume=False)
    assert sorted(path.name for path in (tmp_path / ".training").iterdir()) == ["lock", "run.json", "writer"]


def test_what_a_killed_save_left_goes_with_the_next_one(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"earlier")
    killed_writing(path)
    assert len(list(tmp_path.iterdir())) == 2
    assert path.read_bytes() == b"earlier"
    with files.replacing(path) as temporary:
        save_file({"x": torch.zeros(3)}, temporary)
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_earlier_file_and_nothing_else(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"earlier")

    def write():
        with files.replacing(path) as temporary:
            temporary.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("model.safetensors", b"earlier")]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_checkpoints_and_states_have_the_mode_of_any_new_file(tmp_path, umask, mask, mode):
    umask(mask)
    model, directory = random_model(), RunDirectory(tmp_path)
    directory.begin({}, note=print, resume=False)
    with directory.states.writing(Ranks()) as states:
        states.save(1, tensors_of(model.var, optimizer_of(model.var, RECIPE)))
    state = list((tmp_path / ".training" / "step-1").iterdir())
    assert {file.stat().st_mode & 0o777 for file in state} == {mode}
    directory.finish(model)
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {mode}
    load_elastic(tmp_path)


def test_scratch_folders_of_killed_processes_go_and_others_stay(tmp_path, monkeypatch):
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", SCRATCHING]
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        killed, alive = (process.stdout.readline().strip() for process in processes)
        processes[0].kill()
        processes[0].wait()
        (tmp_path / "varcompress.txt").write_text("of somebody else")
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        assert os.path.isdir(killed)
        with files.scratch_folder() as own:
            assert sorted(map(str, tmp_path.iterdir())) == sorted([alive, str(own), str(tmp_path / "varcompress.txt")])
        assert not own.exists()
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stdout.close()
