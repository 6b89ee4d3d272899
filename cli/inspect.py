"""varcompress inspect"""

from __future__ import annotations

from varcompress.cli.options import Dtype, Json, Loading, Model, Revision, Schedules, Vae
from varcompress.cli.output import out, print_json


def inspect(
    model: Model,
    schedules: Schedules = None,
    vae: Vae = None,
    dtype: Dtype = "float32",
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Say what a model is, which layers its schedules run, and their cost by arithmetic."""
    from varcompress.cost import describe
    from varcompress.loading import outline
    from varcompress.report.tables import inspect_table

    named = None if vae or revision else outline(model, dtype)  # whose shape is known without a download
    result = describe(named or Loading(vae, "cpu", dtype, revision).open(model), schedules)
    if as_json:
        print_json(result)
    else:
        out.print(inspect_table(result))
