"""What an actor of stage score does with a shard, without Ray: read, score, write, commit."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from . import noise
from .artifacts import Run
from .base_losses import BaseLosses, ShardLosses
from .batches import Batch
from .calibration import Calibration, calibrate
from .corpus import Corpus, Examples
from .digests import as_frozen
from .errors import ArtifactError, InputError, StorageError, first_line
from .extensions import load_model, load_task, prepared
from .importing import user_code
from .observe import say, say_seldom
from .shards import ShardWriter, score_table
from .works import Noise, Receipt, Work

if TYPE_CHECKING:
    from .batches import Inputs
    from .engine import LossEngine
    from .losses import Losses

TRIED_SHARDS = 8
"""Shards from the first on that are tried for a batch to calibrate with."""


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
        self._way = run.way
        self._writer = ShardWriter(run, {query_id: meta["tensors"]["sha256"] for query_id, meta in metas.items()})
        with as_frozen(run):
            self._task = load_task(run.spec.task)
        self._engine = self._loaded(device, sum(meta["tensors"]["bytes"] for meta in metas.values()))
        self._computing = threading.Lock()
        keeps = run.spec.score.base_losses is not None and self._way == "difference"  # other ways make them in passing
        self._base_losses = BaseLosses(run) if keeps else None
        self._reproduces: dict[
            bool, bool
        ] = {}  # compiled or not: whether base losses that are kept are computed here, too

    def _loaded(self, device: str, counterparts_bytes: int) -> LossEngine:
        """Base and counterparts: in memory, if there is room for all."""
        import torch

        from . import memory
        from .blocks import compiled
        from .changes import from_bytes
        from .engine import LossEngine
        from .model_check import ModelCheck
        from .private_copies import CACHE, cache_folder, private_folder

        run, section = self._run, self._run.spec.resources.score
        with as_frozen(run):
            model = load_model(run.spec.model, device, run.spec.seed)
        self._check = ModelCheck(model, self._task)
        there = torch.device(device)
        room_bytes = memory.room_bytes(there, section.cpus, section.gpus, section.counterparts_gib)
        on_host_bytes = room_bytes if there.type == "cpu" else memory.host_room_bytes(section.cpus)
        try:
            folder = private_folder() if counterparts_bytes > on_host_bytes else None
            changes = [from_bytes(run.counterpart_tensors(query_id), folder) for query_id in self._query_ids]
            blocks = compiled(model, self._task) if run.spec.score.compile else None
            engine = LossEngine(model, self._task, changes, room_bytes, blocks)
        except (KeyError, ValueError) as error:
            raise ArtifactError(
                f"a counterpart in {run.uri('counterparts')} does not fit the model: {error}"
            ) from error
        except OSError as error:
            raise StorageError(
                f"{len(self._query_ids)} counterparts of {counterparts_bytes / 2**30:.1f} GiB cannot wait in "
                f"{cache_folder()}: {error}",
                f"make room there, or set {CACHE} to another folder",
            ) from error
        if len(engine.groups) > 1:
            say(f"counterparts: {memory.told(engine.groups, engine.steps_bytes, room_bytes)}")
        return engine

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
        place = self._place(work, inputs)
        kept_S = place.read() if place is not None else None
        with self._computing:
            computing_s = time.monotonic()
            base_S = self._trusted(work, inputs, kept_S)
            losses = self._losses(work, inputs, base_S)
            with np.errstate(invalid="ignore"):  # of losses that are not finite, which are no noise
                found = self._noise(work, inputs, losses)
            compute_s = time.monotonic() - computing_s
        if place is not None and base_S is None:
            place.write(losses.base_N)
        losses = losses.mapped(inputs.of_examples)
        standing = self._run.standing(work.addition, work.shard.shard_id)
        if standing is not None:  # somebody was faster: a slow attempt that was taken for dead leaves all as it is
            return standing
        examples, losses = _only_finite(examples, losses, work.query_ids)
        scores = (self._scores(work, examples, losses, q) for q in range(len(work.query_ids)))
        files = self._writer.write(work, scores, examples.rejects)
        counts: dict[str, Any] = {
            "rows": len(examples.row_N),
            "rejects": len(examples.rejects),
            "overlong": inputs.overlong,
        }
        counts["noise"] = found
        counts["base_kept"] = 0 if base_S is None else counts["rows"]
        return self._writer.commit(work, started_at_s, compute_s, counts, files)

    def quarantine(self, work: Work, reason: str) -> Receipt:
        """See ShardWriter."""
        return self._writer.quarantine(work, reason)

    def _prepared(self, work: Work, examples: Examples) -> tuple[Examples, Inputs]:
        """Examples as their model takes them; texts become tokens here, while another shard holds the engine."""
        with self._about(work):
            inputs = prepared(self._task, examples.arrays)
        columns = ", ".join(name for column in self._run.columns for name in column.columns)
        examples = examples.without({i: (columns, got, "tokens that can be scored") for i, got in inputs.bad.items()})
        return replace(examples, arrays={}, num_tokens_N=inputs.num_tokens_N), inputs

    def _batches(self, inputs: Inputs) -> Iterator[Batch]:
        """As they go through the model, which is looked at before the first; to be called by the one thread that computes."""
        section = self._run.spec.score
        return self._check.batches(inputs, section.batch_rows, section.batch_tokens)

    def _losses(self, work: Work, inputs: Inputs, base_S: np.ndarray | None) -> Losses:
        """Losses of items."""
        positions = [self._query_ids.index(query_id) for query_id in work.query_ids]
        with self._about(work):
            return self._through(self._engine, self._batches(inputs), positions, base_S)

    def _through(
        self, engine: LossEngine, batches: Iterable[Batch], positions: Sequence[int], base_S: np.ndarray | None = None
    ) -> Losses:
        if self._way == "difference":
            return engine.losses(batches, positions, base_S)
        return engine.derivatives(batches, positions, self._way)

    def _noise(self, work: Work, inputs: Inputs, losses: Losses) -> dict[str, Noise]:
        """How far some examples' scores are from those in a finer precision; nothing, and said, where that is not to be had."""
        at_most = self._run.spec.score.noise_rows
        if not (at_most and inputs.items and noise.is_measured(work.shard.shard_id)):
            return {}
        coarse_QN = inputs.of_examples(losses.difference_QN)
        example_M = noise.measured_examples(coarse_QN.shape[1], at_most)
        item_M = inputs.items_of(example_M)
        query_ids = [work.query_ids[q] for q in noise.spread(len(work.query_ids), noise.MOST_QUERIES)]
        try:
            finer = self._engine.finer([self._query_ids.index(query_id) for query_id in query_ids])
            if finer is None:
                return {}
            batches = noise.batches_of(inputs, self._batches(inputs), item_M)
            found = self._through(finer, batches, range(len(query_ids)))
        except Exception as error:  # noqa: BLE001 - whatever a model or task says that knows one precision only
            say_seldom("noise", f"rounding noise is not measured (score.noise_rows): {first_line(error)}")
            return {}
        fine_QS = np.full((len(query_ids), inputs.items), np.nan)
        fine_QS[:, found.item_N] = found.difference_QN
        rows = [work.query_ids.index(query_id) for query_id in query_ids]
        error_QM = inputs.of_examples(fine_QS)[:, example_M] - coarse_QN[rows][:, example_M]
        return noise.noise_of(query_ids, error_QM)

    def calibrate(self) -> Calibration | None:
        """Which way of scoring suits model and counterparts, by the first batch of the corpus; null if it has none to read.

        Raises:
            ContractError: The model or task failed.
        """
        for work in islice(self._run.works(), TRIED_SHARDS):
            try:
                examples = self._corpus.read(work.shard, self._run.columns)
            except InputError:
                continue
            _, inputs = self._prepared(work, examples)
            for batch in self._batches(inputs):
                with self._about(work):
                    return calibrate(self._engine, batch, len(self._query_ids))
        return None

    def _place(self, work: Work, inputs: Inputs) -> ShardLosses | None:
        """Where base losses of a shard's items are kept; null if they are not, or there are no items."""
        if self._base_losses is None or not inputs.items:
            return None
        section = self._run.spec.score
        with self._about(work):
            return self._base_losses.of(work.shard, inputs.batches(section.batch_rows, section.batch_tokens))

    def _trusted(self, work: Work, inputs: Inputs, kept_S: np.ndarray | None) -> np.ndarray | None:
        """Base losses that are kept, if this worker would compute the same to the bit: seen once, on one batch.

        Code, accelerator and libraries have no digest; and a difference of losses from two of them is no score.
        """
        if kept_S is None:
            return None
        if self._engine.is_compiled not in self._reproduces:
            with self._about(work):
                own = self._engine.losses(islice(self._batches(inputs), 1), ())
            is_same = own.base_N.tobytes() == kept_S[own.item_N].tobytes()
            self._reproduces[self._engine.is_compiled] = is_same
            if not is_same:
                said = (
                    "were computed with other code, libraries or hardware than this worker's: it computes its own anew"
                )
                say(f"warning: base losses in {self._run.spec.score.base_losses} {said}")
        return kept_S if self._reproduces[self._engine.is_compiled] else None

    def _about(self, work: Work) -> AbstractContextManager[None]:
        """Around what a task does with a shard."""
        task = self._run.spec.task.implementation
        return user_code(f"task {task} on {work.shard.path} from row {work.shard.row_start}")

    def _scores(self, work: Work, examples: Examples, losses: Losses, q: int) -> pa.Table:
        """Scores of one query, rounded last."""
        base_N, counterpart_N, query_id = losses.base_N, losses.counterpart_QN[q], work.query_ids[q]
        score_N = self._directions[query_id] * losses.difference_QN[q]
        return score_table(work, query_id, examples, base_N, counterpart_N, score_N)


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
    return kept, losses.mapped(lambda each: each[..., good_N])
