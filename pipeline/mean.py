"""What an actor of stage score does with a shard of an ensemble, without Ray: read the members' scores, average, write, commit.

Shapes: M members, N examples.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from . import noise
from .artifacts import Run
from .corpus import Examples
from .ensemble import Ensemble
from .errors import ArtifactError
from .folder import parallel, partition
from .records import SCORES, Reject
from .shards import ShardWriter, score_table
from .works import Receipt, Work


class MeanScorer:
    """Averages shards of one ensemble, as ShardScorer scores those of a run. Safe to call from several threads.

    Args:
        run: The ensemble; its members are scored.
        query_ids: Queries that are averaged; null for all of them.

    Raises:
        InputError, ArtifactError: A member's counterpart is missing or damaged, or they do not go together.
    """

    def __init__(self, run: Ensemble, query_ids: tuple[str, ...] | None = None) -> None:
        self._run = run
        asked = run.query_ids if query_ids is None else query_ids
        metas = {query_id: run.counterpart_meta(query_id) for query_id in asked}
        self._directions = {query_id: meta["direction"] for query_id, meta in metas.items()}
        self._weight_M = {query_id: np.array(meta["weights"]) for query_id, meta in metas.items()}
        self._share_M = {query_id: np.array(meta["shares"]) for query_id, meta in metas.items()}
        self._writer = ShardWriter(run, {query_id: meta["tensors"]["sha256"] for query_id, meta in metas.items()})

    def score(self, work: Work) -> Receipt:
        """Read, average, write and commit one shard; one that is quarantined in a member is so here. The commit that then stands.

        Raises:
            InputError, ArtifactError: A member's shard is not committed, or is not what was committed.
            StorageError: The store refused.
        """
        started_at_s, begun_s = time.time(), time.monotonic()
        receipts = parallel(lambda member: member.receipt(work.addition, work.shard.shard_id), self._run.members)
        for place, receipt in enumerate(receipts):
            if receipt.quarantined is not None:
                return self.quarantine(work, f"{self._run.named(place)}: {receipt.quarantined}")
        standing = self._run.standing(work.addition, work.shard.shard_id)
        if standing is not None:
            return standing
        rejects = self._rejects(receipts)
        scores = [self._scores(work, query_id, receipts, rejects) for query_id in work.query_ids]
        compute_s = time.monotonic() - begun_s
        counts = {"rows": work.shard.rows - len(rejects), "rejects": len(rejects), "overlong": receipts[0].overlong}
        shares = {query_id: self._share_M[query_id] for query_id in work.query_ids}
        found = noise.mean_of([receipt.noise for receipt in receipts], shares)
        files = self._writer.write(work, scores, rejects)
        return self._writer.commit(work, started_at_s, compute_s, {**counts, "noise": found}, files)

    def quarantine(self, work: Work, reason: str) -> Receipt:
        """See ShardWriter."""
        return self._writer.quarantine(work, reason)

    def _rejects(self, receipts: Sequence[Receipt]) -> list[Reject]:
        """Rows that any member rejected; where not all did so alike, with the first that did."""
        found: dict[int, list[tuple[int, Reject]]] = {}
        for place, (member, receipt) in enumerate(zip(self._run.members, receipts, strict=True)):
            if receipt.rejects:
                for row in member.read_shard(receipt, receipt.rejects_path).to_pylist():
                    reject = Reject(row["row"], row["column"], row["got"], row["expected"], row["example_id"])
                    found.setdefault(reject.row, []).append((place, reject))
        return [self._reject(found[row]) for row in sorted(found)]

    def _reject(self, said: list[tuple[int, Reject]]) -> Reject:
        place, first = said[0]
        if len(said) == len(self._run.members) and all(reject == first for _, reject in said):
            return first
        got = f"{first.got}, under {self._run.named(place)}"
        return Reject(first.row, first.column, got, first.expected, first.example_id)

    def _scores(self, work: Work, query_id: str, receipts: Sequence[Receipt], rejects: Sequence[Reject]) -> pa.Table:
        """The mean of one query's scores; float64 until it is rounded."""
        path = f"scores/{partition(query_id)}/{work.name}.parquet"
        rejected = [reject.row for reject in rejects]
        pairs = list(zip(self._run.members, receipts, strict=True))
        tables = parallel(lambda pair: _in_order(pair[0], pair[1], path, rejected), pairs)
        expected = work.shard.rows - len(rejects)
        for place, table in enumerate(tables):
            if len(table) != expected or not table["example_id"].equals(tables[0]["example_id"]):
                raise ArtifactError(
                    f"{self._run.named(place)}: {self._run.members[place].uri(path)} has other rows than expected: "
                    f"got {len(table)} that no member rejected, expected {expected}, with the same ids in all members",
                    self._run.mending,
                )
        base_MN = np.array([table["base_loss"].to_numpy() for table in tables], np.float64)
        score_MN = np.array([table["score"].to_numpy() for table in tables], np.float64)
        score_N = _mean(score_MN, self._share_M[query_id])
        base_loss_N = _mean(base_MN, self._weight_M[query_id])
        counterpart_loss_N = base_loss_N + self._directions[query_id] * score_N
        return score_table(work, query_id, _examples(tables[0]), base_loss_N, counterpart_loss_N, score_N)


def _mean(values_MN: np.ndarray, share_M: np.ndarray) -> np.ndarray:
    """Weighted mean over members: summed in their order, so that shard sizes leave no trace."""
    mean_N = np.zeros(values_MN.shape[1])
    for share, values_N in zip(share_M, values_MN, strict=True):
        mean_N += share * values_N
    return mean_N


def _in_order(member: Run, receipt: Receipt, path: str, rejected: Sequence[int]) -> pa.Table:
    """A member's score file in the order of the corpus, less some rows. Raises InputError, ArtifactError."""
    table = member.read_shard(receipt, path).rename_columns(SCORES.names)
    row_N = table["row"].to_numpy()
    position_N = np.argsort(row_N, kind="stable")
    kept_N = position_N[~np.isin(row_N[position_N], rejected)]
    return table.take(pa.array(kept_N)).combine_chunks()


def _examples(table: pa.Table) -> Examples:
    """The examples of a score file."""
    num_tokens = table["num_tokens"]
    return Examples(
        example_id_N=table["example_id"].combine_chunks(),
        source_N=table["source"].cast(pa.string()).combine_chunks(),
        row_N=table["row"].to_numpy(),
        arrays={},
        rejects=[],
        num_tokens_N=None if num_tokens.null_count == len(table) else num_tokens.to_numpy(),
    )
