"""How long a run will take and what it costs, by what was measured of its model on a few rows; and how long it took.

Pure, but for reading and writing forecast.json. What measures is `rehearsal.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, NamedTuple

from .artifacts import Run
from .calibration import Way
from .ensemble import members_of, number_of_members
from .errors import ArtifactError, InputError
from .folder import parallel
from .observe import spoken
from .plan import Plan
from .works import Receipt

NAME = "forecast.json"
"""In the run's folder; part of no run, so that nothing depends on it."""
MILLION = 1_000_000


@dataclass(frozen=True)
class Compiling:
    """What `score.compile` would do.

    Args:
        first_s: Seconds for the first batch, when an actor compiles.
        times: How many times as fast batches are then.
        saved_s: Seconds by which stage score is shorter then.
    """

    first_s: float
    times: float
    saved_s: float


@dataclass(frozen=True)
class Timing:
    """What was measured, by one worker of each stage.

    Args:
        tune_once_s: Seconds that the first counterpart took beyond a further one: for what serves all queries.
        tune_query_s: For each counterpart.
        rows: Rows of the shard that was looked at.
        read_s: Seconds for reading and decoding it.
        write_s: For writing its scores under one query.
        base_s: For its rows through the base model.
        way_s: Way -> seconds for its rows through base and all counterparts, of ways that were tried.
        way: How scores are made.
        why: Why so, for people.
        held: How counterparts lie in an actor's memory, for people.
    """

    tune_once_s: float
    tune_query_s: float
    rows: int
    read_s: float
    write_s: float
    base_s: float
    way_s: Mapping[Way, float]
    way: Way
    why: str
    held: str


@dataclass(frozen=True)
class Workers:
    """Who is to do it.

    Args:
        tuners: Workers of stage tune.
        together: Whether they make every counterpart together, instead of sharing out queries.
        actors: Actors of stage score.
        assumed: Whether the spec leaves their number to the cluster, so that it was taken from this machine.
        tune_unit: What is paid for in stage tune: `CPU` or `GPU`.
        tune_units: How many of them a worker has.
        score_unit: What is paid for in stage score.
        score_units: How many of them an actor has.
    """

    tuners: int
    together: bool
    actors: int
    assumed: bool
    tune_unit: str
    tune_units: float
    score_unit: str
    score_units: float


@dataclass(frozen=True)
class Forecast:
    """What a whole run will take, without the start of Ray and of workers.

    Args:
        fingerprint: Of the run.
        rows: Training examples.
        tune_once_s: As measured.
        tune_query_s: Likewise.
        tune_s: Seconds of stage tune, of all members.
        score_s: Seconds of stage score, likewise.
        work_s: Way -> seconds that one actor would need for the corpus, of ways that were tried, likewise.
        way: How scores are made.
        why: Why so, for people.
        held: How counterparts lie in an actor's memory, for people.
        workers: Who is to do it.
        compiling: What compiling would do; null if it was not tried.
    """

    fingerprint: str
    rows: int
    tune_once_s: float
    tune_query_s: float
    tune_s: float
    score_s: float
    work_s: Mapping[Way, float]
    way: Way
    why: str
    held: str
    workers: Workers
    compiling: Compiling | None = None

    @property
    def tune_cost_s(self) -> float:
        """CPU- or GPU-seconds of stage tune."""
        return self.tune_s * self.workers.tuners * self.workers.tune_units

    @property
    def score_cost_s(self) -> float:
        """CPU- or GPU-seconds of stage score."""
        return self.work_s[self.way] * self.workers.score_units

    @property
    def million_s(self) -> float:
        """CPU- or GPU-seconds of stage score for a million examples under all queries."""
        return self.score_cost_s * MILLION / self.rows


def forecast(fingerprint: str, plan: Plan, timing: Timing, workers: Workers) -> Forecast:
    """What follows from what was measured.

    Args:
        fingerprint: Of the run.
        plan: Its figures.
        timing: What was measured.
        workers: Who is to do it: no more actors than shards.
    """
    if workers.together:
        tune_s = (timing.tune_once_s + timing.tune_query_s * plan.queries) / workers.tuners
    else:
        tune_s = timing.tune_once_s + timing.tune_query_s * math.ceil(plan.queries / workers.tuners)
    shards = plan.members * plan.rows / timing.rows
    work_s = {way: shards * _shard_s(way, plan, timing, workers) for way in timing.way_s}
    return Forecast(
        fingerprint=fingerprint,
        rows=plan.rows,
        tune_once_s=timing.tune_once_s,
        tune_query_s=timing.tune_query_s,
        tune_s=plan.members * tune_s,
        score_s=work_s[timing.way] * math.ceil(plan.shards / workers.actors) / plan.shards,
        work_s=work_s,
        way=timing.way,
        why=timing.why,
        held=timing.held,
        workers=workers,
    )


def _shard_s(way: Way, plan: Plan, timing: Timing, workers: Workers) -> float:
    """Seconds of one actor for the shard that was looked at: a GPU computes while it reads and writes, a CPU has to do both."""
    kept_s = timing.base_s * plan.kept / (plan.members * plan.rows) if way == "difference" else 0.0
    compute_s = timing.way_s[way] - kept_s
    around_s = timing.read_s + timing.write_s * plan.queries
    return max(compute_s, around_s) if workers.score_unit == "GPU" else compute_s + around_s


def lines(found: Forecast) -> dict[str, str]:
    """What was predicted, for people: name of a line -> the line."""
    workers = found.workers
    tuners = _tuners(workers) + (", if they share it without loss" if workers.together and workers.tuners > 1 else "")
    once = f"{spoken(found.tune_once_s)} once and {spoken(found.tune_query_s)} a query, of one worker"
    others = ", ".join(f"{way} {spoken(seconds)}" for way, seconds in found.work_s.items())
    costs = {workers.tune_unit: found.tune_cost_s}
    costs[workers.score_unit] = costs.get(workers.score_unit, 0.0) + found.score_cost_s
    whole = " and ".join(spoken(seconds, unit) for unit, seconds in costs.items())
    return {
        "predicted tune": f"{spoken(found.tune_s)} on {tuners}: {once}",
        "predicted score": f"{spoken(found.score_s)} on {_actors(workers)}"
        + (", as many as this machine has room for" if workers.assumed else ""),
        "predicted cost": f"{spoken(found.million_s, workers.score_unit)} per million examples under all queries; "
        f"{whole} for the run, tuning included",
        "way of scoring": f"{found.way}: {found.why}; one actor would need: {others}",
        "counterparts": found.held,
        **({"torch.compile": _compiling(found.compiling)} if found.compiling else {}),
        "not counted": "start of Ray and of workers, compiling, a far store's delays, actors in each other's way",
    }


def _compiling(found: Compiling) -> str:
    pays = "score.compile: true would pay" if found.saved_s > found.first_s else "score.compile: true would not pay"
    saves = f"saves {spoken(found.saved_s)}" if found.saved_s > 0 else "saves nothing"
    return f"{pays}: batches are {found.times:.2f} times as fast, which {saves}, after {spoken(found.first_s)} for the first"


def _tuners(workers: Workers) -> str:
    return f"{workers.tuners} workers x {workers.tune_units:g} {workers.tune_unit}"


def _actors(workers: Workers) -> str:
    return f"{workers.actors} actors x {workers.score_units:g} {workers.score_unit}"


def keep(run: Run, found: Forecast) -> None:
    """Leave it where `kept` finds it. Raises StorageError."""
    run.write_json(asdict(found), NAME)


def kept(run: Run) -> Forecast | None:
    """What was predicted of this very run; null if nothing was, or not of what it is now. Raises ArtifactError: it is damaged."""
    try:
        tree = run.read_json(NAME)
    except InputError:
        return None
    except ArtifactError as error:
        raise ArtifactError(error.message, "delete it; `mirrorscope plan SPEC --calibrate` predicts again") from error
    found: Forecast = _forecasts().validate_python(tree)
    return found if found.fingerprint == run.additions[-1].fingerprint else None


@cache
def _forecasts() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(Forecast)


class Span(NamedTuple):
    """When a shard was worked on, Unix time, and how many rows it has."""

    started_at_s: float
    finished_at_s: float
    rows: int


def span_of(receipt: Receipt) -> Span:
    """Of a commit."""
    return Span(receipt.started_at_s, receipt.finished_at_s, receipt.rows + receipt.rejects)


def busy_s(spans: Iterable[Span]) -> float:
    """Seconds in which at least one shard was worked on: a pause between two starts does not count."""
    busy, until_s = 0.0, 0.0
    for span in sorted(spans):
        busy += max(0.0, span.finished_at_s - max(span.started_at_s, until_s))
        until_s = max(until_s, span.finished_at_s)
    return busy


def tuning(run: Run, found: Forecast | None) -> str:
    """How long stage tune took, against what was predicted, for people; empty without a prediction."""
    if found is None:
        return ""
    seconds = sum(sum(_tuned_s(each)) for each in members_of(run) or (run,))
    took_s = seconds if found.workers.together else seconds / found.workers.tuners
    is_done = len(run.committed_queries()) == len(run.query_ids)
    return _against(took_s, found.tune_s, _tuners(found.workers), 0.0 if is_done else None)


def _tuned_s(run: Run) -> list[float]:
    metas = parallel(run.counterpart_meta, sorted(run.committed_queries()))
    return [float(meta["seconds"]) for meta in metas]


def scoring(run: Run, found: Forecast | None, spans: Sequence[Span]) -> str:
    """How long stage score took or will still take, against what was predicted, for people; empty if there is nothing to say.

    Args:
        run: The run; of an ensemble its members' commits are read.
        found: What was predicted.
        spans: The run's commits.
    """
    of_each, total = [spans], run.rows_to_score
    if members := members_of(run):
        of_each = [[span_of(receipt) for receipt in member.receipts()] for member in members]
        total *= number_of_members(run)
    took_s, passed = sum(map(busy_s, of_each)), sum(span.rows for some in of_each for span in some)
    left_s = took_s * (total - passed) / passed if passed else None
    if found is not None:
        return _against(took_s, found.score_s, _actors(found.workers), left_s)
    return f"about {spoken(left_s)} left" if left_s else ""


def _against(took_s: float, predicted_s: float, by: str, left_s: float | None) -> str:
    """Measured against predicted; `left_s` is null where nobody knows, 0 at the end."""
    predicted = f"predicted {spoken(predicted_s)} on {by}"
    if left_s == 0:
        return f"took {spoken(took_s)}, {predicted}"
    if not took_s:
        return predicted
    return f"{spoken(took_s)} so far{f', about {spoken(left_s)} left' if left_s else ''}; {predicted} in all"
