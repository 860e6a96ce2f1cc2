"""What lies in a run against what its commits say: every kind of damage is found, named and mended; gc takes orphans only."""

import json
import os
import shutil
import sys
from fnmatch import fnmatch
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from jobs.cli import app, guarded
from pipeline import storage
from pipeline.audit import audit, collect, mend, void
from pipeline.errors import ArtifactError
from pipeline.folder import json_bytes
from pipeline.freeze import freeze
from pipeline.frozen import open_run
from pipeline.run import _needs_ray
from pipeline.scorer import ShardScorer
from tests.small import Small, one_thread, products, work_off

CHEAP = ("corpus.source=null", "corpus.check_ids=false")
"""Without what asks DuckDB."""
SCORES, COMMIT = "scores/query_id=red/shard-000001.parquet", "commits/shard-000001.json"
META, TENSORS = "counterparts/query_id=red/meta.json", "counterparts/query_id=red/changed*.safetensors"
REJECTS, PARTIAL = "rejects/shard-000001.parquet", "partials/topk/shard-000001-3-signed.parquet"
ORPHANS = (
    "scores/query_id=red/shard-000099.parquet",
    "scores/query_id=red/.shard-000001.parquet.0123.tmp",
    "partials/topk/shard-000001-9-signed.parquet",
    "counterparts/query_id=gone/changed.safetensors",
    "additions/0001/manifest-0123.parquet",
)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The small world, with a finished run in `run`."""
    with one_thread():
        made = Small(tmp_path_factory.mktemp("small"))
        work_off(freeze(made.spec(made.folder / "run", *CHEAP)))
        yield made


@pytest.fixture
def run(small, tmp_path):
    """A copy of the finished run, to be damaged."""
    return open_run(str(shutil.copytree(small.folder / "run", tmp_path / "run")))


def objects(run):
    return {path: storage.read_bytes(run.uri(path)) for path in storage.objects(run.uri())}


def invoke(monkeypatch, capsys, *words):
    """Exit code of the command, and what it printed on both streams."""
    monkeypatch.setattr(sys, "argv", ["mirrorscope", *words])
    monkeypatch.setenv("COLUMNS", "200")
    try:
        code = guarded(app)
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def named(run, path):
    """The object that a path with a wildcard stands for: some names have a digest in them."""
    return next(name for name in objects(run) if fnmatch(name, path)) if "*" in path else path


def remove(run, path):
    Path(run.uri(path)).unlink()


def cut(run, path):
    data = Path(run.uri(path)).read_bytes()
    Path(run.uri(path)).write_bytes(data[: len(data) // 2])


def flip(run, path):
    data = bytearray(Path(run.uri(path)).read_bytes())
    data[len(data) // 2] ^= 1
    Path(run.uri(path)).write_bytes(data)


def edit(**changes):
    """Damage to a JSON object: fields that say something else; a function changes what is there."""

    def change(run, path):
        tree = json.loads(Path(run.uri(path)).read_bytes())
        tree |= {name: value(tree[name]) if callable(value) else value for name, value in changes.items()}
        tree.pop("sha256")
        Path(run.uri(path)).write_bytes(json_bytes(tree))

    return change


def without_scores(files):
    return {path: written for path, written in files.items() if path != SCORES}


def fewer_rows(run, path):
    """A score file of fewer rows, whose commit says its digest."""
    buffer = pa.BufferOutputStream()
    pq.write_table(pq.read_table(run.uri(path), partitioning=None).slice(1), buffer)
    data = buffer.getvalue().to_pybytes()
    Path(run.uri(path)).write_bytes(data)
    made = {path: {"bytes": len(data), "sha256": storage.bytes_digest(data)}}
    edit(files=lambda files: files | made)(run, COMMIT)


MENDED = {
    "a score file that is gone": (remove, SCORES, "is missing"),
    "a score file cut in half": (cut, SCORES, "bytes, expected"),
    "a score file with a flipped bit": (flip, SCORES, "got sha256"),
    "a score file of fewer rows": (fewer_rows, SCORES, "got 2 rows, expected 3"),
    "a partial that is gone": (remove, PARTIAL, "is missing"),
    "a partial with a flipped bit": (flip, PARTIAL, "got sha256"),
    "rejects that are gone": (remove, REJECTS, "is missing"),
    "rejects with a flipped bit": (flip, REJECTS, "got sha256"),
    "a commit cut in half": (cut, COMMIT, "is damaged"),
    "a commit of too few rows": (edit(rows=2), COMMIT, "2 scored + 1 rejected rows, expected 4"),
    "a commit that names no scores of a query": (edit(files=without_scores), COMMIT, f"names no {SCORES}"),
    "a commit that says another digest": (
        edit(files=lambda files: files | {SCORES: {**files[SCORES], "sha256": "0" * 64}}),
        COMMIT,
        "expected " + "0" * 64,
    ),
    "tensors that are gone": (remove, TENSORS, "is missing"),
    "tensors with a flipped bit": (flip, TENSORS, "got sha256"),
    "a counterpart's meta cut in half": (cut, META, "is damaged"),
    "a seal that says nothing": (lambda run, path: Path(run.uri(path)).write_text("{}"), "_SUCCESS", "cannot be read"),
    "a seal over a missing commit": (
        lambda run, _: remove(run, COMMIT),
        "_SUCCESS",
        "stands, but 1 shards have no commit",
    ),
}
HOPELESS = {
    "a commit of another run": (edit(fingerprint="another"), COMMIT, "carries fingerprint another"),
    "a counterpart of another run": (edit(fingerprint="another"), META, "carries fingerprint another"),
    "a commit of a shard that is not": (
        lambda run, path: shutil.copy(run.uri(COMMIT), run.uri(path)),
        "commits/shard-000099.json",
        "",
    ),
    "frozen queries that changed since it was opened": (flip, "queries.parquet", "got sha256"),
}


def test_a_whole_run_is_whole(run, monkeypatch, capsys):
    """No damage, no orphans; verify says what it compared and exits 0."""
    found = audit(run)
    assert ([], {}, True) == (found.damage, found.orphans, found.sealed)
    assert (4, 4, 2, 12, 1) == (found.works, found.commits, found.counterparts, found.rows, found.rejects)
    code, shown = invoke(monkeypatch, capsys, "verify", run.uri())
    assert 0 == code, shown
    for words in ("4 of 4 committed", "12 scored, 1 rejected, of 13", "2 of 2 committed", "read and compared"):
        assert words in shown


def cases(kinds):
    """All kinds as parameters; those that are like another one are slow."""
    alike = {"a partial that is gone", "rejects that are gone", "rejects with a flipped bit", "tensors that are gone"}
    return [pytest.param(*kind, id=name, marks=[pytest.mark.slow] * (name in alike)) for name, kind in kinds.items()]


@pytest.mark.slow
@pytest.mark.parametrize(("damage", "path", "said"), cases(MENDED))
def test_damage_is_found_named_and_mended(run, small, damage, path, said, monkeypatch, capsys):
    """verify exits 6 and names the object; --mend and the run's own command bring back the bytes of before."""
    before = objects(run)
    damage(run, named(run, path))
    code, shown = invoke(monkeypatch, capsys, "verify", run.uri())
    assert 6 == code, shown
    assert "verify --mend" in shown
    assert any(line.startswith("damaged ") and said in line for line in shown.splitlines()), shown
    code, shown = invoke(monkeypatch, capsys, "verify", run.uri(), "--mend")
    assert 0 == code, shown
    assert "_SUCCESS" not in objects(run)
    again = work_off(freeze(small.spec(run.uri(), *CHEAP)))
    assert products(before) == products(objects(again))
    assert ([], {}, True) == ((found := audit(again)).damage, found.orphans, found.sealed)


@pytest.mark.parametrize("name", ["a score file that is gone", "tensors with a flipped bit", "a commit cut in half"])
def test_a_start_mends_by_itself(run, small, name):
    """The run's command alone finds damage of what is committed, and makes it anew."""
    before = objects(run)
    damage, path, _ = MENDED[name]
    damage(run, named(run, path))
    again = work_off(freeze(small.spec(run.uri(), *CHEAP)))
    assert products(before) == products(objects(again))


@pytest.mark.parametrize(("damage", "path", "said"), HOPELESS.values(), ids=HOPELESS)
def test_what_making_anew_does_not_mend_is_left_alone(run, damage, path, said, monkeypatch, capsys):
    """Objects of another run, commits that the manifest lacks: exit 6 with and without --mend, and nothing is deleted."""
    damage(run, path)
    remove(run, SCORES)
    before = objects(run)
    findings = audit(run).damage
    assert {path, SCORES} == {finding.path for finding in findings} | {SCORES}
    assert any(said in finding.what and finding.commit is None for finding in findings)
    for attempt in (lambda: mend(run), lambda: void(run, findings), lambda: collect(run, 0)):
        with pytest.raises(ArtifactError):
            attempt()
    if path != "queries.parquet":
        for words in ([], ["--mend"], ["--sizes"]):
            assert 6 == invoke(monkeypatch, capsys, "verify", run.uri(), *words)[0]
    assert before == objects(run)


def test_sizes_are_compared_without_reading(run, monkeypatch, capsys):
    """--sizes does not see a flipped bit, and says that it read nothing; it sees a file cut in half."""
    flip(run, SCORES)
    code, shown = invoke(monkeypatch, capsys, "verify", run.uri(), "--sizes")
    assert 0 == code, shown
    assert "nothing read" in shown
    cut(run, SCORES)
    assert 6 == invoke(monkeypatch, capsys, "verify", run.uri(), "--sizes")[0]


def test_a_run_that_is_not_finished_is_not_damaged(run, monkeypatch, capsys):
    """Shards without a commit are work to do: exit 0, and verify says how far it is."""
    remove(run, "_SUCCESS")
    remove(run, COMMIT)
    code, shown = invoke(monkeypatch, capsys, "verify", run.uri())
    assert 0 == code, shown
    assert "3 of 4 committed" in shown
    assert "no: run it to its end" in shown


def test_voiding_takes_the_seal_first(run, monkeypatch):
    """While a commit is missing _SUCCESS does not stand, whenever the process is killed."""
    removed = []
    monkeypatch.setattr(storage, "remove", removed.append)
    remove(run, SCORES)
    mend(run)
    assert [run.uri("_SUCCESS"), run.uri(COMMIT)] == removed


# --- gc ----------------------------------------------------------------------------------------------------------------


def litter(run, age_s=0.0):
    """Leavings of attempts that were killed, so old."""
    for path in ORPHANS:
        place = Path(run.uri(path))
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(b"left")
        os.utime(place, (place.stat().st_mtime - age_s,) * 2)


def test_orphans_are_listed_and_do_no_harm(run, monkeypatch, capsys):
    """verify names them, says what deletes them, and exits 0."""
    litter(run)
    code, shown = invoke(monkeypatch, capsys, "verify", run.uri())
    assert 0 == code, shown
    assert all(f"orphan    {path}" in shown for path in ORPHANS)
    assert "mirrorscope gc" in shown


def test_gc_deletes_what_nobody_names_and_nothing_else(run, monkeypatch, capsys):
    """Hidden temporary files, strangers' shards, half an addition; all that was there before stays to the byte."""
    before = objects(run)
    litter(run)
    code, shown = invoke(monkeypatch, capsys, "gc", run.uri(), "--older-than", "0", "--dry-run")
    assert 0 == code, shown
    assert f"{len(ORPHANS)} objects of 0.0 MiB would be deleted" in shown
    assert set(before) | set(ORPHANS) == set(objects(run))
    code, shown = invoke(monkeypatch, capsys, "gc", run.uri(), "--older-than", "0")
    assert 0 == code, shown
    assert all(path in shown for path in ORPHANS)
    assert before == objects(run)


def test_what_is_not_ours_is_no_orphan(run, monkeypatch, capsys):
    """A corpus, weights, a catalog or another run in the folder are their owner's: gc does not touch or list them."""
    foreign = ("corpus/part.parquet", "weights.safetensors", "other/commits/shard-000000.json", "catalog.db", ".hidden")
    for path in foreign:
        storage.write_bytes(run.uri(path), b"somebody's")
        os.utime(run.uri(path), (0, 0))
    code, shown = invoke(monkeypatch, capsys, "gc", run.uri(), "--older-than", "0")
    assert 0 == code, shown
    assert "0 objects" in shown
    assert set(foreign) <= set(objects(run))


@pytest.mark.slow
def test_a_ranking_that_is_not_what_was_made_is_found_and_made_anew(run, monkeypatch, capsys):
    """A flipped bit in topk/ranked.parquet: verify names it, `show` refuses it, the run's command ranks again."""
    before = objects(run)
    flipped = bytearray(before["topk/ranked.parquet"])
    flipped[100] ^= 1
    Path(run.uri("topk", "ranked.parquet")).write_bytes(flipped)
    assert ["topk/ranked.parquet"] == [finding.path for finding in audit(run).damage]
    code, shown = invoke(monkeypatch, capsys, "show", run.uri())
    assert 6 == code, shown
    work_off(run)
    assert products(before) == products(objects(run))


def test_gc_spares_what_may_be_in_the_making(run, monkeypatch, capsys):
    """Objects younger than a day, or than --older-than, may belong to a worker that has not committed yet."""
    litter(run, age_s=7200)
    assert "0 objects" in invoke(monkeypatch, capsys, "gc", run.uri())[1]
    assert "0 objects" in invoke(monkeypatch, capsys, "gc", run.uri(), "--older-than", "2.5")[1]
    assert f"{len(ORPHANS)} objects" in invoke(monkeypatch, capsys, "gc", run.uri(), "--older-than", "1.5")[1]


def test_gc_of_a_damaged_run_deletes_nothing(run, monkeypatch, capsys):
    """What is damaged is mended first: exit 6."""
    litter(run)
    remove(run, SCORES)
    before = objects(run)
    code, shown = invoke(monkeypatch, capsys, "gc", run.uri(), "--older-than", "0")
    assert 6 == code, shown
    assert before == objects(run)


def test_gc_of_an_unfinished_run_leaves_what_is_committed(run, small):
    """Files of a shard that lost its commit are orphans; the run goes on as if they had never been."""
    before = objects(run)
    remove(run, "_SUCCESS")
    remove(run, COMMIT)
    gone = collect(run, 0)
    assert set(json.loads(before[COMMIT])["files"]) == set(gone)
    again = work_off(freeze(small.spec(run.uri(), *CHEAP)))
    assert products(before) == products(objects(again))


# --- quarantine ------------------------------------------------------------------------------------------------------------


def test_a_quarantined_shard_leaves_no_scores(run, small):
    """What attempts wrote before they died would count its rows twice."""
    remove(run, "_SUCCESS")
    remove(run, COMMIT)
    receipt = ShardScorer(run, "cpu").quarantine(run.work(0, 1), "its workers died")
    assert (0, 4) == (receipt.rows, receipt.rejects)
    assert SCORES not in objects(run)
    assert ["its workers died"] * 4 == pq.read_table(run.uri(receipt.rejects_path))["got"].to_pylist()


def test_a_scored_shard_is_not_quarantined_any_more(run):
    """Whoever gives up too late finds the commit of an attempt that was taken for dead, and leaves it."""
    before = objects(run)
    receipt = ShardScorer(run, "cpu").quarantine(run.work(0, 1), "its workers died")
    assert receipt.quarantined is None
    assert before == objects(run)


def test_a_quarantined_shard_is_tried_again_and_leaves_no_rejects(run, small):
    """Its rows are in scores/ then, and in rejects/ no more, though no other row of it is rejected."""
    before = objects(run)
    remove(run, "_SUCCESS")
    remove(run, "commits/shard-000000.json")
    ShardScorer(run, "cpu").quarantine(run.work(0, 0), "its workers died")
    assert "rejects/shard-000000-quarantined.parquet" in objects(run)
    again = work_off(freeze(small.spec(run.uri(), *CHEAP)))
    assert products(before) == products(objects(again))


def test_a_quarantined_shard_asks_for_a_cluster_again(run):
    """The next start of a run that does not tolerate it finds work to do, though every shard had its commit."""
    remove(run, "_SUCCESS")
    remove(run, COMMIT)
    ShardScorer(run, "cpu").quarantine(run.work(0, 1), "its workers died")
    assert not _needs_ray(run)
    mend(run)
    assert _needs_ray(run)


def test_verify_of_no_run_says_so():
    """A folder without a run is an error that names it."""
    refused = CliRunner().invoke(app, ["verify", "/nowhere/at/all"])
    assert "holds no run" in str(refused.exception)
