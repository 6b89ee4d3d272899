"""varcompress push"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from varcompress.cli.options import Json, Model, Vae
from varcompress.cli.output import note, out, print_json


def push(
    model: Model,
    repo: Annotated[str, typer.Argument(metavar="REPO", show_default=False, help="Hub id, such as me/my-model.")],
    private: Annotated[bool, typer.Option("--private", help="Create the repository private.")] = False,
    results: Annotated[
        list[Path] | None,
        typer.Option(
            help="JSON of profile or eval; may be given several times. Those in MODEL's directory come along unasked.",
            show_default=False,
        ),
    ] = None,
    branch: Annotated[str | None, typer.Option(help="Branch to commit to.", show_default="main")] = None,
    vae: Vae = None,
    as_json: Json = False,
) -> None:
    """Publish a model on the Hub: weights, recipe, measured results and a model card that says how to use it.

    Needs `hf auth login`. Everything appears in one commit, or not at all.
    """
    from varcompress.hub import push as publish

    result = publish(
        model,
        repo,
        vae=vae,
        private=private,
        results=results or (),
        revision=branch,
        progress=lambda done, total, what: note(f"{what} ({done}/{total})"),
    )
    if as_json:
        print_json(result)
        return
    out.print(f"{result['url']}  commit {result['commit']}", highlight=False, markup=False, soft_wrap=True)
    out.print("\n".join(result["files"]), highlight=False, markup=False)
