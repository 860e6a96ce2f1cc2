"""A folder of whole objects: tables as Parquet, values as JSON, each written in one piece, read against its digest."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

from . import storage
from .errors import ArtifactError
from .records import PARQUET_OPTIONS
from .spec import Spec
from .works import Written

READING_THREADS = 16
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Folder:
    """What a run's folder is to all that reads and writes in it.

    Args:
        spec: The resolved spec; its `run.uri` is the folder.
    """

    spec: Spec

    def uri(self, *parts: str) -> str:
        """URI of something in the run's folder."""
        return "/".join((self.spec.run.uri, *parts))

    def write_table(self, table: pa.Table, *parts: str) -> Written:
        """Write a table whole as Parquet; its size and digest, for a commit."""
        return self.write(parquet_bytes(table), *parts)

    def read_table(self, *parts: str, sha256: str | None = None, hint: str = "") -> pa.Table:
        """Read a table, against its digest where a commit says it.

        Raises:
            InputError: It is not there.
            ArtifactError: It is damaged, or not what was committed.
        """
        data = storage.read_bytes(self.uri(*parts))
        if sha256 is not None and (got := storage.bytes_digest(data)) != sha256:
            raise ArtifactError(
                f"{self.uri(*parts)} is not what its commit says: got sha256 {got}, expected {sha256}", hint
            )
        return table_of(data, self.uri(*parts))

    def write(self, data: bytes, *parts: str) -> Written:
        """Write an object whole; its size and digest, for a commit."""
        storage.write_bytes(self.uri(*parts), data)
        return Written(bytes=len(data), sha256=storage.bytes_digest(data))

    def write_json(self, value: Any, *parts: str) -> None:
        """Write a JSON object whole, readable."""
        self.write(json_bytes(value), *parts)

    def read_json(self, *parts: str) -> Any:
        """Read a JSON object. Raises InputError if it is not there, ArtifactError if it is damaged."""
        try:
            return json.loads(storage.read_bytes(self.uri(*parts)))
        except ValueError as error:
            raise ArtifactError(f"{self.uri(*parts)} is damaged: {error}") from error


def partition(query_id: str) -> str:
    """Hive partition folder of a query."""
    return f"query_id={quote(query_id, safe='')}"


def parallel(action: Any, items: Sequence[_Item]) -> list[Any]:
    """An I/O-bound action over items, in order, in threads."""
    with ThreadPoolExecutor(READING_THREADS) as pool:
        return list(pool.map(action, items))


def table_of(data: bytes, origin: str) -> pa.Table:
    """The table of a Parquet file's bytes; `origin` names it. Raises ArtifactError if it is damaged."""
    try:
        return pq.ParquetFile(io.BytesIO(data)).read()
    except (pa.ArrowInvalid, OSError) as error:
        raise ArtifactError(f"{origin} is damaged: {error}") from error


def parquet_bytes(table: pa.Table) -> bytes:
    """A table as the bytes of a Parquet file."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **PARQUET_OPTIONS)
    return buffer.getvalue()


def json_bytes(value: Any) -> bytes:
    """A value as JSON that a person can read."""
    return json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"
