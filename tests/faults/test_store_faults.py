"""The store has a bad day: it answers wrongly, not at all, is restarted, is full. Nothing is lost, nothing done by hand."""

import copy
import os
import shutil
import subprocess
import threading
import time
from collections import Counter

import pyarrow.parquet as pq
import pytest

from jobs.seaweed import upload
from pipeline import storage
from pipeline.frozen import open_run
from pipeline.run import attribute
from pipeline.specfile import parse_spec
from tests.faults.driver import Driver
from tests.faults.test_worker_deaths import tuned

pytestmark = pytest.mark.ray

TENTH = {"share": 0.1, "times": None}
FAULTS = {
    "503 from the store, one request in ten": ([("unavailable", TENTH)], False),
    "answers of the store cut half way, one GET in ten": ([("cut", {"method": "GET", **TENTH})], True),
    "a store that never answers a PUT and a GET": (
        [("hang", {"method": "PUT", "path": "/scores/", "after": 3}), ("hang", {"method": "GET", "path": "/manifest"})],
        True,
    ),
}
"""Fault -> rules of the proxy; whether queries are tuned in this process, without Ray Train, which takes a while."""
PARENT = "%2Frun%2F&delimiter="
"""Of an empty folder s3fs lists the parent as well, in case that a file has its name, and takes an error there for a no."""
RESTARTED_AFTER, AWAY_S = 3, 3.0
FULL = """
set -e
mount -t tmpfs -o size=64m tmpfs {run}
cp -a {before}/. {run}
mount -o remount,size=$(( ($(du -sk {run} | cut -f1) + {room_kib}) * 1024 )) {run}
code=0; "$@" || code=$?
date +%s.%N > {out}/full
ls -a {run}/scores/* > {out}/listing
echo $code > {out}/code
mount -o remount,size=64m {run}
"$@"
date +%s.%N > {out}/done
cp -a {run}/. {out}/out-run
"""
"""A disk that fills up while shards are written, and then is made larger: in a mount namespace, so that nobody else sees it."""


@pytest.fixture
def tree(world, s3, tmp_path):
    """A spec on the store, of ten shards, each of which has to be read."""
    prefix = s3.prefix("bad-day")
    made = copy.deepcopy(world.tree(f"{prefix}/run"))
    pq.write_table(pq.read_table(world.corpus), tmp_path / "corpus.parquet", row_group_size=16)
    made["corpus"]["uri"] = upload(tmp_path / "corpus.parquet", f"{prefix}/corpus.parquet")
    made["queries"]["uri"] = upload(world.queries, f"{prefix}/queries.parquet")
    made["score"]["shard_rows"] = 16
    made["resources"] = {"score": {"actors": 2}}
    return made


def longest_trouble(requests):
    """Of the requests that had to be repeated: most tries of one, most seconds from its first until it passed."""
    first_s, tried, most_tries, longest_s = {}, Counter(), 0, 0.0
    for method, path, met, at_s in requests:
        key = (method, path)
        tried[key] += 1
        if met != "passed":
            first_s.setdefault(key, at_s)
        elif key in first_s:
            most_tries, longest_s = max(most_tries, tried[key]), max(longest_s, at_s - first_s.pop(key))
        if met == "passed":
            tried[key] = 0
    never = [path for _, path in first_s if PARENT not in path]
    assert not never, f"never passed: {never}"
    return most_tries, longest_s


@pytest.mark.parametrize("fault", FAULTS)
def test_a_whole_run_on_a_bad_store_ends_as_on_a_good_one(fault, bad_day, tree, undisturbed, ledger, monkeypatch):
    """All of the run's requests, the workers' too, go through the proxy: what may pass is repeated and passes."""
    monkeypatch.setattr(storage, "ANSWER_TIMEOUT_S", 3.0)  # in this process; workers wait for as long as they always do
    rules, in_process = FAULTS[fault]
    for word, when in rules:
        bad_day.add(word, **when)
    spec = parse_spec(tree)
    run = attribute(tuned(spec) if in_process else spec)
    struck = sum(bad_day.done[word] for word in {word for word, _ in rules})
    attempts, seconds = longest_trouble(list(bad_day.requests))
    bad_day.clear()
    assert struck >= len(rules)
    ledger.enter(fault, attempts, seconds, run, undisturbed)


@pytest.mark.skipif("S3_ENDPOINT" in os.environ, reason="a store of somebody's own is not ours to restart")
def test_a_store_that_is_restarted_while_shards_are_scored(bad_day, s3, tree, undisturbed, ledger):
    """SIGKILL of the server after three commits, and a new one on the same data some seconds later: the run goes on by itself."""
    killed_s = []

    def restart():
        while sum(method == "PUT" and "/commits/" in path for method, path, *_ in bad_day.requests) <= RESTARTED_AFTER:
            time.sleep(0.01)
        killed_s.append(time.time())
        s3.server.restart(AWAY_S)

    restarter = threading.Thread(target=restart, daemon=True)
    run = tuned(parse_spec(tree))
    bad_day.clear()
    restarter.start()
    run = attribute(run)
    restarter.join()
    commits = [receipt.finished_at_s for receipt in run.receipts()]
    after_s = [at_s - killed_s[0] for at_s in commits if at_s > killed_s[0]]
    assert 0 < len(after_s) < len(commits)
    attempts, _ = longest_trouble(list(bad_day.requests))
    ledger.enter("restart of the store while shards are scored", attempts, min(after_s), run, undisturbed)


def test_a_disk_that_fills_up_while_shards_are_written(make_spec, world, tmp_path, undisturbed, ledger):
    """The run ends with what to do and leaves no half objects; when there is room the same command goes on."""
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*namespace, "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here, so no small disk")
    tree = world.tree(tmp_path / "run")
    tree["score"]["shard_rows"], tree["resources"] = 16, {"score": {"actors": 1}}
    run = tuned(parse_spec(copy.deepcopy(tree)))
    (tmp_path / "run").rename(tmp_path / "before")
    (tmp_path / "run").mkdir()
    script = FULL.format(run=tmp_path / "run", before=tmp_path / "before", out=tmp_path, room_kib=60)
    with Driver(tmp_path, tree, before=(*namespace, "sh", "-c", script, "sh")) as driver:
        assert 0 == driver.wait(), driver.output
    assert "7" == (tmp_path / "code").read_text().strip(), driver.output
    assert "No space left on device" in driver.output
    assert "make room, then run the same command again" in driver.output
    assert ".tmp" not in (tmp_path / "listing").read_text()
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "out-run").rename(tmp_path / "run")
    full_s, done_s = (float((tmp_path / name).read_text()) for name in ("full", "done"))
    starts = driver.output.count("error: ") + 1
    ledger.enter(
        "a full local disk while shards are written", starts, done_s - full_s, open_run(run.run.uri), undisturbed
    )
