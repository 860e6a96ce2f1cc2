"""Attempts that were taken for dead and go on: what stands first stands, and no row is counted twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch

from pipeline import storage
from pipeline.audit import audit
from pipeline.freeze import freeze
from pipeline.frozen import open_run
from pipeline.score import _tally
from pipeline.scorer import ShardScorer
from tests.faults.stepped import Actor, in_hand
from tests.small import Small, products, work_off

STRAY = "rejects/shard-000000-quarantined.parquet"
CHEAP = ("corpus.source=null", "corpus.check_ids=false")


@pytest.fixture
def small(tmp_path):
    return Small(tmp_path)


def objects(run):
    return {path: storage.read_bytes(run.uri(path)) for path in storage.objects(run.uri())}


@pytest.mark.parametrize("written", range(4))
def test_a_shard_that_was_quarantined_meanwhile_keeps_no_scores(small, tmp_path, written):
    """A slow attempt wakes at any of its writes after others gave its shard up: the rows are in rejects/ alone."""
    run = freeze(small.spec(tmp_path / "run", *CHEAP, "score.max_reject_fraction=1"))
    work_off(run)
    commit = "commits/shard-000000.json"
    before = objects(run)
    run.void([commit])
    work = run.work(0, 0)
    for path in [path for path in before if "shard-000000" in path]:
        storage.remove(run.uri(path))
    scorer = ShardScorer(run, "cpu")
    with in_hand():
        late = Actor("late", lambda: scorer.score(work), run.uri())
        while not late.at.endswith(".parquet"):
            late.step()
        for _ in range(written):
            late.step()
        ShardScorer(run, "cpu").quarantine(work, "two workers died on it")
        late.end()
    assert late.error is None
    assert not list(Path(run.uri("scores")).rglob("shard-000000.parquet"))
    receipt = run.receipt(0, 0)
    assert (0, work.shard.rows) == (receipt.rows, receipt.rejects)
    found = audit(run)
    assert [] == found.damage


def test_a_shard_that_was_scored_meanwhile_keeps_no_quarantine(small, tmp_path):
    """Whoever quarantines it wakes after its commit, or dies before: scores stand; the rows are not in rejects/ as well."""
    run = work_off(freeze(small.spec(tmp_path / "run", *CHEAP)))
    before = objects(run)
    run.void(["commits/shard-000000.json"])
    work, scorer = run.work(0, 0), ShardScorer(run, "cpu")
    with in_hand():
        slow, dying = (Actor(name, lambda: scorer.quarantine(work, "its workers died"), run.uri()) for name in "ab")
        for actor in (slow, dying):
            while not actor.at.endswith("commits/shard-000000.json") or not storage.exists(run.uri(STRAY)):
                actor.step()
        scorer.score(work)
        slow.end()
        assert not storage.exists(run.uri(STRAY))
        storage.write_bytes(run.uri(STRAY), b"what the other one left")
        dying.step("crash before")
    assert [(STRAY, True)] == [(finding.path, finding.stray) for finding in audit(run).damage]
    scored = objects(run)["commits/shard-000000.json"]
    after = objects(work_off(open_run(run.uri())))
    assert products(before) == products(after)
    assert scored == after["commits/shard-000000.json"], "nothing had to be scored again"
    assert [] == audit(run).damage


def test_scores_under_another_counterpart_are_found_and_made_anew(small, tmp_path):
    """A counterpart made anew with other bytes: verify names the shards, and the next start scores them under what is there."""
    run = work_off(freeze(small.spec(tmp_path / "run", *CHEAP)))
    before = objects(run)
    tensors = safetensors.torch.load(run.counterpart_tensors("red"))
    other = safetensors.torch.save({name: tensor + 1 for name, tensor in tensors.items()})
    meta = {key: value for key, value in run.counterpart_meta("red").items() if key != "tensors"}
    run.void(["counterparts/query_id=red/meta.json"])
    run.commit_counterpart("red", other, meta)
    found = audit(run)
    assert len(run.shards) == len(found.damage)
    assert "was scored under other counterparts than those that are there" == found.damage[0].what
    assert set() == _tally(open_run(run.uri())).done
    after = objects(work_off(open_run(run.uri())))
    green = {path for path in products(before) if "query_id=green" in path}
    assert all(before[path] == after[path] for path in green)
    assert before["scores/query_id=red/shard-000000.parquet"] != after["scores/query_id=red/shard-000000.parquet"]
    assert [] == audit(run).damage
