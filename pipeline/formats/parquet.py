"""Parquet: row counts and types from the footers, rows from the row groups that hold them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from .. import storage
from ..errors import InputError
from ..records import Measured, Rows, Shard, SourceFile
from ..storage_errors import is_store_error, mapped
from .base import find_files

KEPT_BYTES = 512 << 20
"""Of row groups larger than shards, that the shards to come find in memory: decoded, as Arrow has them."""
DECODED_ROWS = 4096
"""At a time: a whole row group at once needs twice the memory it leaves behind."""


@dataclass(frozen=True)
class _Kept:
    """Row groups that were read for a part of them."""

    of: tuple[Any, ...]
    first: int
    table: pa.Table

    def holds(self, of: tuple[Any, ...], shard: Shard) -> bool:
        """Whether a shard's rows are in it."""
        return of == self.of and self.first <= shard.row_start <= self.first + len(self.table) - shard.rows


class Parquet:
    """Apache Parquet files."""

    suffixes = (".parquet", ".pq")

    def __init__(self) -> None:
        self._kept: _Kept | None = None

    def files(self, uri: str) -> list[SourceFile]:
        """See Format."""
        return find_files(uri, self.suffixes)

    def measure(self, file: SourceFile) -> Measured:
        """See Format."""
        fs, path = storage.data_filesystem(file.path)
        with _named(file.path):  # the size is known from the listing: one request for the footer, and no other
            metadata = ds.ParquetFileFormat().make_fragment(path, fs, file_size=file.size_bytes).metadata
            schema = metadata.schema.to_arrow_schema()
            groups = tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
        return Measured(file, metadata.num_rows, dict(zip(schema.names, schema.types, strict=True)), groups=groups)

    def read(self, shard: Shard, columns: Sequence[str]) -> Rows:
        """See Format."""
        of, kept = (shard.path, shard.size_bytes, shard.version, *columns), self._kept
        if kept is None or not kept.holds(of, shard):
            kept = _read(of, shard, columns)
            if len(kept.table) > shard.rows and kept.table.nbytes <= KEPT_BYTES:
                self._kept = kept
        rows = kept.table.slice(shard.row_start - kept.first, shard.rows)
        if len(rows) != shard.rows:
            raise InputError(f"{shard.path}: got {len(rows)} rows from row {shard.row_start}, expected {shard.rows}")
        return Rows(rows, np.arange(shard.row_start, shard.row_start + shard.rows))


def _read(of: tuple[Any, ...], shard: Shard, columns: Sequence[str]) -> _Kept:
    """The row groups that hold a shard's rows; where these are too many to keep, little more than the shard's rows."""
    with _reading(shard.path) as source:
        parquet = pq.ParquetFile(source, pre_buffer=True)
        groups, first = _row_groups(parquet.metadata, shard.row_start, shard.rows)
        batches: deque[pa.RecordBatch] = deque()
        end, size_bytes = first, 0
        for batch in parquet.iter_batches(DECODED_ROWS, groups, list(columns)):
            batches.append(batch)
            end, size_bytes = end + len(batch), size_bytes + batch.nbytes
            if size_bytes > KEPT_BYTES:
                while batches and first + len(batches[0]) <= shard.row_start:
                    first += len(batches.popleft())
                if end >= shard.row_start + shard.rows:
                    break
        return _Kept(of, first, pa.Table.from_batches(batches) if batches else parquet.schema_arrow.empty_table())


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


@contextmanager
def _reading(path: str) -> Iterator[BinaryIO]:
    with storage.reading(path) as source, _named(path):
        yield source


@contextmanager
def _named(path: str) -> Iterator[None]:
    """What pyarrow raises, as an InputError that names the file, or as the store's error that it is."""
    with mapped(path):
        try:
            yield
        except (pa.ArrowInvalid, pa.ArrowKeyError, pa.ArrowNotImplementedError) as error:
            raise InputError(f"{path} cannot be read as Parquet: {error}") from error
        except OSError as error:
            if is_store_error(error):
                raise
            raise InputError(f"{path} cannot be read as Parquet: {error}") from error
