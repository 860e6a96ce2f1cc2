"""Stage 1: one counterpart per query, by one Ray Train run for all of them.

Reads: run.yaml, queries.parquet, the base model's weights.
Writes: counterparts/query_id=Q/changed-DIGEST.safetensors (only tensors that changed), then meta.json, which commits it.
Resumes: a committed query is skipped; a restarted worker group goes on with those that are left.
Next: score.
"""

from __future__ import annotations

import uuid
from typing import Any

from . import phases
from .artifacts import Run
from .cluster import Watchdog, on_cluster, require, tuning_cpus
from .errors import PipelineError
from .extensions import is_joint, load_producer
from .frozen import open_run
from .observe import Progress, every, say, unsent
from .storage import data_filesystem, remove_folder
from .tuner import Tuner, unless_retryable

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
    scratch = f"{SCRATCH}-{uuid.uuid4().hex}"
    try:
        failures = on_cluster("tune", lambda: _tune(run, pending, scratch))
    finally:  # here, where a signal comes by
        remove_folder(run.uri(scratch))
        phases.forget(run.uri())
    if len(failures) > 1:
        say(f"{len(failures)} queries or workers failed, the first with this error; the other queries are committed")
    if failures:
        raise failures[0]


def _tune(run: Run, pending: list[str], scratch: str) -> list[PipelineError]:
    """Make the counterparts, with progress; what could not be made."""
    resources = run.spec.resources.tune
    together = resources.shard or is_joint(load_producer(run.spec.producer))
    workers = resources.workers if together else min(resources.workers, len(pending))
    cpus = tuning_cpus(resources)
    require(workers, cpus, resources.gpus, "resources.tune")
    progress = Progress("tune", len(run.query_ids), "queries", done=len(run.query_ids) - len(pending))
    watchdog, seen = Watchdog("tune"), dict[str, object]()

    def look() -> None:
        made, phase = len(run.committed_queries()), phases.of_run(run.uri())
        if (made, phase) != seen.get("last"):
            watchdog.feed()
        seen["last"] = made, phase
        progress.at_work = phase.line() if phase else ""
        progress.at(made)

    with progress, every(POLL_S, look), watchdog.watching():
        return _fit(run, workers, cpus, pending, scratch)


def _fit(run: Run, workers: int, cpus: float, pending: list[str], scratch: str) -> list[PipelineError]:
    """Run the workers to their end; what they could not do."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    resources = run.spec.resources.tune
    filesystem, path = data_filesystem(run.uri())
    backend = "cpu:gloo,cuda:nccl" if resources.shard and resources.gpus else "gloo"
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"run_uri": run.uri(), "pending": pending, "threads": max(1, int(cpus))},
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=resources.gpus > 0,
            resources_per_worker={"CPU": cpus, **({"GPU": resources.gpus} if resources.gpus else {})},
        ),
        run_config=RunConfig(
            name=scratch,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=resources.max_failures),
        ),
        torch_config=TorchConfig(backend=backend, timeout_s=GATHER_TIMEOUT_S),
    )
    outcomes: list[_Outcome] = trainer.fit().return_value
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
        torch.set_num_threads(config["threads"])
        device = "cuda" if run.spec.resources.tune.gpus else "cpu"
        tuner = Tuner(run, device)
        done = run.committed_queries()
        mine = slice(None) if tuner.is_together else slice(rank, None, world_size)
        with phases.Note(run.uri(), rank).taken():
            failures += tuner.tune_all([query_id for query_id in config["pending"][mine] if query_id not in done])
    except PipelineError as error:
        failures += unless_retryable(error)
    gathered: list[_Outcome] = [([], [])] * world_size
    dist.all_gather_object(gathered, (failures, unsent()))
    return gathered
