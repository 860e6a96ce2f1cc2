"""Workers are killed for real, or hang; what they leave is finished by others, and the result is that of an undisturbed run."""

import re
import time

import pytest

from pipeline import storage
from pipeline.errors import ContractError, QuarantineError
from pipeline.run import attribute, run_stage
from tests.conftest import read_scores, tuned
from tests.faults.mortal import came, mortal_producer, mortal_task

pytestmark = pytest.mark.ray

SHARD_ROWS = 16
FOREVER = 1000


def committed_at(run, row):
    """Unix time at which the shard of a row was committed."""
    return run.receipt(0, row // SHARD_ROWS).finished_at_s


def test_a_tuning_worker_killed_mid_query_is_replaced(ray_cluster, make_spec, tmp_path, undisturbed, ledger):
    """SIGKILL after the first query's steps, before its commit: the restarted group makes both counterparts."""
    log = tmp_path / "log"
    run = run_stage(make_spec(mortal_producer(log)), "tune")
    for query_id in run.query_ids:
        assert undisturbed.counterpart_tensors(query_id) == run.counterpart_tensors(query_id)
    committed = storage.objects(run.uri("counterparts"))
    (died_s, *_), *_ = came(log)
    recovered_s = min(each.modified_s for name, each in committed.items() if name.endswith("meta.json")) - died_s
    run = attribute(run.spec)
    ledger.enter("SIGKILL of a tuning worker mid-query", len(came(log)), recovered_s, run, undisturbed)


def test_a_scoring_actor_killed_mid_shard_is_replaced(ray_cluster, make_spec, tmp_path, world, undisturbed, ledger):
    """SIGKILL in a forward pass: its shards are scored by others, every row once, with the undisturbed run's scores."""
    log, row = tmp_path / "log", 4 * SHARD_ROWS
    task = mortal_task(log, world.pixels[row])
    run = attribute(tuned(make_spec(task, f"score.shard_rows={SHARD_ROWS}", "resources.score.actors=2")))
    (died_s, *_), *rest = came(log)
    assert 1 == len(rest)
    ledger.enter(
        "SIGKILL of a scoring actor mid-shard", 1 + len(rest), committed_at(run, row) - died_s, run, undisturbed
    )


def test_a_poison_shard_is_quarantined_and_the_rest_is_scored(
    ray_cluster, make_spec, tmp_path, world, undisturbed, ledger, capsys
):
    """It kills every actor: tried so often and no more, all its rows in rejects/ with the reason, no innocent beside it.

    The exit code says so; a spec that tolerates it ends well; and when the poison is gone the same command scores it.
    """
    log, row = tmp_path / "log", 5 * SHARD_ROWS
    poison = mortal_task(log, world.pixels[row], times=FOREVER)
    small = (f"score.shard_rows={SHARD_ROWS}", "resources.score={actors: 1, max_failures: 2}")
    spec = tuned(make_spec(poison, *small))
    with pytest.raises(
        QuarantineError, match=r"1 of 10 shards are quarantined(.|\n)*shard-000005: 16 rows: 3 workers died"
    ) as error:
        attribute(spec)
    assert 9 == error.value.exit_code
    assert 3 == len(came(log))
    tolerant = make_spec(poison, *small, "score.max_reject_fraction=0.2")
    run = attribute(tolerant)
    assert 3 == len(came(log)), "what is tolerated is not tried again"
    assert "warning: 1 of 10 shards are quarantined" in capsys.readouterr().err
    rejects = run.read_shard(run.receipt(0, 5), "rejects/shard-000005-quarantined.parquet").to_pylist()
    assert list(range(row, row + SHARD_ROWS)) == [each["row"] for each in rejects]
    assert all("workers died or stalled on it" in each["got"] for each in rejects)
    seconds = run.receipt(0, 5).finished_at_s - came(log)[0][0]
    fault = "a shard that kills its actor every time"
    ledger.enter(fault, len(came(log)), seconds, run, undisturbed, rejected=SHARD_ROWS)
    with log.open("a") as healing:
        healing.write("0 0 healed\n" * FOREVER)
    healed_s = time.time()
    run = attribute(spec)
    seconds = run.receipt(0, 5).finished_at_s - healed_s
    ledger.enter("the same shard, when it kills no more", len(came(log)) - 1, seconds, run, undisturbed)


def test_an_actor_that_hangs_is_ended_and_its_shard_tried_again(
    ray_cluster, make_spec, tmp_path, world, undisturbed, ledger, capsys
):
    """It sleeps for ever in a forward pass: the warning names shard, worker and since when, and another actor scores it."""
    log, row = tmp_path / "log", 3 * SHARD_ROWS
    task = mortal_task(log, world.pixels[row], how="hang")
    limit = "resources.score={actors: 1, stalled_after_s: 8}"
    run = attribute(tuned(make_spec(task, f"score.shard_rows={SHARD_ROWS}", limit)))
    (hung_s, pid, _), *rest = came(log)
    said = re.findall(r"warning: (.*); the worker is ended, what it was on is tried again", capsys.readouterr().err)
    suspects = re.findall(r"(shard-\d+) is worked on by \S+ pid (\d+) since (\S+) \(.*?attempt \d+\)", "\n".join(said))
    since = {name: since for name, who, since in suspects if who == str(pid)}["shard-000003"]
    since_s = time.mktime(time.strptime(time.strftime("%Y-%m-%d ") + since, "%Y-%m-%d %H:%M:%S"))
    assert abs(since_s - hung_s) < 3
    ledger.enter("a scoring actor that hangs", 1 + len(rest), committed_at(run, row) - hung_s, run, undisturbed)


def test_an_error_in_a_scoring_actor_comes_home_as_it_was(ray_cluster, make_spec, tmp_path, world, undisturbed):
    """A task that raises is a ContractError with its words and exit code; the same command goes on where it stopped."""
    log = tmp_path / "log"
    task = mortal_task(log, world.pixels[SHARD_ROWS], how="fail")
    spec = tuned(make_spec(task, f"score.shard_rows={SHARD_ROWS}", "resources.score.actors=1"))
    with pytest.raises(ContractError, match=r"MortalTask on \S+ from row 16(.|\n)*no loss today") as error:
        attribute(spec)
    assert 4 == error.value.exit_code
    assert read_scores(undisturbed).equals(read_scores(attribute(spec)))
