"""The command `mirrorscope`. Heavy imports stay inside the commands: `--help` answers at once."""

from __future__ import annotations

import os
import sys
import traceback
from enum import StrEnum
from typing import Annotated, NoReturn

import typer

app = typer.Typer(
    name="mirrorscope",
    help="Which training examples made this model do that? Forward-only training data attribution on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ENDED_AT_ONCE = (8, 130, 143)
"""Exit codes after which nothing is waited for: Ray is gone, or there is no time."""
SpecArgument = Annotated[
    str, typer.Argument(metavar="SPEC", help="YAML file; jobs/specs/ has a commented one per use.")
]
RunArgument = Annotated[str, typer.Argument(metavar="RUN_URI", help="Folder of a run: the spec's run.uri.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Override a field, as in producer.lr=0.01. Repeatable."),
]


class Transform(StrEnum):
    """What is sorted by."""

    signed = "signed"
    absolute = "absolute"
    relative = "relative"
    counterpart_loss = "counterpart_loss"


@app.command()
def run(spec: SpecArgument, set_: SetOption = None) -> None:
    """Tune, score, rank and report. The same command again does only what is missing."""
    from pipeline.run import attribute
    from pipeline.specfile import load_spec

    from . import display

    display.show_run(attribute(load_spec(spec, set_ or ())))


@app.command()
def plan(
    spec: SpecArgument,
    set_: SetOption = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Also predict seconds and cost: loads the model on this machine, tunes up to three queries, scores some "
            "batches, and leaves the figures in the run's folder (forecast.json), for `status` to compare with.",
        ),
    ] = False,
) -> None:
    """Say what `run` would do: shards, queries, sizes, objects, resources, forward passes. Touches nothing."""
    from pipeline.freeze import survey
    from pipeline.specfile import load_spec

    from . import display

    run, planned = survey(load_spec(spec, set_ or ()))
    predicted = None
    if calibrate:
        from pipeline.forecast import keep
        from pipeline.rehearsal import rehearse

        predicted = rehearse(run, planned)
        keep(run, predicted)
    display.show_plan(run, planned, predicted)


@app.command()
def status(run_uri: RunArgument) -> None:
    """Say how far a run is: stages, shards, rows, rejects, examples per second; what is left, or was predicted."""
    from pipeline.frozen import open_run

    from . import display

    display.show_status(open_run(run_uri))


@app.command()
def rank(
    run_uri: RunArgument,
    k: Annotated[int | None, typer.Option("--k", min=1, help="Proponents, and opponents, per query.")] = None,
    transform: Annotated[
        Transform | None, typer.Option(help="signed, absolute, relative to the base loss, or counterpart_loss.")
    ] = None,
    eps: Annotated[float | None, typer.Option(min=1e-12, help="Added to the base loss by `relative`, in nats.")] = None,
    fraction: Annotated[
        float | None, typer.Option(min=1e-9, max=1, help="Also write topk/selected/: this top share of every source.")
    ] = None,
) -> None:
    """Rank again with another k or transform, without scoring again."""
    from pipeline.run import rerank

    from . import display

    given = {"k": k, "transform": transform.value if transform else None, "eps": eps, "fraction": fraction}
    display.show_run(rerank(run_uri, [f"rank.{name}={value}" for name, value in given.items() if value is not None]))


@app.command()
def extend(
    run_uri: RunArgument,
    queries: Annotated[str | None, typer.Option(help="File, folder or glob of query rows with new ids.")] = None,
    corpus: Annotated[
        str | None, typer.Option(help="Folder or glob of corpus files; those that the run has are passed over.")
    ] = None,
) -> None:
    """Add queries or newly arrived corpus files to a finished run; scores only what is new and ranks again."""
    from pipeline.errors import SpecError
    from pipeline.run import grow
    from pipeline.sections import without_password

    from . import display

    if queries is None and corpus is None:
        raise SpecError("extend: nothing to add", "give --queries URI, --corpus URI or both")
    try:
        queries, corpus = (uri and without_password(uri) for uri in (queries, corpus))
    except ValueError as error:
        raise SpecError(f"extend: {error}") from error
    display.show_run(grow(run_uri, queries, corpus))


@app.command()
def verify(
    run_uri: RunArgument,
    sizes: Annotated[bool, typer.Option("--sizes", help="Compare sizes only, without reading the data.")] = False,
    mend: Annotated[
        bool,
        typer.Option(
            "--mend",
            help="Delete the commits of what is damaged; the run's command makes it anew. Deletes nothing, and says so, "
            "where something is damaged that no command makes anew.",
        ),
    ] = False,
) -> None:
    """Check from the objects alone that a run (an ensemble's members too) is what its commits say: counts, digests, orphans."""
    from pipeline.audit import audit, require_mendable, void
    from pipeline.ensemble import members_of
    from pipeline.errors import ArtifactError
    from pipeline.frozen import open_run, set_aside

    from . import display

    try:
        opened = open_run(run_uri)
    except ArtifactError:
        if not mend or not (moved := set_aside(run_uri)):
            raise
        for uri in moved:
            display.show_place("put away", f"{uri}: give the run's command again, `mirrorscope run SPEC`")
        return
    audits = [(each, audit(each, read_at_most=-1 if sizes else float("inf"))) for each in (opened, *members_of(opened))]
    for each, found in audits:
        display.show_audit(each, found, opened)
    damaged = sum(len(found.damage) for _, found in audits)
    if damaged and not mend:
        again = "`mirrorscope verify --mend`, then the run's command again"
        raise ArtifactError(f"{opened.uri()}: {damaged} things are damaged or missing", again)
    for do in (require_mendable, void):
        for each, found in audits:
            do(each, found.damage)


@app.command()
def gc(
    run_uri: RunArgument,
    older_than: Annotated[
        float,
        typer.Option(
            min=0,
            metavar="HOURS",
            help="Only what is older, as in 24 or 0.5: younger objects may be in the making.",
        ),
    ] = 24.0,
    dry: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
) -> None:
    """Delete what no commit names: leavings of attempts that were killed, of shards that were scored anew."""
    from pipeline.audit import collect
    from pipeline.ensemble import members_of
    from pipeline.frozen import open_run

    from . import display

    opened = open_run(run_uri)
    for each in (opened, *members_of(opened)):
        display.show_collected(each, collect(each, older_than * 3600, dry), dry)


@app.command()
def publish(
    run_uri: RunArgument,
    catalog: Annotated[
        str,
        typer.Option(
            help="Name of a catalog that pyiceberg is configured with, or its URI: sqlite:///lake.db, https://..."
        ),
    ],
    namespace: Annotated[str, typer.Option(help="Of the tables; the run folder's name if not given.")] = "",
    warehouse: Annotated[
        str | None,
        typer.Option(help="Of the catalog, if it has none configured. SQL catalogs: RUN_URI/lake if not given."),
    ] = None,
) -> None:
    """Register scores and ranking as Apache Iceberg tables `scores` and `topk`; again: adds only what is new."""
    from pipeline import catalog as catalogs
    from pipeline.audit import require_whole
    from pipeline.frozen import open_run
    from pipeline.publish import file_uri, publish

    from . import display

    opened = open_run(run_uri)
    require_whole(opened)
    with catalogs.opened(catalog, warehouse, file_uri(opened.uri("lake"))) as lake:
        display.show_published(publish(opened, lake, namespace))


@app.command()
def show(
    run_uri: RunArgument,
    query: Annotated[str | None, typer.Option("--query", help="Only this query_id.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Rows per query and side.")] = 3,
    tokens: Annotated[
        bool,
        typer.Option(
            "--tokens", help="Texts: also write a page of them with each token shaded by its change. Loads the model."
        ),
    ] = False,
) -> None:
    """Show a ranked run: the table, and where its picture and Parquet are."""
    from pipeline.errors import SpecError
    from pipeline.frozen import open_run

    from . import display

    opened = open_run(run_uri)
    if tokens and query is None:
        raise SpecError("show --tokens: of which query?", "give --query QUERY_ID")
    display.show_run(opened, query, top)
    if tokens and query is not None:
        from pipeline.shading import shade

        display.show_place("tokens", shade(opened, query, top))


@app.command()
def evaluate(spec: SpecArgument, set_: SetOption = None) -> None:
    """Judge finished runs, and scores of other tools: by training anew, by single steps, by known truths and wrong labels."""
    from pipeline import storage
    from pipeline.specfile import load_judge
    from pipeline.verdict import judged

    from . import display

    judge = load_judge(spec, set_ or ())
    display.show_judgements(judged(judge), storage.absolute(judge.judge.uri))


@app.command()
def fields(
    section: Annotated[
        str | None,
        typer.Argument(help="A section of the spec, as in `producer`; or of the judge's, as in `evaluate.lds`."),
    ] = None,
) -> None:
    """Explain the spec: every field with its type, default, meaning and unit."""
    from . import display

    display.show_fields(section)


def guarded(action: typer.Typer) -> int:
    """Run a command line; the exit code says what kind of error it was (pipeline/errors.py), 130 and 143 that it was stopped."""
    sys.path.insert(0, os.getcwd())  # your own tasks, producers and factories are named relative to where you stand
    from pipeline.errors import PipelineError
    from pipeline.observe import for_terminal

    from .stopping import Stopping, stopped_text

    with Stopping() as stopping:
        try:
            action(standalone_mode=True)
        except BaseException as error:  # of a signal native and foreign code make all kinds
            if stopping.number is not None:
                sys.stderr.write(stopped_text())
                return 128 + stopping.number
            if isinstance(error, PipelineError):
                sys.stderr.write(for_terminal(f"error: {error}") + "\n")
                return error.exit_code
            if not isinstance(error, Exception):
                raise
            # the last line of defence: a bug of ours, shown whole
            sys.stderr.write(for_terminal(traceback.format_exc()) + "\n")
            sys.stderr.write("this is a bug in mirrorscope, not in your spec; the lines above say where\n")
            return 1
    return 0


def main(action: typer.Typer = app) -> NoReturn:
    """Entry point of the command, and of the jobs with a command line of their own: ends the process."""
    from .stopping import Stopped, end_process, stopped_text

    try:
        code = guarded(action)
    except Stopped as stopped:  # as the command was about to begin, or had just ended
        sys.stderr.write(stopped_text())
        code = int(stopped.code or 0)
    if code in ENDED_AT_ONCE:
        end_process(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
