"""varcompress report"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from varcompress.cli.options import Device, Json
from varcompress.cli.output import print_json, progress_bar, say


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR…",
            show_default=False,
            help="Elastic directories, the --out of a distill, folders of results; several stand side by side.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="FILE.html.", show_default="DIR/report.html of one DIR, report.html of several"),
    ] = None,
    samples: Annotated[
        int, typer.Option(min=0, help="Images that are drawn under each schedule of each model; 0 for none.")
    ] = 10,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Write one page of HTML about a model: quality against cost, samples, training, and how to have it all again.

    It is one file that loads nothing from elsewhere. Results that cannot be compared are refused.
    """
    from varcompress.reporting import write_report

    with progress_bar() as progress:
        path = write_report(folders, out, samples=samples, device=device, progress=progress)
    if as_json:
        print_json({"kind": "report", "out": str(path), "bytes": path.stat().st_size})
    else:
        say(str(path))
