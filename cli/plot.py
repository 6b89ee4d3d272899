"""varcompress plot"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from varcompress.cli.output import say
from varcompress.errors import InputError


def plot(
    run: Annotated[Path, typer.Argument(help="The --out of a distill, under way or finished.")],
    out: Annotated[Path | None, typer.Option(help="FILE.png.", show_default="RUN/steps.png")] = None,
) -> None:
    """Draw the losses of a run: of each schedule, in training and on images that are held out."""
    from varcompress.report.plots import plot_run
    from varcompress.training.log import read_steps
    from varcompress.training.state import PICTURE, RunDirectory

    if out is not None and out.suffix.lower() != ".png":
        raise InputError(f"{out}: the name must end in .png")
    path = RunDirectory(run).steps_path
    steps = read_steps(path)
    if not any("losses" in step for step in steps):
        raise InputError(f"{path}: holds no step of a run: give the --out of a distill that has begun to train")
    say(str(plot_run(steps, str(run), out or path.with_name(PICTURE))))
