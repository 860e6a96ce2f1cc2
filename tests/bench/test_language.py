"""The language part of `make bench` at a size that takes no time, so that the benchmark cannot rot."""

import pytest

from tests.bench import language
from tests.language import gpt, saved


@pytest.mark.slow
def test_the_language_part_runs(tmp_path, monkeypatch):
    """Four short texts under a tiny model: both ratios are told, with their conditions."""
    monkeypatch.setattr(language, "LONGEST", 12)
    world = language.World(tmp_path, saved(gpt(), tmp_path / "model"), texts=4, dtype="float32")
    rows = language.measure(world, pairs=1)
    assert [">= 0.9", ">= 2"] == [row.bar for row in rows]
    assert all(row.value > 0 and "4 texts of 10 to 12 words" in row.conditions for row in rows)
