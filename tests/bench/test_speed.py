"""The part of `make bench` that times stage score, at a size that takes no time, so that the benchmark cannot rot."""

import pytest

from jobs.digits import cnn
from tests.bench import speed
from tests.bench.speed_worlds import Digits, Pictures, resnet, written
from tests.conftest import compiles


@pytest.mark.slow
def test_stage_score_is_timed_beside_bare_loops(tmp_path):
    """All parameters and the last blocks, one query and many, on digits and on pictures of 32 x 32."""
    digits = written(Digits("digits", tmp_path / "digits", 64, 32, 1), cnn())
    pictures = written(Pictures("pictures", tmp_path / "pictures", 16, 8, 2), resnet())
    for world in (digits, pictures):
        rows = speed.stage(world, rounds=1)
        assert [f">= {bar:g}" for bar in speed.BARS.values()] == [row.bar for row in rows]
        assert all(row.value > 0 and f"{world.rows} rows" in row.conditions for row in rows)


@compiles
@pytest.mark.slow
def test_compiled_stage_score_is_timed_beside_plain(tmp_path):
    """All parameters and the last blocks."""
    pictures = written(Pictures("pictures", tmp_path / "pictures", 16, 8, 2), resnet())
    rows = speed.compiled(pictures, rounds=1)
    assert 2 == len(rows)
    assert all(row.value > 0 and "16 rows" in row.conditions for row in rows)
