"""`varcompress`: the commands, and the one place where errors become a line and an exit code."""

from __future__ import annotations

import importlib
import sys
from typing import Annotated

import click
import typer

from varcompress import __version__
from varcompress.cli.output import err
from varcompress.errors import InputError

app = typer.Typer(
    name="varcompress",
    help="Make a pretrained VAR elastic in depth, see what each schedule costs and how good it is, and publish it.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# command, module, function: in the order in which a person uses them
COMMANDS = (
    ("demo", "demo", "demo"),
    ("inspect", "inspect", "inspect"),
    ("sample", "sample", "sample"),
    ("distill", "distill", "distill"),
    ("profile", "profile", "profile"),
    ("eval", "eval", "evaluate"),
    ("push", "push", "push"),
)


def _version(show: bool) -> None:
    if show:
        print(f"varcompress {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


for _name, _module, _function in COMMANDS:
    app.command(_name)(getattr(importlib.import_module(f"varcompress.cli.{_module}"), _function))
app.add_typer(importlib.import_module("varcompress.cli.recipes").app, name="recipes")


def main(arguments: list[str] | None = None) -> int:
    """Run a command. Bad input is one line on stderr and exit code 2, never a traceback."""
    try:
        status = app(arguments, standalone_mode=False)
    except InputError as error:
        err.print(f"[red]error:[/red] {_escape(str(error))}", highlight=False, soft_wrap=True)
        status = 2
    except click.ClickException as error:
        error.show()
        status = 2
    except (KeyboardInterrupt, click.Abort):
        err.print("interrupted")
        status = 130
    return sys.exit(status if isinstance(status, int) else 0)


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


if __name__ == "__main__":
    main()
