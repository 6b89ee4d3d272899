"""Arguments that several commands share, declared once."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_type_hints

import typer

from varcompress.errors import InputError
from varcompress.sampling import Sampling

if TYPE_CHECKING:
    from varcompress.models.elastic import ElasticVAR

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        show_default=False,
        help="A .pth file, an elastic directory, a Hub id, var-d16 … var-d36, or digits (the embedded model).",
    ),
]
DATA = "A folder with one subfolder per class, tar shards (a folder or a pattern of them), hf:OWNER/NAME[:SPLIT]"
Vae = Annotated[Path | None, typer.Option(help="Tokenizer file that goes with a transformer .pth.")]
Device = Annotated[str | None, typer.Option(help="cuda, cuda:1 or cpu.", show_default="cuda when there is one")]
Dtype = Annotated[
    str,
    typer.Option(
        help="float32, bfloat16 or float16 (slow on most CPUs); auto is bfloat16 where the device is faster with it."
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")]
Schedules = Annotated[
    list[str] | None,
    typer.Option(
        "--schedule",
        "-s",
        help="full, d8, d8@6 or 30x6,8x4; may be given several times.",
        show_default="full and the model's subnets",
    ),
]
Kernels = Annotated[str, typer.Option(help="auto, torch (plain torch alone) or triton (fused kernels, on a GPU).")]
CacheDtype = Annotated[
    str | None,
    typer.Option(help="int8 or float8: keys and values in eight bits.", show_default="as --dtype"),
]
Offload = Annotated[
    str | None,
    typer.Option(
        help="bridge: on a GPU, stream the layers that only the bridge runs from host memory.", show_default=False
    ),
]
Data = Annotated[
    str | None,
    typer.Option(help=f"{DATA}, a token store, or digits. The embedded model needs none.", show_default=False),
]
Depths = Annotated[
    list[int] | None,
    typer.Option(
        "--depth",
        min=1,
        help="A number of layers to try; may be given several times.",
        show_default="those of MODEL's subnets, or 16, 8, 4 and 2",
    ),
]
Reference = Annotated[
    str | None,
    typer.Option(
        help="Also score images drawn: against a folder of images, an .npz of images or of statistics, or digits.",
        show_default=False,
    ),
]
ScoredImages = Annotated[
    int | None,
    typer.Option(
        min=10, help="With --reference: images per schedule.", show_default="50000; 2000 with the digits features"
    ),
]
ResultsIn = Annotated[
    Path | None, typer.Option("--out", help="Directory for the result and its picture.", show_default="not written")
]
Rounding = Annotated[str, typer.Option(help="round or truncate: how images become 8 bits.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


@dataclasses.dataclass(frozen=True)
class Loading:
    """How MODEL is opened, and how it runs."""

    vae: Path | None = None
    device: str | None = None
    dtype: str = "float32"
    revision: str | None = None
    kernels: str = "auto"
    cache_dtype: str | None = None
    offload: str | None = None

    def open(self, model: str) -> ElasticVAR:
        from varcompress.loading import load

        return load(model, **dataclasses.asdict(self))


# of each field of a group, the option that a command has for it
GROUPS = {
    Sampling: {
        field.name: Annotated[get_type_hints(Sampling)[field.name], typer.Option(**field.metadata)]
        for field in dataclasses.fields(Sampling)
    },
    Loading: {
        "vae": Vae,
        "device": Device,
        "dtype": Dtype,
        "revision": Revision,
        "kernels": Kernels,
        "cache_dtype": CacheDtype,
        "offload": Offload,
    },
}


def whole_numbers(option: str, text: str) -> list[int]:
    """Whole numbers from 0,1,2. Raises InputError for anything else."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"--{option} {text!r}: write whole numbers such as 0,1,2") from error


def grouped(command: Callable) -> Callable:
    """A command that typer sees with the options of a group's fields in place of its parameter of that type.

    The defaults are those of the fields. `Sampling` says what each of its options does, so that a new field is an
    option of every command that samples.
    """
    hints = get_type_hints(command, include_extras=True)
    parameters, groups = [], {}
    for parameter in inspect.signature(command).parameters.values():
        kind = hints[parameter.name]
        if kind not in GROUPS:
            parameters.append(parameter.replace(annotation=kind))
            continue
        groups[parameter.name] = kind
        parameters += [
            parameter.replace(name=field.name, annotation=GROUPS[kind][field.name], default=field.default)
            for field in dataclasses.fields(kind)
        ]

    @functools.wraps(command)
    def run(**values: object) -> None:
        for name, kind in groups.items():
            values[name] = kind(**{field.name: values.pop(field.name) for field in dataclasses.fields(kind)})
        command(**values)

    run.__signature__ = inspect.Signature([p.replace(kind=p.KEYWORD_ONLY) for p in parameters])
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del run.__wrapped__  # or typer would look at the command itself
    return run
