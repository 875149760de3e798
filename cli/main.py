"""The `tclkit` command: what its sub-commands share."""

import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from ._console import DebugOption, reported_errors
from .bench import bench
from .build_engine import build_engine
from .data import prepare, world
from .demo import demo
from .embed import embed
from .eval import eval_
from .export import export
from .info import info, version_text
from .pull import pull
from .segment import segment
from .train import train
from .verify import verify

_HELP = """Name things in words, get their pixels.

Start with [bold]tclkit demo[/bold]; then [bold]tclkit segment IMAGE PROMPT...[/bold]"""


class _Command(TyperCommand):
    """Shows no type beside an option that takes no value, where typer 0.29 writes <bool>."""

    def get_params(self, ctx: Any) -> Any:
        return _without_types(super().get_params(ctx))


class _Subgroup(TyperGroup):
    """A group of commands; see `_Command`."""

    def get_params(self, ctx: Any) -> Any:
        return _without_types(super().get_params(ctx))


class _Group(_Subgroup):
    """Reports the errors of every command in one place."""

    def invoke(self, ctx: Any) -> Any:
        with reported_errors(ctx):
            try:
                return super().invoke(ctx)
            except typer.BadParameter as error:
                error.message = error.message.removeprefix("Value error, ")  # pydantic's, which typer 0.29 passes on
                raise


def _without_types(params: Any) -> Any:
    for param in params:
        if getattr(param, "is_flag", False):
            param.metavar = ""
    return params


def _show_version(value: bool) -> None:
    if value:
        typer.echo(version_text())
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Options that stand before the command."""


def _data_options(debug: DebugOption = False) -> None:
    """Make data to train from or to judge by."""


def _make_app() -> typer.Typer:
    made = typer.Typer(
        name="tclkit",
        cls=_Group,
        help=_HELP,
        callback=_options,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,  # a bug of ours gets Python's own traceback
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for panel, commands in {
        "Look": (demo, segment),
        "Get or make a model": (pull, export, train),
        "Compile it": (build_engine, verify),
        "Judge it": (eval_, bench),
        "Around it": (embed, info),
    }.items():
        for command in commands:
            made.command(_command_name(command), cls=_Command, rich_help_panel=panel)(command)
    data = typer.Typer(cls=_Subgroup, callback=_data_options, no_args_is_help=True, rich_markup_mode="rich")
    data.command(cls=_Command)(prepare)
    data.command(cls=_Command)(world)
    made.add_typer(data, name="data", rich_help_panel="Judge it")
    return made


def _command_name(command: Callable[..., None]) -> str:
    """A function's name as a command; the underscore after a name of Python's own goes."""
    return command.__name__.rstrip("_").replace("_", "-")


app = _make_app()


def run() -> None:
    """Entry point of the `tclkit` script."""
    for stream in (sys.stdout, sys.stderr):  # a prompt that the terminal cannot show must not end the program
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    app(prog_name="tclkit")
