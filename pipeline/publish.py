"""After a run: its scores and ranking as Apache Iceberg tables, in whatever catalog a lake has. No score is rewritten.

Reads: _SUCCESS, commits/, topk/; the footers of score files that are new to the catalog.
Writes: lake/ranked-DIGEST.parquet, a copy under a name of its contents (rank overwrites the original); then the catalog's tables
`scores` and `topk`, each with one snapshot.
Resumes: published again, only what is new is added; nothing new, no snapshot.
"""

from __future__ import annotations

import hashlib
import io
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from . import storage
from .artifacts import Run
from .errors import ArtifactError
from .records import SCORES, stored

if TYPE_CHECKING:
    from pyiceberg.catalog import Catalog
    from pyiceberg.manifest import DataFile
    from pyiceberg.table import Table, Transaction

TRIES = 8
"""Of a commit that somebody else's commit came before."""
FILES = "mirrorscope.files-sha256"
"""Of a snapshot: digest of the names and digests of all files in it."""
RUN_URI, FINGERPRINT = "mirrorscope.run-uri", "mirrorscope.fingerprint"
"""Of a table: whose it is."""


@dataclass(frozen=True)
class Content:
    """What a table shall hold.

    Args:
        name: Of the table.
        schema: Its columns, described.
        partitioned_by: Column that is the same within each file, for engines to prune by; null for none.
        files: URI -> sha256 of every file.
    """

    name: str
    schema: pa.Schema
    partitioned_by: str | None
    files: Mapping[str, str]

    def digest(self, uris: set[str]) -> str:
        """Digest of some of its files, names and contents."""
        lines = "\n".join(f"{uri} {self.files[uri]}" for uri in sorted(uris))
        return hashlib.sha256(lines.encode()).hexdigest()


@dataclass(frozen=True)
class Published:
    """A table as it stands in the catalog.

    Args:
        table: Its name, with the namespace.
        rows: Rows in it.
        files: Files in it.
        added: Files that this publication added.
        removed: Files that it took out, because they are no more what the run holds.
    """

    table: str
    rows: int
    files: int
    added: int
    removed: int


def publish(run: Run, catalog: Catalog, namespace: str = "") -> list[Published]:
    """Register a sealed run's scores and ranking.

    Args:
        run: The run.
        catalog: An open catalog, see catalog.py.
        namespace: Of the tables, with dots if it is nested; the name of the run's folder if empty.

    Raises:
        ArtifactError: The run is not sealed, or the tables there are another run's.
        StorageError: Store or catalog refused; published again, nothing is added twice.
    """
    if not run.is_sealed():
        raise ArtifactError(
            f"{run.uri()} is not sealed: it has rows that are neither scored nor rejected",
            "run its spec to the end; `mirrorscope status` says how far it is",
        )
    if set("?#") & set(run.uri()):
        raise ArtifactError(f"{run.uri()} cannot be published: catalogs cannot address a path with ? or #")
    logging.getLogger("pyiceberg.io.pyarrow").addFilter(_is_news)
    names = tuple((namespace or namespace_of(run.uri())).split("."))
    _make_namespace(catalog, names)
    return [_register(run, catalog, (*names, content.name), content) for content in (_scores(run), _ranking(run))]


def _make_namespace(catalog: Catalog, names: tuple[str, ...]) -> None:
    try:
        catalog.create_namespace_if_not_exists(names)
    except Exception:  # each catalog has an error of its own for a namespace that somebody made in this moment
        if names not in catalog.list_namespaces(names[:-1]):
            raise


def namespace_of(run_uri: str) -> str:
    """The name of a run's folder, as every catalog takes it: small letters, digits and underscores."""
    name = re.sub(r"[^0-9a-z]+", "_", run_uri.rstrip("/").rsplit("/", 1)[-1].lower()).strip("_")
    return name if name[:1].isalpha() else f"run_{name}"


def _is_news(record: logging.LogRecord) -> bool:
    """Leaves out that dictionaries become strings, said for every file: they are strings in Parquet."""
    return "dictionary type" not in record.getMessage()


def file_uri(uri: str) -> str:
    """A URI with its scheme, as tables name their files."""
    return uri if "://" in uri else f"file://{uri}"


def _scores(run: Run) -> Content:
    files = {
        file_uri(run.uri(path)): written["sha256"]
        for receipt in run.receipts()
        if receipt.rows  # a file without rows has no statistics to tell its partition by
        for path, written in receipt.files.items()
        if path.startswith("scores/")
    }
    return Content("scores", stored(SCORES, run.per_token), "query_id", files)


def _ranking(run: Run) -> Content:
    data, _ = run.ranked_bytes()
    sha256 = storage.bytes_digest(data)
    uri = run.uri("lake", f"ranked-{sha256[:16]}.parquet")
    if not storage.exists(uri) or storage.file_digest(uri) != sha256:
        storage.write_bytes(uri, data)
    return Content("topk", pq.read_schema(io.BytesIO(data)), None, {file_uri(uri): sha256})


def _register(run: Run, catalog: Catalog, identifier: tuple[str, ...], content: Content) -> Published:
    """Bring a table up to date, in one snapshot; again where somebody else was faster."""
    from pyiceberg.exceptions import CommitFailedException, TableAlreadyExistsError

    for tried in range(1, TRIES + 1):
        try:
            return _once(run, catalog, identifier, content)
        except (CommitFailedException, TableAlreadyExistsError):
            if tried == TRIES:
                raise
    raise AssertionError("unreachable")


def _once(run: Run, catalog: Catalog, identifier: tuple[str, ...], content: Content) -> Published:
    from pyiceberg.exceptions import NoSuchTableError

    owner = {RUN_URI: run.uri(), FINGERPRINT: run.resolved.fingerprint}
    try:
        table = catalog.load_table(identifier)
    except NoSuchTableError:
        _create(catalog, identifier, content, owner)
        return _published(catalog.load_table(identifier), len(content.files), 0)
    if table.properties.get(RUN_URI) != owner[RUN_URI] or table.properties.get(FINGERPRINT) != owner[FINGERPRINT]:
        raise ArtifactError(
            f"table {'.'.join(identifier)} is there and holds {table.properties.get(RUN_URI, 'no run')} "
            f"({table.properties.get(FINGERPRINT)}), not {run.uri()} ({run.resolved.fingerprint})",
            "publish under another --namespace, or drop that table first",
        )
    added, removed = _difference(table, content)
    if added or removed:
        _update(table, content, added, removed)
    return _published(table, len(added), len(removed))


def _create(catalog: Catalog, identifier: tuple[str, ...], content: Content, owner: dict[str, str]) -> None:
    """Make a table with everything in it: nobody sees it empty."""
    from pyiceberg.io.pyarrow import UnsupportedPyArrowTypeException, pyarrow_to_schema
    from pyiceberg.partitioning import UNPARTITIONED_PARTITION_SPEC, PartitionField, PartitionSpec
    from pyiceberg.transforms import IdentityTransform

    schema, spec, name = _described(content.schema), UNPARTITIONED_PARTITION_SPEC, content.partitioned_by
    if name:
        schema = pyarrow_to_schema(schema)
        spec = PartitionSpec(PartitionField(schema.find_field(name).field_id, 1000, IdentityTransform(), name))
    try:
        creating = catalog.create_table_transaction(identifier, schema, partition_spec=spec, properties=owner)
    except (UnsupportedPyArrowTypeException, TypeError) as error:
        raise ArtifactError(
            f"{content.name} cannot be an Iceberg table: {error}",
            "leave the column out: `mirrorscope run SPEC --set corpus.payload=...` with the columns that you want",
        ) from error
    with creating as transaction:
        _append(transaction, content, set(content.files))


def _described(schema: pa.Schema) -> pa.Schema:
    """A schema as Iceberg is told of it: numbered, our descriptions and units as comments, dictionaries as what they hold."""
    fields = []
    for number, field in enumerate(schema, start=1):
        ours = field.metadata or {}
        text, unit = ours.get(b"description", b"").decode(), ours.get(b"unit", b"").decode()
        metadata = {"PARQUET:field_id": str(number), "doc": f"{text} [{unit}]" if unit else text}
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        fields.append(pa.field(field.name, kind, field.nullable, metadata))
    return pa.schema(fields)


def _difference(table: Table, content: Content) -> tuple[set[str], list[DataFile]]:
    """URIs to add and files to take out, so that the table holds the content.

    Where a file that is in it is gone, or has other bytes now, all are taken out and those that shall be there are added: in
    the same snapshot, and without touching one of them.
    """
    from pyiceberg.manifest import ManifestContent

    snapshot = table.current_snapshot()
    if snapshot is None:
        return set(content.files), []
    known = {
        entry.data_file.file_path: entry.data_file
        for manifest in snapshot.manifests(table.io)
        if manifest.content == ManifestContent.DATA
        for entry in manifest.fetch_manifest_entry(table.io)
    }
    said = snapshot.summary.additional_properties.get(FILES) if snapshot.summary else None
    if known.keys() <= content.files.keys() and content.digest(set(known)) == said:
        return content.files.keys() - known.keys(), []
    return set(content.files), list(known.values())


def _update(table: Table, content: Content, added: set[str], removed: list[DataFile]) -> None:
    """Change what a table holds, in one snapshot."""
    from pyiceberg.io.pyarrow import parquet_files_to_data_files

    # Left to itself, the library repeats a commit without seeing that the one that came before it brought the same files.
    alone = {**table.metadata.properties, "commit.retry.num-retries": "0"}
    table.metadata = table.metadata.model_copy(update={"properties": alone})
    with table.transaction() as transaction:
        with transaction.update_schema() as schema:
            schema.union_by_name(_described(content.schema))  # a ranking may have other payload columns than the last
        if not removed:
            _append(transaction, content, added)
            return
        with transaction.update_snapshot(_said(content)).overwrite() as snapshot:
            for data_file in removed:
                snapshot.delete_data_file(data_file)
            for data_file in parquet_files_to_data_files(table.io, transaction.table_metadata, iter(sorted(added))):
                snapshot.append_data_file(data_file)


def _append(transaction: Transaction, content: Content, uris: set[str]) -> None:
    transaction.add_files(sorted(uris), _said(content), check_duplicate_files=False)


def _said(content: Content) -> dict[str, str]:
    return {FILES: content.digest(set(content.files))}


def _published(table: Table, added: int, removed: int) -> Published:
    snapshot = table.current_snapshot()
    assert snapshot is not None
    assert snapshot.summary is not None
    counts = snapshot.summary.additional_properties
    rows, files = int(counts["total-records"]), int(counts["total-data-files"])
    return Published(".".join(table.name()), rows, files, added, removed)
