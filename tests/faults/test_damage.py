"""What lies on the store is damaged behind the run's back: it is found, named, and made anew, or quarantined with its reason."""

import os
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from jobs import attribute as job
from jobs.cli import app, guarded
from pipeline.frozen import open_run
from pipeline.run import attribute, finish
from tests.conftest import run_without_ray
from tests.faults.test_worker_deaths import tuned

pytestmark = pytest.mark.ray

FILE_ROWS, SHARD_ROWS = 50, 25


def command(monkeypatch, application, *words):
    """Exit code of the command in this process, which is connected to the cluster."""
    monkeypatch.setattr(sys, "argv", ["mirrorscope", *words])
    try:
        return guarded(application)
    except SystemExit as stop:
        return stop.code


def truncate(path):
    """Half of it is gone."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    """One bit of its data is another."""
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)


def corrupt(path):
    """The second row group's pages become nonsense, while size and modification time stay; what puts them back is returned."""
    whole, times = path.read_bytes(), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    second = pq.read_metadata(path).row_group(1)
    columns = [second.column(i) for i in range(second.num_columns)]
    start = min(columns[0].data_page_offset, columns[0].dictionary_page_offset or columns[0].data_page_offset)
    stop = start + sum(column.total_compressed_size for column in columns)

    def write(data):
        path.write_bytes(data)
        os.utime(path, ns=times)

    write(whole[:start] + b"\xff" * (stop - start) + whole[stop:])
    return lambda: write(whole)


@pytest.mark.parametrize("damage", [truncate, flip])
def test_a_damaged_score_file_is_found_and_made_anew(
    damage, ray_cluster, make_spec, undisturbed, ledger, monkeypatch, capsys
):
    """`verify` ends with 6 and names it; the run's command makes its shard anew, and no other; then `verify` is content."""
    spec = make_spec()
    finish(run_without_ray(spec))
    scores, name = Path(spec.run.uri, "scores"), "query_id=copy-of-3/shard-000001.parquet"
    others = {path: path.stat().st_mtime_ns for path in scores.rglob("*.parquet") if path.name != Path(name).name}
    damage(scores / name)
    damaged_s, attempts = time.time(), 0
    while code := command(monkeypatch, app, "verify", spec.run.uri):
        shown = capsys.readouterr()
        assert 6 == code
        assert name in shown.out + shown.err
        run, attempts = attribute(spec), attempts + 1
        assert f"{name}: got " in capsys.readouterr().err
        assert attempts < 3
    assert others == {path: path.stat().st_mtime_ns for path in others}
    fault = f"a score file that is {'truncated' if damage is truncate else 'flipped in one bit'}"
    ledger.enter(fault, attempts, run.receipt(0, 1).finished_at_s - damaged_s, run, undisturbed)


def test_a_corrupt_corpus_file_is_quarantined_where_it_cannot_be_read(
    ray_cluster, make_spec, world, tmp_path, ledger, monkeypatch, capsys
):
    """Size and time say nothing of it: its shard goes to rejects/ at once, the rest is scored, and the exit code says so.

    A spec that tolerates it ends well. When the bytes are back the same command scores them.
    """
    corpus, table = tmp_path / "corpus", world.table()
    corpus.mkdir()
    for i in range(0, len(table), FILE_ROWS):
        pq.write_table(table.slice(i, FILE_ROWS), corpus / f"part-{i:03d}.parquet", row_group_size=SHARD_ROWS)
    overrides = (f"corpus.uri={corpus}", f"score.shard_rows={SHARD_ROWS}", "resources.score.actors=1")
    undisturbed = run_without_ray(make_spec(*overrides, name="undisturbed"))
    spec = tuned(make_spec(*overrides))
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    starts = []

    def start(*words):
        starts.append(words)
        return command(monkeypatch, job.app, str(tmp_path / "spec.yaml"), *words)

    mend = corrupt(corpus / f"part-{FILE_ROWS:03d}.parquet")
    assert 9 == start(), capsys.readouterr().err
    said = capsys.readouterr().err
    assert "error: 1 of 6 shards are quarantined" in said
    assert f"shard-000003: {SHARD_ROWS} rows: {corpus}/part-050.parquet" in said
    assert 0 == start("--set", "score.max_reject_fraction=0.2"), capsys.readouterr().err
    run = open_run(spec.run.uri)
    rejects = run.read_shard(run.receipt(0, 3), "rejects/shard-000003-quarantined.parquet").to_pylist()
    assert [(25 + i, "part-050.parquet") for i in range(SHARD_ROWS)] == [
        (r["row"], Path(r["path"]).name) for r in rejects
    ]
    seconds = run.receipt(0, 3).finished_at_s - run.receipt(0, 3).started_at_s
    ledger.enter("a corrupt corpus file", len(starts), seconds, run, undisturbed, rejected=SHARD_ROWS)
    mend()
    mended_s = time.time()
    assert 0 == start(), capsys.readouterr().err
    assert "shard-000003 was quarantined before" in capsys.readouterr().err
    ledger.enter(
        "a corrupt corpus file, put back", len(starts), run.receipt(0, 3).finished_at_s - mended_s, run, undisturbed
    )
