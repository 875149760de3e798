"""What goes to stdout, what to stderr, and how errors end a command."""

import errno
import json
import logging

import pytest
import typer
from typer.testing import CliRunner, Result

from tclkit.cli import _console
from tclkit.cli.main import _Group
from tclkit.runtime.errors import BundleError, InputError, TclkitError


def outcome(raised: BaseException | None = None, *arguments: str, log: str = "") -> Result:
    """Run a command that logs and raises."""
    app = typer.Typer(cls=_Group, pretty_exceptions_enable=False)

    @app.command()
    def work(debug: _console.DebugOption = False) -> None:
        logging.getLogger("tclkit.runtime.test").warning(log) if log else None
        logging.getLogger("tclkit.runtime.test").info("detail")
        if raised is not None:
            raise raised

    @app.command()
    def other() -> None:
        pass

    return CliRunner().invoke(app, ["work", *arguments])


@pytest.mark.parametrize(
    ("raised", "exit_code", "stderr"),
    [
        (InputError("too\n  long"), 1, "error: too long\n"),
        (BundleError("damaged"), 1, "error: damaged\n"),
        (OSError(errno.ENOSPC, "No space left on device", "out.png"), 1, "error: out.png: No space left on device\n"),
        (PermissionError(errno.EACCES, "Permission denied"), 1, "error: Permission denied\n"),
        (OSError("odd"), 1, "error: odd\n"),
        (MemoryError(), 1, "error: out of memory\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (None, 0, ""),
    ],
    ids=str,
)
def test_errors_become_one_line_and_an_exit_code(raised: BaseException | None, exit_code: int, stderr: str) -> None:
    result = outcome(raised)
    assert (result.exit_code, result.stderr, result.stdout) == (exit_code, stderr, "")


def test_debug_shows_the_traceback_and_all_log_lines() -> None:
    result = outcome(InputError("wrong"), "--debug")
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.endswith("error: wrong\n")
    assert "detail\n" in result.stderr


def test_a_bug_keeps_its_traceback() -> None:
    assert isinstance(outcome(RuntimeError("bug")).exception, RuntimeError)


def test_warnings_of_the_libraries_are_shown() -> None:
    result = outcome(log="the cache cannot be written")
    assert result.stderr == "warning: the cache cannot be written\n"
    assert logging.getLogger("tclkit").handlers == []


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (9_940_000, "9.9 MB"),
        (5_600_000_000, "5.6 GB"),
        (10**13, "10000.0 GB"),
    ],
)
def test_sizes_read_well(size_bytes: int, text: str) -> None:
    assert _console.size_text(size_bytes) == text


def test_what_users_write_is_not_markup(capsys: pytest.CaptureFixture[str]) -> None:
    rows = _console.table("prompt")
    rows.add_row(_console.plain("[bold]x[/bold] :cat:"))
    _console.printer().print(rows)
    assert "[bold]x[/bold] :cat:" in capsys.readouterr().out


def test_json_is_plain_ascii(capsys: pytest.CaptureFixture[str]) -> None:
    _console.print_json({"prompt": "łódź 🐶"})
    printed = capsys.readouterr().out
    assert printed.isascii()
    assert json.loads(printed) == {"prompt": "łódź 🐶"}


def test_a_missing_extra_is_named_with_its_remedy() -> None:
    with pytest.raises(TclkitError, match=r'needs no_such_package, .*: pip install "\.\[export\]"'):
        _console.require_extra("export", "json", "no_such_package")
    _console.require_extra("export", "json")
