"""One stage, for orchestrators: `python -m jobs.stage tune|score|rank SPEC [--set path=value ...]`.

Each stage reads what the one before committed, and skips what it has committed itself.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from . import cli
from .cli import SetOption, SpecArgument

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class StageName(StrEnum):
    """A stage that can run by itself."""

    tune = "tune"
    score = "score"
    rank = "rank"


@app.command()
def main(
    stage: Annotated[StageName, typer.Argument(metavar="STAGE", help="tune, score or rank.")],
    spec: SpecArgument,
    set_: SetOption = None,
) -> None:
    """Run one stage of a spec."""
    from pipeline.run import run_stage
    from pipeline.specfile import load_spec

    run_stage(load_spec(spec, set_ or ()), stage.value)


if __name__ == "__main__":
    cli.main(app)
