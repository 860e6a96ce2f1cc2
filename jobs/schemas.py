"""The page pipeline/schemas.md, made of pipeline/records.py: `python -m jobs.schemas > pipeline/schemas.md`."""

from __future__ import annotations

import sys

import pyarrow as pa

from pipeline import records

TABLES = (
    ("scores/query_id=Q/shard-NNNNNN.parquet", records.SCORES,
     "One row per training example and query, highest score first (equal ones in corpus order)."),
    ("topk/ranked.parquet", records.RANKED,
     "The strongest examples of each query on each side; behind these columns, the payload columns of the corpus."),
    ("topk/sources.parquet", records.SOURCES, "One row per query and source."),
    ("topk/selected/query_id=Q/part-NNNNN.parquet", records.SELECTED,
     "With `rank.fraction`: the share of every source's examples that a filter keeps, highest value first within the source."),
    ("rejects/shard-NNNNNN.parquet", records.REJECTS, "One row per example that could not be scored."),
    ("manifest.parquet", records.MANIFEST, "The corpus as it was frozen, one row per shard."),
)  # fmt: skip


def markdown(schema: pa.Schema) -> str:
    """A schema as a table of column, type, unit and meaning."""
    lines = ["| column | type | unit | meaning |", "|---|---|---|---|"]
    for field in schema:
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        meaning, unit = (field.metadata.get(key, b"").decode() for key in (b"description", b"unit"))
        named = str(kind).replace("item: ", "") + (", null" if field.nullable else "")
        lines.append(f"| `{field.name}` | {named} | {unit} | {meaning} |".replace("|  |", "| |"))
    return "\n".join(lines) + "\n"


def page() -> str:
    """All tables of a run."""
    head = (
        "# Tables of a run\n\n"
        "Made of `records.py` by `python -m jobs.schemas`. The same words stand in the files' metadata (keys `description` and\n"
        "`unit` of each column) and, after `mirrorscope publish`, in the catalog.\n"
        "Queries to begin with: [`jobs/sql.md`](../jobs/sql.md).\n"
    )
    return head + "".join(f"\n## `{path}`\n\n{what}\n\n{markdown(schema)}" for path, schema, what in TABLES)


if __name__ == "__main__":
    sys.stdout.write(page())
