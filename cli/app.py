"""`varcompress`: the commands, and the one place where errors become a line and an exit code."""

from __future__ import annotations

import difflib
import importlib
import os
import signal
import sys
from typing import Annotated, NoReturn

import typer
from typer.core import TyperGroup

from varcompress import __version__
from varcompress.cli.output import err, note
from varcompress.errors import InputError, Stopped

# Typer brings click or a copy of its own, by its version: the class behind all usage errors is found through it.
UsageError = typer.BadParameter.__mro__[2]
BAD_INPUT, INTERRUPTED = 2, 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM


class Commands(TyperGroup):
    """A group that knows what a mistyped command was meant to be."""

    def get_command(self, ctx: typer.Context, name: str):  # noqa: ANN201 - typer's or click's, by its version
        found = super().get_command(ctx, name)
        if found is None and not ctx.resilient_parsing:
            known = self.list_commands(ctx)
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise InputError(f"no command is named {name!r}: {hint}")
        return found


app = typer.Typer(
    name="varcompress",
    cls=Commands,
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
    ("tokenize", "tokenize", "tokenize"),
    ("distill", "distill", "distill"),
    ("export", "export", "export"),
    ("plot", "plot", "plot"),
    ("profile", "profile", "profile"),
    ("eval", "eval", "evaluate"),
    ("sensitivity", "sensitivity", "sensitivity"),
    ("search", "search", "search"),
    ("report", "report", "report"),
    ("push", "push", "push"),
)
SHARED = ("distill", "tokenize", "eval")  # the commands whose processes, started by torchrun, share the work


def _version(show: bool) -> None:
    if show:
        print(f"varcompress {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    if context.invoked_subcommand not in SHARED:
        _refuse_more_processes(context.invoked_subcommand)


def _speaks() -> bool:
    """Whether this process, of those of torchrun, is the one that says why all end."""
    return os.environ.get("RANK", "0") == "0"


def _refuse_more_processes(command: str | None) -> None:
    """Under torchrun each process would do all of the work, and all would write to one place. The first says so."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes == "1":
        return
    if not _speaks():
        raise typer.Exit(BAD_INPUT)
    raise InputError(
        f"{command} runs in one process, and WORLD_SIZE is {processes}: start it without torchrun, "
        f"which only {', '.join(SHARED[:-1])} and {SHARED[-1]} can share work under"
    )


for _name, _module, _function in COMMANDS:
    app.command(_name)(getattr(importlib.import_module(f"varcompress.cli.{_module}"), _function))
for _name in ("recipes", "protocols"):
    app.add_typer(importlib.import_module(f"varcompress.cli.{_name}").app, name=_name, cls=Commands)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run a command and exit. Bad input is one line on stderr and exit code 2, never a traceback.

    A SIGTERM ends it as Ctrl-C does, so that what it keeps in temporary places goes.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    arguments = [_with_home(argument) for argument in (sys.argv[1:] if arguments is None else arguments)]
    try:
        status = app(arguments, prog_name="varcompress", standalone_mode=False)
    except InputError as error:
        status = _refuse(str(error))
    except UsageError as error:
        status = _refuse(_usage(error))
    except Stopped as stopped:
        if _speaks():
            note(str(stopped))
        sys.exit(128 + stopped.signal)
    except OSError as error:  # what no command foresaw
        status = _refuse(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    except SystemExit as end:
        if end.code != TERMINATED:
            raise
        status = TERMINATED
    if status in (INTERRUPTED, TERMINATED) and _speaks():  # the first is also what typer returns for Ctrl-C
        note("interrupted")
    sys.exit(status if isinstance(status, int) else 0)


def _with_home(argument: str) -> str:
    """Expand ~ where a shell leaves it, as in --out=~/run."""
    option, equals, value = argument.partition("=")
    if equals and option.startswith("-"):
        return option + equals + os.path.expanduser(value)
    return os.path.expanduser(argument)


def _usage(error: Exception) -> str:
    """What typer says of a wrong call, and where to read more. Empty where it has printed the help already."""
    text, context = " ".join(error.format_message().split()), getattr(error, "ctx", None)
    if not text or type(error).__name__ == "NoArgsIsHelpError":
        return ""
    return f"{text.rstrip('.')}: see {context.command_path} --help" if context else text


def _refuse(text: str) -> int:
    if text:
        err.print("[red]error:[/red] ", end="", highlight=False)
        note(text)
    return BAD_INPUT


if __name__ == "__main__":
    main()
