"""Top-k and sums: any partition merged in any order equals the whole, ties included."""

from itertools import pairwise
from typing import get_args

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.records import SCORES, Transform
from pipeline.topk import (
    RunningTopk,
    deciding,
    merge_sources,
    merge_topk,
    partial_topk,
    source_sums,
    transform_value,
    value_range,
    value_sql,
    values,
    with_rank,
    with_value,
)  # fmt: skip

few = st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, 1.0, 3.0])  # few values: many ties
TRANSFORMS = get_args(Transform)
rows = st.lists(st.tuples(few, st.sampled_from(["a", "b", None])), min_size=1, max_size=60)


def scores(pairs, query_id="q"):
    n = len(pairs)
    return pa.table(
        {
            "example_id": [f"e{(i * 7919) % 10007:05d}" for i in range(n)],
            "source": pa.array([source for _, source in pairs], pa.string()),
            "query_id": [query_id] * n,
            "base_loss": np.linspace(0, 1, n),
            "counterpart_loss": np.arange(n) % 4 / 4,
            "score": [score for score, _ in pairs],
            "num_tokens": pa.nulls(n, pa.int32()),
            "shard_id": np.zeros(n),
            "row": np.arange(n),
        }
    ).cast(SCORES)


@pytest.mark.slow
@given(rows, st.integers(1, 8), st.lists(st.integers(0, 60), max_size=4), st.randoms(use_true_random=False))
def test_merged_parts_equal_the_whole(pairs, k, cuts, random):
    """Cut anywhere, merge in any order: the same rows, in the same order."""
    valued = with_value(scores(pairs), "signed", 1e-3)
    edges = sorted({0, len(pairs), *(cut for cut in cuts if cut < len(pairs))})
    parts = [partial_topk(valued.slice(a, b - a), k, "signed") for a, b in pairwise(edges)]
    random.shuffle(parts)
    whole = merge_topk([partial_topk(valued, k, "signed")], k)
    assert whole.equals(merge_topk(parts, k))
    assert whole.equals(merge_topk([merge_topk(parts[:1], k), *parts[1:]], k))


def fed(running, table, transform):
    """What the rank stage does with a score file: look at the values, then take the rows that count."""
    position_N = running.reaching(values(table.select(deciding(transform)), transform, 1e-3))
    if len(position_N):
        running.add(with_value(table.take(pa.array(position_N)), transform, 1e-3))
    return len(position_N)


@given(
    rows, st.integers(1, 8), st.lists(st.integers(0, 60), max_size=6), st.sampled_from(TRANSFORMS),
    st.randoms(use_true_random=False),
)  # fmt: skip
def test_a_running_topk_equals_the_partials_way(pairs, k, cuts, transform, random):
    """Fed in pieces, in any order, with many ties, fewer rows than k or none: the rows that sorting everything lists."""
    table = scores(pairs)
    edges = sorted({0, len(pairs), *(cut for cut in cuts if cut < len(pairs))})
    pieces = [table.slice(a, b - a) for a, b in pairwise(edges)] + [table.slice(0, 0)]
    random.shuffle(pieces)
    running = RunningTopk(k, transform)
    for piece in pieces:
        fed(running, piece, transform)
    assert merge_topk([partial_topk(with_value(table, transform, 1e-3), k, transform)], k).equals(running.top())


def test_equal_values_everywhere_are_told_apart_by_id_in_little_memory():
    """50 pieces of 200 rows of one value: the k lowest ids of all, and never more than a few k of rows held back."""
    running = RunningTopk(3, "signed")
    pieces = [scores([(1.0, None)] * 10_000).slice(200 * i, 200) for i in range(50)]
    for piece in pieces:
        assert 200 == fed(running, piece, "signed")
        assert sum(map(len, running._pieces)) <= 16 * 3 + 200
    expected = sorted(pa.concat_tables(pieces)["example_id"].to_pylist())[:3]
    assert expected == running.top().slice(0, 3)["example_id"].to_pylist()
    assert 6 == len(running.top())


def test_what_cannot_count_is_not_asked_for():
    """Once k strong rows were seen, weaker pieces are passed over, by their values and by their range alone."""
    running = RunningTopk(2, "signed")
    assert running.may_reach(0.0, 0.0)
    fed(running, scores([(5.0, None), (4.0, None), (-5.0, None), (-4.0, None)]), "signed")
    assert 0 == fed(running, scores([(3.9, None), (-3.9, None)]), "signed")
    assert not running.may_reach(-3.9, 3.9)
    assert running.may_reach(-3.9, 4.0)
    assert running.may_reach(-4.0, 3.9)
    assert 1 == fed(running, scores([(3.0, None), (4.0, None)]), "signed")


@given(
    st.lists(st.tuples(st.floats(-9, 9, width=32), st.floats(-2, 9, width=32)), min_size=1, max_size=9),
    st.sampled_from(TRANSFORMS),
)
def test_no_value_lies_outside_the_range_of_its_columns(pairs, transform):
    """A row group's statistics bound the values of its rows, whatever the signs; without them anything is possible."""
    score_N, base_loss_N = np.float32(pairs).T
    spans = [(float(column.min()), float(column.max())) for column in (score_N, base_loss_N)]
    lowest, highest = value_range(*spans, transform, 0.5)
    with np.errstate(divide="ignore", invalid="ignore"):  # of a base loss of -0.5
        value_N = transform_value(score_N, base_loss_N, transform, 0.5)
    assert lowest <= np.nanmin(value_N, initial=np.inf)
    assert np.nanmax(value_N, initial=-np.inf) <= highest
    assert (-np.inf, np.inf) == value_range(spans[0], None, "relative", 0.5)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 5), st.integers(0, 40), st.integers(1, 6))
def test_a_merge_of_many_parts_equals_one_sort(parts, rows_each, k):
    """Several queries and sides at once, ties across parts: what sorting all rows lists."""
    rng = np.random.default_rng(parts * 100 + rows_each)
    tables = []
    for part in range(parts):
        for query in ("q", "r"):
            table = scores([(float(value), None) for value in rng.integers(0, 4, rows_each)], query)
            named = pa.array([f"{part}-{i}" for i in range(rows_each)], pa.string())
            tables.append(
                partial_topk(with_value(table.set_column(0, SCORES.field(0), named), "signed", 1e-3), k, "signed")
            )
    order = {"proponent": -1, "opponent": 1}
    listed = pa.concat_tables(tables).to_pylist()
    listed.sort(
        key=lambda row: (row["query_id"], order[row["side"]], order[row["side"]] * row["value"], row["example_id"])
    )
    seen = {}
    expected = [row for row in listed if seen.setdefault((row["query_id"], row["side"]), []).append(0) or True
                if len(seen[row["query_id"], row["side"]]) <= k]  # fmt: skip
    assert expected == merge_topk(tables, k).to_pylist()


@given(rows, st.integers(1, 8))
def test_the_order_is_value_then_example_id(pairs, k):
    """Exactly what sorting all rows by (value, example_id) would list, ranks from 1."""
    table = scores(pairs)
    listed = with_rank(merge_topk([partial_topk(with_value(table, "signed", 1e-3), k, "signed")], k)).to_pylist()
    for side, sign in (("proponent", -1), ("opponent", 1)):
        expected = sorted(table.to_pylist(), key=lambda row: (sign * row["score"], row["example_id"]))[:k]
        got = [row for row in listed if row["side"] == side]
        assert [row["example_id"] for row in expected] == [row["example_id"] for row in got]
        assert list(range(1, len(got) + 1)) == [row["rank"] for row in got]


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(rows, st.lists(st.integers(0, 60), max_size=4))
def test_merged_source_sums_equal_the_whole(pairs, cuts):
    """Counts, tops and (to rounding) sums per source do not depend on how the rows were cut."""
    valued = with_value(scores(pairs), "signed", 1e-3)
    edges = sorted({0, len(pairs), *(cut for cut in cuts if cut < len(pairs))})
    merged = merge_sources([source_sums(valued.slice(a, b - a)) for a, b in pairwise(edges)])
    whole = source_sums(valued)
    for name in ("query_id", "source", "count", "top_example_id", "top_value"):
        assert whole[name].to_pylist() == merged[name].to_pylist()
    assert whole["sum"].to_pylist() == pytest.approx(merged["sum"].to_pylist(), abs=1e-9)
    assert whole["mean"].to_pylist() == pytest.approx(merged["mean"].to_pylist(), abs=1e-9)


def test_many_queries_and_large_tables_agree_with_duckdb(rng):
    """20,000 rows of 3 queries: the same list as one SQL query makes."""
    tables = [
        scores(list(zip(rng.normal(size=20_000).round(2), ["a"] * 20_000, strict=True)), f"q{i}") for i in range(3)
    ]
    parts = [partial_topk(with_value(table, "signed", 1e-3), 50, "signed") for table in tables]
    ours = with_rank(merge_topk(parts, 50))
    everything = pa.concat_tables(tables)
    sql = """SELECT query_id, example_id FROM everything
             QUALIFY row_number() OVER (PARTITION BY query_id ORDER BY score DESC, example_id) <= 50
             ORDER BY query_id, score DESC, example_id"""
    ours_up = ours.filter(pa.compute.equal(ours["side"], "proponent"))
    with duckdb.connect() as connection:
        connection.register("everything", everything)
        theirs = connection.execute(sql).fetchall()
    assert theirs == list(zip(ours_up["query_id"].to_pylist(), ours_up["example_id"].to_pylist(), strict=True))


def test_transforms_are_what_they_say():
    """signed, absolute, relative = score / (base_loss + eps), and minus the counterpart's loss, without a negative zero."""
    score_N, base_N = np.float32([-2, 1]), np.float32([1, 0])
    counterpart_N = transform_value(score_N, np.float32([3, 0]), "counterpart_loss", 0.5)
    assert [-3, 0] == counterpart_N.tolist()
    assert not np.signbit(counterpart_N[1])
    assert [-2, 1] == transform_value(score_N, base_N, "signed", 0.5).tolist()
    assert [2, 1] == transform_value(score_N, base_N, "absolute", 0.5).tolist()
    assert [-2 / 1.5, 2] == pytest.approx(transform_value(score_N, base_N, "relative", 0.5).tolist())


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_sql_says_the_same_values(transform):
    """To the bit, of columns by the names that a score file gives them."""
    table = scores([(0.1 * i, None) for i in range(50)])
    names = {name: f"{name}_per_token" if name.endswith("_loss") else name for name in SCORES.names}
    stored = table.rename_columns([names[name] for name in SCORES.names])
    with duckdb.connect() as connection:
        connection.register("stored", stored)
        got = connection.execute(f"SELECT {value_sql(transform, 1e-3, names)} AS value FROM stored").fetchnumpy()
    assert values(table, transform, 1e-3).tobytes() == got["value"].astype(np.float32).tobytes()


def test_a_size_has_no_opponents():
    """`absolute` lists proponents only: the least changed example opposes nothing."""
    assert {"proponent"} == set(
        partial_topk(with_value(scores([(1.0, None), (-3.0, None)]), "absolute", 1e-3), 5, "absolute")[
            "side"
        ].to_pylist()
    )
