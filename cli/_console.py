"""Who hears what: results go to stdout, everything else to stderr; errors become one line and an exit code."""

import contextlib
import importlib.util
import json
import logging
import sys
import traceback
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tclkit.runtime.errors import TclkitError
from tclkit.runtime.extras import install_command

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_DEBUG = "tclkit.debug"  # key in the context's meta, which all nested contexts share
EXIT_FAILED = 1
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def say(message: str) -> None:
    """Tell the person at the terminal something that no pipe wants."""
    typer.echo(message, err=True)


def warn(message: str) -> None:
    """Tell the person at the terminal that something is not as it should be, and was announced, not hidden."""
    typer.secho("warning: ", fg="yellow", nl=False, err=True)
    typer.echo(_one_line(message), err=True)


def fail(message: str) -> None:
    """Print one error line; the caller decides on the exit code."""
    typer.secho("error: ", fg="red", bold=True, nl=False, err=True)
    typer.echo(_one_line(message), err=True)


def printer() -> "Console":
    """Rich console on stdout, for the tables that are a command's result."""
    from rich.console import Console

    return Console(highlight=False, emoji=False)


def table(*columns: str, right: tuple[str, ...] = (), title: str | None = None) -> "Table":
    """Empty table in the one look that all commands share; `right` names the right-aligned columns."""
    from rich import box
    from rich.table import Table

    made = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def plain(text: object) -> str:
    """Text of a user's for a rich table: nothing in it is markup."""
    from rich.markup import escape

    return escape(str(text))


def print_json(document: Mapping[str, Any]) -> None:
    """Print one JSON document on stdout: indented at a terminal, else one line, in ASCII that any pipe takes."""
    typer.echo(json.dumps(document, indent=2 if sys.stdout.isatty() else None, allow_nan=False))


def size_text(size_bytes: int) -> str:
    """Bytes for people: 512 B, 3.4 MB."""
    size = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def require_extra(extra: str, *modules: str) -> None:
    """Stop with the remedy when modules of an optional extra are not installed.

    Raises:
        TclkitError: names what is missing and the pip command that brings it.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise TclkitError(
            f"this command needs {', '.join(missing)}, which the light install leaves out: {install_command(extra)}",
            missing=missing,
        )


def _set_debug(context: typer.Context, value: bool) -> bool:
    if value:
        context.meta[_DEBUG] = True
        logging.getLogger("tclkit").setLevel(logging.DEBUG)
    return value


DebugOption = Annotated[
    bool, typer.Option("--debug", callback=_set_debug, help="Show the traceback of an error, and all log lines.")
]


@contextlib.contextmanager
def reported_errors(context: Any) -> Iterator[None]:
    """Turn what goes wrong inside into one line on stderr and an exit code.

    TclkitError and errors of the operating system (a full disk, a folder that may not be written) exit 1, Ctrl-C exits
    130. Anything else is a bug of ours: it keeps its traceback.
    """
    with _logging_to_stderr(debug=bool(context.meta.get(_DEBUG))):
        try:
            yield
        except KeyboardInterrupt:
            say("interrupted")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except BrokenPipeError:
            raise  # the reader of our stdout went away; typer ends quietly
        except (TclkitError, OSError, MemoryError) as error:
            if context.meta.get(_DEBUG):
                traceback.print_exc(file=sys.stderr)
            fail(error_text(error))
            raise typer.Exit(EXIT_FAILED) from error


def error_text(error: BaseException) -> str:
    """What an error says, in one line; errors of the operating system as 'FILE: reason'."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, MemoryError):
        return f"out of memory{': ' if str(error) else ''}{error}"
    return _one_line(str(error) or type(error).__name__)


def _one_line(message: str) -> str:
    return " ".join(message.split())


class _StderrHandler(logging.Handler):
    """Log records of the libraries, as this program's own lines."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            warn(record.getMessage())
        else:
            say(record.getMessage())


@contextlib.contextmanager
def _logging_to_stderr(*, debug: bool) -> Iterator[None]:
    logger, handler = logging.getLogger("tclkit"), _StderrHandler()
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if debug else logging.WARNING)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
