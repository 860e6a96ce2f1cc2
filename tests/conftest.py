"""What the suites share: a small real world (digits and a CNN), specs over it, and a run without Ray."""

from __future__ import annotations

import copy
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
from hypothesis import settings
from rich.console import Console

from jobs import digits
from jobs.cli import app, guarded
from pipeline import freeze, storage
from pipeline.artifacts import Run
from pipeline.scorer import ShardScorer
from pipeline.specfile import parse_spec
from pipeline.tuner import Tuner
from tests import seaweed
from tests.faults.ledger import JSON_PATH, PROPERTY, Entry, Ledger
from tests.faults.proxy import Proxy, in_front_of
from tests.small import Small, one_thread

settings.register_profile("untimed", deadline=None)  # machines are shared: how long an example takes says nothing
settings.load_profile("untimed")

compiles = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler, and there is none"
)
CORPUS_ROWS = 150
QUERY_ROWS = (3, 77)


class World:
    """Digits on disk: corpus, queries (two copies of training rows) and the weights of a CNN trained on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        pixels, labels = digits.load_digits()
        self.pixels, self.labels = pixels[:CORPUS_ROWS], labels[:CORPUS_ROWS]
        with one_thread():
            self.model = digits.train(self.pixels, self.labels, epochs=8, width=8)
        self.weights = folder / "cnn.safetensors"
        safetensors.torch.save_file(self.model.state_dict(), self.weights)
        self.corpus, self.queries = folder / "corpus.parquet", folder / "queries.parquet"
        pq.write_table(self.table(), self.corpus)
        rows = list(QUERY_ROWS)
        names = [f"copy-of-{row}" for row in rows]
        table = {"query_id": names, "pixels": list(self.pixels[rows]), "label": self.labels[rows]}
        pq.write_table(pa.table(table), self.queries)

    def table(self) -> pa.Table:
        """The corpus: id, pixels, label, author (a made-up source of three)."""
        rows = len(self.labels)
        return pa.table(
            {
                "id": [f"digit-{i:03d}" for i in range(rows)],
                "pixels": list(self.pixels),
                "label": self.labels,
                "author": [f"author-{i % 3}" for i in range(rows)],
            }
        )

    def tree(self, run_uri: Path | str) -> dict[str, Any]:
        """A spec over this world as a YAML tree, to be changed at will."""
        return {
            "run": {"uri": str(run_uri)},
            "model": {"factory": "jobs.digits:cnn", "arguments": {"width": 8}, "weights_uri": str(self.weights)},
            "task": {"features": "pixels", "shape": [1, 8, 8]},
            "corpus": {"uri": str(self.corpus), "example_id": "id", "source": "author"},
            "queries": {"uri": str(self.queries)},
            "producer": {"name": "unlearn", "steps": 3},
            "score": {"shard_rows": 64, "batch_rows": 32},
            "rank": {"k": 5},
            "resources": {"score": {"actors": 2}},
        }


@pytest.fixture(scope="module", autouse=True)
def _threads() -> Iterator[None]:
    """One of torch, as the pipeline's workers have: more only wait for each other in models this small."""
    with one_thread():
        yield


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """One world for the session; tests write beside it, never into it."""
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def small(tmp_path: Path) -> Small:
    """The small world of tests/small.py, of one test alone, which may change it."""
    (tmp_path / "small").mkdir()
    return Small(tmp_path / "small")


@pytest.fixture
def make_spec(world: World, tmp_path: Path) -> Callable[..., Any]:
    """`make_spec("producer.lr=0.1", ...)`: a parsed spec over the world, with overrides, running in a fresh folder."""

    def make(*overrides: str, name: str = "run") -> Any:
        return parse_spec(copy.deepcopy(world.tree(tmp_path / name)), overrides)

    return make


def tuned(spec: Any) -> Any:
    """Freeze and tune in this process, for what is tried is scoring; the spec again."""
    run = freeze.freeze(spec)
    tuner = Tuner(run, "cpu")
    for query_id in run.query_ids:
        tuner.tune(query_id)
    return spec


def run_without_ray(spec: Any, shard_order: Callable[[list], list] = list) -> Run:
    """Everything that workers do, in this process: freeze, tune, score."""
    run = freeze.freeze(spec)
    tuner = Tuner(run, "cpu")
    made, done = run.committed_queries(), run.committed()
    for query_id in run.query_ids:
        if query_id not in made:
            tuner.tune(query_id)
    scorer = ShardScorer(run, "cpu")
    pending = [work for work in run.works() if (work.addition, work.shard.shard_id) not in done]
    for work in shard_order(pending):
        scorer.score(work)
    return run


def exit_code(monkeypatch: pytest.MonkeyPatch, *words: str) -> Any:
    """Exit code of a command line, run in this process."""
    monkeypatch.setattr(sys, "argv", ["mirrorscope", *words])
    try:
        return guarded(app)
    except SystemExit as stop:
        return stop.code


def read_scores(run: Run) -> pa.Table:
    """All score rows of a run, by query and id."""
    columns = ["query_id", "example_id", "source", "base_loss", "counterpart_loss", "score", "row"]
    filesystem, path = storage.data_filesystem(run.uri("scores"))  # the whole folder, as a lake reads it
    table = pq.read_table(path, columns=columns, filesystem=filesystem)
    table = table.set_column(0, "query_id", table["query_id"].cast(pa.string()))
    return table.sort_by([("query_id", "ascending"), ("example_id", "ascending")])


@pytest.fixture(scope="session")
def s3() -> Iterator[seaweed.Store]:
    """A real S3 store, whose keys and endpoint are in the environment from here on: see tests/seaweed.py."""
    with seaweed.store() as store, pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment.items():
            patch.setenv(name, value)
        yield store


@pytest.fixture
def s3_fresh(s3: seaweed.Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[seaweed.Store]:
    """The store, and storage as in a process that has not spoken to it yet; pauses between tries are short."""
    monkeypatch.setattr(storage, "FIRST_PAUSE_S", 0.001)
    seaweed.forget()
    yield s3
    seaweed.forget()


@pytest.fixture
def s3_proxy(s3_fresh: seaweed.Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy for faults that all storage of this process and its children goes through; see tests/faults/proxy.py."""
    with in_front_of(s3_fresh.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


@pytest.fixture(scope="session")
def ray_cluster(s3: seaweed.Store) -> Iterator[Proxy]:
    """An embedded Ray that the tests of a session share; the pipeline uses a cluster that is connected already.

    Its workers have the environment of the moment of its start: the store's keys, and as endpoint a proxy, which is the value.
    """
    import ray

    from pipeline import embedded
    from pipeline.cluster import quieten, runtime_environment

    with in_front_of(s3.endpoint) as proxy, pytest.MonkeyPatch.context() as patch, embedded.closed_environment():
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
        with patch.context() as at_start:
            at_start.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
            embedded.start(num_cpus=6, object_store_memory=200 << 20, runtime_env=runtime_environment())
        quieten()
        yield proxy
        ray.shutdown()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the table of all faults."""
    reports = [report for some in terminalreporter.stats.values() for report in some]
    ended = [report for report in reports if getattr(report, "when", None) == "teardown"]
    entries = [Entry(**value) for report in ended for name, value in report.user_properties if name == PROPERTY]
    if entries:
        Ledger(entries).write(config.rootpath / JSON_PATH)
        terminalreporter.section("faults")
        Ledger(entries).show(Console(file=terminalreporter._tw._file, width=140))


@pytest.fixture(scope="session")
def rng() -> np.random.Generator:
    """Seeded."""
    return np.random.default_rng(0)
