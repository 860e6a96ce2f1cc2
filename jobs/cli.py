"""The command `mirrorscope`. Heavy imports stay inside the commands: `--help` answers at once."""

from __future__ import annotations

import os
import sys
import traceback
from enum import StrEnum
from typing import Annotated

import typer

app = typer.Typer(
    name="mirrorscope",
    help="Which training examples made this model do that? Forward-only training data attribution on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

SpecArgument = Annotated[
    str, typer.Argument(metavar="SPEC", help="YAML file; jobs/specs/ has a commented one per use.")
]
RunArgument = Annotated[str, typer.Argument(metavar="RUN_URI", help="Folder of a run: the spec's run.uri.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Override a field, as in producer.lr=0.01. Repeatable."),
]


class Transform(StrEnum):
    """What the score is turned into before sorting."""

    signed = "signed"
    absolute = "absolute"
    relative = "relative"


@app.command()
def run(spec: SpecArgument, set_: SetOption = None) -> None:
    """Tune, score, rank and report. The same command again does only what is missing."""
    from pipeline.run import attribute
    from pipeline.specfile import load_spec

    from . import display

    display.show_run(attribute(load_spec(spec, set_ or ())))


@app.command()
def plan(spec: SpecArgument, set_: SetOption = None) -> None:
    """Say what `run` would do: shards, queries, sizes, objects, resources, forward passes. Touches nothing."""
    from pipeline.freeze import survey
    from pipeline.specfile import load_spec

    from . import display

    display.show_plan(*survey(load_spec(spec, set_ or ())))


@app.command()
def status(run_uri: RunArgument) -> None:
    """Say how far a run is: stages, shards, rows, rejects, examples per second."""
    from pipeline.artifacts import open_run

    from . import display

    display.show_status(open_run(run_uri))


@app.command()
def rank(
    run_uri: RunArgument,
    k: Annotated[int | None, typer.Option("--k", min=1, help="Proponents, and opponents, per query.")] = None,
    transform: Annotated[Transform | None, typer.Option(help="signed, absolute, or relative to the base loss.")] = None,
    eps: Annotated[float | None, typer.Option(min=1e-12, help="Added to the base loss by `relative`, in nats.")] = None,
) -> None:
    """Rank again with another k or transform, without scoring again."""
    from pipeline.run import rerank

    from . import display

    given = {"k": k, "transform": transform.value if transform else None, "eps": eps}
    display.show_run(rerank(run_uri, [f"rank.{name}={value}" for name, value in given.items() if value is not None]))


@app.command()
def show(
    run_uri: RunArgument,
    query: Annotated[str | None, typer.Option("--query", help="Only this query_id.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Rows per query and side.")] = 3,
) -> None:
    """Show a ranked run: the table, and where its picture and Parquet are."""
    from pipeline.artifacts import open_run

    from . import display

    display.show_run(open_run(run_uri), query, top)


@app.command()
def fields(
    section: Annotated[str | None, typer.Argument(help="A section of the spec, as in `producer`.")] = None,
) -> None:
    """Explain the spec: every field with its type, default, meaning and unit."""
    from . import display

    display.show_fields(section)


def guarded(action: typer.Typer) -> int:
    """Run a command line; the exit code says what kind of error it was (pipeline/errors.py)."""
    sys.path.insert(0, os.getcwd())  # your own tasks, producers and factories are named relative to where you stand
    from pipeline.errors import PipelineError

    try:
        action(standalone_mode=True)
    except PipelineError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("stopped; what is committed stays, and the same command goes on from there\n")
        return 130
    except Exception:  # noqa: BLE001  the last line of defence: a bug of ours, shown whole
        traceback.print_exc()
        sys.stderr.write("this is a bug in mirrorscope, not in your spec; the lines above say where\n")
        return 1
    return 0


def main() -> None:
    """Entry point of the command."""
    sys.exit(guarded(app))


if __name__ == "__main__":
    main()
