"""A run's folder: names of everything in it, whole-object writes, one commit per shard and per counterpart, resume.

Nothing here knows Ray or torch. A stage that is killed leaves either a commit, whose objects are all whole, or no commit,
and then the same names are written again with the same bytes.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, TypeVar
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from . import storage
from .errors import ArtifactError, InputError, SpecError
from .records import MANIFEST, Column, Receipt, Shard, manifest_shards, manifest_table
from .spec import Resolved, Spec
from .specfile import dump_spec, parse_spec

READING_THREADS = 16
_COMMIT_NAME = re.compile(r"shard-(\d+)\.json")
_COLUMNS_KEY = b"task_columns"
_Item = TypeVar("_Item")
MAX_REJECTS_SHOWN = 3


@dataclass(frozen=True)
class Run:
    """An opened run: what was frozen, and the way to everything in its folder.

    Args:
        spec: The resolved spec.
        shards: The manifest.
        columns: What the task reads.
        queries: Query rows, `query_id` first.
    """

    spec: Spec
    shards: tuple[Shard, ...]
    columns: tuple[Column, ...]
    queries: pa.Table

    @property
    def resolved(self) -> Resolved:
        """What the run was frozen with."""
        assert self.spec.resolved is not None
        return self.spec.resolved

    @cached_property
    def query_ids(self) -> tuple[str, ...]:
        """Queries in order of first appearance."""
        return tuple(dict.fromkeys(self.queries["query_id"].to_pylist()))

    @property
    def rows(self) -> int:
        """Rows of the corpus."""
        return sum(shard.rows for shard in self.shards)

    def uri(self, *parts: str) -> str:
        """URI of something in the run's folder."""
        return "/".join((self.spec.run.uri, *parts))

    # --- tables and JSON -------------------------------------------------------------------------------------------

    def write_table(self, table: pa.Table, *parts: str) -> dict[str, Any]:
        """Write a table whole as Parquet; its size and digest, for a commit."""
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        return self.write(buffer.getvalue(), *parts)

    def read_table(self, *parts: str, sha256: str | None = None) -> pa.Table:
        """Read a table, against its digest where a commit says it.

        Raises:
            InputError: It is not there.
            ArtifactError: It is damaged, or not what was committed.
        """
        data = storage.read_bytes(self.uri(*parts))
        if sha256 is not None and (got := storage.bytes_digest(data)) != sha256:
            raise ArtifactError(
                f"{self.uri(*parts)} is not what its commit says: got sha256 {got}, expected {sha256}",
                "delete the shard's commit in commits/ and run again: the shard is then scored anew",
            )
        try:
            return pq.ParquetFile(io.BytesIO(data)).read()
        except (pa.ArrowInvalid, OSError) as error:
            raise ArtifactError(f"{self.uri(*parts)} is damaged: {error}") from error

    def write(self, data: bytes, *parts: str) -> dict[str, Any]:
        """Write an object whole; its size and digest, for a commit."""
        storage.write_bytes(self.uri(*parts), data)
        return {"bytes": len(data), "sha256": storage.bytes_digest(data)}

    def write_json(self, value: Any, *parts: str) -> None:
        """Write a JSON object whole, readable."""
        self.write(json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n", *parts)

    def read_json(self, *parts: str) -> Any:
        """Read a JSON object. Raises InputError if it is not there, ArtifactError if it is damaged."""
        try:
            return json.loads(storage.read_bytes(self.uri(*parts)))
        except ValueError as error:
            raise ArtifactError(f"{self.uri(*parts)} is damaged: {error}") from error

    # --- counterparts ----------------------------------------------------------------------------------------------

    def commit_counterpart(self, query_id: str, tensors: bytes, meta: Mapping[str, Any]) -> None:
        """Write a counterpart's changed tensors (safetensors), then its meta.json, which commits it."""
        written = self.write(tensors, "counterparts", partition(query_id), "changed.safetensors")
        signed = {**meta, "query_id": query_id, "fingerprint": self.resolved.fingerprint, "tensors": written}
        self.write_json(signed, "counterparts", partition(query_id), "meta.json")

    def counterpart_meta(self, query_id: str) -> dict[str, Any]:
        """A committed counterpart's meta.json. Raises InputError, ArtifactError (of another run, or damaged)."""
        meta = self.read_json("counterparts", partition(query_id), "meta.json")
        if not isinstance(meta, dict) or ("fingerprint" in meta and "tensors" not in meta):
            raise ArtifactError(f"{self.uri('counterparts', partition(query_id), 'meta.json')} is damaged")
        self._require_own(meta.get("fingerprint"), f"counterpart of query {query_id!r}")
        return dict(meta)

    def counterpart_tensors(self, query_id: str) -> bytes:
        """A committed counterpart's changed tensors, checked against its digest. Raises InputError, ArtifactError."""
        data = storage.read_bytes(self.uri("counterparts", partition(query_id), "changed.safetensors"))
        expected = self.counterpart_meta(query_id)["tensors"]["sha256"]
        if (got := storage.bytes_digest(data)) != expected:
            raise ArtifactError(
                f"counterpart of query {query_id!r} is damaged: got sha256 {got}, expected {expected}",
                f"delete {self.uri('counterparts', partition(query_id))} and run again",
            )
        return data

    def committed_queries(self) -> set[str]:
        """Queries whose counterpart is committed."""
        there = set(storage.names(self.uri("counterparts")))
        named = [query_id for query_id in self.query_ids if partition(query_id) in there]
        done = parallel(lambda q: storage.exists(self.uri("counterparts", partition(q), "meta.json")), named)
        return {query_id for query_id, committed in zip(named, done, strict=True) if committed}

    # --- shards ----------------------------------------------------------------------------------------------------

    def commit_shard(self, receipt: Receipt) -> None:
        """Write a shard's commit: the last object of a shard, after everything it names."""
        self.write_json(receipt.to_json(), "commits", f"shard-{receipt.shard_id:06d}.json")

    def committed_ids(self) -> set[int]:
        """Shards whose commit is there, by one listing."""
        return {int(found[1]) for name in self._commit_names() if (found := _COMMIT_NAME.fullmatch(name))}

    def _commit_names(self) -> list[str]:
        return [name for name in storage.names(self.uri("commits")) if _COMMIT_NAME.fullmatch(name)]

    def receipts(self) -> list[Receipt]:
        """All commits, by shard. Raises ArtifactError for one of another run, or damaged."""
        receipts = parallel(self._receipt, self._commit_names())
        for receipt in receipts:
            self._require_own(receipt.fingerprint, f"commit of shard {receipt.shard_id}")
        return receipts

    def _receipt(self, name: str) -> Receipt:
        try:
            return Receipt(**self.read_json("commits", name))
        except TypeError as error:
            raise ArtifactError(f"{self.uri('commits', name)} is damaged: {error}") from error

    def read_shard(self, receipt: Receipt, path: str) -> pa.Table:
        """A table that a commit names, by its path in the run's folder. Raises InputError, ArtifactError."""
        if path not in receipt.files:
            raise ArtifactError(f"commit of shard {receipt.shard_id} names no {path}")
        return self.read_table(path, sha256=receipt.files[path]["sha256"])

    def require_few_rejects(self, rejected: int) -> None:
        """See that no more rows were rejected than the spec allows. Raises InputError, with the first of them."""
        allowed = self.spec.score.max_reject_fraction
        if rejected <= allowed * self.rows:
            return
        shown = "".join(f"\n  {line}" for line in self._first_rejects())
        raise InputError(
            f"{rejected:,} of {self.rows:,} rows could not be scored, allowed is a fraction of {allowed:g}; "
            f"they are in {self.uri('rejects')}{shown}",
            "mend the corpus and start a new run, or go on with --set score.max_reject_fraction=...",
        )

    def _first_rejects(self) -> list[str]:
        for receipt in self.receipts():
            if receipt.rejects:
                rows = self.read_shard(receipt, f"rejects/shard-{receipt.shard_id:06d}.parquet").slice(
                    0, MAX_REJECTS_SHOWN
                )
                return [
                    f"{row['path']} row {row['row']}: {row['column']}: got {row['got']}, expected {row['expected']}"
                    for row in rows.to_pylist()
                ]
        return []

    def complete_receipts(self) -> list[Receipt]:
        """All commits of a fully scored run.

        Raises:
            ArtifactError: A shard is not committed, or scored and rejected rows do not add up to the manifest's.
            InputError: More rows were rejected than the spec allows.
        """
        receipts = self.receipts()
        if [receipt.shard_id for receipt in receipts] != [shard.shard_id for shard in self.shards]:
            raise ArtifactError(
                f"{self.uri()}: {len(receipts)} of {len(self.shards)} shards are committed",
                "run stage score to its end first",
            )
        for shard, receipt in zip(self.shards, receipts, strict=True):
            if receipt.rows + receipt.rejects != shard.rows:
                raise ArtifactError(
                    f"commit of shard {shard.shard_id}: {receipt.rows} scored + {receipt.rejects} rejected rows, "
                    f"expected {shard.rows}"
                )
        self.require_few_rejects(sum(receipt.rejects for receipt in receipts))
        return receipts

    def read_ranked(self) -> tuple[pa.Table, dict[str, Any]]:
        """The ranked table and its meta.json. Raises ArtifactError if the run was not ranked."""
        if not storage.exists(self.uri("topk", "meta.json")):
            raise ArtifactError(
                f"{self.uri()} is not ranked yet", "run its spec to the end; `mirrorscope status` says how far it is"
            )
        return self.read_table("topk", "ranked.parquet"), self.read_json("topk", "meta.json")

    def seal(self) -> None:
        """Write _SUCCESS: every row of the corpus is in exactly one of scores and rejects. Raises ArtifactError."""
        receipts = self.complete_receipts()
        counts = {
            "shards": len(receipts),
            "rows": sum(r.rows for r in receipts),
            "rejects": sum(r.rejects for r in receipts),
        }
        self.write_json({**counts, "fingerprint": self.resolved.fingerprint}, "_SUCCESS")

    def _require_own(self, fingerprint: Any, what: str) -> None:
        if fingerprint != self.resolved.fingerprint:
            raise ArtifactError(
                f"{self.uri()}: {what} carries fingerprint {fingerprint}, expected {self.resolved.fingerprint}",
                "the folder mixes two runs; use a new run.uri",
            )


def partition(query_id: str) -> str:
    """Hive partition folder of a query."""
    return f"query_id={quote(query_id, safe='')}"


def parallel(action: Any, items: Sequence[_Item]) -> list[Any]:
    """An I/O-bound action over items, in order, in threads."""
    with ThreadPoolExecutor(READING_THREADS) as pool:
        return list(pool.map(action, items))


def is_run(run_uri: str) -> bool:
    """Whether a run was frozen there (run.yaml is written last)."""
    return storage.exists(f"{run_uri}/run.yaml")


def create_run(run: Run) -> None:
    """Write what is frozen of a run: manifest, queries, and run.yaml last."""
    described = {_COLUMNS_KEY: json.dumps([asdict(column) for column in run.columns]).encode()}
    manifest = manifest_table(list(run.shards)).replace_schema_metadata(described)
    run.write_table(manifest, "manifest.parquet")
    run.write_table(run.queries, "queries.parquet")
    save_spec(run)


def save_spec(run: Run) -> None:
    """Write run.yaml: the resolved spec, itself a valid spec."""
    run.write(dump_spec(run.spec).encode(), "run.yaml")


def open_run(run_uri: str) -> Run:
    """Open a frozen run.

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
    bare = Run(spec, (), (), pa.table({"query_id": pa.array([], pa.string())}))
    try:
        manifest, queries = bare.read_table("manifest.parquet"), bare.read_table("queries.parquet")
    except InputError as error:
        raise ArtifactError(f"{run_uri} is incomplete: {error.message}") from error
    if manifest.schema.names != MANIFEST.names or _COLUMNS_KEY not in (manifest.schema.metadata or {}):
        raise ArtifactError(f"{run_uri}/manifest.parquet is not a manifest")
    columns = [
        Column(**{**column, "columns": tuple(column["columns"]), "shape": tuple(column["shape"])})
        for column in json.loads(manifest.schema.metadata[_COLUMNS_KEY])
    ]
    return replace(bare, shards=tuple(manifest_shards(manifest)), columns=tuple(columns), queries=queries)
