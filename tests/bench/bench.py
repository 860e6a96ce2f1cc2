"""`make bench`: the score stage against a bare loop over the same forward passes, and what a run costs beyond compute.

Absolute times mean little on a shared machine: the two sides of a ratio run in turn, and the median of the pairs' ratios
counts.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
import torch.nn.functional as F

from jobs import digits
from pipeline import cluster
from pipeline.artifacts import Run
from pipeline.freeze import freeze
from pipeline.run import finish
from pipeline.score import score
from pipeline.scorer import ShardScorer
from pipeline.specfile import parse_spec
from pipeline.tune import tune
from tests.bench.table import Row, at_least, figure, machine, publish

ROWS = 200_000
SHARD_ROWS = 16_384
BATCH_ROWS = 256
PAIRS = 5
FIXED_ROWS = 1000


class World:
    """The digits CNN on disk, with digits repeated to any number of rows, and one query."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pixels, self.labels = digits.load_digits()
        self.model = digits.train(self.pixels[: digits.TRAIN_ROWS], self.labels[: digits.TRAIN_ROWS])
        safetensors.torch.save_file(self.model.state_dict(), folder / "cnn.safetensors")
        one = {"query_id": ["q"], "pixels": [self.pixels[1500]], "label": self.labels[1500:1501]}
        pq.write_table(pa.table(one), folder / "queries.parquet")

    def repeated(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Pixels and labels, over and over."""
        take = np.arange(rows) % len(self.labels)
        return self.pixels[take], self.labels[take]

    def spec(self, name: str, rows: int, **sections: Any) -> Any:
        """A spec over `rows` digits in a folder of its own."""
        corpus = self.folder / f"corpus-{rows}.parquet"
        if not corpus.exists():
            pixels, labels = self.repeated(rows)
            columns = {"id": [f"{i:09d}" for i in range(rows)], "pixels": list(pixels), "label": labels}
            pq.write_table(pa.table(columns), corpus, row_group_size=SHARD_ROWS)
        tree = {
            "run": {"uri": str(self.folder / name)},
            "model": {"factory": "jobs.digits:cnn", "weights_uri": str(self.folder / "cnn.safetensors")},
            "task": {"features": "pixels", "shape": [1, 8, 8]},
            "corpus": {"uri": str(corpus), "example_id": "id"},
            "queries": {"uri": str(self.folder / "queries.parquet")},
            "score": {"batch_rows": BATCH_ROWS, "shard_rows": SHARD_ROWS},
        }
        return parse_spec({**tree, **sections})


def bare_loop(world: World, counterpart: torch.nn.Module, rows: int) -> float:
    """Examples/s of nothing but two forward passes and two losses over batches that are tensors in memory already."""
    pixels, labels = world.repeated(rows)
    x, y = torch.from_numpy(pixels).view(-1, 1, 8, 8), torch.from_numpy(labels)
    models = (world.model, counterpart)
    with torch.inference_mode():
        started_s = time.perf_counter()
        for start in range(0, rows, BATCH_ROWS):
            for model in models:
                F.cross_entropy(model(x[start : start + BATCH_ROWS]), y[start : start + BATCH_ROWS], reduction="none")
        return rows / (time.perf_counter() - started_s)


def through_ray(run: Run) -> float:
    """Examples/s of stage score on a running Ray, from the first shard's start (in a fresh actor) to the last commit."""
    forget_scores(run)
    score(run)
    receipts = list(run.receipts())
    elapsed_s = max(receipt.finished_at_s for receipt in receipts) - min(receipt.started_at_s for receipt in receipts)
    return sum(receipt.rows for receipt in receipts) / elapsed_s


def in_process(run: Run, scorer: ShardScorer) -> float:
    """Examples/s of one worker's work, Parquet in and Parquet out, shard after shard."""
    forget_scores(run)
    started_s = time.perf_counter()
    rows = sum(scorer.score(work).rows for work in run.works())
    return rows / (time.perf_counter() - started_s)


def forget_scores(run: Run) -> None:
    """Make the next scoring do all shards again."""
    from pipeline.storage import remove_folder

    for folder in ("commits", "scores", "partials"):
        remove_folder(run.uri(folder))


def paired(ours: Callable[[], float], bare: Callable[[], float]) -> tuple[float, float, float]:
    """Median ratio of PAIRS alternating measurements after one warm-up of each, and the two medians."""
    ours(), bare()
    pairs = [(ours(), bare()) for _ in range(PAIRS)]
    ratio = statistics.median(mine / theirs for mine, theirs in pairs)
    return ratio, statistics.median(mine for mine, _ in pairs), statistics.median(theirs for _, theirs in pairs)


def throughput(world: World) -> list[Row]:
    """The score stage against the bare loop: through Ray, and one worker's work in this process."""
    cores = os.cpu_count() or 1
    torch.set_num_threads(cores)
    run = freeze(world.spec("throughput", ROWS, resources={"score": {"actors": cores, "cpus": 1}}))
    with cluster.connected(run.spec.resources):
        tune(run)
        counterpart = digits.cnn()
        state = {**world.model.state_dict(), **safetensors.torch.load(run.counterpart_tensors("q"))}
        counterpart.load_state_dict(state)
        counterpart.eval()
        ratio, ours, bare = paired(lambda: through_ray(run), lambda: bare_loop(world, counterpart, ROWS))
    scorer = ShardScorer(run, "cpu")
    alone, alone_rate, bare_again = paired(lambda: in_process(run, scorer), lambda: bare_loop(world, counterpart, ROWS))
    same = f"digits CNN, {ROWS:,} rows, 1 query, float32, batches of {BATCH_ROWS}, median of {PAIRS} alternating pairs"
    same = f"{same}; {machine()}"
    return [
        at_least(
            "score stage / bare two-pass loop (examples/s)", ratio, 0.80,
            f"Parquet in, Parquet out, {cores} actors x 1 thread through Ray, first start to last commit: {ours:,.0f}; "
            f"bare: {cores} threads, tensors in memory: {bare:,.0f}; {same}",
        ),
        figure(
            "one worker's work without Ray / bare two-pass loop", alone,
            f"one process, {cores} threads, shard after shard: {alone_rate:,.0f} against {bare_again:,.0f} examples/s; {same}",
        ),
    ]  # fmt: skip


def fixed_cost(world: World) -> list[Row]:
    """Seconds of a run over 1,000 rows that are neither tuning steps nor forward passes, and where they go."""
    spec = world.spec("fixed", FIXED_ROWS)
    marks: list[tuple[str, float]] = []

    def mark(name: str) -> None:
        marks.append((name, time.perf_counter()))

    mark("start")
    run = freeze(spec)
    mark("freeze")
    with cluster.connected(spec.resources):
        mark("Ray start")
        tune(run)
        mark("tune: Ray Train start and stop")
        score(run)
        mark("score: Ray Data and actors start")
    mark("Ray stop")
    finish(run)
    mark("rank and report")
    tuned_s = sum(run.counterpart_meta(query_id)["seconds"] for query_id in run.query_ids)
    scored_s = sum(receipt.compute_s for receipt in run.receipts())
    compute_s = {"tune: Ray Train start and stop": tuned_s, "score: Ray Data and actors start": scored_s}
    parts = {name: at - before - compute_s.get(name, 0.0) for (_, before), (name, at) in pairwise(marks)}
    taken_off = f"compute taken off: {tuned_s:.2f} s tuning, {scored_s:.2f} s scoring"
    same = f"{FIXED_ROWS:,} digits, 1 query, embedded Ray; {taken_off}; {machine()}"
    rows = [figure("fixed cost of a run (s)", sum(parts.values()), same)]
    return rows + [figure(f"  of which {name} (s)", seconds, "same run") for name, seconds in parts.items()]


def main() -> None:
    """Measure and publish."""
    with TemporaryDirectory() as folder:
        world = World(Path(folder))
        publish("bench", fixed_cost(world) + throughput(world))


if __name__ == "__main__":
    main()
