"""`python -m tests.bench.faithful_speed`: how fast are scores, ours beside gradient peers', by turns in two processes?

Digits over and over, float32, the same number of threads for all, every method in the batches that suit it best; garbage is not
collected. Peers and the engine score arrays in memory; the stage reads Parquet and writes it.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F

from pipeline import storage
from pipeline.artifacts import Run
from pipeline.batches import Arrays
from pipeline.changes import from_bytes
from pipeline.engine import LossEngine
from pipeline.extensions import load_model, load_task
from pipeline.freeze import freeze
from pipeline.scorer import ShardScorer
from pipeline.specfile import parse_spec
from pipeline.tuner import Tuner
from tests.bench.faithful_digits import Digits
from tests.bench.faithful_world import Asked, Sections, tree_of
from tests.bench.speed_peers import Peers, Spent
from tests.bench.table import Row, at_least, figure, machine, publish

ROWS, ROUNDS, TRIES = 20_000, 5, 2
BATCHES = (256, 1024, 4096)
WHOLE = ("kronfluence-identity", "dattri-hooks", "captum-tracincp")
"""Gradients of all weights. dattri's other way took 85 us of CPU per digit and query on the MLP, and is left out."""
LAST = "captum-tracincp-fast"
"""Of the last layer's alone."""
FITTED = {"kronfluence-identity": 1.0, "kronfluence-ekfac-heuristic": 8.0}
"""Peers whose fit and scores together are compared with our tuning and scores, and bars for one query."""
TUNED: dict[str, Sections] = {
    "preset: paper": {"producer": {"preset": "paper"}},
    "ascent": {"producer": {"name": "unlearn"}},
}
"""Natural steps are tuned once for all queries, which `make bench-faithful` times."""
SCORE = {"shard_rows": ROWS, "batch_rows": 1024}
"""Of the stage: one shard, since it has one worker."""
BAR = 2.0


Turn = Callable[[], Spent]


class Ours:
    """Our ways to score the same rows.

    Args:
        world: Model and examples.
        queries: The first so many.
    """

    def __init__(self, world: Digits, queries: int) -> None:
        self._world, self._asked = world, Asked(f"first-{queries}", "model", "repeated")
        table = pq.read_table(world.folder / "queries.parquet").slice(0, queries)
        _write_once(table, world.folder / f"{self._asked.queries}.parquet")
        few = pq.read_table(world.folder / "train.parquet")
        rows = np.arange(ROWS) % len(few)
        many = few.take(rows).set_column(few.column_names.index("id"), "id", pa.array([str(i) for i in range(ROWS)]))
        _write_once(many, world.folder / "repeated.parquet")
        self.tune_s: dict[str, float] = {}
        runs: dict[str, Run] = {}
        self._tuned("ascent", TUNED["ascent"])  # the first time does not count
        for name, sections in TUNED.items():
            runs[name], self.tune_s[name] = self._tuned(name, sections)
        self._run = runs["ascent"]
        spec = self._run.spec
        self._changes = [from_bytes(self._run.counterpart_tensors(query_id)) for query_id in self._run.query_ids]
        self._task = load_task(spec.task)
        self._model = load_model(spec.model, "cpu", spec.seed)
        self._engine = LossEngine(self._model, self._task, self._changes)
        pixels = np.array(few["pixels"].to_pylist(), np.float32).reshape(-1, 1, 8, 8)
        self._columns = {"features": pixels[rows], "label": few["label"].to_numpy()[rows]}

    def _tuned(self, name: str, sections: Sections) -> tuple[Run, float]:
        """A fresh run whose counterparts are made, and the seconds that took."""
        tree = tree_of(self._world, name, {**sections, "score": SCORE}, self._asked)
        storage.remove_folder(tree["run"]["uri"])
        run = freeze(parse_spec(tree))
        started_s = time.perf_counter()
        if failures := Tuner(run, "cpu").tune_all(run.query_ids):
            raise failures[0]
        return run, time.perf_counter() - started_s

    def engine(self, batch_rows: int) -> Turn:
        """The loss engine over batches in memory."""
        batches = list(Arrays(self._columns).batches(batch_rows))
        return lambda: _spent(lambda: self._engine.losses(batches))

    def bare(self, batch_rows: int) -> Turn:
        """The same passes without an engine: a model for the base and one for each counterpart, over tensors in memory."""
        x, y = (torch.from_numpy(self._columns[name]).split(batch_rows) for name in ("features", "label"))
        spec = self._run.spec
        models = [load_model(spec.model, "cpu", spec.seed) for _ in (None, *self._changes)]
        for model, changes in zip(models[1:], self._changes, strict=True):
            model.load_state_dict(changes, strict=False)

        def work() -> None:
            with torch.inference_mode():
                for some, labels in zip(x, y, strict=True):
                    for model in models:
                        F.cross_entropy(model(some) / 2, labels, reduction="none")

        return lambda: _spent(work)

    def stage(self) -> Turn:
        """What a worker does: read Parquet, score, write Parquet, commit."""
        scorer = ShardScorer(self._run, "cpu")

        def work() -> None:
            for one in self._run.works():
                scorer.score(one)

        def turn() -> Spent:
            for name in ("scores", "commits", "partials"):
                storage.remove_folder(self._run.uri(name))
            return _spent(work)

        return turn


def _write_once(table: pa.Table, path: Path) -> None:
    if not path.exists():
        pq.write_table(table, path)


def _spent(work: Callable[[], Any]) -> Spent:
    cpu_s, started_s = time.process_time(), time.perf_counter()
    work()
    return Spent(0.0, time.perf_counter() - started_s, time.process_time() - cpu_s)


def by_turns(ways: Mapping[str, Sequence[Turn]]) -> dict[str, list[Spent]]:
    """Every way at its fastest batch: first all are tried, then all take turns."""
    best = {}
    for name, turns in ways.items():
        tried = [min(turn().whole_s for _ in range(TRIES)) for turn in turns]
        best[name] = turns[int(np.argmin(tried))]
    gc.collect()
    gc.freeze()
    rounds = [{name: turn() for name, turn in best.items()} for _ in range(ROUNDS)]
    return {name: [each[name] for each in rounds] for name in best}


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median of pairs: how many times faster ours is."""
    return statistics.median(their / our for our, their in zip(ours, theirs, strict=True))


def measured(kind: str, queries: int, threads: int) -> list[Row]:
    """Rows of the table for one model and number of queries."""
    world, folder = Digits(kind), Digits(kind).folder / "peers-speed"
    folder.mkdir(exist_ok=True)
    world.for_peers(folder, Asked("queries"))
    ours, theirs = Ours(world, queries), Peers(folder, threads)
    ways: dict[str, list[Turn]] = {
        "engine": [ours.engine(rows) for rows in BATCHES],
        "bare loop": [ours.bare(rows) for rows in BATCHES],
        "stage": [ours.stage()],
        **{
            name: [lambda name=name, rows=rows: theirs(name, queries, rows, ROWS) for rows in BATCHES]  # type: ignore[misc]
            for name in dict.fromkeys((*WHOLE, LAST, *FITTED))
        },
    }
    spent = by_turns(ways)
    theirs.close()
    return _rows(spent, ours.tune_s, queries, f"digits {kind}", f"{ROWS:,} rows, {threads} threads, {machine()}")


def _rows(
    spent: Mapping[str, Sequence[Spent]], tune_s: Mapping[str, float], queries: int, model: str, conditions: str
) -> list[Row]:
    about = f"{model}, {queries} queries"
    clock = {name: [each.whole_s for each in some] for name, some in spent.items()}
    cpu = {name: [each.cpu_s for each in some] for name, some in spent.items()}
    rows = [
        figure(f"{about}: {name}, us per example by the clock / of CPU", round(1e6 * statistics.median(each) / ROWS, 3),
               f"{1e6 * statistics.median(cpu[name]) / ROWS:.3f} of CPU; {conditions}")
        for name, each in clock.items()
    ]  # fmt: skip
    fastest = min(WHOLE, key=lambda name: statistics.median(cpu[name]))
    for name in ("engine", "stage"):
        rows.append(
            at_least(f"{about}: {name} against {fastest}", _ratio(clock[name], clock[fastest]), BAR, conditions)
        )
        rows.append(figure(f"{about}: {name} against {fastest}, CPU", _ratio(cpu[name], cpu[fastest]), conditions))
    rows.append(figure(f"{about}: engine against {LAST}", _ratio(clock["engine"], clock[LAST]), conditions))
    rows.append(
        figure(f"{about}: engine against the bare loop", _ratio(clock["engine"], clock["bare loop"]), conditions)
    )
    score_s = statistics.median(clock["engine"])
    for method, seconds in tune_s.items():
        for name, bar in FITTED.items():
            ratio = statistics.median(clock[name]) / (seconds + score_s)
            measure = f"{about}: {method} tuned and scored, against {name} fitted and scored"
            rows.append(at_least(measure, ratio, bar if queries == 1 else 1.0, f"tuning {seconds:.3f} s; {conditions}"))
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("mlp", "cnn"), help="one of the models")
    parser.add_argument("--queries", type=int, nargs="+", default=(1, 60))
    parser.add_argument("--threads", type=int, default=1, help="of torch, for all")
    parser.add_argument("--table", default="faithful-speed", help="where rows are added: build/bench/TABLE.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for kind in ("mlp", "cnn") if given.only is None else (given.only,):
        for queries in given.queries:
            publish(given.table, measured(kind, queries, given.threads))


if __name__ == "__main__":
    main()
