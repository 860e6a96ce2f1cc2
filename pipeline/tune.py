"""Stage 1: one counterpart per query, by one Ray Train run for all of them.

Reads: run.yaml, queries.parquet, the base model's weights.
Writes: counterparts/query_id=Q/changed-DIGEST.safetensors (only tensors that changed), then meta.json, which commits it.
Resumes: a committed query is skipped; a restarted worker group goes on with those that are left.
Next: score.
"""

from __future__ import annotations

import hashlib
import math
import time
import uuid
from typing import TYPE_CHECKING, Any

from .artifacts import Run
from .cluster import Watchdog, errors_of, require
from .errors import ContractError, NumericsError, PipelineError
from .extensions import load_model, load_producer, load_task
from .frozen import open_run
from .importing import user_code
from .observe import Progress, every, say, unsent
from .queries import query_inputs
from .storage import data_filesystem, remove_folder

if TYPE_CHECKING:
    from torch import nn

    from .producers.base import Produced, Producer
    from .tasks.base import Batch, Task

POLL_S = 1.0
GATHER_TIMEOUT_S = 30 * 24 * 3600
"""Workers meet once, at their end; the fastest waits for the slowest."""
_Outcome = tuple[list[PipelineError], list[str]]
"""What a worker hands home: queries that it could not tune, and its notices."""
SCRATCH = ".train"
"""Folder in the run that Ray Train wants for itself, with a name of its own per start; gone when the stage ends."""


def tune(run: Run) -> None:
    """Make the counterparts that are not committed yet.

    Raises:
        ContractError, NumericsError: A query, model or producer does not fit; other queries stay committed.
        ClusterError: Resources are missing, or workers died more often than the spec allows.
    """
    done = run.committed_queries()
    pending = [query_id for query_id in run.query_ids if query_id not in done]
    if not pending:
        return
    resources = run.spec.resources.tune
    workers = resources.workers if resources.shard else min(resources.workers, len(pending))
    require(workers, resources.cpus, resources.gpus, "resources.tune")
    progress = Progress("tune", len(run.query_ids), "queries", done=len(done))
    watchdog = Watchdog("tune")

    def look() -> None:
        made = len(run.committed_queries())
        if made != progress.done:
            watchdog.feed()
        progress.at(made)

    with progress, every(POLL_S, look), watchdog.watching(), errors_of("tune"):
        failures = _fit(run, workers, pending)
    if len(failures) > 1:
        say(f"{len(failures)} queries or workers failed, the first with this error; the other queries are committed")
    if failures:
        raise failures[0]


def _fit(run: Run, workers: int, pending: list[str]) -> list[PipelineError]:
    """Run the workers to their end; what they could not do."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    resources, scratch = run.spec.resources.tune, f"{SCRATCH}-{uuid.uuid4().hex}"
    filesystem, path = data_filesystem(run.uri())
    backend = "cpu:gloo,cuda:nccl" if resources.shard and resources.gpus else "gloo"
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"run_uri": run.uri(), "pending": pending},
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=resources.gpus > 0,
            resources_per_worker={"CPU": resources.cpus, **({"GPU": resources.gpus} if resources.gpus else {})},
        ),
        run_config=RunConfig(
            name=scratch,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=resources.max_failures),
        ),
        torch_config=TorchConfig(backend=backend, timeout_s=GATHER_TIMEOUT_S),
    )
    try:
        outcomes: list[_Outcome] = trainer.fit().return_value
    finally:
        remove_folder(run.uri(scratch))
    for notice in (notice for _, notices in outcomes for notice in notices):
        say(notice)
    return [failure for failures, _ in outcomes for failure in failures]


def _worker(config: dict[str, Any]) -> list[_Outcome]:
    """One Ray Train worker: every world_size-th pending query. Errors that a retry cannot mend are handed home."""
    import ray.train
    import torch
    import torch.distributed as dist

    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    failures: list[PipelineError] = []
    try:
        run = open_run(config["run_uri"])
        torch.set_num_threads(max(1, int(run.spec.resources.tune.cpus)))
        device = "cuda" if run.spec.resources.tune.gpus else "cpu"
        tuner = Tuner(run, device)
        done = run.committed_queries()
        mine = slice(None) if run.spec.resources.tune.shard else slice(rank, None, world_size)
        for query_id in config["pending"][mine]:
            if query_id not in done:
                failures += _failure(tuner, query_id)
    except PipelineError as error:
        failures += _unless_retryable(error)
    gathered: list[_Outcome] = [([], [])] * world_size
    dist.all_gather_object(gathered, (failures, unsent()))
    return gathered


def _failure(tuner: Tuner, query_id: str) -> list[PipelineError]:
    """Tune one query; what stands in its way, so that one bad query does not stop the others."""
    try:
        tuner.tune(query_id)
    except PipelineError as error:
        return _unless_retryable(error)
    return []


def _unless_retryable(error: PipelineError) -> list[PipelineError]:
    """An error to hand home, or raised on for Ray Train to start the workers again."""
    if error.retryable:
        raise error
    return [error]


class Tuner:
    """Makes counterparts of one run; what a worker does, without Ray.

    Args:
        run: The frozen run.
        device: torch device. With `resources.tune.shard`, in a group of workers, the base stays on the CPU.

    Raises:
        SpecError, InputError, ContractError: Model, task or producer cannot be made.
    """

    def __init__(self, run: Run, device: str) -> None:
        import torch.distributed as dist

        self._run = run
        self._task: Task = load_task(run.spec.task)
        self._producer: Producer = load_producer(run.spec.producer)
        self._shared = run.spec.resources.tune.shard and dist.is_initialized()
        self._base: nn.Module = load_model(run.spec.model, "cpu" if self._shared else device, run.spec.seed)
        self._base_versions = _tensor_versions(self._base)
        self._queries = query_inputs(run.queries, run.columns, self._task) if run.spec.queries else {}
        self._device = device

    def tune(self, query_id: str) -> None:
        """Make and commit the counterpart of one query.

        Raises:
            ContractError: Model, task or producer failed on it, or the base model was changed.
            NumericsError: The query's loss before or after is not finite, or steps moved nothing.
        """
        import torch

        from . import changes

        started_s = time.monotonic()
        query = self._batch(query_id)
        seed = query_seed(self._run.spec.seed, query_id)
        with user_code(f"query {query_id!r}: {self._run.spec.producer.implementation}"), torch.random.fork_rng():
            torch.manual_seed(seed)
            before = self._query_loss(self._base, query)
            produced = self._produce(query, seed)
            if produced is None:
                return
            after = self._query_loss(produced.model.eval(), query)
        changed = changes.between(self._base, produced.model, produced.factors)
        if (
            _tensor_versions(self._base) != self._base_versions
        ):  # by this query or an earlier one: all that follow are void
            raise ContractError(
                f"producer {self._run.spec.producer.implementation} changed the base model; it must tune a copy"
            )
        meta = {
            "producer": self._run.spec.producer.model_dump(mode="json"),
            "direction": self._producer.direction,
            "seed": seed,
            "query_rows": len(next(iter(query.values()), ())),
            "steps": produced.steps,
            "query_loss_before_nats": before,
            "query_loss_after_nats": after,
            "change_norm": math.sqrt(sum(norm**2 for _, norm in changed.values())),
            "changed": {name: list(change.shape) for name, (change, _) in changed.items()},
            "details": produced.details,
            "seconds": round(time.monotonic() - started_s, 3),
        }
        for when, loss in (("before", before), ("after", after)):
            if loss is not None and not math.isfinite(loss):
                raise NumericsError(
                    f"query {query_id!r}: its loss {when} tuning is {loss}",
                    "lower producer.lr or producer.steps"
                    if when == "after"
                    else "check the query's rows and the weights",
                )
        if produced.steps and not changed:
            raise NumericsError(
                f"query {query_id!r}: {produced.steps} steps moved no weight",
                "raise producer.lr, or use a finer model.dtype",
            )
        data = changes.to_bytes({name: change for name, (change, _) in changed.items()})
        self._run.commit_counterpart(query_id, data, meta)

    def _produce(self, query: Batch, seed: int) -> Produced | None:
        """The producer's counterpart; null at workers that only helped with one that all make together."""
        from .producers import sharding

        if not self._shared:
            return self._producer.produce(self._base, self._task, query, seed)
        there = {name: value.to(self._device) for name, value in query.items()}
        with sharding.over_workers(self._device):
            produced = self._producer.produce(self._base, self._task, there, seed)
            return produced if sharding.is_first() else None

    def _batch(self, query_id: str) -> Batch:
        import torch

        dtype = next((p.dtype for p in self._base.parameters() if p.is_floating_point()), torch.float32)
        arrays = self._queries[query_id].whole() if query_id in self._queries else {}
        device = "cpu" if self._shared else self._device
        tensors = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
        return {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}

    def _query_loss(self, model: nn.Module, query: Batch) -> float | None:
        """Mean loss of a query's rows; null without one."""
        import torch

        if not query:
            return None
        with torch.no_grad():
            return float(self._task.loss_B(model, query).double().mean())


def query_seed(seed: int, query_id: str) -> int:
    """Seed of one query, from the spec's seed and its id alone: the same on any worker, in any order."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{query_id}".encode()).digest()[:7], "big")


def _tensor_versions(model: nn.Module) -> list[int]:
    """The counts of in-place changes that torch keeps of every parameter and buffer."""
    return [tensor._version for tensor in model.state_dict(keep_vars=True).values()]
