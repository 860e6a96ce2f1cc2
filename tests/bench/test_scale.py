"""The parts of `make bench-scale` at a size that takes no time, so that the benchmark cannot rot."""

import json

import pytest

from tests.bench import scale, table

pytestmark = pytest.mark.slow


def test_the_ranking_part_runs_and_agrees_with_duckdb(tmp_path):
    """200 score rows: the rank stage lists what DuckDB lists, and both bars are told."""
    rows = scale.ranking_part(0.0002, tmp_path)
    assert [1.5, 1000] == [float(row.bar.removeprefix("<= ")) for row in rows]
    assert all("200 score rows" in row.conditions for row in rows)


def test_figures_of_other_parts_stay(tmp_path, monkeypatch):
    """Publishing one part again replaces its own figures and keeps the rest."""
    monkeypatch.setattr(table, "FOLDER", tmp_path)
    table.publish("scale", [table.figure("a", 1.0, ""), table.at_most("b", 3.0, 2.0, "")])
    table.publish("scale", [table.at_most("b", 1.0, 2.0, "")])
    found = {row["measure"]: (row["value"], row["holds"]) for row in json.loads((tmp_path / "scale.json").read_text())}
    assert {"a": (1.0, None), "b": (1.0, True)} == found


def test_the_files_part_runs_on_a_real_store(tmp_path, s3):
    """10 files on the S3 server are listed and frozen."""
    rows = scale.files_part(0.0001, tmp_path, s3)
    assert rows[0].measure.startswith("files: list and freeze")
    assert rows[0].holds


@pytest.mark.ray
@pytest.mark.night
def test_the_parts_that_need_ray_run(tmp_path, ray_cluster, monkeypatch):
    """10 files of rows, and 200 shards of nothing, through the stage's own call; each measured once."""
    monkeypatch.setattr(scale, "PAIRS", 1)
    by_measure = {row.measure: row.value for row in scale.rows_part(0.0, tmp_path) + scale.shards_part(0.0, tmp_path)}
    assert 0 < by_measure["rows: shards scored per second"]
    assert 0 < by_measure["shards: of nothing per second"]
