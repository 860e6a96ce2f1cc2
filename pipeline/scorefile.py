"""A committed score file, read no further than its reader needs: the footer first, then columns of row groups.

What is read is checked page by page against the checksums in the file, so that not every byte must be read to trust some.
The few bytes of a page's header have none: only the commit's digest of the whole file, which `verify` reads, vouches for those.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from . import storage
from .errors import ArtifactError
from .records import SCORES
from .storage_errors import is_store_error

CONSTANT_TYPES = {"query_id": pa.string(), "shard_id": pa.int32(), "source": pa.string()}
"""Types of columns that may be constant."""
_Result = TypeVar("_Result")
Range = tuple[Any, Any]
_MEND = "`mirrorscope verify --mend RUN_URI`, then the run's command again: what is damaged is made anew"


class ScoreFile:
    """An open score file; a context manager. For one thread.

    Args:
        uri: Where it is.
        rows: How many rows its commit promises.
        size_bytes: The size of the file by its commit.
        constants: Column -> the one value that all its rows have.

    Raises:
        InputError: It is not there.
        ArtifactError: It is damaged, or another file than was committed.
        StorageError: The store refused.
    """

    def __init__(self, uri: str, rows: int, size_bytes: int, constants: Mapping[str, Any]) -> None:
        self._uri, self._constants = uri, constants
        self._source: pa.NativeFile | None = None
        self._parquet: pq.ParquetFile | None = None
        self._metadata, found_bytes = self._tried(lambda parquet: (parquet.metadata, self._size_bytes()))
        got, expected = {"rows": self._metadata.num_rows, "bytes": found_bytes}, {"rows": rows, "bytes": size_bytes}
        for group in self.groups:
            for column, value in constants.items():
                lowest, highest = self.range(group, column) or (value, value)
                got[column], expected[column] = lowest if lowest != value else highest, value
        for name in expected:
            if got[name] != expected[name]:
                self.__exit__()
                what = f"{uri} is not what its commit says: got {name} {got[name]}, expected {expected[name]}"
                raise ArtifactError(what, _MEND)

    def __enter__(self) -> ScoreFile:
        return self

    def __exit__(self, *_: object) -> None:
        if self._source is not None:
            self._source.close()
        self._source = self._parquet = None

    @property
    def groups(self) -> list[int]:
        """Its row groups."""
        return list(range(self._metadata.num_row_groups))

    def range(self, group: int, column: str) -> Range | None:
        """Lowest and highest value of a column in a row group, where the file says it."""
        statistics = self._metadata.row_group(group).column(SCORES.get_field_index(column)).statistics
        return (statistics.min, statistics.max) if statistics is not None and statistics.has_min_max else None

    def read(self, groups: Sequence[int], columns: Sequence[str]) -> pa.Table:
        """Columns of SCORES of some row groups, one after the other. Raises ArtifactError, StorageError."""
        there = self._metadata.schema.to_arrow_schema().names  # in the order of SCORES, losses perhaps by another name
        names = [there[SCORES.get_field_index(column)] for column in columns]
        read = self._tried(lambda parquet: parquet.read_row_groups(list(groups), names, use_threads=False))
        return read.select(names).rename_columns(list(columns))

    def take(self, groups: Sequence[int], position_N: np.ndarray, thin: pa.Table | None = None) -> pa.Table:
        """Whole rows by their ascending positions in some row groups put together; reads only those that hold any.

        Args:
            groups: Row groups.
            position_N: Positions.
            thin: What was read of these groups already.
        """
        known = pa.table({}) if thin is None else thin.take(pa.array(position_N))
        unread = [name for name in SCORES.names if name not in self._constants and name not in known.column_names]
        pieces, start = [], 0
        for group in groups:
            rows = self._metadata.row_group(group).num_rows
            first, last = np.searchsorted(position_N, (start, start + rows))
            if last > first:
                pieces.append(self.read([group], unread).take(pa.array(position_N[first:last] - start)))
            start += rows
        if not pieces:
            return SCORES.empty_table()
        read = pa.concat_tables(pieces)
        columns = {name: read[name] for name in unread} | {name: known[name] for name in known.column_names}
        for name, value in self._constants.items():
            columns[name] = pa.repeat(pa.scalar(value, CONSTANT_TYPES[name]), len(position_N))
        return pa.table([columns[name] for name in SCORES.names], names=SCORES.names).cast(SCORES)

    def _tried(self, action: Callable[[pq.ParquetFile], _Result]) -> _Result:
        """Do something with the open file; opened again where the store failed and may recover."""

        def attempt() -> _Result:
            try:
                return action(self._opened())
            except (pa.ArrowException, OSError) as error:
                self.__exit__()
                if isinstance(error, OSError) and is_store_error(error):
                    raise
                raise ArtifactError(f"{self._uri} is damaged: {error}", _MEND) from error

        return storage.retried(self._uri, attempt)

    def _opened(self) -> pq.ParquetFile:
        if self._parquet is None:
            fs, path = storage.data_filesystem(self._uri)
            self._source = fs.open_input_file(path)
            self._parquet = pq.ParquetFile(self._source, page_checksum_verification=True)
        return self._parquet

    def _size_bytes(self) -> int:
        assert self._source is not None
        return int(self._source.size())
