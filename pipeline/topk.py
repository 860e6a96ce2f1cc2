"""Exact top-k of score tables and its merge: the top k of any partition, merged in any order, is the top k of the whole.

Order is total: by value, then by example_id, so ties always fall the same way.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .records import PARTIAL_TOPK, RANKED, SOURCES, Side, Transform


def transform_value(score_N: np.ndarray, base_loss_N: np.ndarray, transform: Transform, eps: float) -> np.ndarray:
    """What is sorted: [N] float32.

    Args:
        score_N: Scores, in nats.
        base_loss_N: Base losses, in nats.
        transform: `signed`: the score; `absolute`: its size (Ko et al. 2024); `relative`: score / (base_loss + eps).
        eps: Added to the base loss by `relative`, in nats.
    """
    match transform:
        case "signed":
            return score_N.astype(np.float32)
        case "absolute":
            return np.abs(score_N).astype(np.float32)
        case "relative":
            return (score_N.astype(np.float64) / (base_loss_N.astype(np.float64) + eps)).astype(np.float32)


def transform_name(transform: Transform, eps: float) -> str:
    """A transform with its parameter, as commits and tables name it."""
    return f"relative:{eps:g}" if transform == "relative" else transform


def sides(transform: Transform) -> tuple[Side, ...]:
    """Sides that a transform can tell apart: a size has no sign, so `absolute` lists no opponents."""
    return ("proponent",) if transform == "absolute" else ("proponent", "opponent")


def with_value(scores: pa.Table, transform: Transform, eps: float) -> pa.Table:
    """A table of SCORES with the column `value` behind."""
    value_N = transform_value(scores["score"].to_numpy(), scores["base_loss"].to_numpy(), transform, eps)
    return scores.append_column(PARTIAL_TOPK.field("value"), pa.array(value_N))


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


def merge_topk(partials: Sequence[pa.Table], k: int) -> pa.Table:
    """Partial top-k tables as one, still at most k rows per query and side, sorted, without ranks."""
    table = pa.concat_tables(partials)
    strength = pc.if_else(pc.equal(table["side"], "proponent"), pc.negate(table["value"]), table["value"])
    keyed = table.append_column("strength", strength)
    # "proponent" sorts behind "opponent": descending puts the answer people look for first.
    keys = [("query_id", "ascending"), ("side", "descending"), ("strength", "ascending"), ("example_id", "ascending")]
    table = table.take(pc.sort_indices(keyed, sort_keys=keys))
    return table.filter(pa.array(_rank_N(table) <= k))


def with_rank(merged: pa.Table) -> pa.Table:
    """A merged table as RANKED: `rank` counts from 1 within query and side."""
    rank = pa.array(_rank_N(merged), pa.int32())
    return merged.add_column(2, RANKED.field("rank"), rank).cast(RANKED)


def _rank_N(table: pa.Table) -> np.ndarray:
    """Position from 1 of each row within its run of equal (query_id, side)."""
    if not len(table):
        return np.empty(0, np.int64)
    group = pc.binary_join_element_wise(table["query_id"], table["side"], "\0")
    codes_N = group.combine_chunks().dictionary_encode().indices.to_numpy()
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
