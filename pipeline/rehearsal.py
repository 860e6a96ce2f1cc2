"""What a run does, done with a few queries and batches in a folder that goes away, to know how long it takes. Without Ray.

Reads: the corpus, query files, the base model's weights. Writes: nothing in the run's folder.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from . import memory, noise
from .artifacts import CALIBRATION, Run
from .batches import Batch
from .calibration import LOOKED_AT, MANY, Calibration, Way, calibrate
from .corpus import Corpus, Examples
from .digests import as_frozen
from .ensemble import member_spec
from .errors import InputError, SpecError
from .extensions import load_model, load_task, prepared
from .forecast import Compiling, Forecast, Timing, Workers, forecast
from .importing import user_code
from .observe import say, spoken
from .plan import Plan
from .shards import ShardWriter, score_table
from .tuner import Tuner
from .works import Work

if TYPE_CHECKING:
    from .batches import Inputs
    from .engine import LossEngine

MEASURED_S = 5.0
"""Seconds after which no further batch is measured."""
FURTHER = 2
"""Queries that are tuned after the first, to know what each costs."""
LONG_S = 60.0
"""Seconds of stage score from which on it is tried whether compiling saves some."""
TRIED_SHARDS = 8
"""Shards from the first on that are tried for rows to measure with."""
_Found = TypeVar("_Found")


def rehearse(run: Run, plan: Plan) -> Forecast:
    """Tune up to three queries, score some batches, and foresee the rest.

    Args:
        run: As surveyed, begun or not; of an ensemble the first member is measured.
        plan: Its figures.

    Raises:
        SpecError: Workers share the model: one process cannot stand for them.
        InputError: No row of the first shards can be scored.
        ContractError, NumericsError: A query, model, task or producer does not fit.
    """
    import torch

    tune, score = run.spec.resources.tune, run.spec.resources.score
    if tune.shard:
        raise SpecError(
            "plan --calibrate: with resources.tune.shard workers share a model that this process may not hold",
            "plan without it; while the run lasts, `mirrorscope status` says how long the rest will take",
        )
    there = torch.cuda.device_count()
    tune_unit, score_unit = ("GPU" if section.gpus and there else "CPU" for section in (tune, score))
    if (tune.gpus or score.gpus) and not there:
        say("warning: the spec asks for GPUs and there is none here: measured, and counted, on CPUs")
    with TemporaryDirectory(prefix="mirrorscope-") as folder:
        trial = _Trial(_beside(run, folder))
        tuning_cpus = tune.cpus or float(1 if tune.workers > 1 else os.cpu_count() or 1)
        with _threads(tuning_cpus):
            once_s, query_s, together = trial.tune(_device(tune_unit))
        room = there // score.gpus if score_unit == "GPU" else (os.cpu_count() or 1) // score.cpus
        workers = Workers(
            tuners=tune.workers if together else min(tune.workers, plan.queries),
            together=together,
            actors=min(score.actors or max(1, int(room)), plan.shards),
            assumed=score.actors is None,
            tune_unit=tune_unit,
            tune_units=tune.gpus if tune_unit == "GPU" else tuning_cpus,
            score_unit=score_unit,
            score_units=score.gpus if score_unit == "GPU" else score.cpus,
        )
        with _threads(score.cpus):
            timing = trial.score(_device(score_unit), _given_way(run), once_s, query_s)
            found = forecast(run.additions[-1].fingerprint, plan, timing, workers)
            if found.way == "difference" and not run.spec.score.compile and found.score_s > LONG_S:
                found = replace(found, compiling=trial.compiling(_device(score_unit), found, plan, timing))
    return found


def _device(unit: str) -> str:
    return "cuda" if unit == "GPU" else "cpu"


def _given_way(run: Run) -> Way | None:
    """How scores are made, if the spec says it or the run has begun; null if that is to be found out."""
    return run.way if run.spec.score.way != "auto" or run.measured(CALIBRATION) or run.committed() else None


def _beside(run: Run, folder: str) -> Run:
    """The run, or its first member, in another folder, with nothing that others read."""
    spec = member_spec(run.spec, 0) if run.spec.ensemble else run.spec
    update = {
        "run": spec.run.model_copy(update={"uri": folder}),
        "score": spec.score.model_copy(update={"base_losses": None}),
        "resolved": run.resolved,
    }
    return Run(spec.model_copy(update=update), run.shards, run.columns, run.queries, run.additions)


@dataclass(frozen=True)
class _Trial:
    """A run in a folder that goes away."""

    run: Run

    @property
    def _tuned(self) -> tuple[str, ...]:
        """Queries that are tuned."""
        return self.run.query_ids[: 1 + FURTHER]

    def tune(self, device: str) -> tuple[float, float, bool]:
        """Seconds for what serves all queries, and for each; whether workers make them together."""
        say(f"tuning {len(self._tuned)} of {len(self.run.query_ids):,} queries, to know how long it takes")
        tuner = Tuner(self.run, device)

        def made_s(query_ids: tuple[str, ...]) -> float:
            failures, seconds = _timed(lambda: tuner.tune_all(query_ids))
            for failure in failures:
                raise failure
            return seconds

        first_s, further = made_s(self._tuned[:1]), self._tuned[1:]
        query_s = min(first_s, made_s(further) / len(further)) if further else first_s
        return first_s - query_s, query_s, tuner.is_together

    def score(self, device: str, given: Way | None, once_s: float, query_s: float) -> Timing:
        """What an actor takes for a shard."""
        run, section = self.run, self.run.spec.score
        work, (examples, inputs), read_s = self._shard
        (engine, room_bytes), queries = self._engine(device, section.compile), len(run.query_ids)
        with self._about(work):
            batches = self._batches(engine, inputs)
        say(f"scoring batches of {work.shard.path} under {queries:,} queries, for about {spoken(MEASURED_S)}")
        with self._about(work):
            found = calibrate(engine, batches[0], queries) if given is None and queries >= MANY else None
            way = given or (found.way if found else "difference")
            base_s, compute_s = _passes(engine, batches, queries, way)
        return Timing(
            tune_once_s=once_s,
            tune_query_s=query_s,
            rows=work.shard.rows,
            read_s=read_s,
            write_s=self._write_s(work, examples),
            base_s=base_s,
            way_s=_each_way(way, compute_s, found),
            way=way,
            why=_why(given, found),
            held=memory.told(engine.groups, engine.steps_bytes, room_bytes),
        )

    def compiling(self, device: str, plain: Forecast, plan: Plan, timing: Timing) -> Compiling | None:
        """What compiling would do; null if the model does not bear it, which is said.

        Args:
            device: Of an actor.
            plain: What is predicted without.
            plan: The run's figures.
            timing: What was measured without.
        """
        work, (_, inputs), _ = self._shard
        engine = self._engine(device, compile=True)[0]
        with self._about(work):
            batches = self._batches(engine, inputs)
        say(f"scoring some compiled, and as they are, for about {spoken(2 * MEASURED_S)}")
        with self._about(work):
            first_s = _timed(lambda: engine.losses(batches[:1], [0]))[1]
            times = _times(engine, batches)
        if times is None:
            return None
        compute_s = timing.way_s["difference"] / times
        there = replace(timing, base_s=timing.base_s / times, way_s={"difference": compute_s})
        # Base losses that are kept are those of the model as it is.
        with_it = forecast(plain.fingerprint, replace(plan, kept=0), there, plain.workers)
        return Compiling(plan.members * first_s, times, plain.score_s - with_it.score_s)

    def _batches(self, engine: LossEngine, inputs: Inputs) -> list[Batch]:
        """Of the shard, as an actor makes them. Raises ContractError: losses are not those of single rows."""
        from .model_check import ModelCheck

        section = self.run.spec.score
        check = ModelCheck(engine.model, load_task(self.run.spec.task))
        return list(check.batches(inputs, section.batch_rows, section.batch_tokens))

    @cached_property
    def _shard(self) -> tuple[Work, tuple[Examples, Inputs], float]:
        """The first shard that can be read, what is in it, and the seconds that this took."""
        run, corpus = self.run, Corpus(self.run.spec.corpus)
        with as_frozen(run):
            task = load_task(run.spec.task)

        def read(work: Work) -> tuple[Examples, Inputs]:
            examples = corpus.read(work.shard, run.columns)
            with self._about(work):
                inputs = prepared(task, examples.arrays)
            examples = examples.without({i: ("", got, "") for i, got in inputs.bad.items()})
            return replace(examples, arrays={}, num_tokens_N=inputs.num_tokens_N), inputs

        for work in islice(run.works(), TRIED_SHARDS):
            try:
                found, read_s = _timed(lambda: read(work))  # noqa: B023  done before the next
            except InputError:
                continue
            if found[1].items:
                return work, found, read_s
        raise InputError(
            f"{run.spec.corpus.uri}: the first {TRIED_SHARDS} shards have no row that can be scored",
            "is task right for this corpus?",
        )

    def _about(self, work: Work) -> AbstractContextManager[None]:
        """Around what a task does with a shard."""
        return user_code(f"task {self.run.spec.task.implementation} on {work.shard.path}")

    def _engine(self, device: str, compile: bool) -> tuple[LossEngine, int]:
        """Base and counterparts, and the room for these: those that were tuned stand for all others, and lie in memory once."""
        import torch

        from .blocks import compiled
        from .changes import from_bytes
        from .engine import LossEngine

        run, there, section = self.run, torch.empty(0, device=device), self.run.spec.resources.score
        with as_frozen(run):
            model, task = load_model(run.spec.model, device, run.spec.seed), load_task(run.spec.task)
        room_bytes = memory.room_bytes(there.device, section.cpus, section.gpus, section.counterparts_gib)
        tuned = [from_bytes(run.counterpart_tensors(query_id)) for query_id in self._tuned]
        changes = [{name: change.to(there) for name, change in found.items()} for found in tuned]
        queries = len(run.query_ids)
        counterparts = [changes[q % len(changes)] for q in range(queries)]
        return LossEngine(model, task, counterparts, room_bytes, compiled(model, task) if compile else None), room_bytes

    def _write_s(self, work: Work, examples: Examples) -> float:
        """Seconds for writing the scores of a shard under one query, to a local disk."""
        query_id = self.run.query_ids[0]
        one = replace(work, query_ids=(query_id,))
        writer = ShardWriter(self.run, {})

        def write() -> None:
            loss_N = np.random.default_rng(0).normal(size=len(examples.row_N))
            writer.write(one, [score_table(one, query_id, examples, loss_N, loss_N, loss_N)], [])

        return min(_timed(write)[1] for _ in range(2))


def _passes(engine: LossEngine, batches: Sequence[Batch], queries: int, way: Way) -> tuple[float, float]:
    """Seconds for all batches: under the base, and under base and all counterparts. Of as many as there is time for, at random.

    Where every counterpart has a pass of its own, some stand for all.
    """
    looked = None if way == "gradient" else noise.spread(queries, LOOKED_AT).tolist()

    def scored(batch: Batch) -> object:
        return engine.losses([batch], looked) if way == "difference" else engine.derivatives([batch], looked, way)

    scored(batches[0])  # the first time layouts and layers are looked at
    bases_s, wholes_s, until_s = list[float](), list[float](), time.perf_counter() + MEASURED_S
    for position in np.random.default_rng(0).permutation(len(batches)):
        batch = batches[position]
        if engine.is_compiled:
            scored(batch)  # a shape may be new, and is compiled
        base_s = _timed(lambda: engine.losses([batch], []))[1]  # noqa: B023  done before the next
        whole_s = _timed(lambda: scored(batch))[1]  # noqa: B023
        if looked is not None:
            whole_s = base_s + max(0.0, whole_s - base_s) * queries / len(looked)
        bases_s.append(base_s)
        wholes_s.append(whole_s)
        if time.perf_counter() > until_s:
            break
    return len(batches) * float(np.mean(bases_s)), len(batches) * float(np.mean(wholes_s))


def _times(engine: LossEngine, batches: Sequence[Batch]) -> float | None:
    """How many times as fast batches are compiled, the median of pairs; null if the model does not bear it."""
    blocks, pairs, until_s = engine.compiled, list[float](), time.perf_counter() + 2 * MEASURED_S
    for position in np.random.default_rng(0).permutation(len(batches)):
        if blocks is None or time.perf_counter() > until_s:
            break
        batch, seconds = [batches[position]], list[float]()
        for blocks.is_on in (False, True):
            engine.losses(batch, [0])  # a shape may be new, and is compiled
            seconds.append(min(_timed(lambda: engine.losses(batch, [0]))[1] for _ in range(2)))  # noqa: B023  done before the next
        pairs.append(seconds[0] / seconds[1])
    return float(np.median(pairs)) if engine.compiled is not None else None


def _each_way(way: Way, compute_s: float, found: Calibration | None) -> dict[Way, float]:
    """Seconds by the way that is taken, and by the other in proportion to the batch that both were tried on."""
    if found is None or found.gradient_s is None:
        return {way: compute_s}
    share = compute_s / (found.gradient_s if way == "gradient" else found.difference_s)
    return {"difference": share * found.difference_s, "gradient": share * found.gradient_s}


def _why(given: Way | None, found: Calibration | None) -> str:
    if found is not None:
        return found.why
    return "as the spec says, or the run was begun" if given else f"with fewer than {MANY} queries no other is tried"


def _timed(work: Callable[[], _Found]) -> tuple[_Found, float]:
    started_s = time.perf_counter()
    found = work()
    return found, time.perf_counter() - started_s


@contextmanager
def _threads(cpus: float) -> Iterator[None]:
    """Torch with as many threads as a worker has, for the time of the block."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(max(1, int(cpus)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
