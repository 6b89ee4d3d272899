"""Arguments that several commands share, declared once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

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
Cfg = Annotated[float, typer.Option(help="Guidance weight.")]
TopK = Annotated[int, typer.Option(min=0, help="Most probable tokens to draw from; 0 for all.")]
TopP = Annotated[float, typer.Option(min=0, max=1, help="Probability mass to draw from; 0 for all.")]
Seed = Annotated[int, typer.Option(help="Seed of all images; image i draws from its stream i, in any batch.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


def open_model(
    model: str,
    vae: Path | None = None,
    device: str | None = None,
    dtype: str = "float32",
    revision: str | None = None,
    **runtime: str | None,
) -> ElasticVAR:
    """Load MODEL with the shared options; runtime: kernels, cache_dtype, offload."""
    from varcompress.hub import load

    return load(model, vae=vae, device=device, dtype=dtype, revision=revision, **runtime)
