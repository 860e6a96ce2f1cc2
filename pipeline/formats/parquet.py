"""Parquet: row counts and types from the footers, rows from the row groups that hold them."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from .. import storage
from ..errors import InputError
from ..observe import printable
from ..records import Measured, Reject, Rows, Shard, SourceFile
from .base import Listing, readable_as

KEPT_BYTES = 128 << 20
"""Of row groups larger than shards, that stays in memory for the shards to come: the rows last decoded, as Arrow has them."""
SHOW_CHARS = 80
DECODED_ROWS = 4096
"""At a time: a whole row group at once needs twice the memory it leaves behind."""


class _Groups:
    """The row groups that hold a shard's rows, decoded from first to last as far as rows are asked for.

    Args:
        of: What tells them from others: the file in its version, and columns.
        shard: Some of their rows.
        columns: Of the file.
    """

    def __init__(self, of: tuple[Any, ...], shard: Shard, columns: Sequence[str]) -> None:
        self._of, self._path = of, shard.path
        with ExitStack() as files, _readable(shard.path):
            source = files.enter_context(storage.reading(shard.path))
            parquet = pq.ParquetFile(source, pre_buffer=True, page_checksum_verification=True)
            groups, self._first = _row_groups(parquet.metadata, shard.row_start, shard.rows)
            self.rows = sum(parquet.metadata.row_group(group).num_rows for group in groups)
            self._coming = parquet.iter_batches(DECODED_ROWS, groups, list(columns))
            self._files = files.pop_all()
        self._kept: deque[pa.RecordBatch] = deque()
        self._kept_bytes, self._end, self._last = 0, self._first, self._first + self.rows

    def holds(self, of: tuple[Any, ...], shard: Shard) -> bool:
        """Whether a shard's rows are in them, and not gone from memory."""
        return of == self._of and self._first <= shard.row_start and shard.row_start + shard.rows <= self._last

    def read(self, shard: Shard) -> pa.Table:
        """A shard's rows; fewer where the file has fewer."""
        with _readable(self._path):
            while self._end < shard.row_start + shard.rows:
                batch = next(self._coming, None)
                if batch is None:
                    break
                self._kept.append(batch)
                self._kept_bytes, self._end = self._kept_bytes + batch.nbytes, self._end + len(batch)
                self._forget_before(shard.row_start)
        if not self._kept:
            return pa.table({})
        return pa.Table.from_batches(self._kept).slice(shard.row_start - self._first, shard.rows)

    def _forget_before(self, row: int) -> None:
        while self._kept and self._kept_bytes > KEPT_BYTES and self._first + len(self._kept[0]) <= row:
            gone = self._kept.popleft()
            self._kept_bytes, self._first = self._kept_bytes - gone.nbytes, self._first + len(gone)

    def close(self) -> None:
        """Close the file."""
        self._files.close()


class Parquet:
    """Apache Parquet files."""

    suffixes: tuple[str, ...] = (".parquet", ".pq")

    def __init__(self) -> None:
        self._large: _Groups | None = None
        self._reading = threading.Lock()

    def files(self, listing: Listing) -> list[SourceFile]:
        """See Format."""
        return listing.pick(self.suffixes)

    def measure(self, file: SourceFile) -> Measured:
        """See Format."""
        fs, path = storage.data_filesystem(file.path)
        with _readable(file.path):  # the size is known from the listing: one request for the footer, and no other
            metadata = ds.ParquetFileFormat().make_fragment(path, fs, file_size=file.size_bytes).metadata
            schema = metadata.schema.to_arrow_schema()
            groups = tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
        repeated = tuple(name for name, times in Counter(schema.names).items() if times > 1)
        columns = dict(zip(schema.names, schema.types, strict=True))
        return Measured(file, metadata.num_rows, columns, groups=groups, repeated=repeated)

    def read(self, shard: Shard, columns: Sequence[str]) -> Rows:
        """See Format. Row groups larger than the shard are decoded once for all shards in them; others side by side."""
        of = (shard.path, shard.size_bytes, shard.version, *columns)
        with self._reading:
            groups = self._large if self._large is not None and self._large.holds(of, shard) else None
            groups = groups or _Groups(of, shard, columns)
            large = groups.rows > shard.rows
            if large:
                table = self._read_large(groups, shard)
        if not large:
            with closing(groups):
                table = groups.read(shard)
        if len(table) != shard.rows:
            raise InputError(f"{shard.path}: got {len(table)} rows from row {shard.row_start}, expected {shard.rows}")
        return _checked(shard, table)

    def _read_large(self, groups: _Groups, shard: Shard) -> pa.Table:
        """Rows of groups that stay open; after an error they are opened anew."""
        before, self._large = self._large, None
        if before is not None and before is not groups:
            before.close()
        table = groups.read(shard)
        self._large = groups
        return table


def _checked(shard: Shard, table: pa.Table) -> Rows:
    """Rows whose texts are UTF-8, and the others as rejects: Arrow looks only where it is asked to."""
    row_N = np.arange(shard.row_start, shard.row_start + shard.rows)
    try:
        table.validate(full=True)
        return Rows(table, row_N)
    except pa.ArrowInvalid:
        rejects = _bad_texts(table, row_N)
    good_N = ~np.isin(row_N, [reject.row for reject in rejects])
    table = table.filter(pa.array(good_N))
    with _readable(shard.path):
        table.validate(full=True)  # what else is wrong with it
    return Rows(table, row_N[good_N], tuple(rejects))


def _bad_texts(table: pa.Table, row_N: np.ndarray) -> list[Reject]:
    rejects: dict[int, Reject] = {}
    for name in table.column_names:
        if pa.types.is_string(table[name].type) or pa.types.is_large_string(table[name].type):
            for row, value in zip(row_N.tolist(), table[name].cast(pa.large_binary()).to_pylist(), strict=True):
                if value is not None and (text := value.decode("utf-8", "replace")).encode() != value:
                    rejects.setdefault(row, Reject(row, name, printable(text[:SHOW_CHARS]), "text in UTF-8"))
    return list(rejects.values())


def _row_groups(metadata: pq.FileMetaData, start: int, rows: int) -> tuple[list[int], int]:
    """Row groups that overlap [start, start + rows), and the first row of the first of them."""
    groups: list[int] = []
    first, position = 0, 0
    for group in range(metadata.num_row_groups):
        size = metadata.row_group(group).num_rows
        if position < start + rows and position + size > start:
            first = position if not groups else first
            groups.append(group)
        position += size
    return groups, first


def _readable(path: str) -> AbstractContextManager[None]:
    return readable_as("Parquet", path)
