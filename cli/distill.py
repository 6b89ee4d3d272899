"""varcompress distill"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from varcompress.cli.options import DATA, Device, Json, Loading, Model, Revision, Vae
from varcompress.cli.output import note, out, print_json, progress_bar, say
from varcompress.errors import InputError, Stopped

if TYPE_CHECKING:
    from varcompress.training.recipe import Recipe

GPU_NAMES = ("rtx3090", "rtx4090", "l40s", "a100-40", "a100", "h100", "h200", "b200")
USUAL_GPU = "h100"


def distill(
    model: Model,
    directory: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Directory that becomes the elastic checkpoint.", show_default="needed, but for --plan"
        ),
    ] = None,
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
    show_plan: Annotated[
        bool, typer.Option("--plan", help="Train nothing: print steps, work, memory, disk and time, by arithmetic.")
    ] = False,
    gpu: Annotated[
        str | None,
        typer.Option(help=f"Of --plan: the device, one of {', '.join(GPU_NAMES)}.", show_default="h100 but for a CPU"),
    ] = None,
    device_memory: Annotated[
        str | None,
        typer.Option(help="Of --plan: memory of a device, such as 24GB.", show_default="as --gpu, or the recipe, says"),
    ] = None,
    devices: Annotated[
        int | None,
        typer.Option(min=1, help="Of --plan: devices that share the batch.", show_default="as the recipe says"),
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(min=1, help="Of --plan: images of the data.", show_default="those of --data, or ImageNet's"),
    ] = None,
    utilisation: Annotated[
        float | None,
        typer.Option(min=0.001, max=1, help="Of --plan: the share of its FLOP/s a device reaches.", show_default="0.2"),
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
    from varcompress.distributed import is_rank_zero, local_device
    from varcompress.report.tables import distill_table, plan_table
    from varcompress.training import distill
    from varcompress.training.log import summary
    from varcompress.training.recipe import load_recipe, recipes_for
    from varcompress.training.tracker import check_tracker

    asked = {"gpu": gpu, "device-memory": device_memory, "devices": devices, "images": images}
    asked["utilisation"] = utilisation
    if given := [name for name, value in asked.items() if value is not None and not show_plan]:
        raise InputError(f"--{given[0]} goes with --plan: leave it out")
    if directory is None and not show_plan:
        raise InputError("name the directory that becomes the elastic checkpoint: --out DIR (or ask for a --plan)")
    name, *others = [recipe] if recipe else recipes_for(Path(model).stem)  # before a download, not after
    chosen = load_recipe(name, settings or ())
    if recipe is None and is_rank_zero():  # also before a download: who wants another recipe can stop it now
        note(f"recipe {name}, made for {Path(model).stem}" + f" (also: {', '.join(others)})" * bool(others))
    if show_plan:
        loading = Loading(vae, "cpu", revision=revision)
        result = planned(loading, model, chosen, data, gpu, device_memory, devices, images, utilisation)
        print_json(result) if as_json else out.print(plan_table(result))
        return
    if is_rank_zero():
        check_tracker(chosen.tracker)  # before a download, too
    loaded = Loading(vae, str(local_device(device)), revision=revision).open(model)
    options = {"data": data, "out": directory, "resume": resume, "tokens": tokens, "note": note}
    try:
        with progress_bar() as progress:
            distill(loaded, chosen, progress=progress, **options)
    except Stopped as stopped:
        raise Stopped(f"{stopped}: go on with {_resuming()}", stopped.signal) from None
    except KeyboardInterrupt:
        raise _interrupted(signal.SIGINT) from None
    except SystemExit as end:
        if end.code != 128 + signal.SIGTERM:  # as `main` ends a command
            raise
        raise _interrupted(signal.SIGTERM) from None
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


def planned(
    loading: Loading,
    model: str,
    recipe: Recipe,
    data: Path | None,
    gpu: str | None,
    device_memory: str | None,
    devices: int | None,
    images: int | None,
    utilisation: float | None,
) -> dict:
    """What a run would cost. A model whose name says what shape it has is not fetched."""
    from varcompress.data.sources import open_source, own_source
    from varcompress.distributed import Ranks
    from varcompress.loading import outline
    from varcompress.training.budget import GPUS, IMAGENET, UTILISATION, budget
    from varcompress.training.checks import check_fit
    from varcompress.training.recipe import Machine, parse_bytes

    if gpu is not None and gpu not in GPUS:
        raise InputError(f"gpu {gpu!r} is unknown: use {', '.join(GPUS)}")
    machine = Machine.parse(recipe.machine)
    chosen = GPUS[gpu or USUAL_GPU] if gpu or device_memory or machine.memory_bytes else None
    described = outline(model) or loading.open(model)
    check_fit(recipe, described, Ranks(count=devices or machine.devices))
    if images is None:
        named = data is not None or own_source(described)
        images = len(open_source(data, described)) if named else IMAGENET
    memory_bytes = parse_bytes(device_memory) if device_memory else GPUS[gpu].memory_bytes if gpu else None
    return budget(
        described,
        recipe,
        images=images,
        devices=devices,
        memory_bytes=memory_bytes,
        flops_per_second=chosen and chosen.flops_per_second,
        utilisation=utilisation or UTILISATION,
    )


def _interrupted(number: int) -> Stopped:
    """The end by a signal that came where a run does not wait for the end of a step, as while it encodes."""
    return Stopped(f"interrupted, and what is encoded or saved is kept: go on with {_resuming()}", number)


def _resuming() -> str:
    """The command that continues what this one began."""
    arguments = sys.argv[1:] if "--resume" in sys.argv else [*sys.argv[1:], "--resume"]
    processes, nodes = os.environ.get("WORLD_SIZE", "1"), os.environ.get("GROUP_WORLD_SIZE", "1")
    how = ["--nproc-per-node", processes] if nodes == "1" else ["…"]
    launcher = ["varcompress"] if processes == "1" else ["torchrun", *how, "-m", "varcompress"]
    return shlex.join(launcher + arguments).replace("'…'", "…")
