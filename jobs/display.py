"""What the command prints: tables on standard output."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline import checkpoints, forecast, kept_curvatures, noise, phases, storage, topk
from pipeline.artifacts import Run
from pipeline.checks import Audit
from pipeline.choices import HfTransformers, LanguageTask, TorchModule
from pipeline.ensemble import FOLDER, member_name, members_of, number_of_members
from pipeline.errors import InputError, SpecError
from pipeline.observe import for_terminal, printable
from pipeline.plan import Plan
from pipeline.producer_choices import Natural
from pipeline.publish import Published
from pipeline.report import number_columns, of, plain_payload
from pipeline.spec import Spec
from pipeline.tuning_cost import tuning_passes

if TYPE_CHECKING:
    from pipeline.case import Judgement

SHOWN = 3
ORPHANS_SHOWN = 20
MIB = 1 << 20


class _PlainConsole(Console):
    """Prints texts as they are: no markup, no emoji codes, and no control character or credential of theirs."""

    def render_str(self, text: str, **options: Any) -> Text:  # every text passes here
        return super().render_str(for_terminal(text), **{**options, "markup": False, "emoji": False})


def console() -> Console:
    """Standard output; wide enough for the tables where it is not a terminal."""
    found = _PlainConsole(highlight=False)
    return found if found.is_terminal else _PlainConsole(highlight=False, width=140)


def show_run(run: Run, query: str | None = None, top: int = SHOWN) -> None:
    """The ranked table of a run, and where everything is.

    Raises:
        ArtifactError: The run is not ranked yet.
        InputError: It has no such query.
    """
    ranked, meta = run.read_ranked()
    if query is not None and query not in run.query_ids:
        raise InputError(f"{run.uri()} has no query {query!r}; it has {', '.join(run.query_ids[:20])}")
    plain = plain_payload(ranked)
    table = Table(title=f"{meta['examples']:,} examples, {topk.described(meta['transform'])}", title_justify="left")
    numbers = number_columns(ranked.schema.names)
    for name in ("query", "side", "rank", "example_id", *plain, *numbers):
        table.add_column(name, justify="left" if name in ("query", "side", "example_id", *plain) else "right")
    for query_id in (query,) if query is not None else run.query_ids:
        for side in ("proponent", "opponent"):
            for row in of(ranked, query_id, side)[:top]:
                table.add_row(*_cells(row, plain, numbers))
        table.add_section()
    out = console()
    out.print(table)
    for line in noise.lines(run, meta, query):
        out.print(line, soft_wrap=True)
    _places(run, out)


def show_place(what: str, uri: str) -> None:
    """Where something is."""
    console().print(f"{what:<15}{uri}", soft_wrap=True)


def _cells(row: dict[str, Any], plain: list[str], numbers: list[str]) -> list[str]:
    return [
        printable(row["query_id"]),
        row["side"],
        str(row["rank"]),
        printable(row["example_id"]),
        *(printable(str(row[name])) for name in plain),
        *(f"{row[name]:.4g}" for name in numbers),
    ]


def _places(run: Run, out: Console) -> None:
    out.print(f"ranked table   {run.uri('topk', 'ranked.parquet')}", soft_wrap=True)
    out.print(f"scores         {run.uri('scores')}", soft_wrap=True)
    if storage.exists(run.uri("report", "contact_sheet.png")):
        out.print(f"picture        {run.uri('report', 'contact_sheet.png')}", soft_wrap=True)
    out.print(f"page           {run.uri('report', 'index.html')}", soft_wrap=True)
    if members_of(run):
        out.print(
            f"members        {run.uri(FOLDER)}: {len(members_of(run))} runs, each with all of this", soft_wrap=True
        )
    out.print("query them     " + duckdb_line(run), soft_wrap=True)


def duckdb_line(run: Run) -> str:
    """A shell line that queries the scores with DuckDB."""
    sql = (
        f"FROM '{run.uri('scores')}/*/*.parquet' SELECT query_id, max(score), min(score), count(*) GROUP BY query_id "
        "ORDER BY query_id"
    )
    scheme = run.uri().split("://")[0] if "://" in run.uri() else ""
    opened = f"duckdb.register_filesystem(__import__('fsspec').filesystem('{scheme}')); " if scheme else ""
    return f'{sys.executable} -c "import duckdb; {opened}print(duckdb.sql(\\"{sql}\\"))"'


def show_plan(run: Run, plan: Plan, predicted: forecast.Forecast | None = None) -> None:
    """What a run would do, and how long that takes if it was measured."""
    spec, tune, score = run.spec, run.spec.resources.tune, run.spec.resources.score
    done = len(run.committed()) if storage.exists(run.uri("run.yaml")) else 0
    cpus = "as many CPUs as a machine has" if tune.cpus is None else f"{tune.cpus:g} CPU"
    actors = f"{score.actors} actors" if score.actors else "as many actors as fit"
    each, times = (", of each member", f"{plan.members} members x ") if plan.members > 1 else ("", "")
    table = Table(show_header=False, box=None)
    rows = {
        "run": run.uri() + (f" (begun: {done} shards of {plan.shards} are scored)" if done else ""),
        "corpus": f"{plan.rows:,} training examples in {plan.files:,} files",
        "shards": f"{plan.shards:,} of up to {spec.score.shard_rows:,} rows",
        "queries": f"{plan.queries:,} of {plan.query_rows:,} rows together",
        "producer": f"{spec.producer.implementation}: {plan.queries:,} counterparts to tune{each}",
        "forward passes": f"{plan.forward_passes:,} = {times}{plan.rows:,} examples x (1 base + {plan.queries} counterparts)"
        + (f" - {plan.kept:,} base losses that are kept" if plan.kept else ""),
        **({"tuning": passes} if (passes := _tuning_planned(spec, plan)) else {}),
        **({"base losses": f"kept in {spec.score.base_losses}"} if spec.score.base_losses else {}),
        **({"curvature": kept} if (kept := _curvature_kept(run)) else {}),
        **({"members": _members_planned(plan)} if plan.members > 1 else {}),
        **({"checkpoints": found} if (found := _checkpoints_found(run)) else {}),
        "objects": f"{plan.objects:,} written in all",
        "scores": f"about {plan.score_bytes / MIB:,.1f} MiB of Parquet",
        "ray": spec.resources.address or "RAY_ADDRESS, else embedded on this machine",
        "tune": f"{min(tune.workers, plan.queries)} workers x {cpus}, {tune.gpus:g} GPU",
        "score": f"{actors} x {score.cpus:g} CPU, {score.gpus:g} GPU",
        "rank": f"{spec.rank.k} per side and query, {topk.described(spec.rank.transform)}",
        **(forecast.lines(predicted) if predicted else {}),
        "fingerprint": run.resolved.fingerprint,
        **({"hint": hint} if (hint := _hint(run)) else {}),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console().print(table)


def _tuning_planned(spec: Spec, plan: Plan) -> str:
    """What tuning costs; empty where the producer does not say."""
    passes = tuning_passes(spec, plan.rows, plan.queries, plan.query_rows)
    return f"about {plan.members * passes:,} forward passes, one backward counted as two" if passes else ""


def _curvature_kept(run: Run) -> str:
    """Where what is fitted is kept, and whether it is there; empty where the spec names no folder."""
    place = kept_curvatures.place_of(run)
    if place is None or run.spec.ensemble:
        return f"kept in {place.rsplit('/', 1)[0]}" if place else ""
    return f"fitted before, in {place}" if storage.exists(place) else f"to be fitted, and kept in {place}"


def _checkpoints_found(run: Run) -> str:
    """What globs in `ensemble` found."""
    found = run.resolved.found.items()
    return "; ".join(f"{len(uris)} by {glob}: {checkpoints.names_of(uris)}" for glob, uris in found)


def _hint(run: Run) -> str:
    """That checkpoints lie beside a language model's weights, where they are no members; empty if there is nothing to say."""
    spec = run.spec
    if spec.ensemble or not isinstance(spec.task, LanguageTask) or not isinstance(spec.producer, Natural):
        return ""  # measured of `natural` alone; of classifiers checkpoints gained nothing
    if not isinstance(spec.model, HfTransformers | TorchModule) or spec.model.weights_uri is None:
        return ""
    beside = None if getattr(spec.model, "adapter_uri", None) else checkpoints.beside(spec.model.weights_uri)
    if beside is None:
        return ""
    glob, number = beside
    return (
        f"{number} checkpoint{'s' * (number > 1)} beside the weights: `ensemble: [{glob}]` scores by the mean over "
        f"{'them' if number > 1 else 'it'} and the model, at {number + 1} times the work (LDS +.11 and +.12 with three, "
        "after 25, 50 and 75 % of the training, on two small language models)"
    )


def _members_planned(plan: Plan) -> str:
    return (
        f"{plan.members}, each a run of its own that tunes and scores: {plan.members} times the work; then their mean"
    )


def show_status(run: Run) -> None:
    """How far a run is. Raises ArtifactError for commits of another run."""
    queries, predicted, spans = len(run.committed_queries()), forecast.kept(run), []
    commits = scored = rejected = passed = quarantined = kept = 0
    for receipt in run.receipts():
        commits, passed = commits + 1, passed + receipt.rows
        rejected, quarantined = rejected + receipt.rejects, quarantined + (receipt.quarantined is not None)
        scored, kept = scored + (receipt.rows if run.is_first(receipt) else 0), kept + receipt.base_kept
        spans.append(forecast.span_of(receipt))
    ranking = run.ranking() if storage.exists(run.uri("topk", "meta.json")) else None
    sealed = run.is_sealed()
    table = Table(title=run.uri(), title_justify="left")
    for name in ("stage", "state", "figures"):
        table.add_column(name)
    table.add_row("freeze", "done", f"{run.rows:,} rows in {len(run.shards):,} shards, {len(run.query_ids):,} queries")
    for place in range(number_of_members(run)):
        table.add_row(*_member_status(run, place))
    made = f"{queries:,} of {len(run.query_ids):,} counterparts"
    phase = phases.of_run(run.uri()) if queries < len(run.query_ids) else None
    figures = _lines(made, f"at work: {phase.line()}" if phase else "", forecast.tuning(run, predicted))
    table.add_row("tune", _state(queries, len(run.query_ids)), figures)
    figures = f"{commits:,} of {run.number_of_works:,} shards, {scored:,} rows scored, {rejected:,} rejected"
    if quarantined:
        figures += f", {quarantined:,} shards quarantined"
    if kept:
        figures += f", {kept:,} rows with base losses that were kept"
    if commits:
        figures += f", {passed / max(forecast.busy_s(spans), 1e-9):,.0f} examples/s while shards were worked on"
    figures = _lines(figures, forecast.scoring(run, predicted, spans))
    table.add_row("score", _state(commits, run.number_of_works), figures)
    table.add_row("rank", "done" if ranking else "not yet", "sealed: every row is scored or rejected" if sealed else "")
    console().print(table)
    for line in noise.lines(run, ranking or {})[:1]:
        console().print(line, soft_wrap=True)


def _member_status(run: Run, place: int) -> tuple[str, str, str]:
    if place >= len(members_of(run)):
        return member_name(place), "not yet", ""
    member = members_of(run)[place]
    queries, shards, sealed = len(member.committed_queries()), len(member.committed()), member.is_sealed()
    state = "done" if sealed else _state(shards, member.number_of_works)
    figures = f"{queries:,} of {len(member.query_ids):,} counterparts, {shards:,} of {member.number_of_works:,} shards"
    return member_name(place), state, figures + (", sealed" if sealed else "")


def show_audit(run: Run, found: Audit, inside: Run) -> None:
    """What a verification found of a run, or of a member of the ensemble that it is inside of."""
    out, place = console(), run.uri().removeprefix(inside.uri()).lstrip("/")
    place = f"{place}/" if place else ""
    read = (
        f"{found.read_bytes / MIB:,.1f} MiB read and compared" if found.read_bytes else "sizes compared, nothing read"
    )
    table = Table(title=run.uri(), title_justify="left", show_header=False)
    rows = {
        "shards": f"{found.commits:,} of {found.works:,} committed"
        + (f", {len(found.quarantined):,} of them quarantined" if found.quarantined else ""),
        "rows": f"{found.rows:,} scored, {found.rejects:,} rejected, of {run.rows_to_score:,}",
        "counterparts": f"{found.counterparts:,} of {len(run.query_ids):,} committed",
        "objects": f"{found.objects:,} named by commits; {read}",
        "sealed": "yes" if found.sealed else "no: run it to its end",
        "orphans": f"{len(found.orphans):,} objects that nothing names" if found.orphans else "none",
        "damage": f"{len(found.damage):,}" if found.damage else "none",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    out.print(table)
    for finding in found.damage:
        out.print(f"damaged   {place}{finding.path}: {finding.what}; {finding.repair}", soft_wrap=True)
    for path in sorted(found.orphans)[:ORPHANS_SHOWN]:
        out.print(f"orphan    {place}{path}", soft_wrap=True)
    if found.orphans:
        out.print("`mirrorscope gc` deletes orphans", soft_wrap=True)


def show_collected(run: Run, old: dict[str, storage.Stored], dry: bool) -> None:
    """What was, or would be, deleted."""
    out, size = console(), sum(each.size_bytes for each in old.values())
    for path in sorted(old)[:ORPHANS_SHOWN]:
        out.print(path, soft_wrap=True)
    done = "would be deleted" if dry else "deleted"
    out.print(f"{len(old):,} objects of {size / MIB:,.1f} MiB {done} from {run.uri()}", soft_wrap=True)


def show_published(tables: Sequence[Published]) -> None:
    """What stands in a catalog."""
    table = Table()
    for name in ("table", "rows", "files", "this time"):
        table.add_column(name)
    for each in tables:
        done = f"{each.added:,} files added" + (f", {each.removed:,} taken out" if each.removed else "")
        done = done if each.added or each.removed else "unchanged"
        table.add_row(each.table, f"{each.rows:,}", f"{each.files:,}", done)
    console().print(table)


def _lines(*texts: str) -> str:
    return "\n".join(text for text in texts if text)


def _state(done: int, total: int) -> str:
    if done == total:
        return "done"
    return f"{done / total:.0%}" if done else "not yet"


def show_judgements(found: Sequence[Judgement], uri: str) -> None:
    """A table per judgement, and where the files are."""
    out = console()
    for judgement in found:
        table = Table(title=judgement.title, title_justify="left")
        for name in judgement.rows[0]:
            table.add_column(name, justify="left" if name in ("method", "transform") else "right")
        for row in judgement.rows:
            table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
        out.print(table)
    show_place("report", f"{uri}/report")


def show_fields(section: str | None) -> None:
    """Every field of the spec. Raises SpecError for a section that there is not."""
    from pipeline.judge import Judge
    from pipeline.sections import unknown_word
    from pipeline.specfile import sections_of

    judging = {
        ("evaluate" if path == "spec" else f"evaluate.{path}"): kind for path, kind in sections_of(Judge).items()
    }
    sections = sections_of() | {path: kind for path, kind in judging.items() if "resources" not in path}
    known = {path.split(" ")[0] for path in sections}
    if section is not None and section not in known:
        raise SpecError(f"section {unknown_word(section, known)}")
    out = console()
    for path, kind in sections.items():
        if section is not None and path.split(" ")[0] != section:
            continue
        table = Table(title=path, title_justify="left", show_lines=False)
        for name in ("field", "default", "meaning"):
            table.add_column(name)
        for name, field in kind.model_fields.items():
            default = "required" if field.is_required() else repr(field.get_default(call_default_factory=True))
            if len(default) < 60:
                table.add_row(name, default, " ".join((field.description or "").split()))
        out.print(table)
