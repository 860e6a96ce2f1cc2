"""The top share of every source's examples, per query: what a data filter keeps. By DuckDB, which spills what does not fit.

Reads: the score files that commits name.
Writes: topk/selected/query_id=Q/part-NNNNN.parquet, SELECTED.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.dataset as ds

from . import storage
from .artifacts import Run
from .folder import parallel, partition
from .records import SCORES, SELECTED, stored
from .topk import value_sql

FOLDER = "selected"
ROWS_PER_FILE = 1 << 20
# The fraction is written as a decimal: in floating point .00001 x 300,000 is above 3, and its ceiling 4.
_SQL = """
    SELECT query_id, source, example_id, value, place, shard_id, row
    FROM (SELECT *, row_number() OVER (PARTITION BY source ORDER BY value DESC, example_id) AS place,
                 count(*) OVER (PARTITION BY source) AS examples
          FROM (SELECT query_id, source, example_id, shard_id, row, {value} AS value FROM scores))
    WHERE place <= ceil({fraction} * examples)
    ORDER BY source, place
"""


def select(run: Run) -> dict[str, str]:
    """Write the selection of every query; path below topk/ -> sha256. Objects of an earlier one are deleted.

    Raises:
        ArtifactError, InputError, StorageError: As commits are read.
    """
    written: dict[str, str] = {}
    if run.spec.rank.fraction is not None:
        named = [path for receipt in run.receipts() if receipt.rows for path in receipt.files]
        for query_id in run.query_ids:
            paths = [path for path in named if path.startswith(_folder(query_id))]
            written |= _selected(run, query_id, paths) if paths else {}
    stale = [path for path in storage.objects(run.uri("topk", FOLDER)) if f"{FOLDER}/{path}" not in written]
    parallel(lambda path: storage.remove(run.uri("topk", FOLDER, path)), stale)
    return written


def _folder(query_id: str) -> str:
    return f"scores/{partition(query_id)}/"


def _selected(run: Run, query_id: str, paths: Sequence[str]) -> dict[str, str]:
    """Write one query's selection out of its score files; path below topk/ -> sha256."""
    import duckdb

    section, written = run.spec.rank, {}
    filesystem, root = storage.data_filesystem(run.uri())
    scores = ds.dataset([f"{root}/{path}" for path in paths], filesystem=filesystem, format="parquet")
    names = dict(zip(SCORES.names, stored(SCORES, run.per_token).names, strict=True))
    value = value_sql(section.transform, section.eps, names)
    with duckdb.connect() as connection:
        connection.register("scores", scores)
        sql = _SQL.format(value=value, fraction=f"{section.fraction:.12f}")
        rows = connection.sql(sql).to_arrow_reader(ROWS_PER_FILE)
        for number, batch in enumerate(rows):
            path = f"{FOLDER}/{partition(query_id)}/part-{number:05d}.parquet"
            table = pa.Table.from_batches([batch]).cast(SELECTED)
            written[path] = run.write_table(table, "topk", path)["sha256"]
    return written
