"""What every command shares: tables on stdout, notes and progress on stderr, JSON for machines."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich import progress as bars
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from varcompress.progress import Progress

PLAIN_INTERVAL_S = 5.0

out = Console()
err = Console(stderr=True)


def note(text: str) -> None:
    """A remark for a person, on stderr."""
    err.print(text, highlight=False, markup=False, soft_wrap=True)


def say(text: str) -> None:
    """A line of a result, on stdout; paths in it stay whole and are no markup."""
    out.print(text, highlight=False, markup=False, soft_wrap=True)


def command_line() -> str:
    """The command as it was called, for a result to tell."""
    return shlex.join(["varcompress", *sys.argv[1:]])


def deliver(
    result: dict, table: Callable[[dict], RenderableType], directory: Path | None, *, as_json: bool, plot: str = "plot"
) -> None:
    """Print a result as a table or as JSON, with the command that made it, and keep it in a directory, if there is one.

    plot: what the picture beside it is called.
    """
    from varcompress.publish import record

    result["command"] = command_line()
    if as_json:
        print_json(result)
    else:
        out.print(table(result))
    if directory is None:
        note(f"Nothing was written: --out DIR keeps this result and its {plot}.")
    else:
        note(f"Written: {', '.join(map(str, record(result, directory)))}")


def print_json(result: dict) -> None:
    """One JSON object on stdout."""
    print(json.dumps(result, indent=2))


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A callable (done, total, what): a bar when stderr is a terminal, a plain line every few seconds when not."""
    if not err.is_terminal:
        yield _plain_lines()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with bars.Progress(*columns, TimeRemainingColumn(), console=err, transient=True) as bar:
        tasks: dict[str, int] = {}

        def show(done: int, total: int, what: str) -> None:
            name = what.split(":")[0]
            if name not in tasks:
                tasks[name] = bar.add_task(what, total=total)
            bar.update(tasks[name], completed=done, total=total, description=what)

        yield show


def _plain_lines() -> Progress:
    last = [0.0]

    def show(done: int, total: int, what: str) -> None:
        now = time.monotonic()
        if done >= total or now - last[0] >= PLAIN_INTERVAL_S:
            last[0] = now
            note(f"{what} {done}/{total}")

    return show
