"""What a worker of stage tune does with a query, without Ray: tune, check, commit."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from .artifacts import Run
from .batches import own_copy
from .corpus_view import CorpusView
from .decode import decode
from .digests import as_frozen
from .errors import ContractError, NumericsError, PipelineError
from .extensions import is_joint, load_model, load_producer, load_task, prepared, sees_corpus
from .importing import user_code
from .queries import query_inputs

if TYPE_CHECKING:
    from torch import nn

    from .model_check import ModelCheck
    from .producers.base import CorpusProducer, Produced, Producer
    from .tasks.base import Batch, Task

CHECKED_QUERY_ROWS = 8
"""Rows of queries, at most, on which the model is looked at."""


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
        self._shared = run.spec.resources.tune.shard and dist.is_initialized()
        with as_frozen(run):
            self._task: Task = load_task(run.spec.task)
            self._producer: Producer = load_producer(run.spec.producer)
            self._base: nn.Module = load_model(run.spec.model, "cpu" if self._shared else device, run.spec.seed)
        self._queries = query_inputs(run.queries, run.columns, self._task) if run.spec.queries else {}
        self._device = device
        self._sees_corpus, self._is_joint = sees_corpus(self._producer), is_joint(self._producer)
        self._prepared: Any = None
        self._check = self._checked()
        self._corpus = CorpusView(run, self._task, self._base, self._check, self._tensors)
        self._base_versions = _tensor_versions(self._base)

    def _checked(self) -> ModelCheck:
        """The base model's check: now on rows of queries, before tuning takes an hour; later it says what to batch.

        Rows of the corpus are left to stage score, where one that ends its worker is quarantined.

        Raises:
            ContractError: Losses are not those of single rows.
        """
        from .model_check import ModelCheck

        section, check = self._run.spec.score, ModelCheck(self._base, self._task)
        if not self._queries:
            return check
        few = self._run.queries.slice(0, CHECKED_QUERY_ROWS)
        arrays, _, _ = decode(few, np.arange(len(few)), self._run.columns)
        with user_code(f"model {self._run.spec.model.implementation}, on queries"):
            check.require_independent(prepared(self._task, arrays), section.batch_rows, section.batch_tokens)
            for query_id, inputs in self._queries.items():
                if not check.may_pad(inputs, np.arange(inputs.items)):
                    raise ContractError(
                        f"query {query_id!r}: the model gives its shorter rows other losses beside the longer ones",
                        "give it rows of one length, or a query_id to each",
                    )
        return check

    @property
    def is_together(self) -> bool:
        """Whether all workers make every counterpart together."""
        return self._shared or self._is_joint

    def tune_all(self, query_ids: Sequence[str]) -> list[PipelineError]:
        """Make and commit counterparts; what stood in the way of single ones, so that one bad query does not stop the others.

        Raises:
            PipelineError: What may pass at another try.
        """
        try:
            if self._is_joint:
                return self._tune_with_sample(query_ids)
            self._prepare()  # here, so that what fails fails once, not for every query
        except PipelineError as error:
            return unless_retryable(error)
        failures = []
        for query_id in query_ids:
            try:
                self.tune(query_id)
            except PipelineError as error:
                failures += unless_retryable(error)
        return failures

    def tune(self, query_id: str) -> None:
        """Make and commit the counterpart of one query.

        Raises:
            ContractError: Model, task or producer failed on it, or the base model was changed.
            NumericsError: The query's loss before or after is not finite, or steps moved nothing.
        """
        import torch

        if self._is_joint:
            for failure in self._tune_with_sample([query_id]):
                raise failure
            return
        self._prepare()
        started_s = time.monotonic()
        query = self._batch(query_id)
        seed = query_seed(self._run.spec.seed, query_id)
        with as_frozen(self._run), self._about(query_id), torch.random.fork_rng():  # a producer may load a model
            torch.manual_seed(seed)
            try:
                produced = self._produce(own_copy(query), seed)  # a producer of your own may hand it on as it is
            except PipelineError as error:
                raise type(error)(f"query {query_id!r}: {error.message}", error.hint) from error
        if produced is not None:
            self._commit(query_id, query, seed, produced, time.monotonic() - started_s)

    def _tune_with_sample(self, query_ids: Sequence[str]) -> list[PipelineError]:
        """Make and commit counterparts by a producer that looks at the corpus, together with the other workers."""
        import torch
        import torch.distributed as dist

        from .producers.base import Produced, SampleProducer

        producer, failures = cast(SampleProducer, self._producer), list[PipelineError]()
        queries = {query_id: self._batch(query_id) for query_id in query_ids}
        is_first = not dist.is_initialized() or dist.get_rank() == 0
        seed = query_seed(self._run.spec.seed, "")
        started_s = time.monotonic()
        with as_frozen(self._run), self._about(f"{len(queries)} queries"), torch.random.fork_rng():
            producer = self._corpus.chosen(producer, seed)
            torch.manual_seed(seed)
            setting = self._corpus.setting(seed, producer.sample_rows or 0)
            copies = {query_id: own_copy(query) for query_id, query in queries.items()}
            for query_id, produced in producer.produce_all(setting, copies, self._corpus.fitted(producer, setting)):
                if is_first and isinstance(produced, Produced):
                    try:
                        self._commit(query_id, queries[query_id], seed, produced, time.monotonic() - started_s)
                    except PipelineError as error:
                        failures += unless_retryable(error)
                elif is_first:
                    failures.append(cast(PipelineError, produced))
                started_s = time.monotonic()
        return failures

    def _commit(self, query_id: str, query: Batch, seed: int, produced: Produced, seconds: float) -> None:
        """Check and commit a counterpart. Raises as `tune` does."""
        from . import changes

        with self._about(query_id):
            before = self._query_loss(self._base, query)
            after = self._query_loss(produced.model.eval(), query)
        changed = changes.between(self._base, produced.model, produced.added)
        if (
            _tensor_versions(self._base) != self._base_versions
        ):  # by this query or an earlier one: all that follow are void
            raise ContractError(
                f"producer {self._run.spec.producer.implementation} changed the base model; it must tune a copy"
            )
        if not 0 < produced.scale < math.inf:
            raise ContractError(
                f"query {query_id!r}: the producer's scale is {produced.scale}, expected a number above 0"
            )
        meta = {
            "producer": self._run.spec.producer.model_dump(mode="json"),
            "direction": self._producer.direction,
            "seed": seed,
            "query_rows": len(next(iter(query.values()), ())),
            "steps": produced.steps,
            "scale": produced.scale,
            "query_loss_before_nats": before,
            "query_loss_after_nats": after,
            "change_norm": math.sqrt(sum(norm**2 for _, norm in changed.values())),
            "changed": {name: list(change.shape) for name, (change, _) in changed.items()},
            "details": produced.details,
            "seconds": round(seconds, 3),
        }
        for when, loss in (("before", before), ("after", after)):
            if loss is not None and not math.isfinite(loss):
                raise NumericsError(
                    f"query {query_id!r}: its loss {when} tuning is {loss}",
                    "lower producer.lr or producer.steps"
                    if when == "after"
                    else "check the query's rows: in classification a label is one of the model's classes, counted from 0",
                )
        if produced.steps and not changed:
            raise NumericsError(
                f"query {query_id!r}: {produced.steps} steps moved no weight",
                "raise producer.lr, or use a finer model.dtype",
            )
        data = changes.to_bytes({name: change for name, (change, _) in changed.items()})
        self._run.commit_counterpart(query_id, data, meta)

    def _about(self, query_id: str) -> AbstractContextManager[None]:
        """Around what model, task and producer do with a query."""
        return user_code(f"query {query_id!r}: {self._run.spec.producer.implementation}")

    def _prepare(self) -> None:
        """Show a CorpusProducer the whole sample, the same at every worker, before its first query. Raises as its `prepare`."""
        import torch

        if self._is_joint or not self._sees_corpus or self._prepared is not None:
            return
        producer, seed = cast("CorpusProducer", self._producer), query_seed(self._run.spec.seed, "")
        about = f"{self._run.spec.producer.implementation}, on a sample of the corpus"
        with as_frozen(self._run), user_code(about), torch.random.fork_rng():
            torch.manual_seed(seed)
            probe, rest, _ = self._corpus.drawn(producer.sample_rows)
            self._prepared = producer.prepare(self._base, self._task, [*probe, *rest], seed)

    def _produce(self, query: Batch, seed: int) -> Produced | None:
        """The producer's counterpart; null at workers that only helped with one that all make together."""
        from .producers import sharding

        if self._sees_corpus:
            producer = cast("CorpusProducer", self._producer)
            return producer.produce(self._base, self._task, query, seed, self._prepared)
        if not self._shared:
            return self._producer.produce(self._base, self._task, query, seed)
        there = {name: value.to(self._device) for name, value in query.items()}
        with sharding.over_workers(self._device):
            produced = self._producer.produce(self._base, self._task, there, seed)
            return produced if sharding.is_first() else None

    def _batch(self, query_id: str) -> Batch:
        return self._tensors(self._queries[query_id].whole() if query_id in self._queries else {})

    def _tensors(self, arrays: Mapping[str, np.ndarray]) -> Batch:
        import torch

        from .numerics import dtype_of

        dtype = dtype_of(self._base)
        device = "cpu" if self._shared else self._device
        tensors = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
        return {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}

    def _query_loss(self, model: nn.Module, query: Batch) -> float | None:
        """Mean loss of a query's rows; null without one."""
        import torch

        if not query:
            return None
        with torch.no_grad():
            return float(self._task.loss_B(model, own_copy(query)).double().mean())


def query_seed(seed: int, query_id: str) -> int:
    """Seed of one query, from the spec's seed and its id alone: the same on any worker, in any order."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{query_id}".encode()).digest()[:7], "big")


def _tensor_versions(model: nn.Module) -> list[int]:
    """The counts of in-place changes that torch keeps of every parameter and buffer."""
    return [tensor._version for tensor in model.state_dict(keep_vars=True).values()]


def unless_retryable(error: PipelineError) -> list[PipelineError]:
    """An error to hand home, or raised on for Ray Train to start the workers again."""
    if error.retryable:
        raise error
    return [error]
