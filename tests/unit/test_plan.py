"""The plan: every row in exactly one shard, and an identity that knows what moves scores."""

import itertools

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from pipeline.plan import MAX_SHARD_ROWS, fingerprint, identity, make_shards, shard_rows
from pipeline.records import Column, Measured, SourceFile
from pipeline.works import Manifest
from tests.unit.test_spec import parse


def measured(rows_each, stride=0):
    files = [SourceFile(f"/c/{i}", 10 * rows, "v") for i, rows in enumerate(rows_each)]
    offsets = [(*range(0, 10 * rows, 10 * stride), 10 * rows) if stride else () for rows in rows_each]
    return [
        Measured(file, rows, {"x": pa.int64()}, offset, stride)
        for file, rows, offset in zip(files, rows_each, offsets, strict=True)
    ]


@given(st.lists(st.integers(0, 500), max_size=8), st.integers(1, 200))
def test_every_row_is_in_exactly_one_shard(rows_each, rows_per_shard):
    """Shards cover each file's rows once, in order, and are numbered from 0."""
    shards = make_shards(measured(rows_each), rows_per_shard)
    covered = [(shard.path, shard.row_start + i) for shard in shards for i in range(shard.rows)]
    assert [(f"/c/{i}", row) for i, rows in enumerate(rows_each) for row in range(rows)] == covered
    assert list(range(len(shards))) == [shard.shard_id for shard in shards]
    assert all(0 < shard.rows <= rows_per_shard for shard in shards)


@given(st.lists(st.integers(0, 40), max_size=12), st.integers(1, 60))
def test_shards_are_cut_along_row_groups(groups, rows_per_shard):
    """A shard is made of whole groups or is part of one; each row is in one, and no two shards could have been one."""
    file = SourceFile("/c/0", 1, "v")
    shards = make_shards([Measured(file, sum(groups), {}, groups=tuple(groups))], rows_per_shard)
    group_of_row = [group for group, rows in enumerate(groups) for _ in range(rows)]
    parts = [group_of_row[shard.row_start : shard.row_start + shard.rows] for shard in shards]
    assert group_of_row == [group for part in parts for group in part]
    assert all(0 < len(part) <= rows_per_shard for part in parts)
    is_whole = [len(part) == sum(groups[group] for group in set(part)) for part in parts]
    assert all(whole or 1 == len(set(part)) for whole, part in zip(is_whole, parts, strict=True))
    for whole, (part, after) in zip(is_whole, itertools.pairwise(parts), strict=False):
        assert not whole or len(part) + groups[after[0]] > rows_per_shard


@given(st.integers(1, 1000), st.integers(1, 300), st.integers(1, 64))
def test_byte_ranges_hold_the_shards_rows(rows, rows_per_shard, stride):
    """A text shard's bytes begin at or before its first row and end at or behind its last."""
    for shard in make_shards(measured([rows], stride), rows_per_shard):
        assert 10 * (shard.row_start - shard.row_start % stride) == shard.byte_start
        assert shard.byte_stop >= 10 * (shard.row_start + shard.rows)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=4))
def test_a_manifest_reads_back_as_it_was_written(rows_each):
    """Shards -> table -> shards is the identity."""
    shards = make_shards(measured(rows_each), 7)
    assert shards == list(Manifest.of(shards))


def test_shards_are_whole_batches_and_bounded():
    """By default a 32nd of the corpus, in whole batches, and never above the bound."""
    spec = parse("score.batch_rows=100")
    small, image = [Column("x", ("x",))], [Column("x", ("x",), "float32", (3, 224, 224))]
    assert [100, 400, 65_600] == [shard_rows(spec, rows, small) for rows in (5, 12_000, 10**9)]
    assert shard_rows(spec, 10**9, small) < MAX_SHARD_ROWS + 100
    assert 300 == shard_rows(spec, 10**9, image)  # 223 rows of 1.2 MB are 256 MiB
    assert 7 == shard_rows(parse("score.shard_rows=7"), 10**6, small)


def test_the_fingerprint_follows_what_moves_scores_and_nothing_else():
    """The sample, seed and weights change it; k, workers and tolerance for rejects do not."""
    base = fingerprint(parse(), {"weights": "a"})
    assert "ensemble" not in identity(parse()), "a run without one is what it was before there were any"
    for same in (
        "rank.k=3",
        "resources.tune.workers=3",
        "score.max_reject_fraction=0.5",
        "corpus.check_ids=false",
        "score.base_losses=kept",
        "producer.curvatures=kept",
        "score.noise_rows=0",
        "run.uri=y",
    ):
        assert base == fingerprint(parse(same), {"weights": "a"}), same
    for other in ("producer.sample_rows=7", "seed=1", "score.batch_rows=9", "task.label=y", "model.dtype=float64"):
        assert base != fingerprint(parse(other), {"weights": "a"}), other
    assert base != fingerprint(parse(), {"weights": "b"})
    assert "rank" not in identity(parse())
