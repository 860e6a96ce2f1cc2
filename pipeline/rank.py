"""Stage 3: the strongest proponents and opponents of every query, and sums per source.

Reads: commits/, partials/ (or scores/, when k or the transform is not what the partials hold), payload from the corpus.
Writes: topk/ranked.parquet, topk/sources.parquet, and topk/meta.json last.
Resumes: runs again as a whole; it takes seconds and scores nothing.
Next: report.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa

from . import topk
from .artifacts import Run, parallel, partition
from .corpus import Corpus, concat_rows, payload_names
from .observe import say
from .records import RANKED, SOURCES, Receipt

_Read = Callable[[Run, Receipt], tuple[pa.Table, pa.Table]]
MERGE_AT_ONCE = 256
"""Partial tables merged at a time: memory is this many partials, whatever the number of shards."""


def rank(run: Run) -> pa.Table:
    """Rank a fully scored run; the ranked table, as RANKED with payload columns behind.

    Raises:
        ArtifactError: Shards are missing, or an artifact is not what was committed.
        InputError: Too many rows were rejected, or the corpus changed, so that payload cannot be fetched.
    """
    receipts = run.complete_receipts()
    section = run.spec.rank
    scored = sum(receipt.rows for receipt in receipts)
    if section.k > scored:
        say(f"rank.k is {section.k:,} but {scored:,} examples were scored: all of them are listed")
    read = _partials if _partials_fit(run, receipts) else _from_scores
    top, sources = _merged(run, receipts, read)
    payload = payload_names(run.spec.corpus, run.columns)
    ranked = _with_payload(run, topk.with_rank(top), payload)
    run.write_table(ranked, "topk", "ranked.parquet")
    run.write_table(sources, "topk", "sources.parquet")
    meta = {
        "k": section.k,
        "transform": topk.transform_name(section.transform, section.eps),
        "payload": payload,
        "examples": scored,
        "rejects": sum(receipt.rejects for receipt in receipts),
        "fingerprint": run.resolved.fingerprint,
    }
    run.write_json(meta, "topk", "meta.json")
    return ranked


def _partials_fit(run: Run, receipts: Sequence[Receipt]) -> bool:
    wanted = topk.transform_name(run.spec.rank.transform, run.spec.rank.eps)
    return all(receipt.transform == wanted and receipt.k >= run.spec.rank.k for receipt in receipts)


def _partials(run: Run, receipt: Receipt) -> tuple[pa.Table, pa.Table]:
    """A shard's partial top-k and source sums, as it committed them."""
    name = f"shard-{receipt.shard_id:06d}.parquet"
    with_sources = run.spec.corpus.source is not None
    sums = run.read_shard(receipt, f"partials/sources/{name}") if with_sources else SOURCES.empty_table()
    return run.read_shard(receipt, f"partials/topk/{name}"), sums


def _from_scores(run: Run, receipt: Receipt) -> tuple[pa.Table, pa.Table]:
    """The same from the shard's scores, for another k or transform."""
    section, name = run.spec.rank, f"shard-{receipt.shard_id:06d}.parquet"
    tops, sums = [], [SOURCES.empty_table()]
    for query_id in run.query_ids:
        valued = topk.with_value(
            run.read_shard(receipt, f"scores/{partition(query_id)}/{name}"), section.transform, section.eps
        )
        tops.append(topk.partial_topk(valued, section.k, section.transform))
        if run.spec.corpus.source is not None:
            sums.append(topk.source_sums(valued))
    return pa.concat_tables(tops), pa.concat_tables(sums)


def _merged(run: Run, receipts: Sequence[Receipt], read: _Read) -> tuple[pa.Table, pa.Table]:
    """Top-k and source sums of all shards, a bounded number of partials at a time."""
    tops: list[pa.Table] = []
    sums: list[pa.Table] = []
    for start in range(0, len(receipts), MERGE_AT_ONCE):
        parts = parallel(lambda receipt: read(run, receipt), receipts[start : start + MERGE_AT_ONCE])
        tops = [topk.merge_topk([*tops, *(top for top, _ in parts)], run.spec.rank.k)]
        sums = [topk.merge_sources([*sums, *(part for _, part in parts)])]
    return tops[0], sums[0]


def _with_payload(run: Run, ranked: pa.Table, names: Sequence[str]) -> pa.Table:
    """The ranked table with payload columns fetched from the corpus, each shard's rows in one read."""
    if not names or not len(ranked):
        return ranked
    corpus = Corpus(run.spec.corpus)
    shard_N, row_N = ranked["shard_id"].to_numpy(), ranked["row"].to_numpy()
    shards = np.unique(shard_N)
    rows_each = [np.unique(row_N[shard_N == shard]) for shard in shards]
    fetched = parallel(
        lambda i: corpus.payload(run.shards[shards[i]], rows_each[i].tolist(), names), range(len(shards))
    )
    starts = np.cumsum([0, *(len(rows) for rows in rows_each)])
    position = {
        (int(shard), int(row)): int(starts[i] + j)
        for i, shard in enumerate(shards)
        for j, row in enumerate(rows_each[i])
    }
    payload = concat_rows(fetched)
    payload = payload.take([position[int(s), int(r)] for s, r in zip(shard_N, row_N, strict=True)])
    for name in names:
        described = {"description": f"Payload: column {name!r} of the corpus."}
        ranked = ranked.append_column(pa.field(name, payload[name].type, True, described), payload[name])
    assert ranked.schema.names[: len(RANKED)] == RANKED.names
    return ranked
