"""What flows between the stages: one Arrow schema per table, one frozen type per thing.

Every column carries its description, and its unit if it has one, in the Parquet metadata, so that a lake shows them too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

Transform = Literal["signed", "absolute", "relative", "counterpart_loss"]
Side = Literal["proponent", "opponent"]

PARQUET_OPTIONS: dict[str, Any] = {
    "compression": "zstd",
    "use_dictionary": ["source", "query_id", "shard_id", "side", "path", "column", "expected", "version"],
    "row_group_size": 16_384,
    "bloom_filter_options": {"example_id": {"ndv": 16_384, "fpp": 0.05}},
    "write_page_checksum": True,
}
"""How every table is written (decision 5): dictionaries only where values repeat, and what lets engines skip."""

_UNITS = dict.fromkeys(("base_loss", "counterpart_loss", "score"), "nats")
_UNITS |= dict.fromkeys(("value", "sum", "mean", "top_value"), "nats; none if relative")
_UNITS |= dict.fromkeys(("byte_start", "byte_stop", "size_bytes"), "bytes")


def _schema(*columns: tuple[str, pa.DataType, bool, str]) -> pa.Schema:
    return pa.schema([_field(*column) for column in columns])


def _field(name: str, kind: pa.DataType, nullable: bool, text: str) -> pa.Field:
    return pa.field(name, kind, nullable, {"description": text, **({"unit": _UNITS[name]} if name in _UNITS else {})})


_EXAMPLE_ID = ("example_id", pa.string(), False, "Stable id of the training example, unique in the corpus.")
_SOURCE = ("source", pa.string(), True, "Group of the example (site, author, split); null without a source column.")
_QUERY_ID = ("query_id", pa.string(), False, "What is attributed: one or more examples asked about together.")
_BASE_LOSS = ("base_loss", pa.float32(), False, "Loss of the example under the base model.")
_COUNTERPART_LOSS = ("counterpart_loss", pa.float32(), False, "Loss of the example under the counterpart.")
_SCORE_TEXT = (
    "`direction * (counterpart_loss - base_loss)`, subtracted before rounding; higher = more helpful to the query."
)
_SCORE = ("score", pa.float32(), False, _SCORE_TEXT)
_NUM_TOKENS = ("num_tokens", pa.int32(), True, "Tokens whose loss counts; null where examples are no texts.")
_SHARD_ID = ("shard_id", pa.int32(), False, "Shard of the manifest that holds the example.")
_ROW = ("row", pa.int64(), False, "Position of the example in its corpus file, from 0.")
_VALUE = (
    "value",
    pa.float32(),
    False,
    "What the transform named in topk/meta.json makes of the row's score and losses; what is sorted.",
)
_SIDE = ("side", pa.string(), False, "`proponent` (high value) or `opponent` (low value).")

# Dictionary-encoded in scores/ alone: pyarrow and pandas read the partition folder as that type, and refuse the folder where
# the file's own column differs from it. In Parquet both are strings.
_PARTITION = ("query_id", pa.dictionary(pa.int32(), pa.string()), False, _QUERY_ID[3])

SCORES = _schema(
    _EXAMPLE_ID, _SOURCE, _PARTITION, _BASE_LOSS, _COUNTERPART_LOSS, _SCORE, _NUM_TOKENS, _SHARD_ID, _ROW
)  # fmt: skip
"""scores/query_id=Q/shard-NNNNNN.parquet: one row per scored example, highest score first (equal ones in corpus order)."""

PARTIAL_TOPK = _schema(
    _QUERY_ID, _SIDE, _EXAMPLE_ID, _SOURCE, _VALUE, _SCORE, _BASE_LOSS, _COUNTERPART_LOSS, _NUM_TOKENS, _SHARD_ID, _ROW
)  # fmt: skip
"""partials/topk/shard-NNNNNN.parquet: the k strongest on each side, per query, of one shard."""

RANKED = PARTIAL_TOPK.insert(
    2, _field("rank", pa.int32(), False, "1 = strongest on its side; ties break by example_id.")
)  # fmt: skip
"""topk/ranked.parquet: as PARTIAL_TOPK over the whole corpus, with the payload columns behind."""

SOURCES = _schema(
    _QUERY_ID,
    ("source", pa.string(), True, "Group of the examples."),
    ("count", pa.int64(), False, "Scored examples of the source."),
    ("sum", pa.float64(), False, "Sum of their values."),
    ("mean", pa.float64(), False, "Mean of their values."),
    ("top_example_id", pa.string(), False, "Its example of highest value; ties break by example_id."),
    ("top_value", pa.float32(), False, "That example's value."),
)
"""topk/sources.parquet, and per shard partials/sources/shard-NNNNNN.parquet."""

SELECTED = _schema(
    _QUERY_ID,
    _SOURCE,
    _EXAMPLE_ID,
    _VALUE,
    ("place", pa.int64(), False, "1 = highest value of its source; ties by example_id."),
    _SHARD_ID,
    _ROW,
)
"""topk/selected/query_id=Q/part-NNNNN.parquet: the top `rank.fraction` of every source's examples."""

REJECTS = _schema(
    _SHARD_ID,
    ("path", pa.string(), False, "Corpus file."),
    _ROW,
    ("example_id", pa.string(), True, "Id of the example, where it could be read."),
    ("column", pa.string(), False, "Column (or loss) that stood in the way."),
    ("got", pa.string(), False, "What was found."),
    ("expected", pa.string(), False, "What can be scored."),
)
"""rejects/shard-NNNNNN.parquet: one row per example that could not be scored."""

MANIFEST = _schema(
    _SHARD_ID,
    ("path", pa.string(), False, "Corpus file, or folder of images, that the shard is read from."),
    ("row_start", pa.int64(), False, "First row of the shard in that file."),
    ("rows", pa.int64(), False, "Rows of the shard."),
    ("byte_start", pa.int64(), True, "Text formats: where reading starts, at or before row_start."),
    ("byte_stop", pa.int64(), True, "Text formats: where reading may stop."),
    ("members", pa.list_(pa.string()), True, "Image folders: file names of the shard's rows, in order."),
    ("size_bytes", pa.int64(), False, "Size of the whole file when the corpus was frozen."),
    ("version", pa.string(), False, "ETag or modification time of the file when the corpus was frozen."),
)
"""manifest.parquet: the corpus frozen once, one row per shard."""


LOSSES = ("base_loss", "counterpart_loss")
"""Columns of losses. Where a loss is a mean over tokens, `stored` says so in their names."""


def stored(schema: pa.Schema, per_token: bool) -> pa.Schema:
    """A schema as it is written: losses (and the score) that are means over tokens say so in name and unit."""
    if not per_token:
        return schema
    fields = []
    for field in schema:
        if field.name in (*LOSSES, "score"):
            field = field.with_metadata({**field.metadata, b"unit": b"nats per token"})
        fields.append(field.with_name(f"{field.name}_per_token") if field.name in LOSSES else field)
    return pa.schema(fields)


def as_stored(table: pa.Table, per_token: bool) -> pa.Table:
    """A table as it is written: see `stored`."""
    schema = stored(table.schema, per_token)
    return table.rename_columns(schema.names).cast(schema)


LANGUAGE = {
    "text": "a text that is not empty",
    "messages": "a list of messages, each with role and content",
    "tokens": "a list of token ids",
}
"""Kinds of columns that a language task reads: what is expected in them."""


@dataclass(frozen=True)
class Column:
    """What one model input of one example looks like, and where it comes from.

    Args:
        name: Key under which the task finds it in a batch.
        columns: The corpus column it is read from; several numeric columns are stacked in this order.
        dtype: numpy dtype of the decoded array, `float32`, `float64` or `int64`. Or what a language task makes tokens of:
            `text`, `messages` (a list of {role, content}) or `tokens` (a list of ids), each decoded to an object per row.
        shape: Shape of one example, `()` for a number. Image bytes decode to (C, H, W) floats in [0, 1].
        optional: Of a text or token ids: null, or an empty one, is none at all and no error.
    """

    name: str
    columns: tuple[str, ...]
    dtype: str = "float32"
    shape: tuple[int, ...] = ()
    optional: bool = False

    @property
    def expected(self) -> str:
        """What a good value looks like, for messages."""
        if self.dtype in LANGUAGE:
            return LANGUAGE[self.dtype] + (", or null" if self.optional else "")
        size = "x".join(map(str, self.shape))
        if self.dtype.startswith("int"):
            return f"integers of shape {size}" if self.shape else "an integer"
        return f"finite numbers of shape {size}" if self.shape else "a finite number"

    @property
    def is_image(self) -> bool:
        """Whether one example can be drawn: (H, W), or (C, H, W) with one or three channels, at least 4 x 4."""
        return (
            len(self.shape) in (2, 3)
            and min(self.shape[-2:]) >= 4
            and (len(self.shape) == 2 or self.shape[0] in (1, 3))
        )


@dataclass(frozen=True)
class SourceFile:
    """One file (or folder of images) of the corpus as listed: `members` holds the images' names."""

    path: str
    size_bytes: int
    version: str
    members: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Measured:
    """A listed file with what only reading it can tell.

    Args:
        file: The listed file.
        rows: How many rows it holds.
        columns: Column names, and Arrow types where the format knows them (else null).
        byte_offsets: Text formats: where every `stride`-th row starts, with the file's end behind; else empty.
        stride: Rows between two byte offsets.
        groups: Rows of each piece that can only be read whole, in order; empty where there is no such thing.
        repeated: Names that more than one column has.
    """

    file: SourceFile
    rows: int
    columns: Mapping[str, pa.DataType]
    byte_offsets: tuple[int, ...] = ()
    stride: int = 0
    groups: tuple[int, ...] = ()
    repeated: tuple[str, ...] = ()


@dataclass(frozen=True)
class Shard:
    """A contiguous piece of the corpus: read, scored, written and committed as one (a row of MANIFEST)."""

    shard_id: int
    path: str
    row_start: int
    rows: int
    byte_start: int | None
    byte_stop: int | None
    members: tuple[str, ...] | None
    size_bytes: int
    version: str


@dataclass(frozen=True)
class Reject:
    """One row that could not be scored, and why."""

    row: int
    column: str
    got: str
    expected: str
    example_id: str | None = None


@dataclass(frozen=True)
class Rows:
    """Rows as a format reads them.

    Args:
        table: The columns asked for; as many rows as could be parsed.
        row_N: Position of each in its file.
        rejects: Rows that could not be parsed.
    """

    table: pa.Table
    row_N: Any
    rejects: tuple[Reject, ...] = ()
