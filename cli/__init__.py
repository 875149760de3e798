"""The `tclkit` command: a typer app, one file a command, thin over the libraries."""

from .main import app, run

__all__ = ["app", "run"]
