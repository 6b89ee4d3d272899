"""Kill a run twenty times at random moments, and hold what it learns against an undisturbed one, bit for bit.

    python -m tests.kill_runs

takes some minutes on two cores: the embedded model in one process and in two, ten kills each, of all processes at once,
from their start to their last file. Exits with 1 where weights, steps or files differ.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from varcompress.training.log import read_steps

SETTINGS = ("epochs=1", "batch_size=64", "checkpoint_every=1", "holdout_every=10", "samples_every=9")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def start(out: Path, processes: int) -> subprocess.Popen:
    launcher = [f"--nproc-per-node={processes}", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    module = ["-m", *(("torch.distributed.run", *launcher, "-m") if processes > 1 else ()), "varcompress"]
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    command = [sys.executable, *module, "distill", "digits", *settings, "--out", str(out), "--resume"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, env=ENVIRONMENT, start_new_session=True, **pipes)


def killed(out: Path, processes: int, after: float) -> bool:
    """Start a run and kill it after so many seconds. Returns whether it was still there."""
    process = start(out, processes)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(after)
    found = [process.pid] if processes == 1 else [process.pid, *_children(process.pid)]
    for pid in found:  # torchrun's processes have sessions of their own
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def _children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def learnt(out: Path) -> dict[str, object]:
    """Weights, steps without their times, and the names of all files."""
    clocks = ("seconds", "waited", "between", "memory_bytes")
    return {
        "weights": (out / "model.safetensors").read_bytes(),
        "steps": [{k: v for k, v in step.items() if k not in clocks} for step in read_steps(out / "steps.jsonl")],
        "files": sorted(str(path.relative_to(out)) for path in out.rglob("*")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10, help="of one process, and again of two")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    moments, failed = random.Random(options.seed), False
    for processes in options.processes:
        with tempfile.TemporaryDirectory() as folder:
            expected, began = Path(folder) / "expected", time.monotonic()
            start(expected, processes).wait()
            whole, kills, differ = time.monotonic() - began, [], set()  # kills: the steps in the log at each
            while len(kills) < options.kills:
                out = Path(folder) / f"killed-{len(kills)}"
                while len(kills) < options.kills and killed(out, processes, moments.uniform(0, whole)):
                    kills.append(len(read_steps(out / "steps.jsonl")))
                start(out, processes).wait()
                found, undisturbed = learnt(out), learnt(expected)
                differ |= {what for what, value in undisturbed.items() if found[what] != value}
            failed |= bool(differ)
            result = f"DIFFERENT {', '.join(differ)}" if differ else "equal bit for bit"
            print(f"processes: {processes}; kills after step {', '.join(map(str, kills))}: {result}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
