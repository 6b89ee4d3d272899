"""varcompress distill"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from varcompress.cli.options import DATA, Device, Json, Loading, Model, Revision, Vae
from varcompress.cli.output import note, out, print_json, progress_bar, say
from varcompress.errors import Stopped


def distill(
    model: Model,
    directory: Annotated[Path, typer.Option("--out", help="Directory that becomes the elastic checkpoint.")],
    recipe: Annotated[
        str | None,
        typer.Option(
            help="A recipe's name (see `varcompress recipes list`) or a YAML file.", show_default="made for the model"
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help=f"{DATA}, a token store, or digits. The embedded model needs none.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was interrupted.")] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the recipe; may be given several times."),
    ] = None,
    tokens: Annotated[
        Path | None, typer.Option(help="Keep the encoded images here, for further runs.", show_default="drop them")
    ] = None,
    vae: Vae = None,
    device: Device = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Make a pretrained VAR elastic in depth: train it, by a recipe, to one set of weights for all depths.

    On several GPUs: torchrun --nproc-per-node 8 -m varcompress distill …
    """
    from varcompress.data.sources import own_source
    from varcompress.report.tables import distill_table
    from varcompress.training import distill
    from varcompress.training.distributed import is_rank_zero, local_device
    from varcompress.training.log import summary
    from varcompress.training.recipe import load_recipe, recipes_for

    name, *others = [recipe] if recipe else recipes_for(Path(model).stem)  # before a download, not after
    chosen = load_recipe(name, settings or ())
    if recipe is None and is_rank_zero():
        note(f"recipe {name}, made for {Path(model).stem}" + f" (also: {', '.join(others)})" * bool(others))
    loaded = Loading(vae, str(local_device(device)), revision=revision).open(model)
    options = {"data": data, "out": directory, "resume": resume, "tokens": tokens, "note": note}
    try:
        with progress_bar() as progress:
            distill(loaded, chosen, progress=progress, **options)
    except Stopped as stopped:
        raise Stopped(f"{stopped}: go on with {_resuming()}", stopped.signal) from None
    if not is_rank_zero():
        return
    result = {
        "kind": "distill",
        "model": loaded.provenance.name,
        "out": str(directory),
        "recipe": chosen.to_dict(),
        **summary(directory),
    }
    if as_json:
        print_json(result)
        return
    out.print(distill_table(result))
    say(f"{result['steps']} steps in {result['seconds']:.0f} s; elastic checkpoint: {directory}")
    say("Next:")
    reference = "" if own_source(loaded) else " --reference REF"
    for command in ("profile {}", f"eval {{}}{reference}", "push {} REPO"):
        say(f"  varcompress {command.format(directory)}")


def _resuming() -> str:
    """The command that continues what this one began."""
    arguments = sys.argv[1:] if "--resume" in sys.argv else [*sys.argv[1:], "--resume"]
    processes = os.environ.get("WORLD_SIZE", "1")
    launcher = ["varcompress"] if processes == "1" else ["torchrun", "…", "-m", "varcompress"]
    return shlex.join(launcher + arguments).replace("'…'", "…")
