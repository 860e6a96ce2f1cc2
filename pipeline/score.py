"""Stage 2: losses of every training example under the base model and all counterparts.

Reads: run.yaml, manifest.parquet, counterparts/, corpus files.
Writes: per shard scores/query_id=Q/, rejects/, partials/; then commits/shard-NNNNNN.json, last.
Resumes: committed shards are skipped; a shard that is done twice writes the same bytes twice.
Next: rank.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from . import topk
from .artifacts import Run, open_run, partition
from .cluster import Watchdog, bounded_retries, errors_of, require, room
from .corpus import Corpus, Examples
from .errors import ArtifactError
from .extensions import load_model, load_task
from .importing import user_code
from .observe import Progress
from .records import REJECTS, SCORES, Receipt, Reject, Shard

if TYPE_CHECKING:
    from .engine import Losses

SHARDS_AHEAD = 2
"""Calls that run in one actor at a time: one reads, decodes and writes while the other holds the engine."""


def score(run: Run) -> None:
    """Score the shards that are not committed yet.

    Raises:
        InputError: More rows were rejected than the spec allows, or a corpus file changed; what is done is committed.
        ContractError: The model or task failed.
        ClusterError: Resources are missing, or an actor died more often than the spec allows.
    """
    done = run.committed_ids()
    pending = [shard for shard in run.shards if shard.shard_id not in done]
    rejected = sum(receipt.rejects for receipt in run.receipts()) if done else 0
    run.require_few_rejects(rejected)
    if not pending:
        return
    watchdog = Watchdog("score")
    progress = Progress("score", len(run.shards), "shards", done=len(done))
    with errors_of("score"), watchdog.watching(), progress:
        for row in _receipts(run, pending):
            watchdog.feed()
            progress.advance(row["rows"])
            rejected += row["rejects"]
            run.require_few_rejects(rejected)


def _receipts(run: Run, pending: list[Shard]) -> Iterator[dict[str, Any]]:
    """Rows {shard_id, rows, rejects} of shards as they are committed, in any order."""
    import ray.data
    from ray.data import ActorPoolStrategy

    resources = run.spec.resources.score
    if resources.actors is None:
        actors = min(room(resources.cpus, resources.gpus, "resources.score"), len(pending))
    else:
        actors = min(resources.actors, len(pending))
        require(actors, resources.cpus, resources.gpus, "resources.score")
    # A shard is known by its id alone: actors read the rest from the manifest.
    shards = ray.data.from_items([{"shard_id": shard.shard_id} for shard in pending], override_num_blocks=len(pending))
    with bounded_retries(resources.max_failures):
        scored = shards.map_batches(
            ScoreShard,
            fn_constructor_kwargs={"run_uri": run.uri()},
            batch_size=1,
            compute=ActorPoolStrategy(
                size=actors,
                max_tasks_in_flight_per_actor=2 * SHARDS_AHEAD,
                max_concurrent_calls_per_actor=SHARDS_AHEAD,
                enable_true_multi_threading=True,
            ),
            num_cpus=resources.cpus,
            num_gpus=resources.gpus or None,
            max_restarts=resources.max_failures,
            max_task_retries=resources.max_failures,
        )
    return iter(scored.iter_rows())


class ScoreShard:
    """The Ray Data actor: a ShardScorer behind the shape that `map_batches` calls."""

    def __init__(self, run_uri: str) -> None:
        import torch

        run = open_run(run_uri)
        torch.set_num_threads(max(1, int(run.spec.resources.score.cpus)))
        self._scorer = ShardScorer(run, "cuda" if run.spec.resources.score.gpus else "cpu")
        self._shards = run.shards

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[int]]:
        """Score a batch of shard ids; one small receipt row each."""
        receipts = [self._scorer.score(self._shards[shard_id]) for shard_id in batch["shard_id"]]
        return {name: [getattr(receipt, name) for receipt in receipts] for name in ("shard_id", "rows", "rejects")}


class ShardScorer:
    """Scores shards of one run; what an actor does, without Ray. Safe to call from several threads.

    Args:
        run: The frozen run, all counterparts committed.
        device: torch device.

    Raises:
        ArtifactError: A counterpart is missing, damaged or does not fit the model.
        SpecError, InputError, ContractError: Model or task cannot be made.
    """

    def __init__(self, run: Run, device: str) -> None:
        import safetensors.torch

        from .engine import LossEngine

        committed = run.committed_queries()
        if missing := [query_id for query_id in run.query_ids if query_id not in committed]:
            raise ArtifactError(
                f"{len(missing)} counterparts are not made yet, first {missing[0]!r}", "run stage tune first"
            )
        self._run = run
        self._corpus = Corpus(run.spec.corpus)
        self._direction_Q = np.array([run.counterpart_meta(query_id)["direction"] for query_id in run.query_ids])
        tensors = [safetensors.torch.load(run.counterpart_tensors(query_id)) for query_id in run.query_ids]
        model = load_model(run.spec.model, device, run.spec.seed)
        try:
            self._engine = LossEngine(model, load_task(run.spec.task), tensors)
        except (KeyError, ValueError) as error:
            raise ArtifactError(
                f"a counterpart in {run.uri('counterparts')} does not fit the model: {error}"
            ) from error
        self._computing = threading.Lock()

    def score(self, shard: Shard) -> Receipt:
        """Read, score, write and commit one shard.

        Raises:
            InputError: The corpus file changed or cannot be read.
            ContractError: The model or task failed.
            StorageError: The store refused.
        """
        started_at_s = time.time()
        examples = self._corpus.read(shard, self._run.columns)
        with self._computing:
            computing_s = time.monotonic()
            losses = self._losses(shard, examples)
            compute_s = time.monotonic() - computing_s
        examples, losses = _only_finite(examples, losses, self._run.query_ids)
        files = self._write(shard, examples, losses)
        rank = self._run.spec.rank
        receipt = Receipt(
            shard_id=shard.shard_id,
            fingerprint=self._run.resolved.fingerprint,
            rows=len(examples.row_N),
            rejects=len(examples.rejects),
            files=files,
            started_at_s=started_at_s,
            finished_at_s=time.time(),
            compute_s=compute_s,
            k=rank.k,
            transform=topk.transform_name(rank.transform, rank.eps),
        )
        self._run.commit_shard(receipt)
        return receipt

    def _losses(self, shard: Shard, examples: Examples) -> Losses:
        with user_code(f"task {self._run.spec.task.implementation} on {shard.path} from row {shard.row_start}"):
            return self._engine.losses(examples.arrays, self._run.spec.score.batch_rows)

    def _write(self, shard: Shard, examples: Examples, losses: Losses) -> dict[str, dict[str, Any]]:
        """Write everything of a shard but its commit; relative path -> size and digest."""
        rank, name = self._run.spec.rank, f"{shard.name}.parquet"
        tables: dict[str, pa.Table] = {}
        tops, sums = [], []
        for q, query_id in enumerate(self._run.query_ids):
            scores = self._scores(shard, examples, losses, q)
            tables[f"scores/{partition(query_id)}/{name}"] = scores
            valued = topk.with_value(scores, rank.transform, rank.eps)
            tops.append(topk.partial_topk(valued, rank.k, rank.transform))
            if self._run.spec.corpus.source is not None:
                sums.append(topk.source_sums(valued))
        tables[f"partials/topk/{name}"] = pa.concat_tables(tops)
        if sums:
            tables[f"partials/sources/{name}"] = pa.concat_tables(sums)
        if examples.rejects:
            tables[f"rejects/{name}"] = _rejects_table(shard, examples.rejects)
        return {path: self._run.write_table(table, path) for path, table in tables.items()}

    def _scores(self, shard: Shard, examples: Examples, losses: Losses, q: int) -> pa.Table:
        """Scores of one query, as SCORES; the difference is taken in float64 and rounded last."""
        rows = len(examples.row_N)
        difference_N = losses.counterpart_QN[q].astype(np.float64) - losses.base_N.astype(np.float64)
        columns = {
            "example_id": examples.example_id_N,
            "source": examples.source_N,
            "query_id": pa.array([self._run.query_ids[q]] * rows, pa.string()),
            "base_loss": losses.base_N.astype(np.float32),
            "counterpart_loss": losses.counterpart_QN[q].astype(np.float32),
            "score": (self._direction_Q[q] * difference_N + 0.0).astype(np.float32),  # + 0.0: no negative zero
            "shard_id": np.full(rows, shard.shard_id, np.int32),
            "row": examples.row_N,
        }
        return pa.table(columns).cast(SCORES)


def _only_finite(examples: Examples, losses: Losses, query_ids: tuple[str, ...]) -> tuple[Examples, Losses]:
    """Move rows with a loss that is not finite, under any model, to the rejects."""
    names = ["base_loss", *(f"counterpart_loss of query {query_id}" for query_id in query_ids)]
    losses_MN = np.vstack([losses.base_N, losses.counterpart_QN])
    finite_MN = np.isfinite(losses_MN)
    good_N = finite_MN.all(axis=0)
    if good_N.all():
        return examples, losses
    rejects = []
    for i in np.flatnonzero(~good_N):
        m = int(np.argmin(finite_MN[:, i]))
        got, example_id = str(losses_MN[m, i]), examples.example_id_N[int(i)].as_py()
        rejects.append(Reject(int(examples.row_N[i]), names[m], got, "a finite loss", example_id))
    kept = Examples(
        example_id_N=examples.example_id_N.filter(pa.array(good_N)),
        source_N=examples.source_N.filter(pa.array(good_N)),
        row_N=examples.row_N[good_N],
        arrays={},
        rejects=sorted([*examples.rejects, *rejects], key=lambda reject: reject.row),
    )
    return kept, type(losses)(losses.base_N[good_N], losses.counterpart_QN[:, good_N])


def _rejects_table(shard: Shard, rejects: list[Reject]) -> pa.Table:
    rows = [{"shard_id": shard.shard_id, "path": shard.path, **asdict(reject)} for reject in rejects]
    return pa.Table.from_pylist(rows, schema=REJECTS)
