"""steps.jsonl, one JSON object per step, and a summary of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

from varcompress.files import disk_errors, write_text
from varcompress.training.recipe import FULL
from varcompress.training.state import RunDirectory

LAST = 10  # steps of a schedule whose mean is called its loss


class StepLog:
    """Appends to the log, after cutting off what lies beyond the step that a run continues from."""

    def __init__(self, path: Path, done: int) -> None:
        with disk_errors(path):
            kept = [line for line in read_steps(path) if line["step"] <= done]
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
            self._file = path.open("a", encoding="utf-8")
        self._path = path

    def __enter__(self) -> StepLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, line: dict) -> None:
        """Add one step, readable at once by whoever follows the file."""
        with disk_errors(self._path):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()


def read_steps(path: Path) -> list[dict]:
    """The steps in a log, in order. Stops at a line that a killed process left unfinished, or that is damaged."""
    steps: list[dict] = []
    if not path.is_file():
        return steps
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            step = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            break
        if not isinstance(step, dict) or not isinstance(step.get("step"), int):
            break
        steps.append(step)
    return steps


def step_text(line: dict, images: int, heldout: dict) -> str:
    """What the progress of a run says of its last step, of so many images, and of the last held-out losses."""
    phase = f"phase {line['phase']}, p {line['p']:.2f}, " if "phase" in line else ""
    losses = "skipped" if "skipped" in line else f"loss {_by_depth(line['losses'])}"
    held = f", held out {_by_depth(heldout['losses'])}" if heldout else ""
    speed = f"{images / line['seconds']:.3g} images/s, {line['waited'] / line['seconds']:.0%} waiting"
    memory = f", {line['memory_bytes'] / 1e9:.3g} GB" if line["memory_bytes"] else ""
    return f"{phase}{losses}{held}, {speed}{memory}"


def _by_depth(losses: dict[str, float]) -> str:
    return ", ".join(f"{schedule.partition('@')[0]} {loss:.3f}" for schedule, loss in losses.items())


def summary(out: str | Path) -> dict:
    """What a run did: its steps, their seconds and those between them, and of each schedule its steps and losses.

    A schedule has steps, the last of them, loss_first and loss_last. A loss is the mean, in nats per token, over the
    first or last ten steps that trained the schedule. heldout is what the last step measured on images that were never
    trained on, if the run kept any.
    """
    steps = read_steps(RunDirectory(out).steps_path)
    by_schedule: dict[str, list[tuple[int, float]]] = {}
    for step in steps:
        for schedule, loss in step.get("losses", {}).items():  # none of a step that was skipped
            by_schedule.setdefault(schedule, []).append((step["step"], loss))
    return {
        "steps": len(steps),
        "seconds": sum(step["seconds"] + step["between"] for step in steps),
        "schedules": [_schedule(schedule, ran) for schedule, ran in sorted(by_schedule.items(), key=_deepest_first)],
        "heldout": next((step["heldout"] for step in reversed(steps) if "heldout" in step), None),
    }


def _schedule(schedule: str, ran: list[tuple[int, float]]) -> dict:
    losses = [loss for _, loss in ran]
    return {
        "schedule": schedule,
        "steps": len(ran),
        "loss_first": sum(losses[:LAST]) / len(losses[:LAST]),
        "loss_last": sum(losses[-LAST:]) / len(losses[-LAST:]),
        "last_step": ran[-1][0],
    }


def _deepest_first(item: tuple[str, list]) -> float:
    """full, then d16 before d8."""
    return -math.inf if item[0] == FULL else -int(item[0].lstrip("d").partition("@")[0])
