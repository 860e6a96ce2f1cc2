"""What lies on the store is damaged behind the run's back: it is found, named, and made anew, or quarantined with its reason."""

import hashlib
import io
import os
import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import yaml

from jobs import attribute as job
from jobs.cli import app, guarded
from pipeline.errors import InputError
from pipeline.freeze import freeze
from pipeline.frozen import open_run
from pipeline.run import attribute, carry_on, finish
from tests.conftest import run_without_ray, tuned
from tests.faults.mortal import mortal_task
from tests.small import work_off

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


OTHERS = ("counterparts/query_id=copy-of-3/changed-*.safetensors", "counterparts/query_id=copy-of-3/meta.json",
          "commits/shard-000001.json", "partials/topk/shard-000001-*.parquet", "_SUCCESS", "topk/meta.json", "run.yaml",
          "manifest.parquet", "queries.parquet", "report/index.html", "report/contact_sheet.png")  # fmt: skip
"""Kinds of objects, scores aside."""


@pytest.mark.timeout(900)
def test_a_flipped_bit_in_any_kind_of_object_is_found_and_repaired(make_spec, undisturbed, ledger, monkeypatch, capsys):
    """`verify` ends with 6; `verify --mend` and the run's command bring back what was there; then `verify` is content."""
    spec = make_spec()
    finish(run_without_ray(spec))
    for pattern in OTHERS:
        (path,) = Path(spec.run.uri).glob(pattern)
        flip(path)
        damaged_s = time.monotonic()
        assert 6 == command(monkeypatch, app, "verify", spec.run.uri), pattern
        assert 0 == command(monkeypatch, app, "verify", spec.run.uri, "--mend"), capsys.readouterr().err
        run = work_off(freeze(spec))
        assert 0 == command(monkeypatch, app, "verify", spec.run.uri), capsys.readouterr().err
        kind = re.sub(r"query_id=[^/]*/|-?(\d{6}-?)?\*", "", pattern)
        ledger.enter(f"a flipped bit: {kind}", 1, time.monotonic() - damaged_s, run, undisturbed)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("when", ["before tune", "before score", "while a worker dies"])
def test_weights_that_are_swapped_make_no_score(when, request, make_spec, world, undisturbed, ledger, tmp_path):
    """Exit 3 and no wrong row, also where a worker has to start again in the middle; put back, it ends as undisturbed."""
    dies = when == "while a worker dies"
    if dies:
        request.getfixturevalue("ray_cluster")
    weights, other, row = tmp_path / "weights.safetensors", tmp_path / "other.safetensors", 4 * 16
    safetensors.torch.save_file({k: v + 0.1 for k, v in world.model.state_dict().items()}, other)
    shutil.copy(world.weights, weights)
    overrides = [f"model.weights_uri={weights}", "score.shard_rows=16", "resources.score.actors=1"]
    if dies:
        overrides.append(mortal_task(tmp_path / "log", world.pixels[row], swap=(other, weights)))
    spec = make_spec(*overrides)
    run = freeze(spec)
    if when != "before tune":
        tuned(spec)
    if not dies:
        shutil.copy(other, weights)
    with pytest.raises(
        InputError, match=r"model\.weights_uri: .*weights\.safetensors is not what the run was frozen with"
    ):
        (carry_on if dies else work_off)(run)
    swapped_s = time.monotonic()
    shutil.copy(world.weights, weights)
    run = attribute(spec) if dies else work_off(freeze(spec))
    ledger.enter(f"weights swapped {when}", 2, time.monotonic() - swapped_s, run, undisturbed)


@pytest.mark.timeout(900)
def test_kept_base_losses_of_other_weights_are_not_believed(make_spec, undisturbed, ledger, tmp_path, capsys):
    """Every object of the cache is changed, its own digests right: computed again, and said."""
    base = tmp_path / "base"
    work_off(freeze(make_spec(f"score.base_losses={base}", name="first")))
    for path in sorted(base.rglob("*.npy")):
        body = path.read_bytes()[:-32]
        losses, inputs = np.load(io.BytesIO(body)), body[-32:]
        buffer = io.BytesIO()
        np.save(buffer, losses + losses.dtype.type(0.25))
        path.write_bytes(buffer.getvalue() + inputs + hashlib.sha256(buffer.getvalue() + inputs).digest())
    capsys.readouterr()
    started_s = time.monotonic()
    run = work_off(freeze(make_spec(f"score.base_losses={base}", name="second")))
    assert "it computes its own anew" in capsys.readouterr().err
    ledger.enter("a poisoned cache of base losses", 1, time.monotonic() - started_s, run, undisturbed)


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
