"""Stage 2: losses of every training example under the base model and all counterparts.

Reads: run.yaml, manifest.parquet, counterparts/, corpus files.
Writes: per shard scores/query_id=Q/, rejects/, partials/; then commits/shard-NNNNNN.json, last.
Resumes: committed shards are skipped; a shard that is done twice writes the same bytes twice.
Next: rank.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from .artifacts import CALIBRATION, Run, counterparts_digest
from .attempts import LOOK_S, Stalls, Worker, start_attempts
from .calibration import MANY, Calibration
from .cluster import Watchdog, actors_of, on_cluster
from .ensemble import Ensemble
from .errors import PipelineError, QuarantineError, UnavailableError
from .frozen import open_run
from .mean import MeanScorer
from .observe import Progress, every, say, say_seldom, unsent
from .scorer import ShardScorer
from .works import Receipt, Work, work_name

SHARDS_AHEAD = 2
"""Calls that run in one actor at a time: one reads, decodes and writes while the other holds the engine."""
SHARDS_PER_WAVE = 100_000
"""Shards given to Ray Data at a time: its driver keeps something of each until the end."""
BLOCKS_PER_WAVE, BLOCKS_PER_ACTOR = 4096, 32
"""What Ray Data schedules is a block, of one shard where that makes no more blocks than this, else of several: a block costs
the driver 3 ms and 2-5 KB. An actor's death repeats its blocks, the last ones leave actors idle: hence 32 per actor."""
_Key = tuple[int, int]


def score(run: Run) -> None:
    """Score the shards that are not committed yet.

    Raises:
        InputError: More rows were rejected than the spec allows; what is done is committed.
        QuarantineError: Shards are quarantined, more than the spec allows; all others are committed.
        ContractError: The model or task failed.
        StorageError: The store refused, or was gone for too long.
        ClusterError: Resources are missing, or actors could not start.
    """
    _calibrate(run)
    tally = _tally(run)
    run.require_few_rejects(tally.rejects)
    pending = [key for key in _keys(run) if key not in tally.done]
    if pending:
        on_cluster("score", lambda: _score(run, pending, tally))
    if tally.quarantined:
        _tell_quarantined(run, tally)


def _calibrate(run: Run) -> None:
    """Choose the way of scoring, once for the run, in a worker like those that will score."""
    if run.spec.score.way != "auto" or len(run.query_ids) < MANY or isinstance(run, Ensemble):
        return
    if run.committed() or run.measured(CALIBRATION) is not None:
        return
    said = on_cluster("score", lambda: _calibrated_by_worker(run))
    for notice in said["notices"]:
        say(notice)
    if said["error"]:
        raise pickle.loads(said["error"])
    found: Calibration | None = said["found"]
    if found is not None:
        run.commit_measured(CALIBRATION, found.to_json())
        say(f"score by {found.way}: {found.why}")
        if run.spec.score.compile and found.way != "difference":
            say(f"score.compile: has no effect on way {found.way}, which runs the model as it is")


def _calibrated_by_worker(run: Run) -> dict[str, Any]:
    import ray

    resources = run.spec.resources.score
    remote = ray.remote(_calibrated).options(
        num_cpus=resources.cpus, num_gpus=resources.gpus, max_retries=resources.max_failures
    )
    with Watchdog("score").watching():
        said: dict[str, Any] = ray.get(remote.remote(run.uri()))
    return said


def _calibrated(run_uri: str) -> dict[str, Any]:
    """What a worker measured, and said."""
    found, raised = None, b""
    try:
        scorer = _scorer(open_run(run_uri), None)
        assert isinstance(scorer, ShardScorer)
        found = scorer.calibrate()
    except PipelineError as error:
        raised = pickle.dumps(error)
    return {"found": found, "error": raised, "notices": unsent()}


@dataclass
class _Tally:
    """Where the stage stands: commits that stay, rows rejected one by one, shards quarantined with their rows and reason."""

    done: set[_Key] = field(default_factory=set)
    rejects: int = 0
    quarantined: dict[str, tuple[int, str]] = field(default_factory=dict)

    @property
    def rows_lost(self) -> int:
        """Rows in rejects/."""
        return self.rejects + sum(rows for rows, _ in self.quarantined.values())


def _keys(run: Run) -> Iterator[_Key]:
    return ((work.addition, work.shard.shard_id) for work in run.works())


def _tally(run: Run) -> _Tally:
    """What is committed. A shard that was scored under a counterpart which was made anew with other bytes is scored anew."""
    tally, way = _Tally(), run.way
    tensors = {
        query_id: run.counterpart_meta(query_id)["tensors"]["sha256"] for query_id in sorted(run.committed_queries())
    }
    stale: list[str] = []
    for receipt in run.receipts():
        query_ids = run.work(receipt.addition, receipt.shard_id).query_ids
        there = counterparts_digest([tensors[query_id] for query_id in query_ids if query_id in tensors], way)
        if receipt.quarantined is None and receipt.counterparts != there:
            stale.append(f"commits/{receipt.name}.json")
            continue
        tally.done.add((receipt.addition, receipt.shard_id))
        if receipt.quarantined is None:
            tally.rejects += receipt.rejects
        else:
            tally.quarantined[receipt.name] = (receipt.rejects, receipt.quarantined)
    if stale:
        say(
            f"warning: {len(stale):,} shards were scored under other counterparts than those that are there, or in another way: "
            "scored anew"
        )
        run.void(stale)
    return tally


def _score(run: Run, pending: Sequence[_Key], tally: _Tally) -> None:
    attempts = start_attempts()
    stalls = Stalls(run.spec.resources.score.stalled_after_s, attempts)
    watchdog = Watchdog("score", detail=stalls.longest)
    progress = Progress(
        "mean" if isinstance(run, Ensemble) else "score", run.number_of_works, "shards", done=len(tally.done)
    )
    ended = closing(_rows(run, pending, attempts))  # an error here ends the actors too
    with watchdog.watching(), every(LOOK_S, stalls.look), progress, ended as rows:
        for row in rows:
            watchdog.feed()
            stalls.took(row["seconds"])
            for notice in filter(None, row["notices"].split("\n")):
                say_seldom(notice, notice)  # actors are alike
            if row["error"]:
                raise pickle.loads(row["error"])
            progress.advance(row["rows"])
            if row["quarantined"]:
                tally.quarantined[row["name"]] = (row["rejects"], row["quarantined"])
                say(f"warning: {row['name']} ({row['rejects']:,} rows) is quarantined: {row['quarantined']}")
            else:
                tally.rejects += row["rejects"]
                run.require_few_rejects(tally.rejects)


def _tell_quarantined(run: Run, tally: _Tally) -> None:
    shown = "".join(f"\n  {name}: {rows:,} rows: {why}" for name, (rows, why) in islice(tally.quarantined.items(), 5))
    quarantined = f"{len(tally.quarantined)} of {run.number_of_works:,} shards are quarantined"
    message = f"{quarantined}; their rows are in {run.uri('rejects')}{shown}"
    if run.is_tolerable(tally.rows_lost):
        say(f"warning: {message}")
        return
    raise QuarantineError(
        message,
        "every other shard is scored. Mend what stands above and run the same command: it tries these again; or go on "
        "without them with --set score.max_reject_fraction=...",
    )


def _rows(run: Run, pending: Sequence[_Key], attempts: Any) -> Generator[dict[str, Any], None, None]:
    """What actors say of shards as they are committed, in any order."""
    for start in range(0, len(pending), SHARDS_PER_WAVE):
        yield from _wave(run, pending[start : start + SHARDS_PER_WAVE], attempts)


def _wave(run: Run, pending: Sequence[_Key], attempts: Any) -> Iterator[dict[str, Any]]:
    import ray.data
    from ray.data import ActorPoolStrategy, DataContext

    resources = run.spec.resources.score
    if isinstance(run, Ensemble):
        resources = resources.model_copy(update={"gpus": 0.0})  # files are averaged, no model is there
    actors = actors_of(resources, len(pending))
    DataContext.get_current().max_consecutive_actor_init_deaths = resources.max_failures
    # A shard is known by its number alone: actors read the rest from the manifest.
    items = [{"addition": addition, "shard_id": shard_id} for addition, shard_id in pending]
    blocks = min(len(items), max(BLOCKS_PER_WAVE, BLOCKS_PER_ACTOR * actors))
    scored = ray.data.from_items(items, override_num_blocks=blocks).map_batches(
        ScoreShard,
        fn_constructor_kwargs={"run_uri": run.uri(), "query_ids": _queries_of(run, pending), "attempts": attempts},
        batch_size=1,
        compute=ActorPoolStrategy(
            size=actors,
            max_tasks_in_flight_per_actor=2 * SHARDS_AHEAD,
            max_concurrent_calls_per_actor=SHARDS_AHEAD,
            enable_true_multi_threading=True,
        ),
        num_cpus=resources.cpus,
        num_gpus=resources.gpus or None,
    )
    return iter(scored.iter_rows())


def _queries_of(run: Run, pending: Sequence[_Key]) -> tuple[str, ...]:
    """Queries that the pending shards need."""
    kinds = {(addition, shard_id >= run.additions[addition].first_shard): shard_id for addition, shard_id in pending}
    wanted = {
        query_id for (addition, _), shard_id in kinds.items() for query_id in run.work(addition, shard_id).query_ids
    }
    return tuple(query_id for query_id in run.query_ids if query_id in wanted)


class ScoreShard:
    """The Ray Data actor: a ShardScorer, or a MeanScorer, behind the shape that `map_batches` calls.

    Ray restarts it and gives it its shards again for ever; what is bounded is how often a shard may take its actor with it.
    """

    def __init__(self, run_uri: str, query_ids: tuple[str, ...], attempts: Any) -> None:
        self._worker = Worker(attempts)  # first of all: what it was on before is over, however long loading takes
        self._error: PipelineError | None = None
        try:
            self._run = open_run(run_uri)
            self._max_failures = self._run.spec.resources.score.max_failures
            self._scorer = _scorer(self._run, query_ids)
        except PipelineError as error:  # raised here, Ray would bring home that an actor died
            self._error = error

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Score a batch of shards; one small row each."""
        keys = zip(batch["addition"].tolist(), batch["shard_id"].tolist(), strict=True)
        rows = [self._row(addition, shard_id) for addition, shard_id in keys]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def _row(self, addition: int, shard_id: int) -> dict[str, Any]:
        started_s, name = time.monotonic(), work_name(addition, shard_id)
        row: dict[str, Any] = {"name": name, "rows": 0, "rejects": 0, "quarantined": "", "error": b""}
        try:
            if self._error is not None:
                raise self._error
            receipt = self._attempt(self._run.work(addition, shard_id))
            row |= {"rows": receipt.rows, "rejects": receipt.rejects, "quarantined": receipt.quarantined or ""}
        except PipelineError as error:  # of an error that is raised Ray Data brings only the text home
            row["error"] = pickle.dumps(error)
        return row | {"seconds": time.monotonic() - started_s, "notices": "\n".join(unsent())}

    def _attempt(self, work: Work) -> Receipt:
        with self._worker.attempt(work.name) as number:
            standing = self._run.standing(work.addition, work.shard.shard_id)
            if standing is not None:  # by another driver, or in a block that comes again because its actor died
                return standing
            if number <= self._max_failures + 1:
                return self._score(work)
            died = f"{number - 1} workers died or stalled on it, the last attempts with no other shard beside it"
            return self._scorer.quarantine(work, died)

    def _score(self, work: Work) -> Receipt:
        """Score a shard, again if the store was away for longer than one request is repeated."""
        for failed in range(1, self._max_failures + 1):
            try:
                return self._scorer.score(work)
            except UnavailableError as error:
                say(f"warning: {work.name}: {error.message}; attempt {failed + 1} of {self._max_failures + 1}")
        return self._scorer.score(work)


def _scorer(run: Run, query_ids: tuple[str, ...] | None) -> ShardScorer | MeanScorer:
    """What does a shard of a run: its models, or the mean of its members."""
    if isinstance(run, Ensemble):
        return MeanScorer(run, query_ids)
    import torch

    resources = run.spec.resources.score
    torch.set_num_threads(max(1, int(resources.cpus)))
    return ShardScorer(run, "cuda" if resources.gpus else "cpu", query_ids)
