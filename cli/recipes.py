"""varcompress recipes"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from varcompress.cli.options import Json
from varcompress.cli.output import note, out, print_json

app = typer.Typer(help="List, show and copy recipes: YAML files to edit and hand to distill.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(metavar="NAME", show_default=False, help="A recipe's name.")]


@app.command("list")
def list_recipes(as_json: Json = False) -> None:
    """Name the recipes that the package brings."""
    from varcompress.training.recipe import PHASES, load_recipe, recipe_names, recipe_title

    recipes = [{"title": recipe_title(name), **load_recipe(name).to_dict()} for name in recipe_names()]
    if as_json:
        print_json({"kind": "recipes", "recipes": recipes})
        return
    table = Table("name", "depths", "bridge", "epochs", "what it is")
    for recipe in recipes:
        epochs = str(recipe["epochs"]) if "epochs" in recipe else "+".join(str(recipe[phase]) for phase in PHASES)
        depths = " ".join(map(str, recipe["depths"]))
        table.add_row(recipe["name"], depths, str(recipe["bridge"]), epochs, recipe["title"])
    out.print(table)


@app.command("show")
def show_recipe(name: Name, as_json: Json = False) -> None:
    """Print a recipe."""
    from varcompress.training.recipe import load_recipe, recipe_text

    if as_json:
        print_json({"kind": "recipe", **load_recipe(name).to_dict()})
    else:
        print(recipe_text(name), end="")


@app.command("copy")
def copy_recipe(
    name: Name,
    destination: Annotated[
        Path | None,
        typer.Argument(metavar="[DEST]", show_default="./NAME.yaml", help="File or directory."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Copy a recipe to edit it. Never overwrites a file."""
    from varcompress.training.recipe import copy_recipe

    path = copy_recipe(name, destination or Path())
    if as_json:
        print_json({"kind": "recipe", "name": name, "path": str(path)})
    else:
        note(f"{path}: edit it, then varcompress distill MODEL --recipe {path} --out DIR")
