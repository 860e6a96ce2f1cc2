"""Stage 3: the strongest proponents and opponents of every query, and sums per source.

Reads: commits/, partials/ (or scores/, when k or the transform is not what the partials hold), payload from the corpus.
Writes: topk/ranked.parquet, topk/sources.parquet, and topk/meta.json last.
Resumes: runs again as a whole; it takes seconds and scores nothing.
Next: report.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from . import noise, storage, topk
from .artifacts import Run
from .corpus import Corpus, payload_names
from .errors import ArtifactError, InputError
from .folder import parallel, partition
from .observe import say
from .records import RANKED, SOURCES, as_stored
from .scorefile import ScoreFile
from .selection import select
from .values import concat_rows
from .works import Receipt

TRIES = 8
"""Of writing a ranking, while others write theirs."""
SHARDS_AT_ONCE = 256
ROWS_AT_ONCE = 1 << 20
"""Shards whose partials are merged at a time, and rows of them: memory is this much, whatever the number of shards."""
SUMMED = ["example_id", "source", "query_id"]
"""Columns of scores/ that source sums are made of, beside those that decide a row's value."""


def rank(run: Run) -> pa.Table:
    """Rank a fully scored run; the ranked table, as RANKED with payload columns behind. Raises as `rank_with_meta`."""
    return rank_with_meta(run)[0]


def rank_with_meta(run: Run) -> tuple[pa.Table, dict[str, Any]]:
    """Rank a fully scored run; the ranked table, and what its meta.json says.

    Raises:
        ArtifactError: Shards are missing, an artifact is not what was committed, or others write rankings all the time.
        InputError: Too many rows were rejected, or the corpus changed, so that payload cannot be fetched.
        SpecError: The transform does not go with the producer.
    """
    section = run.spec.rank
    if section.transform == "counterpart_loss":  # of a finished run any transform may be asked for
        topk.require_fitting(section.transform, run.counterpart_meta(run.query_ids[0])["direction"])
    merging, floor = _Merging(run), noise.Floor()
    scored = rejects = 0
    for receipts in _some_at_once(run, run.complete_receipts()):
        scored += sum(receipt.rows for receipt in receipts if run.is_first(receipt))
        rejects += sum(receipt.rejects for receipt in receipts)
        floor.add(receipts)
        merging.add([receipt for receipt in receipts if receipt.quarantined is None])
    run.require_few_rejects(rejects)
    if section.k > scored:
        say(f"rank.k is {section.k:,} but {scored:,} examples were scored: all of them are listed")
    payload = payload_names(run.spec.corpus, run.columns)
    ranked = as_stored(_with_payload(run, topk.with_rank(merging.top()), payload), run.per_token)
    meta = {
        "k": section.k,
        "transform": topk.transform_name(section.transform, section.eps),
        "payload": payload,
        "examples": scored,
        "rejects": rejects,
        "noise": floor.judged(ranked, scored),
        "fingerprint": run.resolved.fingerprint,
    }
    return ranked, _written(run, meta, {"ranked.parquet": ranked, "sources.parquet": merging.sources})


def _written(run: Run, meta: dict[str, Any], tables: dict[str, pa.Table]) -> dict[str, Any]:
    """Write a ranking, meta.json last, and return that. Raises ArtifactError if other rankings write over it again and again."""
    for _ in range(TRIES):
        selected = select(run)  # the longest part first: what is read while it is written is not whole for moments only
        written = {name: run.write_table(table, "topk", name)["sha256"] for name, table in tables.items()} | selected
        ranking = {**meta, "tables": written}
        run.write_json(ranking, "topk", "meta.json")
        if _is_last_or_whole(run, written):
            return ranking
    raise ArtifactError(f"{run.uri('topk')} is being written by another command", "rank again when that is done")


def _is_last_or_whole(run: Run, written: dict[str, str]) -> bool:
    """Whether another ranking came after this one, or what lies there is this one whole.

    Another with its own k may write its tables over ours before our meta.json, or ours may be over its tables. Each looks after
    its meta.json, so the one whose meta.json is the last sees what is not its own, and writes again.
    """
    try:
        if run.ranking()["tables"] != written:
            return True
        return all(storage.file_digest(run.uri("topk", name)) == sha256 for name, sha256 in written.items())
    except InputError:  # taken away, as the stale parts of a selection are
        return False


def _some_at_once(run: Run, receipts: Iterable[Receipt]) -> Iterator[list[Receipt]]:
    """Receipts in order, as many at a time as the partials of are held in memory."""
    rows_each = max(1, len(run.query_ids) * run.spec.rank.k * len(topk.sides(run.spec.rank.transform)))
    number = max(1, min(SHARDS_AT_ONCE, ROWS_AT_ONCE // rows_each))
    rest = iter(receipts)
    while some := list(islice(rest, number)):
        yield some


class _Merging:
    """Top-k and source sums of the shards seen so far.

    A shard comes in as the partials that it committed, or, where those are of another transform or not as deep as `k`, from its
    scores: the result is the same.
    """

    def __init__(self, run: Run) -> None:
        section = run.spec.rank
        self._run, self._section = run, section
        self._transform = topk.transform_name(section.transform, section.eps)
        self._merged: list[pa.Table] = []
        self._running = {query_id: topk.RunningTopk(section.k, section.transform) for query_id in run.query_ids}
        self.sources = SOURCES.empty_table()

    def add(self, receipts: Sequence[Receipt]) -> None:
        """Take in some shards. Raises ArtifactError, InputError, StorageError."""
        partials: list[Receipt] = []
        scores: list[tuple[Receipt, str]] = []
        for receipt in receipts:
            if not receipt.rows:
                continue
            if receipt.transform == self._transform and receipt.k >= self._section.k:
                partials.append(receipt)
            else:
                scores += [(receipt, q) for q in self._run.work(receipt.addition, receipt.shard_id).query_ids]
        tops = parallel(lambda receipt: self._partial(receipt, "topk"), partials)
        if tops:
            self._merged = [topk.merge_topk([*self._merged, *tops], self._section.k)]
        sums = parallel(lambda one: self._from_scores(*one), scores)
        if self._run.spec.corpus.source is not None:
            sums += parallel(lambda receipt: self._partial(receipt, "sources"), partials)
            self.sources = topk.merge_sources([self.sources, *sums])

    def _partial(self, receipt: Receipt, kind: str) -> pa.Table:
        return self._run.read_shard(receipt, f"partials/{kind}/{receipt.partial}")

    def _from_scores(self, receipt: Receipt, query_id: str) -> pa.Table:
        """Feed a score file to its query's running top-k, reading no more than decides; its source sums, if there are sources."""
        section, summed = self._section, self._run.spec.corpus.source is not None
        path = f"scores/{partition(query_id)}/{receipt.name}.parquet"
        same = {"query_id": query_id, "shard_id": receipt.shard_id, **({} if summed else {"source": None})}
        with ScoreFile(self._run.uri(path), receipt.rows, receipt.files[path]["bytes"], same) as file:
            if summed:
                thin = self._feed(file, file.groups, query_id, [*SUMMED, *topk.deciding(section.transform)])
                return topk.source_sums(topk.with_value(thin, section.transform, section.eps))
            ends = sorted(
                {file.groups[0], file.groups[-1]}
            )  # rows stand in order of score: what is between rarely counts
            for groups in (ends, file.groups[1:-1]):
                if groups := [group for group in groups if self._may_reach(file, group, query_id)]:
                    self._feed(file, groups, query_id, topk.deciding(section.transform))
        return SOURCES.empty_table()

    def _feed(self, file: ScoreFile, groups: list[int], query_id: str, columns: Sequence[str]) -> pa.Table:
        """Feed row groups to a query's running top-k: columns that decide, then the rest of the rows that count."""
        section, running = self._section, self._running[query_id]
        thin = file.read(groups, columns)
        position_N = running.reaching(topk.values(thin, section.transform, section.eps))
        if len(position_N):
            running.add(topk.with_value(file.take(groups, position_N, thin), section.transform, section.eps))
        return thin

    def _may_reach(self, file: ScoreFile, group: int, query_id: str) -> bool:
        transform = self._section.transform
        score, loss = (file.range(group, name) for name in ("score", topk.deciding(transform)[-1]))
        if score is None:
            return True
        return self._running[query_id].may_reach(*topk.value_range(score, loss, transform, self._section.eps))

    def top(self) -> pa.Table:
        """The k strongest rows of every query and side, as `merge_topk` sorts them."""
        return topk.merge_topk([*self._merged, *(running.top() for running in self._running.values())], self._section.k)


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
