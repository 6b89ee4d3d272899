"""varcompress protocols"""

from __future__ import annotations

from typing import Annotated

import typer

from varcompress.cli.options import Json
from varcompress.cli.output import out, print_json

app = typer.Typer(help="What `eval` does where nothing else is said.", no_args_is_help=True)


@app.command("list")
def list_protocols(as_json: Json = False) -> None:
    """The protocols, and what each is for."""
    from varcompress.evaluation.protocols import PROTOCOLS, describe_protocol
    from varcompress.report.tables import protocols_table

    described = [describe_protocol(name) for name in PROTOCOLS]
    if as_json:
        print_json({"kind": "protocols", "protocols": described})
    else:
        out.print(protocols_table(described))


@app.command("show")
def show_protocol(
    name: Annotated[str, typer.Argument(metavar="PROTOCOL", show_default=False)], as_json: Json = False
) -> None:
    """One protocol: images, sampling, rounding, reference, features, and how the scores are computed."""
    from varcompress.evaluation.protocols import describe_protocol
    from varcompress.report.tables import protocol_table

    described = describe_protocol(name)
    if as_json:
        print_json({"kind": "protocol", **described})
    else:
        out.print(protocol_table(described))
