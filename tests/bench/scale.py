"""`make bench-scale`: what the pipeline costs beside its models, at the sizes it is made for.

    python -m tests.bench.scale [rows shards files ranking] [--scale 0.01]

Every part drives the real thing: stages as `mirrorscope run` calls them, over a model of no cost (`nothing.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import cluster, score, storage
from pipeline.artifacts import Run
from pipeline.attempts import start_attempts
from pipeline.observe import every
from pipeline.rank import rank
from pipeline.scorer import ShardScorer
from tests import seaweed
from tests.bench import nothing
from tests.bench.speed_worlds import forget_scores
from tests.bench.table import Row, at_least, at_most, figure, machine, publish

FILES, ROWS_EACH, SMALL_FILES = 1000, 10_000, 10
CUT = {"shard_rows": ROWS_EACH, "batch_rows": 1000}
SHARDS = 100_000
S3_FILES, S3_ROWS_EACH, UPLOADERS = 100_000, 10, 32
QUERIES, SCORED_ROWS, K = 100, 500_000, 100
PAIRS = 3


def rss_bytes() -> int:
    """Memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Memory:
    """Memory of this process in the time of the block: before, and at its highest."""

    def __init__(self) -> None:
        gc.collect()
        self.before_bytes = self.peak_bytes = rss_bytes()

    def look(self) -> None:
        """See how much it is now."""
        self.peak_bytes = max(self.peak_bytes, rss_bytes())

    @property
    def grown_bytes(self) -> int:
        """What the block took at most."""
        return self.peak_bytes - self.before_bytes


@contextmanager
def memory() -> Iterator[Memory]:
    """Watch the memory of this process."""
    watched = Memory()
    with every(0.01, watched.look):
        yield watched


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came out."""
    started_s = time.perf_counter()
    result = action()
    return time.perf_counter() - started_s, result


# --- rows: a corpus of 10 M rows in 1,000 files, through Ray ------------------------------------------------------------


def rows_part(scale: float, folder: Path) -> list[Row]:
    """Planning, scoring and merging a large corpus against a small one."""
    files = max(SMALL_FILES, round(FILES * scale))
    nothing.write_corpus(folder / "large", files, ROWS_EACH)
    nothing.write_corpus(folder / "small", SMALL_FILES, ROWS_EACH)
    with memory() as planning:
        planning_s, large = timed(lambda: nothing.frozen(folder / "of-large", str(folder / "large"), score=CUT))
    small = nothing.frozen(folder / "of-small", str(folder / "small"), score=CUT)
    for run in (large, small):
        nothing.make_counterparts(run)
    with cluster.connected(large.spec.resources):
        small_s = [_seconds_per_row(small) for _ in range(1 + PAIRS)][1:]  # the first also loads libraries
        with memory() as scoring:
            large_s = _seconds_per_row(large)
        small_s += [_seconds_per_row(small) for _ in range(PAIRS)]
    with memory() as merging:
        merging_s, _ = timed(lambda: rank(large))
    shards_each_s = len(large.shards) / (large_s * large.rows)
    same = f"{large.rows:,} rows in {files:,} local Parquet files, 1 query, k = {large.spec.rank.k}; {machine()}"
    against = f"{large_s * 1e6:.2f} us a row, first shard's start to last commit, against {small.rows:,} rows in"
    return [
        figure("rows: planning, freeze included (s)", planning_s, same),
        figure("rows: memory that planning takes (MB)", planning.grown_bytes / 1e6, same),
        figure("rows: shards scored per second", shards_each_s, same),
        figure("rows: memory of the driver while it scores (MB)", scoring.grown_bytes / 1e6, same),
        figure("rows: ranking from partials (s)", merging_s, same),
        figure("rows: memory that ranking takes (MB)", merging.grown_bytes / 1e6, same),
        at_most(
            "rows: cost per row, all / small corpus", large_s / statistics.median(small_s), 1.05,
            f"{against} {SMALL_FILES} files: {', '.join(f'{each * 1e6:.2f}' for each in small_s)} us; {same}",
        ),
    ]  # fmt: skip


def _seconds_per_row(run: Run) -> float:
    """Stage score on a running Ray: from the first shard's start to the last commit, per row."""
    forget_scores(run)
    score.score(run)
    receipts = list(run.receipts())
    elapsed_s = max(receipt.finished_at_s for receipt in receipts) - min(receipt.started_at_s for receipt in receipts)
    return elapsed_s / sum(receipt.rows for receipt in receipts)


# --- shards: 100,000 of nothing through the stage's own Ray Data call ---------------------------------------------------


def shards_part(scale: float, folder: Path) -> list[Row]:
    """What the driver pays per shard, in time and in memory."""
    shards = max(200, round(SHARDS * scale))
    nothing.write_corpus(folder / "corpus", 1, 1)
    run = nothing.frozen(folder / "of-corpus", str(folder / "corpus"))
    with cluster.connected(run.spec.resources), mock.patch.object(score, "ScoreShard", nothing.Nobody):
        _through_ray(nothing.with_shards(run, 100), lambda done: None)  # loads what it loads once
        seen: list[tuple[int, int]] = []
        with memory() as watched:
            seconds, done = timed(
                lambda: _through_ray(
                    nothing.with_shards(run, shards),
                    lambda done: seen.append((done, rss_bytes())) if done % 100 == 0 else None,
                )
            )
    assert done == shards
    half = seen[len(seen) // 2 :]
    slope_bytes = np.polyfit([done for done, _ in half], [used for _, used in half], 1)[0] if len(half) > 1 else 0.0
    same = f"{shards:,} shards of nothing through stage score's Ray Data call, attempts counted; {machine()}"
    return [
        at_least("shards: of nothing per second", shards / seconds, 100, same),
        at_most("shards: memory of the driver per shard (bytes)", watched.grown_bytes / shards, 1024, f"peak less start; {same}"),
        figure("shards: growth of it in the second half (bytes per shard)", float(slope_bytes), same),
    ]  # fmt: skip


def _through_ray(run: Run, look: Callable[[int], None]) -> int:
    done = 0
    for _ in score._rows(run, list(score._keys(run)), start_attempts()):
        done += 1
        look(done)
    return done


# --- files: 100,000 small ones on a real S3 server ----------------------------------------------------------------------


def files_part(scale: float, folder: Path, there: seaweed.Store | None = None) -> list[Row]:
    """Listing and freezing; a server of our own runs on the same machine, and its share of it counts."""
    files = max(10, round(S3_FILES * scale))
    with nullcontext(there) if there else seaweed.store() as store, mock.patch.dict(os.environ, store.environment):
        uri = store.prefix("small-files")
        upload_s, _ = timed(lambda: _upload(uri, files))
        used_s = -time.process_time()
        with memory() as watched:
            seconds, run = timed(lambda: nothing.frozen(folder / "of-files", uri))
        used_s += time.process_time()
        listing_s, _ = timed(lambda: storage.objects(uri))
    assert (len(run.shards), run.rows) == (files, files * S3_ROWS_EACH)
    same = f"{files:,} Parquet files of {S3_ROWS_EACH} rows on SeaweedFS on the same machine; {machine()}"
    return [
        at_most("files: list and freeze (s)", seconds, 120, f"{files / seconds:,.0f} files/s; {same}"),
        figure("files: CPU time of it, without the server's (s)", used_s, same),
        figure("files: of which one listing takes about (s)", listing_s, same),
        figure("files: memory that it takes (MB)", watched.grown_bytes / 1e6, same),
        figure("files: writing them for this (s)", upload_s, same),
    ]


def _upload(uri: str, files: int) -> None:
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table({"x": np.arange(S3_ROWS_EACH)}), buffer)
    data = buffer.getvalue().to_pybytes()
    fs, path = storage.data_filesystem(uri)

    def put(i: int) -> None:
        with fs.open_output_stream(f"{path}/part-{i // 1000:03d}/file-{i:06d}.parquet") as file:
            file.write(data)

    with ThreadPoolExecutor(UPLOADERS) as pool:
        list(pool.map(put, range(files)))


# --- ranking: 50 M score rows against DuckDB ----------------------------------------------------------------------------

ALL_COLUMNS = "query_id, example_id, score, base_loss, counterpart_loss, num_tokens, shard_id, row"
SQL = {
    "max_by and min_by": """
        SELECT query_id, max_by(example_id, score, {k}), min_by(example_id, score, {k}) FROM '{scores}' GROUP BY query_id""",
    "thresholds, then a join": """
        WITH edges AS (SELECT query_id, list_min(max(score, {k})) AS high, list_max(min(score, {k})) AS low
                       FROM '{scores}' GROUP BY query_id)
        SELECT {columns} FROM '{scores}' JOIN edges USING (query_id) WHERE score >= high OR score <= low""",
    "ORDER BY ... LIMIT per query and side": """
        (SELECT {columns} FROM '{one}' ORDER BY score DESC, example_id LIMIT {k}) UNION ALL
        (SELECT {columns} FROM '{one}' ORDER BY score, example_id LIMIT {k})""",
}
"""Plain SQL for the same question. The first leaves out most columns, and the order of ties; the last is run once per query.
QUALIFY row_number() took 80 s and 5 GB in a first trial, and is left out."""


def ranking_part(scale: float, folder: Path) -> list[Row]:
    """Another k than the partials have: the rank stage from score files, and DuckDB on the same files."""
    rows, queries = max(100, round(SCORED_ROWS * scale)), max(2, round(QUERIES * min(1.0, 10 * scale)))
    nothing.write_corpus(folder / "corpus", 1, rows)
    run = nothing.frozen(
        folder / "of-corpus", str(folder / "corpus"), queries, score={"shard_rows": 62_500, "batch_rows": 500}
    )
    nothing.make_counterparts(run)
    scorer = ShardScorer(run, "cpu")
    for work in run.works():
        scorer.score(work)
    section = run.spec.rank.model_copy(update={"k": K})
    deeper = dataclasses.replace(run, spec=run.spec.model_copy(update={"rank": section}))
    names = list(SQL)
    seconds: dict[str, list[float]] = {name: [] for name in ("ours", *names)}
    with memory() as watched:
        rank(deeper)
    for _ in range(PAIRS):
        seconds["ours"].append(timed(lambda: rank(deeper))[0])
        for name in names:
            seconds[name].append(timed(lambda name=name: _in_duckdb(deeper, name))[0])
    _require_same(deeper)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    best = min(names, key=lambda name: medians[name])
    told = "; ".join(f"{name}: {medians[name]:.2f} s" for name in ("ours", *names))
    ratio, grown_mb = medians["ours"] / medians[best], watched.grown_bytes / 1e6
    same = f"{rows * queries:,} score rows, {queries} queries, k = {K} on both sides, medians of {PAIRS}; {told}; {machine()}"
    return [
        at_most("ranking: from score files / DuckDB's best plain SQL", ratio, 1.5, f"best: {best}; {same}"),
        at_most("ranking: memory that it takes (MB)", grown_mb, 1000, f"the first time in its process; {same}"),
    ]  # fmt: skip


def _in_duckdb(run: Run, name: str) -> list[tuple[Any, ...]]:
    import duckdb

    found: list[tuple[Any, ...]] = []
    folders = storage.names(run.uri("scores")) if "{one}" in SQL[name] else ["*"]
    with duckdb.connect() as connection:
        for folder in folders:
            fields = {"k": K, "columns": ALL_COLUMNS, "scores": run.uri("scores", "*", "*.parquet")}
            found += connection.execute(
                SQL[name].format(**fields, one=run.uri("scores", folder, "*.parquet"))
            ).fetchall()
    return found


def _require_same(run: Run) -> None:
    """The rank stage lists what DuckDB lists, in the same order."""
    theirs = [(row[0], row[1]) for row in _in_duckdb(run, "ORDER BY ... LIMIT per query and side")]
    ours = run.read_ranked()[0]
    assert theirs == list(zip(ours["query_id"].to_pylist(), ours["example_id"].to_pylist(), strict=True))


PARTS = {"rows": rows_part, "shards": shards_part, "files": files_part, "ranking": ranking_part}


def main() -> None:
    """Measure the parts asked for, one after the other, and publish each as it is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all of them by default")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="of the sizes; what is below 1 is a quick look, no result"
    )
    asked = parser.parse_args()
    for part in asked.parts or PARTS:
        with TemporaryDirectory() as folder:
            publish("scale" if asked.scale == 1.0 else "scale-quick", PARTS[part](asked.scale, Path(folder)))


if __name__ == "__main__":
    main()
