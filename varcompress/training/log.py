"""steps.jsonl, one JSON object per step, and a summary of it."""

from __future__ import annotations

import json
from pathlib import Path

from varcompress.files import disk_errors, write_text
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
    """The steps in a log, in order. Stops at a line that a killed process left unfinished."""
    steps: list[dict] = []
    if not path.is_file():
        return steps
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            steps.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return steps


def summary(out: str | Path) -> dict:
    """What a run did: its steps and seconds, and per schedule its steps, the last of them, loss_first and loss_last.

    A loss is the mean, in nats per token, over the first or last ten steps that trained the schedule.
    """
    steps = read_steps(RunDirectory(out).steps_path)
    by_schedule: dict[str, list[dict]] = {}
    for step in sorted(steps, key=lambda step: -step["depth"]):
        by_schedule.setdefault(step["schedule"], []).append(step)
    schedules = []
    for schedule, ran in by_schedule.items():
        losses = [step["loss"] for step in ran]
        schedules.append(
            {
                "schedule": schedule,
                "steps": len(ran),
                "loss_first": sum(losses[:LAST]) / len(losses[:LAST]),
                "loss_last": sum(losses[-LAST:]) / len(losses[-LAST:]),
                "last_step": ran[-1]["step"],
            }
        )
    return {"steps": len(steps), "seconds": sum(step["seconds"] for step in steps), "schedules": schedules}
