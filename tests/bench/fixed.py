"""`make bench`: what a run costs beyond compute."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow.parquet as pq

from jobs import digits
from pipeline import cluster
from pipeline.freeze import freeze
from pipeline.run import finish
from pipeline.score import score
from pipeline.specfile import parse_spec
from pipeline.tune import tune
from tests.bench.speed_worlds import Digits, written
from tests.bench.table import Row, at_most, figure, machine, publish

ROWS, MOST_S = 1000, 25.0


def fixed_cost(folder: Path) -> list[Row]:
    """Seconds of a run over 1,000 rows that are neither tuning steps nor forward passes, and where they go."""
    tree = written(Digits("digits CNN", folder / "digits", ROWS, 256, 1), digits.cnn()).tree()
    one = pq.read_table(tree["queries"]["uri"]).slice(0, 1)
    pq.write_table(one, tree["queries"]["uri"])
    spec = parse_spec({"run": {"uri": str(folder / "run")}, **tree})
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
    same = f"{ROWS:,} digits, 1 query, embedded Ray; {taken_off}; {machine()}"
    rows = [at_most("fixed cost of a run (s)", sum(parts.values()), MOST_S, same)]
    return rows + [figure(f"  of which {name} (s)", seconds, "same run") for name, seconds in parts.items()]


def main() -> None:
    """Measure and publish."""
    with TemporaryDirectory() as folder:
        publish("bench", fixed_cost(Path(folder)))


if __name__ == "__main__":
    main()
