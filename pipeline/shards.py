"""What is written of a shard that was scored, and its commit: the same for all who score one."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from . import storage, topk
from .artifacts import Run, counterparts_digest
from .corpus import Examples
from .folder import parallel, partition
from .records import REJECTS, SCORES, Reject, Shard, as_stored
from .works import Receipt, Work, Written, partial_name, rejects_path


class ShardWriter:
    """Writes and commits shards of one run. Safe to call from several threads.

    Args:
        run: The frozen run.
        tensors: Query id -> digest of the counterpart that it is scored under.
    """

    def __init__(self, run: Run, tensors: Mapping[str, str]) -> None:
        self._run, self._tensors, self._way = run, tensors, run.way

    def write(self, work: Work, scores: Iterable[pa.Table], rejects: list[Reject]) -> dict[str, Written]:
        """Write everything of a shard but its commit; relative path -> size and digest.

        Args:
            work: The shard.
            scores: Per query, in the work's order, what `score_table` makes.
            rejects: The shard's other rows.
        """
        rank, name = self._run.spec.rank, f"{work.name}.parquet"
        partial = partial_name(work.name, rank.k, topk.transform_name(rank.transform, rank.eps))
        tables: dict[str, pa.Table] = {}
        tops, sums = [], []
        for query_id, table in zip(work.query_ids, scores, strict=True):
            tables[f"scores/{partition(query_id)}/{name}"] = as_stored(table, self._run.per_token)
            valued = topk.with_value(table, rank.transform, rank.eps)
            tops.append(topk.partial_topk(valued, rank.k, rank.transform))
            if self._run.spec.corpus.source is not None:
                sums.append(topk.source_sums(valued))
        tables[f"partials/topk/{partial}"] = pa.concat_tables(tops)
        if sums:
            tables[f"partials/sources/{partial}"] = pa.concat_tables(sums)
        if rejects:
            tables[rejects_path(work.name, quarantined=False)] = _rejects_table(work.shard, rejects)
        return {path: self._run.write_table(table, path) for path, table in tables.items()}

    def quarantine(self, work: Work, reason: str) -> Receipt:
        """Quarantine a shard: all its rows go to rejects/ with the reason, and that is committed. The commit that then stands.

        Raises:
            StorageError: The store refused.
        """
        standing = self._run.standing(work.addition, work.shard.shard_id)
        if standing is not None:  # an attempt that was taken for dead made it after all
            return standing
        started_at_s, shard = time.time(), work.shard
        rows = range(shard.row_start, shard.row_start + shard.rows)
        rejects = [Reject(row, "shard", reason, "a shard that can be scored") for row in rows]
        path = rejects_path(work.name, quarantined=True)
        files = {path: self._run.write_table(_rejects_table(shard, rejects), path)}
        counts = {"rows": 0, "rejects": shard.rows}
        return self.commit(work, started_at_s, 0.0, counts, files, quarantined=reason)

    def commit(
        self,
        work: Work,
        started_at_s: float,
        compute_s: float,
        counts: dict[str, Any],
        files: dict[str, Written],
        quarantined: str | None = None,
    ) -> Receipt:
        """Commit what was written of a shard; the commit that then stands.

        Args:
            work: The shard.
            started_at_s: Unix time when reading began.
            compute_s: Seconds of computing.
            counts: The receipt's rows, rejects, overlong, base_kept, noise.
            files: What was written.
            quarantined: Why the whole shard is quarantined; else null.
        """
        rank = self._run.spec.rank
        receipt = Receipt(
            addition=work.addition,
            shard_id=work.shard.shard_id,
            fingerprint=self._run.additions[work.addition].fingerprint,
            **counts,
            files=files,
            started_at_s=started_at_s,
            finished_at_s=time.time(),
            compute_s=compute_s,
            k=rank.k,
            transform=topk.transform_name(rank.transform, rank.eps),
            counterparts="" if quarantined else self._scored_under(work),
            quarantined=quarantined,
        )
        standing = self._run.commit(receipt)
        if standing.quarantined is not None or quarantined:
            # Two kinds of attempts, of which one may have died or come late: who reads the folder would count rows twice.
            paths = [f"scores/{partition(query_id)}/{work.name}.parquet" for query_id in work.query_ids]
            paths += [rejects_path(work.name, each) for each in (False, True)]
            twice = [path for path in paths if path not in standing.files]
            parallel(lambda path: storage.remove(self._run.uri(path)), twice)
        return standing

    def _scored_under(self, work: Work) -> str:
        return counterparts_digest([self._tensors[query_id] for query_id in work.query_ids], self._way)


def score_table(
    work: Work,
    query_id: str,
    examples: Examples,
    base_loss_N: np.ndarray,
    counterpart_loss_N: np.ndarray,
    score_N: np.ndarray,
) -> pa.Table:
    """Scores of one query, as SCORES in the order of its file. What comes in float64 is rounded here."""
    rows = len(examples.row_N)
    columns = {
        "example_id": examples.example_id_N,
        "source": examples.source_N,
        "query_id": pa.array([query_id] * rows, pa.string()),
        "base_loss": base_loss_N.astype(np.float32),
        "counterpart_loss": counterpart_loss_N.astype(np.float32),
        "num_tokens": pa.nulls(rows, pa.int32()) if examples.num_tokens_N is None else examples.num_tokens_N,
        "score": (score_N + 0.0).astype(np.float32),  # + 0.0: no negative zero
        "shard_id": np.full(rows, work.shard.shard_id, np.int32),
        "row": examples.row_N,
    }
    highest_first_N = np.argsort(-columns["score"], kind="stable")
    return pa.table({name: columns[name] for name in SCORES.names}).cast(SCORES).take(pa.array(highest_first_N))


def _rejects_table(shard: Shard, rejects: list[Reject]) -> pa.Table:
    rows = [{"shard_id": shard.shard_id, "path": shard.path, **asdict(reject)} for reject in rejects]
    return pa.Table.from_pylist(rows, schema=REJECTS)
