"""`mirrorscope run` for `ray job submit`: `python -m jobs.attribute SPEC [--set path=value ...]`."""

from __future__ import annotations

import sys

import typer

from .cli import guarded, run

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command(help=run.__doc__)(run)

if __name__ == "__main__":
    sys.exit(guarded(app))
