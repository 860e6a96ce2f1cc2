"""What an actor of stage score does with a shard, without Ray: read, score, write, commit."""

from __future__ import annotations

import threading
import time
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from . import storage, topk
from .artifacts import Run, counterparts_digest
from .corpus import Corpus, Examples
from .errors import ArtifactError, InputError
from .extensions import load_model, load_task, prepared
from .folder import parallel, partition
from .importing import user_code
from .records import REJECTS, SCORES, Reject, Shard, as_stored
from .works import Receipt, Work, Written, partial_name, rejects_path

if TYPE_CHECKING:
    from .batches import Inputs
    from .engine import Losses


class ShardScorer:
    """Scores shards of one run. Safe to call from several threads.

    Args:
        run: The frozen run.
        device: torch device.
        query_ids: Queries whose counterparts are held; null for all of them. They must be committed.

    Raises:
        ArtifactError: A counterpart is missing, damaged or does not fit the model.
        SpecError, InputError, ContractError: Model or task cannot be made.
    """

    def __init__(self, run: Run, device: str, query_ids: tuple[str, ...] | None = None) -> None:
        from .changes import from_bytes
        from .engine import LossEngine

        self._query_ids = run.query_ids if query_ids is None else query_ids
        committed = run.committed_queries()
        if missing := [query_id for query_id in self._query_ids if query_id not in committed]:
            raise ArtifactError(
                f"{len(missing)} counterparts are not made yet, first {missing[0]!r}", "run stage tune first"
            )
        self._run = run
        self._corpus = Corpus(run.spec.corpus)
        metas = {query_id: run.counterpart_meta(query_id) for query_id in self._query_ids}
        self._directions = {query_id: meta["direction"] for query_id, meta in metas.items()}
        self._tensors = {query_id: meta["tensors"]["sha256"] for query_id, meta in metas.items()}
        changes = [from_bytes(run.counterpart_tensors(query_id)) for query_id in self._query_ids]
        model = load_model(run.spec.model, device, run.spec.seed)
        self._task = load_task(run.spec.task)
        try:
            self._engine = LossEngine(model, self._task, changes)
        except (KeyError, ValueError) as error:
            raise ArtifactError(
                f"a counterpart in {run.uri('counterparts')} does not fit the model: {error}"
            ) from error
        self._computing = threading.Lock()

    def score(self, work: Work) -> Receipt:
        """Read, score, write and commit one shard; one that cannot be read is quarantined. The commit that then stands.

        Raises:
            ContractError: The model or task failed.
            StorageError: The store refused.
        """
        started_at_s = time.time()
        try:
            examples = self._corpus.read(work.shard, self._run.columns)
        except InputError as error:
            return self.quarantine(work, error.message)
        examples, inputs = self._prepared(work, examples)
        with self._computing:
            computing_s = time.monotonic()
            losses = self._losses(work, inputs)
            compute_s = time.monotonic() - computing_s
        standing = self._run.standing(work.addition, work.shard.shard_id)
        if standing is not None:  # somebody was faster: a slow attempt that was taken for dead leaves all as it is
            return standing
        examples, losses = _only_finite(examples, losses, work.query_ids)
        files = self._write(work, examples, losses)
        counts = {"rows": len(examples.row_N), "rejects": len(examples.rejects), "overlong": inputs.overlong}
        return self._commit(work, started_at_s, compute_s, counts, files)

    def quarantine(self, work: Work, reason: str) -> Receipt:
        """Quarantine a shard: all its rows go to rejects/ with the reason, and that is committed. The commit that then stands.

        Raises:
            StorageError: The store refused.
        """
        standing = self._run.standing(work.addition, work.shard.shard_id)
        if standing is not None:  # an attempt that was taken for dead made it after all
            return standing
        started_at_s, shard = time.time(), work.shard
        rows = range(shard.row_start, shard.row_start + shard.rows)
        rejects = [Reject(row, "shard", reason, "a shard that can be scored") for row in rows]
        path = rejects_path(work.name, quarantined=True)
        files = {path: self._run.write_table(_rejects_table(shard, rejects), path)}
        counts = {"rows": 0, "rejects": shard.rows}
        return self._commit(work, started_at_s, 0.0, counts, files, quarantined=reason)

    def _commit(
        self,
        work: Work,
        started_at_s: float,
        compute_s: float,
        counts: dict[str, int],
        files: dict[str, Written],
        quarantined: str | None = None,
    ) -> Receipt:
        rank = self._run.spec.rank
        receipt = Receipt(
            addition=work.addition,
            shard_id=work.shard.shard_id,
            fingerprint=self._run.additions[work.addition].fingerprint,
            **counts,
            files=files,
            started_at_s=started_at_s,
            finished_at_s=time.time(),
            compute_s=compute_s,
            k=rank.k,
            transform=topk.transform_name(rank.transform, rank.eps),
            counterparts="" if quarantined else counterparts_digest([self._tensors[q] for q in work.query_ids]),
            quarantined=quarantined,
        )
        standing = self._run.commit(receipt)
        if (
            standing.quarantined is not None or quarantined
        ):  # two kinds of attempts, of which one may have died or come late
            paths = [f"scores/{partition(query_id)}/{work.name}.parquet" for query_id in work.query_ids]
            paths += [rejects_path(work.name, each) for each in (False, True)]
            twice = [
                path for path in paths if path not in standing.files
            ]  # who reads the folder would count them again
            parallel(lambda path: storage.remove(self._run.uri(path)), twice)
        return standing

    def _prepared(self, work: Work, examples: Examples) -> tuple[Examples, Inputs]:
        """Examples as their model takes them; texts become tokens here, while another shard holds the engine."""
        with self._about(work):
            inputs = prepared(self._task, examples.arrays)
        columns = ", ".join(name for column in self._run.columns for name in column.columns)
        examples = examples.without({i: (columns, got, "tokens that can be scored") for i, got in inputs.bad.items()})
        return replace(examples, arrays={}, num_tokens_N=inputs.num_tokens_N), inputs

    def _losses(self, work: Work, inputs: Inputs) -> Losses:
        section = self._run.spec.score
        positions = [self._query_ids.index(query_id) for query_id in work.query_ids]
        with self._about(work):
            losses = self._engine.losses(inputs.batches(section.batch_rows, section.batch_tokens), positions)
        return type(losses)(inputs.of_examples(losses.base_N), inputs.of_examples(losses.counterpart_QN))

    def _about(self, work: Work) -> AbstractContextManager[None]:
        """Around what a task does with a shard."""
        task = self._run.spec.task.implementation
        return user_code(f"task {task} on {work.shard.path} from row {work.shard.row_start}")

    def _write(self, work: Work, examples: Examples, losses: Losses) -> dict[str, Written]:
        """Write everything of a shard but its commit; relative path -> size and digest."""
        rank, name = self._run.spec.rank, f"{work.name}.parquet"
        partial = partial_name(work.name, rank.k, topk.transform_name(rank.transform, rank.eps))
        tables: dict[str, pa.Table] = {}
        tops, sums = [], []
        for q, query_id in enumerate(work.query_ids):
            scores = self._scores(work, examples, losses, q)
            tables[f"scores/{partition(query_id)}/{name}"] = as_stored(scores, self._run.per_token)
            valued = topk.with_value(scores, rank.transform, rank.eps)
            tops.append(topk.partial_topk(valued, rank.k, rank.transform))
            if self._run.spec.corpus.source is not None:
                sums.append(topk.source_sums(valued))
        tables[f"partials/topk/{partial}"] = pa.concat_tables(tops)
        if sums:
            tables[f"partials/sources/{partial}"] = pa.concat_tables(sums)
        if examples.rejects:
            tables[rejects_path(work.name, quarantined=False)] = _rejects_table(work.shard, examples.rejects)
        return {path: self._run.write_table(table, path) for path, table in tables.items()}

    def _scores(self, work: Work, examples: Examples, losses: Losses, q: int) -> pa.Table:
        """Scores of one query, as SCORES in the order of its file; the difference is taken in float64 and rounded last."""
        rows, query_id = len(examples.row_N), work.query_ids[q]
        difference_N = losses.counterpart_QN[q].astype(np.float64) - losses.base_N.astype(np.float64)
        columns = {
            "example_id": examples.example_id_N,
            "source": examples.source_N,
            "query_id": pa.array([query_id] * rows, pa.string()),
            "base_loss": losses.base_N.astype(np.float32),
            "counterpart_loss": losses.counterpart_QN[q].astype(np.float32),
            "num_tokens": pa.nulls(rows, pa.int32()) if examples.num_tokens_N is None else examples.num_tokens_N,
            "score": (self._directions[query_id] * difference_N + 0.0).astype(np.float32),  # + 0.0: no negative zero
            "shard_id": np.full(rows, work.shard.shard_id, np.int32),
            "row": examples.row_N,
        }
        highest_first_N = np.argsort(-columns["score"], kind="stable")
        return pa.table({name: columns[name] for name in SCORES.names}).cast(SCORES).take(pa.array(highest_first_N))


def _only_finite(examples: Examples, losses: Losses, query_ids: tuple[str, ...]) -> tuple[Examples, Losses]:
    """Move rows with a loss that is not finite, under any model, to the rejects."""
    names = ["base_loss", *(f"counterpart_loss of query {query_id}" for query_id in query_ids)]
    losses_MN = np.vstack([losses.base_N, losses.counterpart_QN])
    finite_MN = np.isfinite(losses_MN)
    good_N = finite_MN.all(axis=0)
    if good_N.all():
        return examples, losses
    bad = {int(i): int(np.argmin(finite_MN[:, i])) for i in np.flatnonzero(~good_N)}
    kept = examples.without({i: (names[m], str(losses_MN[m, i]), "a finite loss") for i, m in bad.items()})
    return kept, type(losses)(losses.base_N[good_N], losses.counterpart_QN[:, good_N])


def _rejects_table(shard: Shard, rejects: list[Reject]) -> pa.Table:
    rows = [{"shard_id": shard.shard_id, "path": shard.path, **asdict(reject)} for reject in rejects]
    return pa.Table.from_pylist(rows, schema=REJECTS)
