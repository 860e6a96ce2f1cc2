"""The judge's work on the cluster: models trained anew on parts of the corpus, and the queries' losses under them.

Reads: run.yaml, corpus and queries of the runs that are judged.
Writes: {judge.uri}/retrainings/FINGERPRINT/subset-NNNNN-NN.parquet, one object per retraining, whole.
Resumes: what is there is not done again, whichever methods are judged.
Next: verdict.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from . import storage
from .artifacts import Run
from .attempts import Worker, start_attempts
from .cluster import Watchdog, actors_of, connected, errors_of
from .errors import ArtifactError, ClusterError, PipelineError
from .folder import parallel, parquet_bytes, table_of
from .frozen import open_run
from .judge import Judge, LdsSection
from .observe import Progress
from .plan import identity
from .retraining import Retrainer, seed_of, start_of, untempered

_Key = tuple[int, int]
"""A part of the corpus, and which of its retrainings."""
LOSSES = pa.schema([pa.field("query_id", pa.string(), False), pa.field("loss", pa.float64(), False)])
"""One retraining: mean loss of every query, in nats, without temperature."""


@dataclass(frozen=True)
class Retrainings:
    """Where retrainings of one model on parts of one corpus lie, and what is in each part.

    Args:
        judge: The spec.
        run: Says what model, corpus and queries are.
        lds: How the corpus is cut.
    """

    judge: Judge
    run: Run
    lds: LdsSection

    @property
    def fingerprint(self) -> str:
        """Digest of everything that decides the losses; not of how many there are, nor of who is judged by them."""
        tree = identity(self.run.spec)
        about = {
            "start": start_of(self.run, self.judge.training).model_dump(mode="json"),
            "task": untempered(self.run.spec.task).model_dump(mode="json"),
            "training": self.judge.training.model_dump(mode="json"),
            "corpus": tree["corpus"],
            "digests": {name: self.run.resolved.digests[name] for name in ("corpus", "queries")},
            "share": self.lds.share,
            "seed": self.judge.seed,
        }
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]

    def uri(self, *parts: str) -> str:
        """URI of something among the retrainings."""
        return "/".join((storage.absolute(self.judge.judge.uri), "retrainings", self.fingerprint, *parts))

    def keys(self) -> list[_Key]:
        """All retrainings that are asked for."""
        return [(part, again) for part in range(self.lds.subsets) for again in range(self.lds.retrainings)]

    def missing(self) -> list[_Key]:
        """Those that are not done."""
        there = set(storage.names(self.uri()))
        return [key for key in self.keys() if self.name(key) not in there]

    def name(self, key: _Key) -> str:
        """Name of a retraining's object."""
        return f"subset-{key[0]:05d}-{key[1]:02d}.parquet"

    def inside_N(self, part: int, examples: int) -> np.ndarray:
        """Which of N examples are in a part: drawn from the spec's seed and the part's number alone."""
        chance = np.random.default_rng(seed_of(self.judge.seed, "subset", part))
        inside_N = np.zeros(examples, bool)
        inside_N[chance.permutation(examples)[: max(1, round(self.lds.share * examples))]] = True
        return inside_N

    def do(self, retrainer: Retrainer, key: _Key) -> None:
        """Train once, and write the losses. Raises as `Retrainer.query_losses`."""
        inside_N = self.inside_N(key[0], len(retrainer.id_N))
        loss_Q = retrainer.query_losses(inside_N, seed_of(self.judge.seed, "retraining", *key))
        table = pa.table([list(self.run.query_ids), loss_Q], schema=LOSSES)
        storage.write_bytes(self.uri(self.name(key)), parquet_bytes(table))

    def losses_SRQ(self) -> np.ndarray:
        """Losses of the queries [S, R, Q] after all retrainings.

        Raises:
            ArtifactError: One is damaged, or of other queries.
        """

        def loss_Q(key: _Key) -> np.ndarray:
            uri = self.uri(self.name(key))
            table = table_of(storage.read_bytes(uri), uri)
            if tuple(table["query_id"].to_pylist()) != self.run.query_ids:
                raise ArtifactError(f"{uri} holds losses of other queries", "delete it and judge again")
            return table["loss"].to_numpy()

        losses = np.stack(parallel(loss_Q, self.keys()))
        return losses.reshape(self.lds.subsets, self.lds.retrainings, -1)


def retrain(retrainings: Retrainings) -> None:
    """Do the retrainings that are missing, on the cluster.

    Raises:
        SpecError, InputError, ContractError, NumericsError: Training cannot be done as the spec says; what is done stays.
        ClusterError: Resources are missing, or workers could not start.
    """
    missing = retrainings.missing()
    if not missing:
        return
    progress = Progress("train", len(retrainings.keys()), "models", done=len(retrainings.keys()) - len(missing))
    watchdog = Watchdog("retrain")
    ended = closing(_rows(retrainings, missing))  # an error here ends the actors too
    with connected(retrainings.judge.resources), errors_of("retrain"), watchdog.watching(), progress, ended as rows:
        for row in rows:
            watchdog.feed()
            if row["error"]:
                raise pickle.loads(row["error"])
            progress.advance(1)


def _rows(retrainings: Retrainings, missing: Sequence[_Key]) -> Generator[dict[str, Any], None, None]:
    import ray.data
    from ray.data import ActorPoolStrategy

    resources = retrainings.judge.resources.score
    actors = actors_of(resources, len(missing))
    items = [{"part": part, "again": again} for part, again in missing]
    trained = ray.data.from_items(items, override_num_blocks=min(len(items), 32 * actors)).map_batches(
        Retrain,
        fn_constructor_kwargs={
            "judge": retrainings.judge,
            "run_uri": retrainings.run.uri(),
            "attempts": start_attempts(),
        },
        batch_size=1,
        compute=ActorPoolStrategy(size=actors),
        num_cpus=resources.cpus,
        num_gpus=resources.gpus or None,
    )
    yield from trained.iter_rows()


class Retrain:
    """The Ray Data actor: a Retrainer behind the shape that `map_batches` calls.

    Ray restarts it and gives it its retrainings again for ever; what is bounded is how often one may take its actor with it.
    """

    def __init__(self, judge: Judge, run_uri: str, attempts: Any) -> None:
        import torch

        self._worker, self._max_failures = Worker(attempts), judge.resources.score.max_failures
        self._error: PipelineError | None = None
        try:
            resources = judge.resources.score
            torch.set_num_threads(max(1, int(resources.cpus)))
            run = open_run(run_uri)
            assert judge.lds is not None
            self._retrainings = Retrainings(judge, run, judge.lds)
            self._retrainer = Retrainer(run, judge.training, "cuda" if resources.gpus else "cpu")
        except PipelineError as error:  # raised here, Ray would bring home that an actor died
            self._error = error

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Train once for each row; one small row each."""
        errors = [self._do((int(part), int(again))) for part, again in zip(batch["part"], batch["again"], strict=True)]
        return {"error": errors}

    def _do(self, key: _Key) -> bytes:
        try:
            if self._error is not None:
                raise self._error
            name = self._retrainings.name(key)
            with self._worker.attempt(name) as number:
                if number > self._max_failures + 1:
                    raise ClusterError(f"{number - 1} workers died on {name}", "is there enough memory for training?")
                self._retrainings.do(self._retrainer, key)
        except PipelineError as error:  # of an error that is raised Ray Data brings only the text home
            return pickle.dumps(error)
        return b""
