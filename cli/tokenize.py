"""varcompress tokenize"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from varcompress.cli.options import DATA, Device, Json, Loading, Model, Revision, Vae
from varcompress.cli.output import note, out, print_json, progress_bar, say


def tokenize(
    model: Model,
    data: Annotated[str, typer.Argument(metavar="DATA", show_default=False, help=f"{DATA}, or digits.")],
    directory: Annotated[Path, typer.Option("--out", help="Directory that becomes the token store.")],
    views: Annotated[int, typer.Option(min=1, max=256, help="Of each image: the centre, then random crops.")] = 1,
    vae: Vae = None,
    device: Device = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Encode images once, into a token store that distill --data takes in their place and push publishes.

    Interrupted and called again, it goes on where it stopped.
    On several GPUs: torchrun --nproc-per-node 8 -m varcompress tokenize …
    """
    from varcompress.distributed import is_rank_zero, local_device
    from varcompress.report.tables import tokenize_table
    from varcompress.tokenizing import tokenize

    loaded = Loading(vae, str(local_device(device)), revision=revision).open(model)
    with progress_bar() as progress:
        result = tokenize(loaded, data, directory, views=views, progress=progress, note=note)
    if not is_rank_zero():
        return
    if as_json:
        print_json(result)
        return
    out.print(tokenize_table(result))
    say("Next:")
    options = f" --set views={views}" if views > 1 else ""
    for command in (f"distill {model} --data {directory}{options} --out DIR", f"push {directory} REPO"):
        say(f"  varcompress {command}")
