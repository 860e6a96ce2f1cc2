"""What a run is made of: shards in a manifest, additions, works, and the receipts of what is committed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from typing_extensions import TypedDict  # that of typing knows too little for pydantic before Python 3.12

from .records import MANIFEST, Shard

SHARDS_AT_ONCE = 1024
"""Shards made of a manifest at a time, when all of them are gone through."""


class Written(TypedDict):
    """An object that a commit names: its size in bytes and its digest."""

    bytes: int
    sha256: str


class Noise(TypedDict):
    """How far a query's scores were from those in a finer precision: of so many examples, the sum of squares."""

    examples: int
    squares: float


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
        counterparts: Digest of the counterparts that it was scored under; empty for a quarantined shard.
        overlong: Examples that were longer than a sequence may be: cut, or split.
        quarantined: Why the whole shard was quarantined, so that all its rows are in rejects/; else null.
        base_kept: Rows scored with base losses that were kept (score.base_losses), not computed.
        noise: Query id -> rounding noise, in shards that it is measured in (score.noise_rows).
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
    overlong: int = 0
    quarantined: str | None = None
    base_kept: int = 0
    noise: dict[str, Noise] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """File stem of everything that the commit names."""
        return work_name(self.addition, self.shard_id)

    @property
    def partial(self) -> str:
        """Name of its partials: it says what is in them, so that two that rank differently never write over each other's."""
        return partial_name(self.name, self.k, self.transform)

    @property
    def rejects_path(self) -> str:
        """Path of its rejects in the run's folder, if it has any."""
        return rejects_path(self.name, self.quarantined is not None)

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


def rejects_path(name: str, quarantined: bool) -> str:
    """Path of a shard's rejects: of a quarantined one by another name, so that neither is ever written over the other."""
    return f"rejects/{name}{'-quarantined' if quarantined else ''}.parquet"


def partial_name(name: str, k: int, transform: str) -> str:
    """File name of a shard's partials of one depth and transform."""
    return f"{name}-{k}-{transform}.parquet"


def work_name(addition: int, shard_id: int) -> str:
    """File stem of a shard's objects; a grown run scores old shards again, under its new queries."""
    return f"shard-{shard_id:06d}" + (f"-addition-{addition}" if addition else "")
