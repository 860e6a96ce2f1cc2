"""JSON lines and CSV: one scan finds where rows start; a shard then reads only its own bytes.

A row is a record that is not blank. In CSV a line break inside quotes belongs to its record: it ends where the number
of quote characters so far is even (RFC 4180), which needs no parser.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ..errors import InputError
from ..observe import printable
from ..records import Measured, Reject, Rows, Shard, SourceFile
from ..values import json_column, json_field
from .base import Listing
from .streams import BUFFER_BYTES, TextBytes, open_text, with_compressed

csv.field_size_limit(1 << 30)  # the text of an image is longer than the module's own 128 KiB

STRIDE = 256
"""Rows between two recorded byte offsets: a shard reads at most this many rows that are not its own."""
LOOK_ROWS = 100
"""Rows of a JSON-lines file whose keys are its columns, unless `find_columns` looks for others."""
SHOW_CHARS = 80
MAX_DEPTH = 32
"""Levels of lists and objects in a row of JSON; more are no data, and could exhaust the stack."""


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
    """Rows, byte offset of every STRIDE-th with the end of the last behind, and the first records (with the header)."""
    offsets, rows, head, stop = [], 0, [], 0
    with open_text(file.path) as source:
        for position, (offset, record) in enumerate(_records(source, quoted)):
            stop = offset + len(record)
            if position < LOOK_ROWS:
                head.append(record)
            if header and position == 0:
                continue
            if rows % STRIDE == 0:
                offsets.append(offset)
            rows += 1
    return rows, (*offsets, stop), head


def _own_records(shard: Shard, data: bytes, quoted: bool) -> list[bytes]:
    """A shard's records in the bytes between its two offsets."""
    records = [record for _, record in _records(io.BytesIO(data), quoted)]
    skip = shard.row_start % STRIDE
    records = records[skip : skip + shard.rows]
    if len(records) != shard.rows:
        raise InputError(f"{shard.path}: got {len(records)} rows from row {shard.row_start}, expected {shard.rows}")
    return records


def _show(record: bytes) -> str:
    text = printable(record[: 4 * SHOW_CHARS].decode("utf-8", "replace").strip())
    return text if len(text) <= SHOW_CHARS else text[:SHOW_CHARS] + "..."


def _parsed_rows(
    shard: Shard, parsed: list[dict[str, Any] | Reject]
) -> tuple[list[dict[str, Any]], Any, tuple[Reject, ...]]:
    """Rows that could be parsed, the position of each in the file, and the others."""
    good = [(shard.row_start + i, row) for i, row in enumerate(parsed) if isinstance(row, dict)]
    bad = tuple(row for row in parsed if isinstance(row, Reject))
    return [row for _, row in good], np.array([i for i, _ in good], np.int64), bad


class _RepeatedKeyError(ValueError):
    """An object of JSON has a key twice: which of the values counts, nobody knows."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise _RepeatedKeyError(printable(f"key {name[:SHOW_CHARS]!r} more than once"))
    return found


def _is_deep(value: Any) -> bool:
    """Whether lists and objects are nested deeper than arrays can be: what comes later walks them by recursion."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        inner = [one for one in level if isinstance(one, list | dict)]
        level = [one for each in inner for one in (each if isinstance(each, list) else each.values())]
    return bool(level)


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


class JsonLines:
    """One JSON object per line. A key that a row lacks is null in it; a row with a key twice is rejected."""

    suffixes = with_compressed(".jsonl", ".ndjson", ".json")

    def __init__(self) -> None:
        self._bytes = TextBytes()

    def files(self, listing: Listing) -> list[SourceFile]:
        """See Format."""
        return listing.pick(self.suffixes)

    def measure(self, file: SourceFile) -> Measured:
        """See Format."""
        rows, offsets, head = _measure(file, quoted=False, header=False)
        parsed = [self._parse(0, record) for record in head]
        names = {name: pa.null() for row in parsed if isinstance(row, dict) for name in row}
        if head and not names:
            raise InputError(f"{file.path} cannot be read as JSON lines: its first line is {_show(head[0])!r}")
        return Measured(file, rows, names, offsets, STRIDE)

    def find_columns(self, file: SourceFile, names: Collection[str] | None) -> list[str]:
        """Keys of a file's rows, in order of appearance: all, or those of some names that any row has.

        It reads the file once more, to its end or until all names are found.
        """
        found: dict[str, None] = {}
        sought = None if names is None else [json.dumps(name).encode() for name in names]
        with open_text(file.path) as source:
            for _, record in _records(source, quoted=False):
                # Parsing takes ten times as long as looking; a key may be spelt with escapes.
                if sought is None or b"\\u" in record or any(name in record for name in sought):
                    row = self._parse(0, record)
                    found |= dict.fromkeys(
                        name for name in (row if isinstance(row, dict) else ()) if names is None or name in names
                    )
                if names is not None and len(found) == len(names):
                    break
        return list(found)

    def read(self, shard: Shard, columns: Sequence[str]) -> Rows:
        """See Format."""
        records = _own_records(shard, self._bytes.read(shard), quoted=False)
        parsed = [self._parse(shard.row_start + i, record) for i, record in enumerate(records)]
        rows, row_N, rejects = _parsed_rows(shard, parsed)
        arrays = [json_column([row.get(name) for row in rows]) for name in columns]
        schema = pa.schema([json_field(name, array.type) for name, array in zip(columns, arrays, strict=True)])
        return Rows(pa.table(arrays, schema), row_N, rejects)

    @staticmethod
    def _parse(row: int, record: bytes) -> dict[str, Any] | Reject:
        try:
            value = _DECODER.decode(record.decode("utf-8-sig").strip())
            if record.count(b"[") + record.count(b"{") > MAX_DEPTH and _is_deep(value):
                return Reject(row, "(row)", _show(record), f"a JSON object of at most {MAX_DEPTH} levels")
            if b"\\ud" in record.lower():  # half a surrogate pair is JSON, but no text
                json.dumps(value, ensure_ascii=False).encode()
        except _RepeatedKeyError as error:
            return Reject(row, "(row)", f"{error}: {_show(record)}", "a JSON object, every key once")
        except (ValueError, RecursionError):  # malformed JSON, or bytes that are not UTF-8
            value = None
        return value if isinstance(value, dict) else Reject(row, "(row)", _show(record), "a JSON object")


class Csv:
    """Comma-separated values with a header line; every value is text until a task reads it."""

    suffixes = with_compressed(".csv")

    def __init__(self) -> None:
        self._bytes = TextBytes()

    def files(self, listing: Listing) -> list[SourceFile]:
        """See Format."""
        return listing.pick(self.suffixes)

    def measure(self, file: SourceFile) -> Measured:
        """See Format."""
        rows, offsets, head = _measure(file, quoted=True, header=True)
        if not head:
            raise InputError(f"{file.path} cannot be read as CSV: it has no header line")
        names = self._header(file.path, head[0])
        repeated = tuple(name for name, times in Counter(names).items() if times > 1)
        return Measured(file, rows, dict.fromkeys(names, pa.null()), offsets, STRIDE, repeated=repeated)

    def read(self, shard: Shard, columns: Sequence[str]) -> Rows:
        """See Format."""
        with open_text(shard.path) as source:
            top = source.read(BUFFER_BYTES)
        header = self._header(shard.path, next(_records(io.BytesIO(top), quoted=True))[1])
        records = _own_records(shard, self._bytes.read(shard), quoted=True)
        parsed = [self._parse(header, shard.row_start + i, record) for i, record in enumerate(records)]
        rows, row_N, rejects = _parsed_rows(shard, parsed)
        names = [name for name in columns if name in header]
        return Rows(
            pa.table({name: pa.array([row[name] for row in rows], pa.string()) for name in names}), row_N, rejects
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
