"""JSON lines and CSV: one scan finds where rows start; a shard then reads only its own bytes.

A row is a record that is not blank. In CSV a line break inside quotes belongs to its record: it ends where the number
of quote characters so far is even (RFC 4180), which needs no parser.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from .. import storage
from ..errors import InputError
from ..records import Measured, Reject, Rows, Shard, SourceFile
from .base import find_files

csv.field_size_limit(1 << 30)  # the text of an image is longer than the module's own 128 KiB

STRIDE = 256
"""Rows between two recorded byte offsets: a shard reads at most this many rows that are not its own."""
LOOK_ROWS = 100
"""Rows of a JSON-lines file whose keys count as its columns."""
SHOW_CHARS = 80
HEADER_BYTES = 1 << 20


def _records(lines: Iterable[bytes], quoted: bool, offset: int = 0) -> Iterator[tuple[int, bytes]]:
    """Byte offset and bytes of every record that is not blank."""
    begin, parts, quotes = offset, [], 0
    for line in lines:
        parts.append(line)
        quotes += line.count(b'"') if quoted else 0
        offset += len(line)
        if quotes % 2 == 0:
            record = b"".join(parts)
            if record.strip():
                yield begin, record
            begin, parts, quotes = offset, [], 0
    if b"".join(parts).strip():
        yield begin, b"".join(parts)


def _measure(file: SourceFile, quoted: bool, header: bool) -> tuple[int, tuple[int, ...], list[bytes]]:
    """Rows, byte offset of every STRIDE-th with the end behind, and the first records (with the header)."""
    offsets, rows, head = [], 0, []
    with storage.reading(file.path) as source:
        for position, (offset, record) in enumerate(_records(io.BufferedReader(source, storage.CHUNK_BYTES), quoted)):
            if position < LOOK_ROWS:
                head.append(record)
            if header and position == 0:
                continue
            if rows % STRIDE == 0:
                offsets.append(offset)
            rows += 1
    return rows, (*offsets, file.size_bytes), head


def _shard_records(shard: Shard, quoted: bool) -> list[bytes]:
    assert shard.byte_start is not None
    data = storage.read_bytes(shard.path, shard.byte_start, shard.byte_stop)
    records = [record for _, record in _records(io.BytesIO(data), quoted)]
    skip = shard.row_start % STRIDE
    records = records[skip : skip + shard.rows]
    if len(records) != shard.rows:
        raise InputError(f"{shard.path}: got {len(records)} rows from row {shard.row_start}, expected {shard.rows}")
    return records


def _table(parsed: list[dict[str, Any]], columns: Sequence[str]) -> pa.Table:
    return pa.table({name: _column([row.get(name) for row in parsed]) for name in columns})


def _column(values: list[Any]) -> pa.Array:
    """Python values as one Arrow column; where types are mixed, as JSON text, which decoding reads back."""
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        texts = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
        return pa.array(texts, pa.string())


def _show(record: bytes) -> str:
    text = record.decode("utf-8", "replace").strip()
    return text if len(text) <= SHOW_CHARS else text[:SHOW_CHARS] + "..."


def _rows(shard: Shard, parsed: list[dict[str, Any] | Reject], columns: Sequence[str]) -> Rows:
    good = [(shard.row_start + i, row) for i, row in enumerate(parsed) if isinstance(row, dict)]
    bad = tuple(row for row in parsed if isinstance(row, Reject))
    return Rows(_table([row for _, row in good], columns), np.array([i for i, _ in good], np.int64), bad)


class JsonLines:
    """One JSON object per line."""

    suffixes = (".jsonl", ".ndjson", ".json")

    def files(self, uri: str) -> list[SourceFile]:
        """See Format."""
        return find_files(uri, self.suffixes)

    def measure(self, file: SourceFile) -> Measured:
        """See Format."""
        rows, offsets, head = _measure(file, quoted=False, header=False)
        parsed = [self._parse(0, record) for record in head]
        names = {name: pa.null() for row in parsed if isinstance(row, dict) for name in row}
        if head and not names:
            raise InputError(f"{file.path} cannot be read as JSON lines: its first line is {_show(head[0])!r}")
        return Measured(file, rows, names, offsets, STRIDE)

    def read(self, shard: Shard, columns: Sequence[str]) -> Rows:
        """See Format."""
        records = _shard_records(shard, quoted=False)
        return _rows(shard, [self._parse(shard.row_start + i, record) for i, record in enumerate(records)], columns)

    @staticmethod
    def _parse(row: int, record: bytes) -> dict[str, Any] | Reject:
        try:
            value = json.loads(record)
            if b"\\ud" in record.lower():  # half a surrogate pair is JSON, but no text
                json.dumps(value, ensure_ascii=False).encode()
        except (ValueError, RecursionError):  # malformed JSON, or bytes that are not UTF-8
            value = None
        return value if isinstance(value, dict) else Reject(row, "(row)", _show(record), "a JSON object")


class Csv:
    """Comma-separated values with a header line; every value is text until a task reads it."""

    suffixes = (".csv",)

    def files(self, uri: str) -> list[SourceFile]:
        """See Format."""
        return find_files(uri, self.suffixes)

    def measure(self, file: SourceFile) -> Measured:
        """See Format."""
        rows, offsets, head = _measure(file, quoted=True, header=True)
        if not head:
            raise InputError(f"{file.path} cannot be read as CSV: it has no header line")
        return Measured(file, rows, {name: pa.null() for name in self._header(file.path, head[0])}, offsets, STRIDE)

    def read(self, shard: Shard, columns: Sequence[str]) -> Rows:
        """See Format."""
        top = storage.read_bytes(shard.path, 0, HEADER_BYTES)
        header = self._header(shard.path, next(_records(io.BytesIO(top), quoted=True))[1])
        records = _shard_records(shard, quoted=True)
        return _rows(
            shard, [self._parse(header, shard.row_start + i, record) for i, record in enumerate(records)], columns
        )

    @staticmethod
    def _header(path: str, record: bytes) -> list[str]:
        try:
            return next(csv.reader([record.decode("utf-8-sig")]))
        except (UnicodeDecodeError, csv.Error) as error:
            raise InputError(
                f"{path} cannot be read as CSV: its header is not one line of UTF-8 text: {error}"
            ) from error

    @staticmethod
    def _parse(header: list[str], row: int, record: bytes) -> dict[str, Any] | Reject:
        try:
            values, *more = csv.reader(io.StringIO(record.decode("utf-8"), newline=""))
        except (UnicodeDecodeError, csv.Error):
            return Reject(row, "(row)", _show(record), "CSV in UTF-8")
        if any(more):
            return Reject(row, "(row)", f"a stray quote: {_show(record)}", "quotes around whole values only")
        if len(values) != len(header):
            return Reject(row, "(row)", f"{len(values)} values: {_show(record)}", f"{len(header)} values")
        return {name: value or None for name, value in zip(header, values, strict=True)}
