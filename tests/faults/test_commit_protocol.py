"""The commit protocol under everything that may happen between two requests to the store: hypothesis looks for a way to break it.

Drivers and scorers are the real code on a real store, stepped request by request: see stepped.py.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from pipeline import storage
from pipeline.artifacts import Run
from pipeline.audit import audit, collect
from pipeline.errors import ArtifactError, InputError, PipelineError
from pipeline.extend import extend
from pipeline.folder import parquet_bytes
from pipeline.freeze import freeze
from pipeline.frozen import is_run, open_run, save_spec
from pipeline.run import rerank
from pipeline.scorer import ShardScorer
from pipeline.works import Receipt
from tests import small
from tests.faults import stepped
from tests.faults.stepped import Actor, Crash, in_hand
from tests.small import Small, products, work_off

pytestmark = pytest.mark.slow

OVERRIDES = ("corpus.source=null", "corpus.check_ids=false")
"""Without what asks DuckDB: it costs more than everything else together."""
OTHER_K = "rank.k=1"
FATES = ("crash before", "crash after", "torn")
ONCE = settings(
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
    derandomize=True,
    stateful_step_count=20,
)
"""The same examples every time, and none looked for again in a simpler form: a failure names its steps anyway."""


class World:
    """The small world, with what undisturbed runs over it made.

    Args:
        folder: Where it lies; runs go beside it.
    """

    def __init__(self, folder: Path) -> None:
        self.small = Small(folder)
        self.prefix, self.runs = str(folder), 0
        run = freeze(self.small.spec(folder / "undisturbed", *OVERRIDES))
        for name in run.query_ids:
            _tune(run, name)
        self.starts = {"nothing": {}, "tuned": everything(run.uri())}
        work_off(run)
        self.starts["sealed"] = everything(run.uri())
        self.undisturbed = products(everything(run.uri()))
        extend(run.uri(), *self.small.later)
        self.starts["grown"] = everything(run.uri())
        work_off(open_run(run.uri()))
        self.extended = products(everything(run.uri()))

    def new_uri(self) -> str:
        """Where nothing is."""
        self.runs += 1
        return f"{self.prefix}/run-{self.runs}"


def _tune(run: Run, query_id: str) -> None:
    from pipeline.tuner import Tuner

    Tuner(run, "cpu").tune(query_id)


def everything(run_uri: str) -> dict[str, bytes]:
    """Path -> bytes of all that lies in a run's folder."""
    return {path: storage.read_bytes(f"{run_uri}/{path}") for path in storage.objects(run_uri)}


class Protocol(RuleBasedStateMachine):
    """What may happen to a run. Subclasses of it in tests have a `world`, and a place for the run's folder."""

    world: World

    def __init__(self) -> None:
        super().__init__()
        self.uri = self.world.new_uri()
        self.drivers: list[Actor] = []
        self.workers: list[Actor] = []
        self.passing: list[Actor] = []
        self.damaged = self.extended = self.quarantined = False

    # --- what begins -----------------------------------------------------------------------------------------------

    @initialize(start=st.sampled_from(["nothing", "tuned", "sealed", "grown"]), conditional=st.booleans())
    def begin(self, start: str, conditional: bool) -> None:
        """A folder in which nothing is, or all counterparts, or a whole run, or one that was just extended.

        With conditional PUTs, or (where a run is) as on a store that has none.
        """
        self.extended, self.conditional = start == "grown", conditional
        for path, data in self.world.starts[start].items():
            storage.write_bytes(f"{self.uri}/{path}", data)
        if not conditional and is_run(self.uri):
            run = open_run(self.uri)
            put = run.resolved.model_copy(update={"commits": "put"})
            save_spec(replace(run, spec=run.spec.model_copy(update={"resolved": put})))

    def spec(self, *overrides: str):
        return self.world.small.spec(self.uri, *OVERRIDES, *overrides)

    def actor(self, kind: list[Actor], name: str, action) -> None:
        kind.append(Actor(name, action, self.uri))

    @property
    def actors(self) -> list[Actor]:
        return [*self.drivers, *self.workers, *self.passing]

    @precondition(lambda self: len(self.drivers) < 2 and not self.passing)
    @rule(backwards=st.booleans())
    def start_driver(self, backwards: bool) -> None:
        """`mirrorscope run`: the first, one beside another, or again after a crash; on workers of any order."""
        order = (lambda works: works[::-1]) if backwards else list
        self.actor(self.drivers, "driver", lambda: work_off(freeze(self.spec()), order))

    @precondition(lambda self: len(self.actors) < 4 and not self.damaged and is_ready(self.uri))
    @rule(place=st.integers(0, 20), quarantine=st.sampled_from([False, False, True]))
    def start_worker(self, place: int, quarantine: bool) -> None:
        """An attempt at one shard that belongs to no driver (any more); perhaps the one that gives it up.

        Without conditional PUTs giving up is only tried while nobody else is at work: see decision 6.
        """
        quarantine = quarantine and (self.conditional or not self.actors)
        run = open_run(self.uri)
        works = [work for work in run.works() if set(work.query_ids) <= run.committed_queries()]
        work = works[place % len(works)]

        self.quarantined |= quarantine

        def attempt() -> None:
            scorer = ShardScorer(run, "cpu", work.query_ids)
            scorer.quarantine(work, "its workers died") if quarantine else scorer.score(work)

        self.actor(self.passing if quarantine else self.workers, f"worker on {work.name}", attempt)
        if quarantine and not self.conditional:
            self.passing[-1].end()
            self.reap()

    @precondition(lambda self: not self.drivers and not self.passing and not self.damaged and is_sealed(self.uri))
    @rule(what=st.sampled_from(["extend", "extend", "rank"]))
    def start_change(self, what: str) -> None:
        """`mirrorscope extend` by queries and files, or `rank` with another k: an attempt of before sleeps through it."""
        if what == "rank":
            self.actor(self.passing, "rank", lambda: rerank(self.uri, [OTHER_K]))
        else:
            self.extended = True
            self.actor(self.passing, "extend", lambda: work_off(extend(self.uri, *self.world.small.later)))

    @precondition(lambda self: len(self.drivers) < 2 and not self.passing)
    @rule()
    def start_other_driver(self) -> None:
        """A driver of the same run that ranks differently."""
        self.actor(self.passing, "other driver", lambda: work_off(freeze(self.spec(OTHER_K))))

    # --- what happens ----------------------------------------------------------------------------------------------

    def chosen(self, place: int) -> Actor:
        return self.actors[place % len(self.actors)]

    def reap(self) -> None:
        """Forget who is done. An error is the protocol's, but where two drivers void the same commits at the same time."""
        for actor in [actor for actor in self.actors if actor.done]:
            for kind in (self.drivers, self.workers, self.passing):
                if actor in kind:
                    kind.remove(actor)
            voided = (self.damaged or self.quarantined) and isinstance(actor.error, ArtifactError | InputError)
            if actor.error is not None and not voided:
                raise AssertionError(f"{actor} ended with {actor.error!r}") from actor.error
            if actor.error is None and actor.ended and actor.name == "driver":
                self.damaged = False

    @precondition(lambda self: self.actors)
    @rule(place=st.integers(0, 3), requests=st.integers(1, 30))
    def go_on(self, place: int, requests: int) -> None:
        """One of them makes some requests; all others sleep."""
        actor = self.chosen(place)
        for _ in range(requests):
            if not actor.done:
                actor.step()
        self.reap()

    @precondition(lambda self: self.actors)
    @rule(place=st.integers(0, 3))
    def run_out(self, place: int) -> None:
        """One of them comes to its end."""
        self.chosen(place).end()
        self.reap()

    @precondition(lambda self: self.actors)
    @rule(place=st.integers(0, 3), fate=st.sampled_from(FATES))
    def crash(self, place: int, fate: str) -> None:
        """SIGKILL before, in, or after a request."""
        self.chosen(place).step(fate)
        self.reap()

    @precondition(lambda self: self.actors)
    @rule(place=st.integers(0, 3), times=st.integers(1, 6))
    def lose_answers(self, place: int, times: int) -> None:
        """The store does what it is asked, and its answer is lost: the request is made again."""
        actor = self.chosen(place)
        for _ in range(times):
            if not actor.done:
                actor.step("lose")
        self.reap()

    @precondition(lambda self: not self.actors and not self.damaged and is_run(self.uri))
    @rule(place=st.integers(0, 50), how=st.sampled_from(["gone", "cut", "flipped"]))
    def damage(self, place: int, how: str) -> None:
        """Something committed is lost, cut or changed on the store; only a driver may come next, and mends it."""
        run = open_run(self.uri)
        found = [path for receipt in run.receipts() for path in (*receipt.files, f"commits/{receipt.name}.json")]
        found += [
            path for path in storage.objects(self.uri) if path.endswith(".safetensors") and run.committed_queries()
        ]
        if not found:
            return
        uri = run.uri(sorted(found)[place % len(found)])
        data = bytearray(storage.read_bytes(uri))
        data[len(data) // 2] ^= 1
        if how == "gone":
            storage.remove(uri)
        else:
            storage.write_bytes(uri, bytes(data[: len(data) // 2] if how == "cut" else data))
        self.damaged = True

    @precondition(lambda self: not self.actors and not self.damaged and is_run(self.uri))
    @rule()
    def gc(self) -> None:
        """Everything that no commit names is deleted, when nobody is at work."""
        collect(open_run(self.uri), 0)

    # --- what must hold --------------------------------------------------------------------------------------------

    @invariant()
    def committed_is_whole(self) -> None:
        """Whatever a commit names is there and has its digest; _SUCCESS stands for all of the run or not at all."""
        if not self.damaged:
            require_whole(everything(self.uri), self.uri)

    def teardown(self) -> None:
        """The command is given a last time, and not disturbed; whoever sleeps wakes up afterwards, and changes nothing."""
        try:
            self._finish()
        finally:
            for actor in self.actors:
                if not actor.done:
                    actor.step("crash before")

    def _finish(self) -> None:
        leaving = [*self.passing, *(self.drivers if self.extended else [])]
        for actor in leaving:  # they leave another ranking, or one of less, if they come last
            actor.step("crash before")
        self.passing, self.drivers = [], [] if self.extended else self.drivers
        self.complete()
        expected = self.world.extended if self.extended else self.world.undisturbed
        require_whole(objects := everything(self.uri), self.uri)
        require_same(expected, named_of(objects))
        while self.actors:
            for actor in self.actors:
                actor.step()
            self.reap()
        collect(run := open_run(self.uri), 0)
        require_whole(objects := everything(self.uri), self.uri)
        require_same(expected, products(objects))
        found = audit(run, shown=False)
        assert ([], {}, True) == (found.damage, found.orphans, found.sealed)

    def complete(self) -> None:
        work_off(freeze(self.spec()))
        if self.extended:
            work_off(extend(self.uri, *self.world.small.later))
            work_off(freeze(self.spec()))
        self.damaged = False


def is_ready(run_uri: str) -> bool:
    """Whether an attempt at a shard can have begun: counterparts are there."""
    return is_run(run_uri) and bool(open_run(run_uri).committed_queries() >= {"red", "green"})


def is_sealed(run_uri: str) -> bool:
    return is_run(run_uri) and open_run(run_uri).is_sealed()


def require_whole(objects: dict[str, bytes], run_uri: str) -> None:
    """What must hold of a run's objects in any moment."""
    if "run.yaml" not in objects:
        return
    commits = {path: json.loads(data) for path, data in objects.items() if is_commit(path)}
    for path, commit in commits.items():
        for name, made in commit["files"].items():
            assert name in objects, f"{path} names {name}, which is not there"
            written = {"bytes": len(objects[name]), "sha256": storage.bytes_digest(objects[name])}
            assert made == written, f"{path} names another {name}"
    if "_SUCCESS" in objects:
        run, sealed = open_run(run_uri), json.loads(objects["_SUCCESS"])
        assert run.additions[-1].fingerprint == sealed["fingerprint"]
        assert {f"commits/{work.name}.json" for work in run.works()} == set(commits)
        counted = {work.name: commits[f"commits/{work.name}.json"] for work in run.works()}
        assert all(
            work.shard.rows == counted[work.name]["rows"] + counted[work.name]["rejects"] for work in run.works()
        )
        assert run.rows == sealed["rows"] + sealed["rejects"]


def is_commit(path: str) -> bool:
    return path.startswith("commits/") and path.endswith(".json")


def named_of(objects: dict[str, bytes]) -> dict[str, bytes]:
    """The products without those that no commit names: a quarantined shard's, until gc."""
    named = {name for path, data in objects.items() if is_commit(path) for name in json.loads(data)["files"]}
    return {
        path: data
        for path, data in products(objects).items()
        if path in named or not path.startswith(("scores/", "rejects/"))
    }


def require_same(expected: dict[str, bytes], got: dict[str, bytes]) -> None:
    """The same objects to the byte."""
    assert sorted(expected) == sorted(got)
    assert [] == [path for path, data in expected.items() if got[path] != data]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("small"))


def look(world: World, kind: type[Protocol] = Protocol, **changes) -> None:
    """Let hypothesis look for a way to break the protocol."""

    class Machine(kind):  # type: ignore[misc, valid-type]
        pass

    Machine.world = world
    run_state_machine_as_test(Machine, settings=settings(ONCE, **changes))


def test_no_crash_zombie_or_lost_answer_changes_a_result(world):
    """Crashes, second drivers, sleepers that wake late, answers lost, damage, gc, growth: the undisturbed run's bytes."""
    with in_hand():
        look(world, max_examples=4)


def commit_first(patch: pytest.MonkeyPatch) -> None:
    """A shard's commit is written before the files that it names."""
    held = threading.local()
    commit, write_table = Run.commit, Run.write_table

    def write_later(run: Run, table: pa.Table, *parts: str) -> dict[str, Any]:
        if not parts[0].startswith(("scores/", "partials/", "rejects/")):
            return write_table(run, table, *parts)
        held.tables = [*getattr(held, "tables", []), (table, parts)]
        return {"bytes": len(data := parquet_bytes(table)), "sha256": storage.bytes_digest(data)}

    def commit_now(run: Run, receipt: Receipt) -> Receipt:
        standing, tables, held.tables = commit(run, receipt), held.tables, []
        for table, parts in tables:
            write_table(run, table, *parts)
        return standing

    patch.setattr(Run, "write_table", write_later)
    patch.setattr(Run, "commit", commit_now)


def write_in_place(patch: pytest.MonkeyPatch) -> None:
    """Objects are written under their own names, instead of beside them and renamed."""

    def write(_: object, path: str, data: bytes, only_new: bool) -> None:
        if only_new and os.path.exists(path):
            raise FileExistsError(path)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Path(path).write_bytes(data[: len(data) // 2] if stepped.is_torn() else data)
        if stepped.is_torn():
            raise Crash

    patch.setattr(storage, "write_local", write)


def leave_the_seal(patch: pytest.MonkeyPatch) -> None:
    """_SUCCESS stays while the run grows, or while what is damaged is made anew."""
    remove = storage.remove
    patch.setattr(storage, "remove", lambda uri: None if uri.endswith("_SUCCESS") else remove(uri))


def commit_by_listing(patch: pytest.MonkeyPatch) -> None:
    """A shard is done when its first file is there: no commits."""
    patch.setattr(small, "_tally", lambda run: _Listed(run))


class _Listed:
    def __init__(self, run: Run) -> None:
        there = storage.names(run.uri("scores", f"query_id={run.query_ids[0]}"))
        self.done = {(w.addition, w.shard.shard_id) for w in run.works() if f"{w.name}.parquet" in there}


def test_the_slower_of_two_that_freeze_takes_what_the_faster_froze(world):
    """A driver that finds a run.yaml in the moment of writing its own goes on with that run, its store's ways included."""
    uri, frozen = world.new_uri(), []
    spec = world.small.spec(uri, *OVERRIDES)
    with in_hand():
        slower = Actor("slower", lambda: frozen.append(freeze(spec)), uri)
        while not storage.exists(f"{uri}/queries.parquet"):
            slower.step()
        while not slower.at.endswith("run.yaml"):  # is there one?
            slower.step()
        slower.step()
        faster = freeze(spec)
        slower.end()
    assert slower.error is None
    assert [faster.spec] == [run.spec for run in frozen]
    assert "create" == faster.resolved.commits


def command(world: World, uri: str, extended: bool) -> None:
    """What `mirrorscope run`, or `extend`, does."""
    work_off(extend(uri, *world.small.later) if extended else freeze(world.small.spec(uri, *OVERRIDES)))


def sweep(world: World, extended: bool, fate: str, stride: int = 1) -> None:
    """Crash a driver at one request after the other; the same command again has the undisturbed result each time."""
    for requests in itertools.count(0, stride):
        uri = world.new_uri()
        for path, data in world.starts["sealed" if extended else "tuned"].items():
            storage.write_bytes(f"{uri}/{path}", data)
        actor = Actor("driver", partial(command, world, uri, extended), uri)
        while not actor.done and requests:
            actor.step()
            requests -= 1
            if requests < stride:  # what was there before was looked at in an earlier round
                require_whole(everything(uri), uri)
        if actor.done:
            assert actor.error is None
            return
        actor.step(fate)
        require_whole(everything(uri), uri)
        command(world, uri, extended)
        require_whole(objects := everything(uri), uri)
        require_same(world.extended if extended else world.undisturbed, products(objects))


@pytest.mark.parametrize(
    ("extended", "fate", "stride"),
    [
        (False, "torn", 47),
        (True, "crash before", 83),
        pytest.param(False, "crash before", 1, marks=pytest.mark.slow),
        pytest.param(False, "torn", 2, marks=pytest.mark.slow),
        pytest.param(True, "crash after", 2, marks=pytest.mark.slow),
    ],
)
@pytest.mark.timeout(1800)
def test_a_driver_that_dies_at_any_request_goes_on(world, extended, fate, stride):
    """After every request, or every other, what is committed is whole; the command again ends as undisturbed."""
    with in_hand():
        sweep(world, extended, fate, stride)


@pytest.mark.parametrize(
    ("broken", "extended", "fate"),
    [
        (commit_first, False, "crash after"),
        pytest.param(write_in_place, False, "torn", marks=pytest.mark.slow),
        pytest.param(commit_by_listing, False, "crash after", marks=pytest.mark.slow),
        pytest.param(leave_the_seal, True, "crash after", marks=pytest.mark.slow),
    ],
)
def test_a_broken_protocol_is_caught(world, broken, extended, fate):
    """Were the real one like one of these, the tests above would say so."""
    with in_hand() as patch:
        broken(patch)
        with pytest.raises((AssertionError, PipelineError, ValueError)):
            sweep(world, extended, fate, stride=13 if broken is commit_first else 1)


@pytest.mark.night
@pytest.mark.timeout(1800)
def test_more_of_the_same(world):
    """As above, for longer, and other examples every time."""
    with in_hand():
        look(world, max_examples=25, stateful_step_count=40, derandomize=False)


@pytest.mark.timeout(1800)
def test_the_same_on_s3(world, s3, monkeypatch):
    """Conditional PUTs and listings of a real S3 server: the bytes are those of the undisturbed run on a local disk."""
    monkeypatch.setattr(world, "prefix", s3.prefix("protocol"))
    with in_hand():
        look(world, max_examples=3, derandomize=False)
