"""Queries as rows: read whole and checked when a run is frozen, as arrays when they are tuned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from .choices import ProducerSection
from .decode import decode
from .errors import InputError
from .extensions import prepared
from .observe import say
from .plan import make_shards
from .reader import Reader, check_columns
from .records import Column
from .spec import QueriesSection
from .values import as_text, concat_rows

if TYPE_CHECKING:
    from .batches import Inputs
    from .tasks.base import Task

WHOLE_FILE_ROWS = 1 << 62


def read_queries(section: QueriesSection, columns: Sequence[Column], classes: Sequence[str] | None) -> pa.Table:
    """All query rows: `query_id` first, then every column of their files.

    Args:
        section: From the spec.
        columns: What the task reads.
        classes: The corpus's, for image folders.

    Raises:
        InputError: Files, rows or ids are missing, or a row cannot be decoded: a query is never silently smaller.
    """
    reader = Reader(section.uri, section.format, classes)
    if reader.name == "image_folder" and classes is None:
        raise InputError(
            f"queries {section.uri}: folders of images have labels by position", "list corpus.classes in label order"
        )
    id_column = section.query_id or ("path" if reader.name == "image_folder" else "query_id")
    files = [measured for file in reader.survey() if (measured := reader.measure(file)).rows]
    tables = []
    for measured in reader.with_columns(files, None):
        file = measured.file
        check_columns(measured, columns, {"queries.query_id": [id_column], "queries": measured.repeated})
        for shard in make_shards([measured], WHOLE_FILE_ROWS):
            rows = reader.read(shard, list(measured.columns))
            _, _, rejects = decode(rows.table, rows.row_N, columns)
            for reject in sorted([*rows.rejects, *rejects], key=lambda one: one.row):
                raise InputError(
                    f"query row {reject.row} of {file.path}: column {reject.column}: got {reject.got}, expected {reject.expected}"
                )
            id_N = as_text(rows.table, id_column)
            if id_N.null_count:
                raise InputError(
                    f"query row {rows.row_N[id_N.is_null().index(True).as_py()]} of {file.path}: {id_column} is null"
                )
            rest = rows.table.drop_columns(["query_id"]) if "query_id" in rows.table.column_names else rows.table
            tables.append(rest.add_column(0, "query_id", id_N))
    if not tables:
        raise InputError(f"queries {section.uri}: no rows", "a query is one or more rows that share a query_id")
    return concat_rows(tables)


def checked_queries(
    section: QueriesSection, columns: Sequence[Column], classes: Sequence[str] | None, task: Task
) -> pa.Table:
    """All query rows, seen to be such as the task's model takes; says which are cut. Raises as the functions beside it."""
    table = read_queries(section, columns, classes)
    for query_id, inputs in query_inputs(table, columns, task).items():
        if inputs.overlong:
            say(
                f"warning: query {query_id!r}: {inputs.overlong} of its rows are longer than task.max_tokens and were cut"
            )
    return table


def require_enough_rows(table: pa.Table, producer: ProducerSection) -> None:
    """See that of every query some rows can be held out, if the producer wants that. Raises InputError."""
    if not getattr(producer, "validation_fraction", 0):
        return
    for query_id, rows in Counter(table["query_id"].to_pylist()).items():
        if rows < 2:
            raise InputError(
                f"query {query_id!r}: got {rows} row, expected 2 or more: producer.validation_fraction holds some of them out",
                "give the same query_id to all rows of a query, or set producer.validation_fraction to 0",
            )


def query_inputs(table: pa.Table, columns: Sequence[Column], task: Task) -> dict[str, Inputs]:
    """Query id -> its rows as the task's model takes them, in order of first appearance.

    Raises:
        InputError: A row cannot be decoded, is no text that the model can read, or one that would be split: a producer takes the
            mean over rows, in which a window of one token would count as much as a full one.
    """
    found = {}
    for query_id, arrays in decoded_queries(table, columns).items():
        found[query_id] = prepared(task, arrays)
        for row, got in found[query_id].bad.items():
            raise InputError(f"query {query_id!r}, row {row}: got {got}, expected tokens that can be scored")
        if found[query_id].items > len(next(iter(arrays.values()))):
            raise InputError(
                f"query {query_id!r}: a row is longer than task.max_tokens, and windows are for training examples",
                "give it as several rows of one query_id, each of which counts alike; or set task.overlong: cut",
            )
    return found


def decoded_queries(table: pa.Table, columns: Sequence[Column]) -> dict[str, dict[str, np.ndarray]]:
    """Query id -> task column -> [rows of the query, *shape], in order of first appearance. Raises InputError."""
    arrays, good_N, rejects = decode(table, np.arange(len(table)), columns)
    if not good_N.all():
        raise InputError(f"queries.parquet row {rejects[0].row}: got {rejects[0].got}, expected {rejects[0].expected}")
    id_N = np.asarray(table["query_id"].to_pylist())
    return {
        query_id: {name: array[id_N == query_id] for name, array in arrays.items()}
        for query_id in dict.fromkeys(id_N.tolist())
    }
