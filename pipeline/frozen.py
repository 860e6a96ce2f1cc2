"""What is frozen of a run: run.yaml with the tables it vouches for, and the same of every addition."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from itertools import takewhile
from typing import Any

import pyarrow as pa
import yaml

from . import storage
from .artifacts import Run
from .ensemble import FOLDER, ensemble_of, member_name, number_of_members
from .errors import ArtifactError, InputError, SpecError
from .folder import json_bytes, parallel, parquet_bytes
from .observe import say
from .records import MANIFEST, Column
from .specfile import dump_spec, parse_spec
from .values import concat_rows
from .works import Addition, Manifest

MANIFEST_NAME, QUERIES_NAME = "manifest.parquet", "queries.parquet"
ADDITION_NAME = "addition.json"
_COLUMNS_KEY = b"task_columns"


def is_run(run_uri: str) -> bool:
    """Whether a run was frozen there (run.yaml is written last)."""
    return storage.exists(f"{run_uri}/run.yaml")


def is_begun(run_uri: str) -> bool:
    """Whether a run there, or a member of it, has committed anything."""
    members = [f"{run_uri}/{FOLDER}/{name}" for name in storage.names(f"{run_uri}/{FOLDER}")]
    folders = [f"{uri}/{kind}" for uri in (run_uri, *members) for kind in ("counterparts", "commits")]
    return is_run(run_uri) and any(storage.objects(folder) for folder in folders)


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
    """Write run.yaml: the resolved spec, itself a valid spec."""
    run.write(_spec_bytes(run), "run.yaml")


def _spec_bytes(run: Run) -> bytes:
    return dump_spec(run.spec).encode()


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
            run.write(data, *_addition_path(addition.number, _table_name(kind, tables[kind])))
    data = json_bytes({**asdict(addition), "tables": tables})
    uri = run.uri(*_addition_path(addition.number, ADDITION_NAME))
    if run.resolved.commits == "put":
        storage.write_bytes(uri, data)
    elif not storage.create_bytes(uri, data) and storage.read_bytes(uri) != data:
        raise ArtifactError(
            f"{run.uri()} was extended by somebody else in the same moment", "extend it again when that is done"
        )


def _addition_path(number: int, name: str) -> tuple[str, str, str]:
    return "additions", f"{number:04d}", name


def _table_name(kind: str, sha256: str) -> str:
    return f"{kind}-{sha256[:16]}.parquet"


def frozen_objects(run: Run) -> dict[str, str | None]:
    """Path -> sha256 (where one is known) of everything frozen of a run, for its verification."""
    found: dict[str, str | None] = {"run.yaml": None, **run.resolved.tables}
    for addition in run.additions[1:]:
        found["/".join(_addition_path(addition.number, ADDITION_NAME))] = None
        for kind, sha256 in _read_addition(run, addition.number)["tables"].items():
            found["/".join(_addition_path(addition.number, _table_name(kind, sha256)))] = sha256
    return found


def open_run(run_uri: str) -> Run:
    """Open a frozen run: an Ensemble where its spec asks for one.

    Raises:
        ArtifactError: There is none, or what was frozen is damaged.
    """
    run_uri = storage.absolute(run_uri)
    if not is_run(run_uri):
        raise ArtifactError(f"{run_uri} holds no run (no run.yaml)", "give the run.uri of a spec that was run")
    origin = f"{run_uri}/run.yaml"
    try:
        spec = parse_spec(yaml.safe_load(storage.read_bytes(origin)), origin=origin)
    except (yaml.YAMLError, SpecError) as error:
        raise ArtifactError(f"{origin} is damaged: {error}") from error
    if spec.resolved is None:
        raise ArtifactError(f"{origin} has no `resolved` section: it was not written by a run")
    # The folder may have been moved: what it says of its own place does not count.
    spec = spec.model_copy(update={"run": spec.run.model_copy(update={"uri": run_uri})})
    bare = Run(spec, Manifest.of([]), (), pa.table({"query_id": pa.array([], pa.string())}), ())
    try:
        tables = [
            bare.read_table(name, sha256=bare.resolved.tables.get(name)) for name in (MANIFEST_NAME, QUERIES_NAME)
        ]
    except InputError as error:
        raise ArtifactError(f"{run_uri} is incomplete: {error.message}") from error
    manifest, queries = tables
    if manifest.schema.names != MANIFEST.names or _COLUMNS_KEY not in (manifest.schema.metadata or {}):
        raise ArtifactError(f"{run_uri}/{MANIFEST_NAME} is not a manifest")
    columns = [
        Column(**{**column, "columns": tuple(column["columns"]), "shape": tuple(column["shape"])})
        for column in json.loads(manifest.schema.metadata[_COLUMNS_KEY])
    ]
    first = Addition(0, bare.resolved.fingerprint, 0, len(manifest), _in_order(queries))
    frozen = replace(bare, shards=Manifest(manifest), columns=tuple(columns), queries=queries, additions=(first,))
    return _with_members(_with_additions(frozen))


def _with_members(run: Run) -> Run:
    """An ensemble with its members, as far as they are frozen; an ordinary run as it is."""
    if not run.spec.ensemble:
        return run
    places = (run.uri(member_name(place)) for place in range(number_of_members(run)))
    return ensemble_of(run, tuple(open_run(uri) for uri in takewhile(is_run, places)))


def _with_additions(run: Run) -> Run:
    """The run with all that was added to it."""
    numbers = [int(name) for name in storage.names(run.uri("additions")) if name.isdigit()]
    committed = parallel(lambda n: storage.exists(run.uri(*_addition_path(n, ADDITION_NAME))), numbers)
    manifests, queries, additions = [run.shards.table], [run.queries], list(run.additions)
    for number in (number for number, done in zip(numbers, committed, strict=True) if done):
        described = _read_addition(run, number)
        for kind, tables in (("manifest", manifests), ("queries", queries)):
            if sha256 := described["tables"].get(kind):
                tables.append(run.read_table(*_addition_path(number, _table_name(kind, sha256)), sha256=sha256))
        known = {name: value for name, value in described.items() if name != "tables"}
        additions.append(Addition(**{**known, "query_ids": tuple(known["query_ids"])}))
    if len(additions) == 1:
        return run
    shards = pa.concat_tables([table.replace_schema_metadata(None) for table in manifests])
    return replace(run, shards=Manifest(shards), queries=concat_rows(queries), additions=tuple(additions))


def _read_addition(run: Run, number: int) -> Mapping[str, Any]:
    found = run.read_json(*_addition_path(number, ADDITION_NAME))
    if not isinstance(found, dict) or "tables" not in found:
        raise ArtifactError(f"{run.uri(*_addition_path(number, ADDITION_NAME))} is damaged")
    return found


def _in_order(queries: pa.Table) -> tuple[str, ...]:
    return tuple(dict.fromkeys(queries["query_id"].to_pylist()))
