"""A folder of whole objects: tables as Parquet, values as JSON, each written in one piece, read against its digest."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
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
SPEC_COMMENT, PAGE_COMMENT = ("# ", ""), ("<!-- ", " -->")
"""What stands around the digest in the last line of run.yaml and of a page."""
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

    @property
    def mending(self) -> str:
        """What to do about something damaged, for hints."""
        return f"`mirrorscope verify --mend {self.uri()}`, then the run's command again: what is damaged is made anew"

    def write_table(self, table: pa.Table, *parts: str) -> Written:
        """Write a table whole as Parquet; its size and digest, for a commit."""
        return self.write(parquet_bytes(table), *parts)

    def read_table(self, *parts: str, sha256: str | None = None, hint: str = "") -> pa.Table:
        """Read a table, as `read_checked`."""
        return table_of(self.read_checked(*parts, sha256=sha256, hint=hint), self.uri(*parts))

    def read_checked(self, *parts: str, sha256: str | None, hint: str = "") -> bytes:
        """Read an object, against its digest where a commit says it.

        Raises:
            InputError: It is not there.
            ArtifactError: It is damaged, or not what was committed.
        """
        data = storage.read_bytes(self.uri(*parts))
        if sha256 is not None and (got := storage.bytes_digest(data)) != sha256:
            raise ArtifactError(
                f"{self.uri(*parts)} is not what its commit says: got sha256 {got}, expected {sha256}",
                hint or self.mending,
            )
        return data

    def write(self, data: bytes, *parts: str) -> Written:
        """Write an object whole; its size and digest, for a commit."""
        storage.write_bytes(self.uri(*parts), data)
        return Written(bytes=len(data), sha256=storage.bytes_digest(data))

    def write_json(self, value: Mapping[str, Any], *parts: str) -> None:
        """Write a JSON object whole, readable, with its own digest."""
        self.write(json_bytes(value), *parts)

    def read_json(self, *parts: str) -> dict[str, Any]:
        """Read a JSON object, checked against its own digest.

        Raises:
            InputError: It is not there.
            ArtifactError: It is damaged, or was edited.
        """
        return parse_json(storage.read_bytes(self.uri(*parts)), self.uri(*parts), self.mending)


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


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """An object, not empty, as JSON that a person can read. Its last field, `sha256`, is the digest of the text without it."""
    text = json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"
    return text.removesuffix(_JSON_END) + _json_digest(text)


def parse_json(data: bytes, origin: str, hint: str) -> dict[str, Any]:
    """What `json_bytes` wrote, without the digest. Raises ArtifactError, with origin and hint, if any bit of it changed."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{origin} is damaged: {error}", hint) from error
    expected = value.pop("sha256", None) if isinstance(value, dict) else None
    text = data[:-_JSON_DIGEST_BYTES] + _JSON_END
    # The bytes are compared, not the values: other bytes may parse to the same value (1e-05 and 1E-05).
    if data[-_JSON_DIGEST_BYTES:] != _json_digest(text):
        got = storage.bytes_digest(text)
        raise ArtifactError(f"{origin} is damaged, or was edited: got sha256 {got}, expected {expected}", hint)
    return dict(value)


def _json_digest(text: bytes) -> bytes:
    return f',\n "sha256": "{storage.bytes_digest(text)}"'.encode() + _JSON_END


_JSON_END = b"\n}\n"
_JSON_DIGEST_BYTES = len(_json_digest(b""))


def with_digest_line(text: str, comment: tuple[str, str]) -> bytes:
    """A text that ends with a line break, and behind it a comment line with its digest.

    Args:
        text: The text.
        comment: SPEC_COMMENT or PAGE_COMMENT.
    """
    return text.encode() + _digest_line(text.encode(), comment)


def digest_line_problem(data: bytes, comment: tuple[str, str]) -> str:
    """Why it is not what `with_digest_line` wrote; empty if every bit is as it was."""
    size = len(_digest_line(b"", comment))
    if data[-size:] == _digest_line(data[:-size], comment):
        return ""
    return f"is damaged, or was edited: got sha256 {storage.bytes_digest(data[:-size])}, expected that of its last line"


def _digest_line(text: bytes, comment: tuple[str, str]) -> bytes:
    return f"{comment[0]}sha256: {storage.bytes_digest(text)}{comment[1]}\n".encode()
