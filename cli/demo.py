"""varcompress demo"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from varcompress.cli.options import Json
from varcompress.cli.output import note, out, print_json, progress_bar, say


def demo(
    directory: Annotated[Path, typer.Option("--out", help="Directory for the results.")] = Path("varcompress-demo"),
    as_json: Json = False,
) -> None:
    """Distil, profile and evaluate the embedded model: the whole path in a few minutes, on any machine."""
    from varcompress.demo import run_demo
    from varcompress.report.tables import demo_table

    note("The embedded model: 30 layers, 4 scales, trained on 8 x 8 handwritten digits.")
    with progress_bar() as progress:
        result = run_demo(directory, progress=progress, note=note)
    if as_json:
        print_json(result)
        return
    out.print(demo_table(result))
    say(f"Results of {result['seconds']:.0f} s in {directory}:")
    for path in result["files"]:
        say(f"  {path}")
    say(f"Next: varcompress sample {directory} --classes 0,1,2 -s d4 --out digits.png")
