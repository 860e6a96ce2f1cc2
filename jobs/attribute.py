"""`mirrorscope run` for `ray job submit`: `python -m jobs.attribute SPEC [--set path=value ...]`."""

from __future__ import annotations

import typer

from .cli import main, run

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command(help=run.__doc__)(run)

if __name__ == "__main__":
    main(app)
