"""Exact top-k of score tables and its merge: the top k of any partition, merged in any order, is the top k of the whole.

Order is total: by value, then by example_id, so ties always fall the same way.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .errors import SpecError
from .records import PARTIAL_TOPK, RANKED, SOURCES, Side, Transform

PENDING_PER_K = 16
"""Rows that a RunningTopk holds back before it sorts them, per k."""


def transform_value(score_N: np.ndarray, loss_N: np.ndarray, transform: Transform, eps: float) -> np.ndarray:
    """What is sorted: [N] float32.

    Args:
        score_N: Scores, in nats.
        loss_N: Losses in nats, where `deciding` names some: base losses for `relative`, else the counterpart's.
        transform: `signed`: the score; `absolute`: its size (Ko et al. 2024); `relative`: score / (base_loss + eps);
            `counterpart_loss`: minus that loss.
        eps: Added to the base loss by `relative`, in nats.
    """
    match transform:
        case "signed":
            return score_N.astype(np.float32)
        case "absolute":
            return np.abs(score_N).astype(np.float32)
        case "relative":
            return (score_N.astype(np.float64) / (loss_N.astype(np.float64) + eps)).astype(np.float32)
        case "counterpart_loss":
            return (0 - loss_N).astype(np.float32)  # 0 - 0, where -0 would be a negative zero


def value_range(
    score: tuple[float, float], loss: tuple[float, float] | None, transform: Transform, eps: float
) -> tuple[float, float]:
    """Lowest and highest value that rows can have whose columns lie in these ranges (lowest, highest); perhaps infinite.

    Args:
        score: Range of the scores.
        loss: Range of the losses that `transform_value` takes; null if it is not known.
        transform: As of `transform_value`.
        eps: As of `transform_value`.
    """
    low, high = score
    match transform:
        case "signed":
            return low, high
        case "absolute":
            return 0.0, max(abs(low), abs(high))
        case "relative":
            if loss is None or loss[0] + eps <= 0:
                return -np.inf, np.inf
            corners = transform_value(np.array([low, low, high, high]), np.array([*loss, *loss]), transform, eps)
            return float(corners.min()), float(corners.max())
        case "counterpart_loss":
            return (-np.inf, np.inf) if loss is None else (-loss[1], -loss[0])


def value_sql(transform: Transform, eps: float, stored_names: Mapping[str, str]) -> str:
    """`transform_value` as an SQL expression over a score file, whose losses may have other names there than in SCORES."""
    match transform:
        case "signed":
            return "score"
        case "absolute":
            return "abs(score)"
        case "relative":
            return f"(score::DOUBLE / ({stored_names['base_loss']}::DOUBLE + {eps!r}))::FLOAT"
        case "counterpart_loss":
            return f"(0 - {stored_names['counterpart_loss']})::FLOAT"


def transform_name(transform: Transform, eps: float) -> str:
    """A transform with its parameter, as commits and tables name it."""
    return f"relative:{eps:g}" if transform == "relative" else transform


def described(name: str) -> str:
    """A transform's name in a sentence on what is ranked by."""
    return "minus the counterpart's loss" if name == "counterpart_loss" else f"{name} score"


def require_fitting(transform: Transform, direction: int) -> None:
    """See that high values mean helpful examples.

    Args:
        transform: What is ranked by.
        direction: The producer's.

    Raises:
        SpecError: The counterpart's loss is ranked by, and the query's loss rises under it.
    """
    if transform == "counterpart_loss" and direction != -1:
        raise SpecError(
            f"rank.transform: counterpart_loss wants a producer of direction -1, whose counterpart fits what is like the query; "
            f"got one of direction {direction}",
            "use producer finetune, or transform signed, absolute or relative",
        )


def sides(transform: Transform) -> tuple[Side, ...]:
    """Sides that a transform can tell apart: a size has no sign, so `absolute` lists no opponents."""
    return ("proponent",) if transform == "absolute" else ("proponent", "opponent")


def deciding(transform: Transform) -> list[str]:
    """Columns of SCORES that a row's value is made of."""
    losses: dict[Transform, list[str]] = {"relative": ["base_loss"], "counterpart_loss": ["counterpart_loss"]}
    return ["score", *losses.get(transform, [])]


def values(scores: pa.Table, transform: Transform, eps: float) -> np.ndarray:
    """Values of rows that have the `deciding` columns: [N] float32."""
    score_N, loss_N = (scores[name].to_numpy() for name in ("score", deciding(transform)[-1]))
    return transform_value(score_N, loss_N, transform, eps)


def with_value(scores: pa.Table, transform: Transform, eps: float) -> pa.Table:
    """A table of SCORES, or of its `deciding` columns and others, with the column `value` behind."""
    return scores.append_column(PARTIAL_TOPK.field("value"), pa.array(values(scores, transform, eps)))


def partial_topk(valued: pa.Table, k: int, transform: Transform) -> pa.Table:
    """The k strongest rows on each side, of one query's rows.

    Args:
        valued: SCORES with `value`, of one query.
        k: Rows per side; fewer rows give all of them.
        transform: Says which sides there are.
    """
    parts = []
    for side in sides(transform):
        top = _strongest(valued, k, descending=side == "proponent")
        parts.append(top.append_column(PARTIAL_TOPK.field("side"), pa.array([side] * len(top), pa.string())))
    return pa.concat_tables(parts).select(PARTIAL_TOPK.names).cast(PARTIAL_TOPK)


def _strongest(valued: pa.Table, k: int, descending: bool) -> pa.Table:
    value_N = valued["value"].to_numpy()
    if len(value_N) > k:  # only rows at or beyond the k-th value can be among the k: sort ids of those alone
        order_N = -value_N if descending else value_N
        kth = np.partition(order_N, k - 1)[k - 1]
        valued = valued.filter(pa.array(order_N <= kth))
    keys = [("value", "descending" if descending else "ascending"), ("example_id", "ascending")]
    return valued.take(pc.sort_indices(valued, sort_keys=keys)[:k])


class RunningTopk:
    """The k strongest rows of one query on each side, fed piece by piece in any order, from any number of threads.

    What a piece must reach to count is known from the values seen so far, so callers look at the values first and read the
    rest of a row only where it can matter. Memory is a few k of rows, whatever is fed.

    Args:
        k: Rows per side.
        transform: Says which sides there are.
    """

    def __init__(self, k: int, transform: Transform) -> None:
        self._k, self._transform = k, transform
        self._lock = threading.Lock()
        # Per side the best values so far, negated where high ones are best: a row counts up to the k-th smallest of them.
        self._signs = [np.float32(-1 if side == "proponent" else 1) for side in sides(transform)]
        self._best = [np.empty(0, np.float32) for _ in self._signs]
        self._pieces: list[pa.Table] = []
        self._top: list[pa.Table] = []

    def _limits(self) -> list[np.float32]:
        return [best.max() if len(best) >= self._k else np.float32(np.inf) for best in self._best]

    def may_reach(self, lowest: float, highest: float) -> bool:
        """Whether rows with values in this range could be among the k."""
        with self._lock:
            limits = self._limits()
        return any(min(sign * lowest, sign * highest) <= limit for sign, limit in zip(self._signs, limits, strict=True))

    def reaching(self, value_N: np.ndarray) -> np.ndarray:
        """Positions of the rows that could be among the k, by value alone; ties with the k-th are kept."""
        chosen_N = np.zeros(len(value_N), bool)
        with self._lock:
            limits = self._limits()
        for side, sign in enumerate(self._signs):
            order_N = sign * value_N
            near = order_N[order_N <= limits[side]]
            with self._lock:
                near = np.concatenate([self._best[side], near])
                self._best[side] = np.partition(near, self._k - 1)[: self._k] if len(near) > self._k else near
                chosen_N |= order_N <= self._limits()[side]
        return np.flatnonzero(chosen_N)

    def add(self, valued: pa.Table) -> None:
        """Rows that `reaching` chose: SCORES with `value`."""
        with self._lock:
            self._pieces.append(valued)
            if sum(map(len, self._pieces)) > PENDING_PER_K * self._k:
                self._settle()

    def _settle(self) -> None:
        if self._pieces:
            part = partial_topk(pa.concat_tables(self._pieces), self._k, self._transform)
            self._top = [merge_topk([*self._top, part], self._k)] if self._top else [part]
            self._pieces = []

    def top(self) -> pa.Table:
        """What was found: PARTIAL_TOPK, sorted as `merge_topk` sorts."""
        with self._lock:
            self._settle()
        return self._top[0] if self._top else PARTIAL_TOPK.empty_table()


def merge_topk(partials: Sequence[pa.Table], k: int) -> pa.Table:
    """Partial top-k tables as one, still at most k rows per query and side, sorted, without ranks."""
    table = pa.concat_tables(partials).combine_chunks()
    strength = pc.if_else(pc.equal(table["side"], "proponent"), pc.negate(table["value"]), table["value"])
    near = pa.array(
        _within_N(_group_N(table), strength.to_numpy(), k)
    )  # sorting text is slow: only what can be among the k
    keyed = table.append_column("strength", strength).filter(near)
    # "proponent" sorts behind "opponent": descending puts the answer people look for first.
    keys = [("query_id", "ascending"), ("side", "descending"), ("strength", "ascending"), ("example_id", "ascending")]
    table = keyed.take(pc.sort_indices(keyed, sort_keys=keys)).drop_columns("strength")
    return table.filter(pa.array(_rank_N(table) <= k))


def _within_N(group_N: np.ndarray, strength_N: np.ndarray, k: int) -> np.ndarray:
    """Which rows are at or beyond the k-th of their group: [N] bool."""
    if not len(group_N):
        return np.empty(0, bool)
    order_N = np.lexsort((strength_N, group_N))
    sorted_N = group_N[order_N]
    starts = np.flatnonzero(np.r_[True, sorted_N[1:] != sorted_N[:-1]])
    last = np.minimum(starts + k, np.r_[starts[1:], len(sorted_N)]) - 1
    kth = np.empty(group_N.max() + 1, strength_N.dtype)
    kth[sorted_N[starts]] = strength_N[order_N[last]]
    return strength_N <= kth[group_N]


def _group_N(table: pa.Table) -> np.ndarray:
    """A number for each row's (query_id, side)."""
    query_N = table["query_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    return 2 * query_N.astype(np.int64) + pc.equal(table["side"], "proponent").to_numpy()


def with_rank(merged: pa.Table) -> pa.Table:
    """A merged table as RANKED: `rank` counts from 1 within query and side."""
    rank = pa.array(_rank_N(merged), pa.int32())
    return merged.add_column(2, RANKED.field("rank"), rank).cast(RANKED)


def _rank_N(table: pa.Table) -> np.ndarray:
    """Position from 1 of each row within its run of equal (query_id, side)."""
    if not len(table):
        return np.empty(0, np.int64)
    codes_N = _group_N(table)
    starts = np.flatnonzero(np.r_[True, codes_N[1:] != codes_N[:-1]])
    return np.arange(len(table)) - np.repeat(starts, np.diff(np.r_[starts, len(table)])) + 1


_SUMS = """
    SELECT query_id, source, {count} AS count, {sum} AS sum, {sum} / {count} AS mean,
           first({example_id} ORDER BY {value} DESC, {example_id}) AS top_example_id, max({value}) AS top_value
    FROM rows GROUP BY query_id, source ORDER BY query_id, source
"""


def source_sums(valued: pa.Table) -> pa.Table:
    """Per query and source: count, sum, mean and strongest example of rows with `value`; as SOURCES."""
    return _sums(valued, count="count(*)", sum="sum(value::DOUBLE)", value="value", example_id="example_id")


def merge_sources(partials: Sequence[pa.Table]) -> pa.Table:
    """Partial SOURCES as one, sorted by query and source."""
    table = pa.concat_tables(partials)
    return _sums(table, count="sum(count)", sum="sum(sum)", value="top_value", example_id="top_example_id")


def _sums(rows: pa.Table, **columns: str) -> pa.Table:
    import duckdb

    # One thread adds in the order of the rows: the same rows give the same bytes.
    with duckdb.connect(config={"threads": 1}) as connection:
        connection.register("rows", rows)
        return connection.sql(_SUMS.format(**columns)).to_arrow_table().cast(SOURCES)
