"""varcompress push"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from varcompress.cli.options import Json, Model, Revision, Vae
from varcompress.cli.output import note, print_json, say


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
    base_model: Annotated[
        str | None,
        typer.Option(help="Hub id of what MODEL was made from, where MODEL does not know it.", show_default=False),
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option("--license", help="Its licence, as the Hub writes it: mit, apache-2.0.", show_default=False),
    ] = None,
    branch: Annotated[str | None, typer.Option(help="Branch of REPO to commit to.", show_default="main")] = None,
    vae: Vae = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Publish a model on the Hub: weights, recipe, measured results and a model card that says how to use it.

    A picture samples.png in MODEL's directory comes along too.
    A token store in place of MODEL is published as a data set, which distill --data hf:REPO takes back.
    Needs `hf auth login`. Everything appears in one commit, or not at all.
    """
    from varcompress.publish import push as publish

    result = publish(
        model,
        repo,
        vae=vae,
        private=private,
        results=results or (),
        revision=revision,
        branch=branch,
        base_model=base_model,
        license=licence,
        progress=lambda done, total, what: note(f"{what} ({done}/{total})"),
    )
    if result["card"] == "own":
        note("README.md is not the card that was generated: yours was published as it is, without results.")
    if as_json:
        print_json(result)
        return
    say(f"{result['url']}  commit {result['commit']}")
    say("\n".join(result["files"]))
