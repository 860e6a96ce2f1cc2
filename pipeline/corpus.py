"""The corpus as rows: list the files, measure them once, then read any shard as checked examples.

A row is addressed by its file and its position in it; with no id column that address is its id.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from . import storage
from .decode import decode
from .errors import InputError, PipelineError, SpecError
from .formats.base import relative_path
from .reader import Reader, check_columns
from .records import Column, Measured, Reject, Shard, SourceFile
from .spec import CorpusSection
from .values import as_text

LISTING_THREADS = 16
MEASURED_AT_ONCE = 64
"""Files that a thread is handed together: handing over takes as long as some footers."""
MAX_DUPLICATES_SHOWN = 5


@dataclass(frozen=True)
class Examples:
    """Rows that can be scored, checked and decoded.

    Args:
        example_id_N: Arrow strings, none null.
        source_N: Arrow strings, null where there is none.
        row_N: Position of each in its file.
        arrays: Task column -> [N, *shape].
        rejects: The shard's other rows.
        num_tokens_N: Tokens of each whose loss counts; null where examples are no texts.
    """

    example_id_N: pa.Array
    source_N: pa.Array
    row_N: np.ndarray
    arrays: dict[str, np.ndarray]
    rejects: list[Reject]
    num_tokens_N: np.ndarray | None = None

    def without(self, bad: Mapping[int, tuple[str, str, str]]) -> Examples:
        """These less some, which become rejects.

        Args:
            bad: Position -> column, what was got in it, what was expected.
        """
        if not bad:
            return self
        good_N = np.ones(len(self.row_N), bool)
        good_N[list(bad)] = False
        rejects = [Reject(int(self.row_N[i]), *why, example_id=self.example_id_N[i].as_py()) for i, why in bad.items()]
        return Examples(
            example_id_N=self.example_id_N.filter(pa.array(good_N)),
            source_N=self.source_N.filter(pa.array(good_N)),
            row_N=self.row_N[good_N],
            arrays={name: array[good_N] for name, array in self.arrays.items()},
            rejects=sorted([*self.rejects, *rejects], key=lambda reject: reject.row),
            num_tokens_N=None if self.num_tokens_N is None else self.num_tokens_N[good_N],
        )


class Corpus:
    """The training examples that a corpus section names.

    Args:
        section: From the spec; `classes` of image folders are filled in by `list_files`.

    Raises:
        InputError: No file fits the section.
    """

    def __init__(self, section: CorpusSection) -> None:
        self.section = section
        self._reader = Reader(section.uri, section.format, section.classes)

    @property
    def resolved(self) -> CorpusSection:
        """The section with format, classes and an absolute URI filled in."""
        return self.section.model_copy(
            update={
                "uri": storage.absolute(self.section.uri),
                "format": self._reader.name,
                "classes": self._reader.classes,
            }
        )

    def list_files(self) -> list[SourceFile]:
        """Files in order, unopened. Raises InputError, StorageError."""
        return self._reader.files()

    def survey_files(self) -> list[SourceFile]:
        """Files in order, unopened; says which are not read. Raises as Reader.survey does."""
        return self._reader.survey()

    def rows(self, file: SourceFile) -> int:
        """Rows of one file. Raises InputError, StorageError."""
        return self._reader.measure(file).rows

    def measure(
        self, files: Sequence[SourceFile], columns: Sequence[Column], may_be_empty: bool = False
    ) -> list[Measured]:
        """Open every file once for its rows and columns, and check that it has what the run reads.

        Raises:
            InputError: A file cannot be read, lacks a column or has it in a type that cannot be decoded; the corpus is empty.
        """
        each = max(1, min(MEASURED_AT_ONCE, len(files) // (8 * LISTING_THREADS)))
        parts = [files[start : start + each] for start in range(0, len(files), each)]
        with ThreadPoolExecutor(LISTING_THREADS) as pool:
            done = pool.map(lambda part: [self._reader.measure(file) for file in part], parts)
            measured = [one for part in done for one in part]
        asked = self._asked()
        names = [name for column in columns for name in column.columns] + [
            name for some in asked.values() for name in some
        ]
        measured = self._reader.with_columns(measured, names)
        checked = None
        for one in measured:
            if (
                one.rows and (one.columns, one.repeated) != checked
            ):  # files of a corpus mostly are alike: one check serves all
                check_columns(one, columns, asked)
                checked = one.columns, one.repeated
        if not may_be_empty and not sum(one.rows for one in measured):
            raise InputError(f"corpus {self.section.uri} has no rows in {len(files)} file(s)")
        return measured

    def _asked(self) -> dict[str, list[str]]:
        """Field of the section -> the columns that it names."""
        return {
            "corpus.example_id": [self.section.example_id] if self.section.example_id else [],
            "corpus.source": [self.section.source] if self.section.source else [],
            "corpus.payload": self.section.payload or [],
        }

    def read(self, shard: Shard, columns: Sequence[Column]) -> Examples:
        """Read and decode one shard.

        Raises:
            InputError: The file changed since it was frozen (of an image folder: an image is gone), or cannot be read at all.
        """
        self._check_unchanged(shard)
        ids, sources = self.section.example_id, self.section.source
        named = [name for column in columns for name in column.columns] + [name for name in (ids, sources) if name]
        rows = self._reader.read(shard, list(dict.fromkeys(named)))
        id_N = as_text(rows.table, ids) if ids else self._made_ids(shard, rows.row_N)
        source_N = as_text(rows.table, sources) if sources else pa.nulls(len(rows.table), pa.string())
        arrays, good_N, rejects = decode(rows.table, rows.row_N, columns)
        position = {int(row): i for i, row in enumerate(rows.row_N)} if rejects else {}
        rejects = [replace(reject, example_id=id_N[position[reject.row]].as_py()) for reject in rejects]
        if id_N.null_count:
            missing_N = pc.is_null(id_N).to_numpy(zero_copy_only=False) & good_N
            rejects += [Reject(int(row), str(ids), "null", "an id") for row in rows.row_N[missing_N]]
            arrays = {name: array[~missing_N[good_N]] for name, array in arrays.items()}
            good_N &= ~missing_N
        mask = pa.array(good_N)
        rejects = sorted([*rows.rejects, *rejects], key=lambda reject: reject.row)
        return Examples(id_N.filter(mask), source_N.filter(mask), rows.row_N[good_N], arrays, rejects)

    def _check_unchanged(self, shard: Shard) -> None:
        if shard.members is not None:
            return  # each image is read by name; a missing one is an error of its own
        size_bytes, version = storage.stat(shard.path)
        if (size_bytes, version) != (shard.size_bytes, shard.version):
            raise InputError(
                f"{shard.path} changed since the corpus was frozen: got {size_bytes} bytes of version {version}, "
                f"expected {shard.size_bytes} of {shard.version}",
                "put the file back, or start a new run",
            )

    def _made_ids(self, shard: Shard, row_N: np.ndarray) -> pa.Array:
        path = relative_path(shard.path, self._reader.root)
        if shard.members is not None:
            return pa.array([f"{path}/{shard.members[row - shard.row_start]}" for row in row_N], pa.string())
        return pc.binary_join_element_wise(path, pa.array(row_N).cast(pa.string()), "#")

    def payload(self, shard: Shard, rows: Sequence[int], names: Sequence[str]) -> pa.Table:
        """Payload columns of single rows of a shard, in the order asked. Raises InputError as `read` does."""
        self._check_unchanged(shard)
        if shard.members is not None:  # each image is a file of its own
            picked = [shard.members[row - shard.row_start] for row in rows]
            return self._reader.read(replace(shard, members=tuple(picked), rows=len(rows)), list(names)).table
        if shard.byte_start is None:  # row groups between the first and the last
            shard = replace(shard, row_start=min(rows), rows=max(rows) - min(rows) + 1)
        read = self._reader.read(shard, list(names))
        return read.table.take(np.searchsorted(read.row_N, np.asarray(rows)))

    def check_ids(self, shards: Sequence[Shard]) -> None:
        """See that no example id comes twice, exactly and with memory that spills to disk.

        Raises:
            InputError: Some do; the first few are named with their files and rows.
        """
        name = self.section.example_id
        if not name or not self.section.check_ids:
            return
        import duckdb

        schema = pa.schema([("id", pa.string())])
        failed: list[PipelineError] = []

        def batches() -> Iterator[pa.RecordBatch]:
            try:
                yield from (pa.record_batch([id_N], schema=schema) for _, _, id_N in self._ids(shards, name))
            except PipelineError as error:  # DuckDB makes a text of it
                failed.append(error)

        with duckdb.connect() as connection:
            connection.register("ids", pa.RecordBatchReader.from_batches(schema, batches()))
            twice = connection.execute(
                "SELECT id FROM ids WHERE id IS NOT NULL GROUP BY id HAVING count(*) > 1 "
                f"ORDER BY id LIMIT {MAX_DUPLICATES_SHOWN}"
            ).fetchall()
        if failed:
            raise failed[0]
        if twice:
            places = self._places(shards, name, {str(row[0]) for row in twice})
            shown = "\n".join(f"  {value!r}: {' and '.join(where)}" for value, where in sorted(places.items()))
            raise InputError(f"corpus column {name!r} must be unique, but these ids come more than once:\n{shown}")

    def _ids(self, shards: Sequence[Shard], name: str) -> Iterator[tuple[str, np.ndarray, pa.Array]]:
        """File, positions in it, and ids, shard after shard."""
        for shard in shards:
            rows = self._reader.read(shard, [name])
            yield shard.path, rows.row_N, as_text(rows.table, name)

    def _places(self, shards: Sequence[Shard], name: str, wanted: set[str]) -> dict[str, list[str]]:
        places: dict[str, list[str]] = {}
        for path, row_N, id_N in self._ids(shards, name):
            for row, value in zip(row_N, id_N.to_pylist(), strict=True):
                if value in wanted and len(places.setdefault(value, [])) < 2:
                    places[value].append(f"{path} row {row}")
        return places


def payload_names(section: CorpusSection, columns: Sequence[Column]) -> list[str]:
    """Columns carried into the ranked table: the section's, or those the task reads."""
    if section.payload is not None:
        return section.payload
    return list(dict.fromkeys(name for column in columns for name in column.columns))


def require_free_names(names: Sequence[str], taken: Collection[str]) -> None:
    """See that payload columns do not carry the names of the ranked table's own. Raises SpecError."""
    if clash := sorted(set(names) & set(taken)):
        raise SpecError(
            f"corpus.payload: {', '.join(clash)}: the ranked table has columns of that name", "leave them out"
        )
