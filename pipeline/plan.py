"""What would be done, without doing it: spec and measured files -> shards, identity, sizes. Pure: no I/O, no Ray, no torch."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .producer_choices import Natural
from .records import Column, Measured, Shard
from .spec import Spec

MAX_SHARD_ROWS = 65_536
MAX_SHARD_BYTES = 256 << 20
"""Decoded size of a shard; an actor holds two of them."""
NUMBER_BYTES = 8
SHARDS_AIMED_AT = 32
SCORE_ROW_BYTES = 30
"""Bytes of one score row on disk: 18 measured with ids like doc-000731234, 32 with 32 random hex digits (decision 5)."""

SCORES_DEPEND_ON = ("model", "task", "corpus", "queries", "producer", "score", "seed", "ensemble")
"""Sections that make two runs different runs. `ensemble` and `score.compile` only where they are given: without, a run is what
it was before."""
_FREE = {
    "corpus": ("payload", "check_ids"),
    "score": ("max_reject_fraction", "base_losses", "noise_rows"),
    "producer": ("curvatures",),
}
"""Fields in them that may change between two starts of one run: they move no score."""


@dataclass(frozen=True)
class Plan:
    """The figures of a run before it starts; of an ensemble, its members' included.

    Args:
        rows: Training examples.
        files: Corpus files.
        shards: Pieces that the corpus is cut into.
        queries: Counterparts to make, of each member.
        query_rows: Rows of all queries together.
        forward_passes: Examples through a model in stage score: one base pass, unless its losses are kept, and one per query.
        objects: Objects written by all stages, without rejects and selections; one less where examples are no pictures.
        score_bytes: Rough size of scores/ on the store.
        members: Models of an ensemble; 1 without one.
        kept: Examples whose base losses are kept already (score.base_losses), of all members together.
    """

    rows: int
    files: int
    shards: int
    queries: int
    query_rows: int
    forward_passes: int
    objects: int
    score_bytes: int
    members: int = 1
    kept: int = 0


def shard_rows(spec: Spec, rows: int, columns: Sequence[Column]) -> int:
    """Rows per shard: the spec's, or a 32nd of the corpus in whole batches, bounded in rows and in decoded bytes."""
    if spec.score.shard_rows is not None:
        return spec.score.shard_rows
    row_bytes = sum(math.prod(column.shape) * NUMBER_BYTES for column in columns)
    wanted = min(math.ceil(rows / SHARDS_AIMED_AT), MAX_SHARD_ROWS, max(1, MAX_SHARD_BYTES // max(1, row_bytes)))
    return max(1, math.ceil(wanted / spec.score.batch_rows)) * spec.score.batch_rows


def make_shards(files: Sequence[Measured], rows_each: int, first: int = 0) -> list[Shard]:
    """Cut files into shards of at most `rows_each` rows; a shard never spans two files.

    Every row of every file is in exactly one shard, in order; shard ids count from `first`. A shard holds whole row groups, or is
    part of one: else neighbours would both read the group that they meet in.
    """
    shards: list[Shard] = []
    for measured in files:
        start = 0
        for rows in _pieces(measured.groups or (measured.rows,), rows_each):
            shards.append(_shard(first + len(shards), measured, start, rows))
            start += rows
    return shards


def _pieces(groups: Sequence[int], rows_each: int) -> Iterator[int]:
    """Rows of shards: as many groups as fit, or the parts of one that does not."""
    taken = 0
    for rows in groups:
        if taken and taken + rows > rows_each:
            yield taken
            taken = 0
        if rows <= rows_each:
            taken += rows
        else:
            yield from (min(rows_each, rows - start) for start in range(0, rows, rows_each))
    if taken:
        yield taken


def _shard(shard_id: int, measured: Measured, start: int, rows: int) -> Shard:
    file, offsets, stride = measured.file, measured.byte_offsets, measured.stride
    return Shard(
        shard_id=shard_id,
        path=file.path,
        row_start=start,
        rows=rows,
        byte_start=offsets[start // stride] if stride else None,
        byte_stop=offsets[math.ceil((start + rows) / stride)] if stride else None,
        members=file.members[start : start + rows] if file.members is not None else None,
        size_bytes=file.size_bytes,
        version=file.version,
    )


def make_plan(spec: Spec, shards: Sequence[Shard], query_ids: Sequence[str], query_rows: int, kept: int = 0) -> Plan:
    """Figures of the run that `spec` and `shards` make; `kept` as in Plan."""
    rows, queries = sum(shard.rows for shard in shards), len(query_ids)
    per_shard = queries + 2 + (spec.corpus.source is not None)  # scores, partial top-k, commit, partial sums
    frozen, ranked, reported, seal = 3, 3, 2, 1
    each = frozen + len(shards) * per_shard + ranked + reported + seal
    members = 1 + len(spec.ensemble)
    folders = members + (members > 1)  # the mean has one, too
    fitted = 2 + (spec.producer.sample_rows is None) if isinstance(spec.producer, Natural) else 0
    return Plan(
        rows=rows,
        files=len({shard.path for shard in shards}),
        shards=len(shards),
        queries=queries,
        query_rows=query_rows,
        forward_passes=members * rows * (1 + queries) - kept,
        objects=folders * each + members * (2 * queries + fitted),
        score_bytes=folders * rows * queries * SCORE_ROW_BYTES,
        members=members,
        kept=kept,
    )


def identity(spec: Spec) -> dict[str, Any]:
    """The part of a spec that decides the scores."""
    tree = spec.model_dump(mode="json", include=set(SCORES_DEPEND_ON))
    for section, fields in _FREE.items():
        for field in fields:
            tree[section].pop(field, None)
    if not spec.ensemble:
        tree.pop("ensemble")
    if not spec.score.compile:
        tree["score"].pop("compile")
    return tree


def fingerprint(spec: Spec, digests: Mapping[str, str]) -> str:
    """Digest of everything that decides the scores: the spec's identity and its inputs' digests."""
    text = json.dumps({"spec": identity(spec), "digests": dict(digests)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def added_fingerprint(before: str, digests: Mapping[str, str]) -> str:
    """Fingerprint of an addition: of the run before it and what it brings."""
    text = json.dumps({"before": before, "digests": dict(digests)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def corpus_digest(shards: Sequence[Shard], relative: Mapping[str, str]) -> str:
    """Digest of the corpus as the run sees it: relative path, size and row ranges, wherever it lies."""
    lines = [f"{relative[shard.path]} {shard.size_bytes} {shard.row_start} {shard.rows}" for shard in shards]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
