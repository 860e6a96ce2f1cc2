"""Scores of whole corpora under several methods, side by side: from runs, and from files that other tools wrote.

Shapes: Q queries, N examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from . import storage
from .artifacts import Run
from .errors import InputError
from .folder import partition, table_of
from .records import SCORES
from .topk import values

COLUMNS = ("query_id", "example_id", "score")


@dataclass(frozen=True)
class Matrix:
    """One method's scores.

    Args:
        name: The method's.
        score_QN: Signed scores, higher = more helpful.
        value_QN: What the method ranks by.
        transform: How it got there.
        base_loss_N: The examples' base losses, in nats, which no query moves; null where another tool made the scores.
    """

    name: str
    score_QN: np.ndarray
    value_QN: np.ndarray
    transform: str
    base_loss_N: np.ndarray | None = None


def of_run(name: str, run: Run, query_ids: Sequence[str], id_N: np.ndarray) -> Matrix:
    """A finished run's scores. Raises InputError, ArtifactError: it lacks an example or a query, or is damaged."""
    rank = run.spec.rank
    score_QN = np.full((len(query_ids), len(id_N)), np.nan)
    value_QN, base_loss_N = score_QN.copy(), np.full(len(id_N), np.nan)
    place = _Places(id_N)
    for receipt in run.complete_receipts():
        for q, query_id in enumerate(query_ids):
            path = f"scores/{partition(query_id)}/{receipt.name}.parquet"
            if path not in receipt.files:
                continue
            table = run.read_shard(receipt, path).rename_columns(SCORES.names)  # losses of texts have other names
            at = place.of(table["example_id"])
            score_QN[q, at] = table["score"].to_numpy()
            value_QN[q, at] = values(table, rank.transform, rank.eps)
            base_loss_N[at] = table["base_loss"].to_numpy()
    _require_all(run.uri(), score_QN, query_ids, id_N)
    return Matrix(name, score_QN, value_QN, rank.transform, base_loss_N)


def of_file(name: str, uri: str, query_ids: Sequence[str], id_N: np.ndarray) -> Matrix:
    """Scores that another tool wrote. Raises InputError: columns are missing, or pairs of query and example."""
    table = table_of(storage.read_bytes(uri), uri)
    if missing := [column for column in COLUMNS if column not in table.column_names]:
        raise InputError(f"{uri}: got columns {', '.join(table.column_names)}, expected also {', '.join(missing)}")
    score_QN = np.full((len(query_ids), len(id_N)), np.nan)
    query = table["query_id"].cast(pa.string())
    queries = {query_id: q for q, query_id in enumerate(query_ids)}
    q_M = np.array([queries.get(query_id, -1) for query_id in query.to_pylist()])
    known_M = q_M >= 0
    chosen = table.filter(pa.array(known_M))
    score_QN[q_M[known_M], _Places(id_N).of(chosen["example_id"])] = chosen["score"].to_numpy()
    _require_all(uri, score_QN, query_ids, id_N)
    return Matrix(name, score_QN, score_QN, "signed")


class _Places:
    """Where examples stand in a matrix."""

    def __init__(self, id_N: np.ndarray) -> None:
        self._order_N = np.argsort(id_N)
        self._sorted_N = id_N[self._order_N]

    def of(self, ids: pa.ChunkedArray) -> np.ndarray:
        """Columns of some examples. Raises InputError for one that is not in the corpus."""
        wanted_M = np.asarray(ids.cast(pa.string()).to_pylist(), dtype=str)
        at_M = np.minimum(np.searchsorted(self._sorted_N, wanted_M), len(self._sorted_N) - 1)
        strange_M = self._sorted_N[at_M] != wanted_M
        if strange_M.any():
            raise InputError(f"scores of example {str(wanted_M[strange_M][0])!r}, which the corpus does not have")
        return self._order_N[at_M]


def _require_all(origin: str, score_QN: np.ndarray, query_ids: Sequence[str], id_N: np.ndarray) -> None:
    """See that every pair has a score that is finite. Raises InputError."""
    bad = np.argwhere(~np.isfinite(score_QN))
    if len(bad):
        q, n = bad[0]
        raise InputError(
            f"{origin}: {len(bad):,} of {score_QN.size:,} pairs have no finite score, first query {query_ids[q]!r} and "
            f"example {str(id_N[n])!r}",
            "a method is judged on all examples of the corpus and all queries of the first run",
        )
