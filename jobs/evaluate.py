"""`mirrorscope evaluate` for `ray job submit`: `python -m jobs.evaluate SPEC [--set path=value ...]`."""

from __future__ import annotations

import typer

from .cli import evaluate, main

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command(help=evaluate.__doc__)(evaluate)

if __name__ == "__main__":
    main(app)
