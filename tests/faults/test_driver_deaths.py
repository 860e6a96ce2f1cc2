"""The driver ends in every stage, by SIGKILL, and the same command goes on; two drivers do one run at once."""

import copy
import signal
import time
from collections import Counter
from contextlib import ExitStack

import pytest

from jobs.seaweed import upload
from pipeline.frozen import open_run
from tests.faults.driver import Driver
from tests.faults.proxy import in_front_of
from tests.seaweed import forget

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]

ENDS = [
    ("SIGKILL of the driver in stage freeze", "/run/run.yaml", 0),
    ("SIGKILL of the driver in stage tune", "/meta.json", 1),
    ("SIGKILL of the driver in stage score", "/commits/", 2),
    ("SIGKILL of the driver in stage rank", "/run/topk/", 1),
    ("SIGKILL of the driver before the seal", "/run/_SUCCESS", 0),
    ("SIGKILL of the driver in stage report", "/run/report/", 1),
]
"""Fault, and the PUT during which it comes: in whose path this stands, after so many others like it."""


@pytest.fixture
def tree(world, s3):
    """A spec on the store, of ten shards."""
    prefix = s3.prefix("driver")
    made = copy.deepcopy(world.tree(f"{prefix}/run"))
    made["corpus"]["uri"] = upload(world.corpus, f"{prefix}/corpus.parquet")
    made["score"]["shard_rows"] = 16
    made["resources"] = {"score": {"actors": 1}}
    return made


def last(proxy, met, since_s, method="", path=""):
    """The last request since then that met this; None if there was none."""
    for each in reversed(proxy.requests):
        if each.at_s >= since_s and each.met == met and path in each.path and method in each.method:
            return each
    return None


def test_a_driver_ended_in_every_stage_is_resumed_by_the_same_command(s3, tree, tmp_path, undisturbed, ledger):
    """The store keeps silent on one PUT of each stage; in that moment the driver ends; that object is written all the same.

    Workers of the dead are left to themselves until all is over: one may write the object before the next driver does, and
    before this one ends where the machine stalls for longer than the store's time limit.
    """
    recovered_s, tries = {}, Counter()
    fault = hung = ended_s = None
    with in_front_of(s3.endpoint) as proxy, ExitStack() as left:
        for following, path, after in [*ENDS, (None, None, None)]:
            if following:
                proxy.add("hang", method="PUT", path=path, after=after)
            started_s = time.time()
            driver = left.enter_context(Driver(tmp_path, tree, AWS_ENDPOINT_URL=proxy.endpoint))
            if fault:
                passed = driver.until(lambda hung=hung: last(proxy, "passed", 0, hung.method, hung.path))
                recovered_s[fault] = max(0.0, passed.at_s - ended_s)
                tries[fault] += 1
            if following:
                fault, hung = following, driver.until(lambda since_s=started_s: last(proxy, "hang", since_s))
                tries[fault] += 1
                ended_s = driver.signal(signal.SIGKILL)
            code = driver.wait()
        assert 0 == code, driver.output
    forget()
    run = open_run(tree["run"]["uri"])
    for fault in recovered_s:
        ledger.enter(fault, tries[fault], recovered_s[fault], run, undisturbed)


def test_two_drivers_started_on_one_run_at_once_give_one_result(world, tmp_path, undisturbed, ledger):
    """Both end well, both took part from the freezing on, and the result is that of one; work may have been done twice."""
    tree = world.tree(tmp_path / "run")
    tree["score"]["shard_rows"] = 8
    tree["resources"] = {"score": {"actors": 1}}
    with Driver(tmp_path, tree) as one, Driver(tmp_path, tree) as other:
        codes = [driver.wait() for driver in (one, other)]
        outputs = [one.output, other.output]
    assert [0, 0] == codes, "\n".join(outputs)
    assert all("score 19/19 shards  100%" in output for output in outputs), "\n".join(outputs)
    ledger.enter("two drivers on one run at once", len(codes), None, open_run(tree["run"]["uri"]), undisturbed)
