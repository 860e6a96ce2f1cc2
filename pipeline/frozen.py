"""What is frozen of a run: run.yaml with the tables it vouches for, and the same of every addition."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from itertools import takewhile
from typing import Any

import pyarrow as pa
import yaml

from . import storage
from .artifacts import CHOICE, Run
from .ensemble import FOLDER, ensemble_of, member_name, members_of, number_of_members
from .errors import ArtifactError, InputError, SpecError
from .folder import SPEC_COMMENT, digest_line_problem, json_bytes, parallel, parquet_bytes, with_digest_line
from .observe import say
from .plan import fingerprint
from .records import MANIFEST, Column
from .spec import Spec
from .specfile import dump_spec, parse_spec
from .values import concat_rows
from .works import Addition, Manifest

MANIFEST_NAME, QUERIES_NAME = "manifest.parquet", "queries.parquet"
ADDITION_NAME = "addition.json"
REEXTEND = "put it back from a copy, or extend the run by the same queries and files again: it is written again"
REFREEZE = (
    "put it back from a copy; or `mirrorscope verify --mend`, then `mirrorscope run SPEC` with its spec, write it again"
)
"""What to do about a frozen object that is damaged, for hints: one of an addition, and of the run as it began."""
_COLUMNS_KEY = b"task_columns"


def is_run(run_uri: str) -> bool:
    """Whether a run was frozen there (run.yaml is written last)."""
    return storage.exists(f"{run_uri}/run.yaml")


def is_begun(run_uri: str) -> bool:
    """Whether a run there, or a member of it, has committed anything."""
    members = [f"{run_uri}/{FOLDER}/{name}" for name in storage.names(f"{run_uri}/{FOLDER}")]
    folders = [f"{uri}/{kind}" for uri in (run_uri, *members) for kind in ("counterparts", "commits")]
    return is_run(run_uri) and any(storage.objects(folder) for folder in folders)


def set_aside(run_uri: str) -> list[str]:
    """Put away run.yaml where it or a table that it names is damaged, so that the run's command freezes the run again.

    Of an ensemble that of each member, too.

    Returns:
        Where they are now; empty if nothing that was frozen is damaged, but perhaps an addition.
    """
    run_uri = storage.absolute(run_uri)
    moved = []
    for uri in (run_uri, *(f"{run_uri}/{FOLDER}/{name}" for name in storage.names(f"{run_uri}/{FOLDER}"))):
        if is_run(uri):
            try:
                open_alone(uri, before_damage=True)
            except ArtifactError:
                moved.append(f"{uri}/run.yaml.damaged")
                storage.write_bytes(moved[-1], storage.read_bytes(f"{uri}/run.yaml"))
                storage.remove(f"{uri}/run.yaml")
    return moved


def create_run(run: Run) -> Run | None:
    """Write what is frozen of a run: manifest, queries, and run.yaml last. The run, or None if somebody else was faster.

    Raises:
        StorageError: The store refused.
    """
    commits = "create" if storage.creates(run.uri()) else "put"
    if "://" in run.uri():
        kind = (
            "conditional PUTs: a first commit stands"
            if commits == "create"
            else "no conditional PUTs: a last commit stands"
        )
        say(f"{run.uri()}: the store has {kind}")
    described = {_COLUMNS_KEY: json.dumps([asdict(column) for column in run.columns]).encode()}
    tables = {
        MANIFEST_NAME: run.write_table(run.shards.table.replace_schema_metadata(described), MANIFEST_NAME)["sha256"],
        QUERIES_NAME: run.write_table(run.queries, QUERIES_NAME)["sha256"],
    }
    resolved = run.resolved.model_copy(update={"tables": tables, "commits": commits})
    run = replace(run, spec=run.spec.model_copy(update={"resolved": resolved}))
    if commits == "create" and not is_run(run.uri()):
        return run if storage.create_bytes(run.uri("run.yaml"), _spec_bytes(run)) else None
    save_spec(run)
    return run


def save_spec(run: Run) -> None:
    """Write run.yaml: the resolved spec, itself a valid spec, with its digest in a comment at the end."""
    run.write(_spec_bytes(run), "run.yaml")


def with_choices(run: Run) -> Run:
    """The run with what stage tune chose in its run.yaml, so that this does the same on any machine."""
    members = {member_name(place): member for place, member in enumerate(members_of(run))}
    measured = {name: each.measured(CHOICE) for name, each in (members or {"": run}).items()}
    chosen = run.resolved.chosen | {name: found["fields"] for name, found in measured.items() if found}
    if chosen == run.resolved.chosen:
        return run
    run = replace(
        run, spec=run.spec.model_copy(update={"resolved": run.resolved.model_copy(update={"chosen": chosen})})
    )
    save_spec(run)
    return run


def _spec_bytes(run: Run) -> bytes:
    return with_digest_line(dump_spec(run.spec), SPEC_COMMENT)


def _read_spec(run_uri: str) -> Spec:
    """The spec that a run was frozen with. Raises ArtifactError: run.yaml is damaged, or was edited."""
    try:
        spec = parse_spec(yaml.safe_load(read_spec_bytes(run_uri)), origin=f"{run_uri}/run.yaml")
    except (yaml.YAMLError, SpecError) as error:  # every bit is as it was written
        raise ArtifactError(f"{run_uri}/run.yaml was written by another version of mirrorscope: {error}") from error
    _require_own_fingerprint(run_uri, spec)
    # The folder may have been moved: what it says of its own place does not count.
    return spec.model_copy(update={"run": spec.run.model_copy(update={"uri": run_uri})})


def _require_own_fingerprint(run_uri: str, spec: Spec) -> None:
    """See that a spec is what the run was frozen with, though an edit renewed its digest line. Raises ArtifactError."""
    resolved = spec.resolved
    # Another version may know other fields, so it would compute another fingerprint of the same text.
    if resolved is None or resolved.versions.get("mirrorscope") != version("mirrorscope"):
        return
    if (got := fingerprint(spec, resolved.digests)) != resolved.fingerprint:
        raise ArtifactError(
            f"{run_uri}/run.yaml is not the spec that the run was frozen with: got fingerprint {got}, "
            f"expected {resolved.fingerprint}",
            REFREEZE,
        )


def read_spec_bytes(run_uri: str) -> bytes:
    """A run's run.yaml, compared with its digest. Raises ArtifactError: it is damaged, or was edited."""
    origin = f"{run_uri}/run.yaml"
    data = storage.read_bytes(origin)
    if b"\nresolved:" not in data:
        raise ArtifactError(f"{origin} has no `resolved` section: it was not written by a run, or was cut", REFREEZE)
    if problem := digest_line_problem(data, SPEC_COMMENT):
        raise ArtifactError(f"{origin} {problem}", REFREEZE)
    return data


def create_addition(run: Run, addition: Addition, shards: Manifest, queries: pa.Table | None) -> None:
    """Write an addition to a run: its tables under names of their contents, then addition.json, which commits it.

    Raises:
        ArtifactError: Somebody else added something at the same time.
    """
    tables: dict[str, str] = {}
    for kind, table in (("manifest", shards.table if len(shards) else None), ("queries", queries)):
        if table is not None:
            data = parquet_bytes(table)
            tables[kind] = storage.bytes_digest(data)
            run.write(data, _table_path(addition.number, kind, tables[kind]))
    data = json_bytes({**asdict(addition), "tables": tables})
    uri = run.uri(addition_path(addition.number))
    if run.resolved.commits == "put":
        storage.write_bytes(uri, data)
    elif not storage.create_bytes(uri, data) and storage.read_bytes(uri) != data:
        if _is_whole(run, addition.number):
            raise ArtifactError(
                f"{run.uri()} was extended by somebody else in the same moment", "extend it again when that is done"
            )
        storage.write_bytes(uri, data)


def _is_whole(run: Run, number: int) -> bool:
    try:
        read_addition(run, number)
    except ArtifactError:
        return False
    return True


def addition_path(number: int) -> str:
    """Path of what commits an addition."""
    return f"additions/{number:04d}/{ADDITION_NAME}"


def addition_tables(number: int, described: Mapping[str, Any]) -> dict[str, str]:
    """Path -> sha256 of the tables that an addition names."""
    return {_table_path(number, kind, sha256): sha256 for kind, sha256 in described["tables"].items()}


def _table_path(number: int, kind: str, sha256: str) -> str:
    return f"additions/{number:04d}/{kind}-{sha256[:16]}.parquet"


def open_run(run_uri: str) -> Run:
    """Open a frozen run: an Ensemble where its spec asks for one.

    Raises:
        ArtifactError: There is none, or what was frozen is damaged, or a part of it is gone.
    """
    return _with_members(open_alone(run_uri))


def open_alone(run_uri: str, before_damage: bool = False) -> Run:
    """Open a frozen run, an ensemble without its members.

    Args:
        run_uri: Its folder.
        before_damage: Whether a run with an addition that is damaged is opened as it was before that, so that the addition can
            be written again.

    Raises:
        ArtifactError: As `open_run`.
    """
    run_uri = storage.absolute(run_uri)
    if not is_run(run_uri):
        raise ArtifactError(f"{run_uri} holds no run (no run.yaml)", "give the run.uri of a spec that was run")
    spec = _read_spec(run_uri)
    bare = Run(spec, Manifest.of([]), (), pa.table({"query_id": pa.array([], pa.string())}), ())
    try:
        tables = [bare.read_table(name, sha256=bare.resolved.tables[name]) for name in (MANIFEST_NAME, QUERIES_NAME)]
    except (InputError, ArtifactError) as error:
        raise ArtifactError(error.message, REFREEZE) from error
    manifest, queries = tables
    if manifest.schema.names != MANIFEST.names or _COLUMNS_KEY not in (manifest.schema.metadata or {}):
        raise ArtifactError(f"{run_uri}/{MANIFEST_NAME} is not a manifest")
    columns = [
        Column(**{**column, "columns": tuple(column["columns"]), "shape": tuple(column["shape"])})
        for column in json.loads(manifest.schema.metadata[_COLUMNS_KEY])
    ]
    first = Addition(0, bare.resolved.fingerprint, 0, len(manifest), _in_order(queries))
    frozen = replace(bare, shards=Manifest(manifest), columns=tuple(columns), queries=queries, additions=(first,))
    return _with_additions(frozen, before_damage)


def _with_members(run: Run) -> Run:
    """An ensemble with its members, as far as they are frozen; an ordinary run as it is."""
    if not run.spec.ensemble:
        return run
    places = (run.uri(member_name(place)) for place in range(number_of_members(run)))
    return ensemble_of(run, tuple(open_run(uri) for uri in takewhile(is_run, places)))


def _with_additions(run: Run, before_damage: bool) -> Run:
    """The run with all that was added to it. Raises ArtifactError: an addition is damaged or gone, and that is not expected."""
    numbers = [int(name) for name in storage.names(run.uri("additions")) if name.isdigit()]
    committed = parallel(lambda n: storage.exists(run.uri(addition_path(n))), numbers)
    manifests, queries, additions = [run.shards.table], [run.queries], list(run.additions)
    for place, number in enumerate((n for n, done in zip(numbers, committed, strict=True) if done), start=1):
        try:
            if number != place:
                raise ArtifactError(f"{run.uri(addition_path(place))} is gone")
            described = read_addition(run, number)
            tables = described.pop("tables")
            added = {
                kind: run.read_table(_table_path(number, kind, tables[kind]), sha256=tables[kind]) for kind in tables
            }
        except (InputError, ArtifactError) as error:
            if before_damage:
                break
            raise ArtifactError(error.message, REEXTEND) from error
        manifests += [added["manifest"]] if "manifest" in added else []
        queries += [added["queries"]] if "queries" in added else []
        additions.append(Addition(**{**described, "query_ids": tuple(described["query_ids"])}))
    if len(additions) == 1:
        return run
    shards = pa.concat_tables([table.replace_schema_metadata(None) for table in manifests])
    return replace(run, shards=Manifest(shards), queries=concat_rows(queries), additions=tuple(additions))


def read_addition(run: Run, number: int) -> dict[str, Any]:
    """What commits an addition. Raises InputError, ArtifactError: it is not there, or damaged."""
    return run.read_json(addition_path(number))


def _in_order(queries: pa.Table) -> tuple[str, ...]:
    return tuple(dict.fromkeys(queries["query_id"].to_pylist()))
