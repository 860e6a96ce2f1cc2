"""What flows between the stages: one Arrow schema per table, one frozen type per thing.

Every column carries its description, and its unit if it has one, in the Parquet metadata, so that a lake shows them too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
from typing_extensions import TypedDict  # that of typing knows too little for pydantic before Python 3.12

Transform = Literal["signed", "absolute", "relative"]
Side = Literal["proponent", "opponent"]

PARQUET_OPTIONS: dict[str, Any] = {
    "compression": "zstd",
    "use_dictionary": ["source", "query_id", "shard_id", "side", "path", "column", "expected", "version"],
    "row_group_size": 16_384,
    "bloom_filter_options": {"example_id": {"ndv": 16_384, "fpp": 0.05}},
    "write_page_checksum": True,
}
"""How every table is written (decision 5): dictionaries only where values repeat, and what lets engines skip."""
SHARDS_AT_ONCE = 1024
"""Shards made of a manifest at a time, when all of them are gone through."""

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
_SHARD_ID = ("shard_id", pa.int32(), False, "Shard of the manifest that holds the example.")
_ROW = ("row", pa.int64(), False, "Position of the example in its corpus file, from 0.")
_VALUE = ("value", pa.float32(), False, "The score after the transform named in topk/meta.json; what is sorted.")
_SIDE = ("side", pa.string(), False, "`proponent` (high value) or `opponent` (low value).")

# Dictionary-encoded in scores/ alone: pyarrow and pandas read the partition folder as that type, and refuse the folder where
# the file's own column differs from it. In Parquet both are strings.
_PARTITION = ("query_id", pa.dictionary(pa.int32(), pa.string()), False, _QUERY_ID[3])

SCORES = _schema(
    _EXAMPLE_ID, _SOURCE, _PARTITION, _BASE_LOSS, _COUNTERPART_LOSS, _SCORE, _SHARD_ID, _ROW
)  # fmt: skip
"""scores/query_id=Q/shard-NNNNNN.parquet: one row per scored example, highest score first (equal ones in corpus order)."""

PARTIAL_TOPK = _schema(
    _QUERY_ID, _SIDE, _EXAMPLE_ID, _SOURCE, _VALUE, _SCORE, _BASE_LOSS, _COUNTERPART_LOSS, _SHARD_ID, _ROW
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


@dataclass(frozen=True)
class Column:
    """What one model input of one example looks like, and where it comes from.

    Args:
        name: Key under which the task finds it in a batch.
        columns: The corpus column it is read from; several numeric columns are stacked in this order.
        dtype: numpy dtype of the decoded array, `float32`, `float64` or `int64`.
        shape: Shape of one example, `()` for a number. Image bytes decode to (C, H, W) floats in [0, 1].
    """

    name: str
    columns: tuple[str, ...]
    dtype: str = "float32"
    shape: tuple[int, ...] = ()

    @property
    def expected(self) -> str:
        """What a good value looks like, for messages."""
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
    """

    file: SourceFile
    rows: int
    columns: Mapping[str, pa.DataType]
    byte_offsets: tuple[int, ...] = ()
    stride: int = 0


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


class Written(TypedDict):
    """An object that a commit names: its size in bytes and its digest."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Receipt:
    """What a commit says of its shard.

    Args:
        addition: 0, or the addition of the run that added the shard or the queries.
        shard_id: Shard of the manifest.
        fingerprint: Of the run, or of its addition.
        rows: Rows scored, under every query.
        rejects: Rows in rejects/.
        files: Relative path -> {"bytes", "sha256"} of every object of the shard.
        started_at_s: Unix time when reading began.
        finished_at_s: Unix time when the last object was written.
        compute_s: Seconds in the loss engine.
        k: Depth of the partial top-k.
        transform: Transform of the partial top-k and sums, with its eps: `relative:0.001`.
        counterparts: Digest of the counterparts that it was scored under; empty for a shard that was given up.
        quarantined: Why the whole shard was given up, so that all its rows are in rejects/; else null.
    """

    addition: int
    shard_id: int
    fingerprint: str
    rows: int
    rejects: int
    files: dict[str, Written]
    started_at_s: float
    finished_at_s: float
    compute_s: float
    k: int
    transform: str
    counterparts: str = ""
    quarantined: str | None = None

    @property
    def name(self) -> str:
        """File stem of everything that the commit names."""
        return work_name(self.addition, self.shard_id)

    @property
    def partial(self) -> str:
        """Name of its partials: it says what is in them, so that two that rank differently never write over each other's."""
        return partial_name(self.name, self.k, self.transform)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


@cache
def _receipts() -> Any:
    from pydantic import ConfigDict, TypeAdapter

    Receipt.__pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[attr-defined]
    return TypeAdapter(Receipt)


def parse_receipt(tree: Any) -> Receipt:
    """A commit's JSON as a receipt. Raises ValueError if a field is missing, unknown or of another type."""
    receipt: Receipt = _receipts().validate_python(tree)
    return receipt


class Manifest(Sequence[Shard]):
    """All shards of a run, in order, as compact as their table: a shard is made when it is asked for.

    Args:
        table: Rows of MANIFEST; shard ids count from 0.
    """

    def __init__(self, table: pa.Table) -> None:
        self.table = table.combine_chunks()

    @classmethod
    def of(cls, shards: Sequence[Shard]) -> Manifest:
        """The manifest of some shards."""
        columns = {name: [getattr(shard, name) for shard in shards] for name in MANIFEST.names}
        return cls(pa.table(columns, schema=MANIFEST))

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, position: Any) -> Any:
        if isinstance(position, slice):
            start, stop, step = position.indices(len(self))
            assert step == 1
            return Manifest(self.table.slice(start, stop - start))
        if not -len(self) <= position < len(self):
            raise IndexError(position)
        return _shard(self.table.slice(position % len(self), 1).to_pylist()[0])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Manifest) and self.table.equals(other.table)

    def __iter__(self) -> Iterator[Shard]:
        for batch in self.table.to_batches(max_chunksize=SHARDS_AT_ONCE):
            yield from map(_shard, batch.to_pylist())

    @property
    def rows(self) -> int:
        """Rows of all shards."""
        return int(pc.sum(self.table["rows"]).as_py() or 0)


def _shard(row: dict[str, Any]) -> Shard:
    return Shard(**{**row, "members": tuple(row["members"]) if row["members"] is not None else None})


@dataclass(frozen=True)
class Addition:
    """What a run was given at one time; number 0 is the run as it was frozen, the others are its growth.

    Args:
        number: From 0.
        fingerprint: Carried by all that was made for it.
        first_shard: First of its shards; it has none when that is `stop_shard`.
        stop_shard: The shard after its last.
        query_ids: Queries that are new in it.
        corpus_uri: Where its shards' files were listed; null for the spec's own place, or if it has none.
        queries_digest: Digest of the contents of its query files; null if it has none.
    """

    number: int
    fingerprint: str
    first_shard: int
    stop_shard: int
    query_ids: tuple[str, ...]
    corpus_uri: str | None = None
    queries_digest: str | None = None


@dataclass(frozen=True)
class Work:
    """A shard under some queries: what is scored, written and committed as one.

    Args:
        addition: Number of the addition that asks for it.
        shard: Shard of the manifest.
        query_ids: All queries there are, for a shard that is new; those that are new, for a shard that is not.
    """

    addition: int
    shard: Shard
    query_ids: tuple[str, ...]

    @property
    def name(self) -> str:
        """File stem of everything it writes."""
        return work_name(self.addition, self.shard.shard_id)


def partial_name(name: str, k: int, transform: str) -> str:
    """File name of a shard's partials of one depth and transform."""
    return f"{name}-{k}-{transform}.parquet"


def work_name(addition: int, shard_id: int) -> str:
    """File stem of a shard's objects; a grown run scores old shards again, under its new queries."""
    return f"shard-{shard_id:06d}" + (f"-addition-{addition}" if addition else "")
