"""Two commands on one run at once, stepped request by request: rankings, growth, and gc beside a driver."""

import itertools
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml

from pipeline import artifacts, checks, storage
from pipeline.audit import audit, collect
from pipeline.extend import extend
from pipeline.freeze import freeze
from pipeline.frozen import open_run
from pipeline.run import rerank
from tests.faults.driver import REPOSITORY
from tests.faults.stepped import Actor, in_hand
from tests.faults.test_commit_protocol import OVERRIDES, World, everything, require_same, require_whole
from tests.small import products, work_off

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SHARD = "shard-000001"
DAY_S = 24 * 3600


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("small"))


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    """A command that stands still between two requests does so for longer than any pause."""
    monkeypatch.setattr(artifacts, "BETWEEN_LOOKS_S", 0)
    monkeypatch.setattr(checks, "BETWEEN_LOOKS_S", 0)


def started(world, kind):
    """URI of a run at that start of the world's."""
    uri = world.new_uri()
    for path, data in world.starts[kind].items():
        storage.write_bytes(f"{uri}/{path}", data)
    return uri


def step(actor, requests):
    for _ in range(requests):
        if not actor.done:
            actor.step()


def ended(*actors):
    """All of them, to their ends, which are good."""
    for actor in actors:
        actor.end()
        assert actor.error is None, f"{actor} ended with {actor.error!r}"


def require_one_ranking(world, uri):
    """What lies there goes together, and is what one of the rankings makes alone."""
    run = open_run(uri)
    assert [] == audit(run, shown=False).damage
    _, meta = run.read_ranked()
    alone = started(world, "sealed")
    rerank(alone, [f"rank.k={meta['k']}"])
    there, expected = everything(uri), everything(alone)
    for path in (path for path in expected if path.startswith("topk/") and path.endswith(".parquet")):
        assert expected[path] == there[path], path


def schedules(number, longest, seed=0):
    """Random steps of two commands by turns."""
    draw = np.random.default_rng(seed)
    return [draw.integers(1, longest, 6).tolist() for _ in range(number)]


def by_turns(first, second, schedule):
    for place, requests in enumerate(schedule):
        step((first, second)[place % 2], requests)
    ended(first, second)


@pytest.mark.parametrize("number", [4, pytest.param(60, marks=pytest.mark.night)], ids=["some", "many"])
def test_two_rankings_at_once_leave_one_that_is_whole(world, number):
    """With another k each, in turns of any length: no error, and tables and meta.json of one of them."""
    with in_hand():
        for schedule in schedules(number, 12):
            uri = started(world, "sealed")
            by_turns(*(Actor(f"rank {k}", partial(rerank, uri, [f"rank.k={k}"]), uri) for k in (1, 2)), schedule)
            require_one_ranking(world, uri)


@pytest.mark.parametrize("stride", [9, pytest.param(2, marks=pytest.mark.night)])
def test_a_ranking_that_stops_before_its_meta_is_written_over(world, stride):
    """It stands still at a request, while another comes from beginning to end; then it goes on."""
    with in_hand():
        for requests in itertools.count(0, stride):
            uri = started(world, "sealed")
            slow = Actor("rank 1", partial(rerank, uri, ["rank.k=1"]), uri)
            step(slow, requests)
            if slow.done:
                break
            ended(Actor("rank 2", partial(rerank, uri, ["rank.k=2"]), uri))
            assert 2 == open_run(uri).read_ranked()[1]["k"]
            ended(slow)
            require_one_ranking(world, uri)


def run_command(world, uri):
    return work_off(freeze(world.small.spec(uri, *OVERRIDES)))


@pytest.mark.parametrize("number", [2, pytest.param(30, marks=pytest.mark.night)])
def test_a_run_beside_a_ranking_leaves_one_that_is_whole(world, number):
    """The run's command looks at all that is there, and ranks by the spec's k."""
    with in_hand():
        for schedule in schedules(number, 25, seed=1):
            uri = started(world, "sealed")
            run = Actor("run", partial(run_command, world, uri), uri)
            by_turns(run, Actor("rank 1", partial(rerank, uri, ["rank.k=1"]), uri), schedule)
            require_whole(everything(uri), uri)
            require_one_ranking(world, uri)
            assert open_run(uri).is_sealed()


def grow(world, uri):
    return work_off(extend(uri, *world.small.later))


@pytest.mark.parametrize("stride", [37, pytest.param(3, marks=pytest.mark.night)])
def test_two_equal_extensions_at_once_are_one(world, stride):
    """One stands still at a request, the other comes from beginning to end, the first goes on: the same run, and no error."""
    with in_hand():
        for requests in itertools.count(0, stride):
            uri = started(world, "sealed")
            slow = Actor("extend", partial(grow, world, uri), uri)
            step(slow, requests)
            if slow.done:
                break
            ended(Actor("extend too", partial(grow, world, uri), uri), slow)
            require_whole(objects := everything(uri), uri)
            require_same(world.extended, products(objects))
            run = open_run(uri)
            assert ([], True, 2) == (audit(run, shown=False).damage, run.is_sealed(), len(run.additions))


def with_old_leavings(world):
    """A run of which a shard lost its commit two days ago: what that named is nobody's."""
    uri = started(world, "sealed")
    for path in (f"commits/{SHARD}.json", "_SUCCESS"):
        storage.remove(f"{uri}/{path}")
    old = [path for path in storage.objects(uri) if SHARD in path]
    for path in old:
        os.utime(f"{uri}/{path}", (time.time() - 2 * DAY_S,) * 2)
    assert old
    return uri


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.night)])
def test_gc_takes_nothing_that_a_driver_makes_meanwhile(world, stride):
    """The shard is scored again, under the names of the old leavings, while gc deletes these: no commit names what is gone."""
    with in_hand():
        for requests in itertools.count(0, stride):
            uri = with_old_leavings(world)
            gc = Actor("gc", lambda uri=uri: collect(open_run(uri), DAY_S), uri)
            step(gc, requests)
            if gc.done:
                break
            ended(Actor("driver", partial(run_command, world, uri), uri), gc)
            require_whole(everything(uri), uri)
            run_command(world, uri)
            require_same(world.undisturbed, products(everything(uri)))


def test_gc_goes_by_the_stores_clock(world, monkeypatch):
    """The clock of the machine that it runs on jumps by ten years, either way: what is young stays, what is old goes."""
    real = time.time
    for jump_s, age_s, expected in ((3650 * DAY_S, 60, 0), (-3650 * DAY_S, 2 * DAY_S, 1), (3650 * DAY_S, 2 * DAY_S, 1)):
        uri = started(world, "sealed")
        leaving = Path(uri, "scores", "query_id=red", "shard-000099.parquet")
        leaving.write_bytes(b"left")
        os.utime(leaving, (real() - age_s,) * 2)
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda jump_s=jump_s: real() + jump_s)
            assert expected == len(collect(open_run(uri), DAY_S))
        assert bool(expected) != leaving.exists()


@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_commands_of_one_run_at_once_as_processes(world, ledger):
    """`rank` twice, `run` and `gc` at a time, again and again: all end with 0, and `verify` is content."""
    uri = started(world, "sealed")
    spec = Path(world.prefix, "spec.yaml")
    spec.write_text(yaml.safe_dump(world.small.spec(uri, *OVERRIDES).model_dump(mode="json")))
    commands = [["rank", uri, "--k", "1"], ["rank", uri, "--k", "2"], ["run", str(spec)], ["gc", uri], ["show", uri]]
    started_s = time.monotonic()
    for _ in range(2):
        running = [
            subprocess.Popen(
                [sys.executable, "-m", "jobs.cli", *words], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            for words in commands
        ]  # fmt: skip
        outputs = [process.communicate(timeout=600)[0].decode(errors="replace") for process in running]
        assert [0] * len(commands) == [process.returncode for process in running], "\n".join(outputs)
        require_one_ranking(world, uri)
    seconds, alone = time.monotonic() - started_s, str(shutil.copytree(uri, f"{uri}-alone"))
    ledger.enter(
        "rank twice, run, gc and show at once", 2, seconds, open_run(uri), run_command(world, alone), rejected=1
    )
