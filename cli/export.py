"""varcompress export"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from varcompress.cli.options import Json
from varcompress.cli.output import print_json, say
from varcompress.errors import InputError


def export(
    run: Annotated[Path, typer.Argument(help="The --out of a distill that has not come to its end.")],
    directory: Annotated[Path, typer.Option("--out", help="Directory that becomes the elastic checkpoint.")],
    step: Annotated[int | None, typer.Option(help="The state to take.", show_default="the last one")] = None,
    as_json: Json = False,
) -> None:
    """Make an elastic checkpoint of the state of an unfinished run, which goes on or stays as it is."""
    from varcompress.checkpoint import check_output, is_elastic
    from varcompress.publish import save
    from varcompress.training.state import RunDirectory

    check_output(directory)
    if is_elastic(directory):
        raise InputError(f"{directory}: holds a checkpoint already: choose another --out")
    state = RunDirectory(run)
    chosen, model = state.newest() if step is None else (step, state.unfinished(step))
    save(model, directory)
    if as_json:
        print_json({"kind": "export", "run": str(run), "step": chosen, "out": str(directory)})
        return
    say(f"step {chosen} of {run}; elastic checkpoint: {directory}")
