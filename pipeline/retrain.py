"""The judge's work on the cluster: models trained anew on other corpora, and losses under them.

Reads: run.yaml, corpus and queries of the runs that are judged.
Writes: {judge.uri}/retrainings/FINGERPRINT/LESSON.parquet, one object per model trained, whole.
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
from .cluster import Watchdog, actors_of, connected, on_cluster
from .errors import ArtifactError, ClusterError, InputError, PipelineError
from .folder import parallel, parquet_bytes, table_of
from .frozen import open_run
from .frozen_files import FrozenFiles
from .judge import Judge
from .lessons import Lesson, Step, Whole
from .model_folder import digest_of
from .observe import Progress
from .retraining import Examples, Retrainer, known_start, start_files, start_of, untempered

LOSSES = pa.schema(
    [
        pa.field("query_id", pa.string()),
        pa.field("example_id", pa.string()),
        pa.field("loss", pa.float64(), False),
    ]
)
"""One lesson: mean loss of every query, in nats, without temperature; of the whole corpus's, losses of its examples too."""


@dataclass(frozen=True)
class Retrainings:
    """Where losses after retrainings of one model on one corpus lie.

    Args:
        judge: The spec.
        run: Says what model, corpus and queries are.
        fingerprint: Of everything that decides the losses, but for what the lesson is.
    """

    judge: Judge
    run: Run
    fingerprint: str

    def uri(self, *parts: str) -> str:
        """URI of something among the retrainings."""
        return "/".join((self.judge.judge.uri, "retrainings", self.fingerprint, *parts))

    def missing(self, lessons: Sequence[Lesson]) -> list[Lesson]:
        """Those that are not done, each once."""
        there = set(storage.names(self.uri()))
        return [lesson for lesson in dict.fromkeys(lessons) if _object(lesson) not in there]

    def do(self, retrainer: Retrainer, lesson: Lesson) -> None:
        """Train once, and write the losses.

        Raises:
            InputError: The model before training, or the corpus, is not what it was when the judge began.
            Other errors as `Retrainer.learned` and its losses.
        """
        if fingerprint(self.judge, self.run, retrainer.examples, retrainer.start_files) != self.fingerprint:
            uris = ", ".join(one.uri for one in retrainer.start_files)
            raise InputError(
                f"{uris or 'the corpus'} changed since these retrainings began: {self.uri()}",
                "put the former files back, or give the command again to retrain with those that are there",
            )
        model = retrainer.learned(lesson, self.judge.seed)
        loss_Q = retrainer.query_losses(model)
        loss_N = retrainer.example_losses(model) if isinstance(lesson, Whole) else np.empty(0)
        columns = [
            [*self.run.query_ids, *[None] * len(loss_N)],
            [*[None] * len(loss_Q), *retrainer.examples.id_N[: len(loss_N)].tolist()],
            np.concatenate([loss_Q, loss_N]),
        ]
        storage.write_bytes(self.uri(_object(lesson)), parquet_bytes(pa.table(columns, schema=LOSSES)))

    def query_losses(self, lessons: Sequence[Lesson]) -> np.ndarray:
        """Losses of the queries [L, Q] after lessons. Raises ArtifactError: one is damaged, or of other queries."""
        found = parallel(self._read, lessons)
        return np.stack([table["loss"].to_numpy()[: len(self.run.query_ids)] for table in found])

    def example_losses(self, lessons: Sequence[Lesson]) -> np.ndarray:
        """Losses of the examples [L, N] after lessons on the whole corpus. Raises ArtifactError as `query_losses`."""
        return np.stack(
            [table["loss"].to_numpy()[len(self.run.query_ids) :] for table in parallel(self._read, lessons)]
        )

    def _read(self, lesson: Lesson) -> pa.Table:
        uri = self.uri(_object(lesson))
        table = table_of(storage.read_bytes(uri), uri)
        if tuple(table["query_id"].drop_null().to_pylist()) != self.run.query_ids:
            raise ArtifactError(f"{uri} holds losses of other queries", "delete it and judge again")
        return table


def fingerprint(judge: Judge, run: Run, examples: Examples, files: Sequence[FrozenFiles] | None = None) -> str:
    """Digest of everything that decides losses after retrainings, by contents; not of who is judged by them.

    Args:
        judge: The spec.
        run: Says what model, corpus and queries are.
        examples: What is trained on.
        files: Those of the model before training; null: as they are now.

    Raises:
        InputError, StorageError: They cannot be read.
    """
    files = start_files(run, judge.training) if files is None else files
    start = known_start(run, judge.training)
    about = {
        "start": start and start.model_dump(mode="json"),
        "weights": {one.field: digest_of(one.files) for one in files},
        "task": untempered(run.spec.task).model_dump(mode="json"),
        "training": judge.training.model_dump(mode="json"),
        "examples": examples.digest,
        "seed": judge.seed,
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def model_mark(run: Run) -> str:
    """Digest of a run's own model, by its section and the contents of its files."""
    files = {
        name: digest for name, digest in run.resolved.digests.items() if name == "weights" or name.startswith("model ")
    }
    text = json.dumps([run.spec.model.model_dump(mode="json"), files, run.spec.seed], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _object(lesson: Lesson) -> str:
    return f"{lesson.name}.parquet"


def retrain(retrainings: Retrainings, lessons: Sequence[Lesson]) -> None:
    """Do the lessons that are missing, on the cluster.

    Raises:
        SpecError, InputError, ContractError, NumericsError: Training cannot be done as the spec says; what is done stays.
        ClusterError: Resources are missing, or workers could not start.
    """
    missing = retrainings.missing(lessons)
    if not missing:
        return
    if not all(isinstance(lesson, Step) for lesson in missing):
        start_of(retrainings.run, retrainings.judge.training)
    asked = len(set(lessons))
    progress = Progress("train", asked, "models", done=asked - len(missing))
    with connected(retrainings.judge.resources):
        on_cluster("retrain", lambda: _retrain(retrainings, missing, progress))


def _retrain(retrainings: Retrainings, missing: Sequence[Lesson], progress: Progress) -> None:
    watchdog = Watchdog("retrain")
    ended = closing(_rows(retrainings, missing))  # an error here ends the actors too
    with watchdog.watching(), progress, ended as rows:
        for row in rows:
            watchdog.feed()
            if row["error"]:
                raise pickle.loads(row["error"])
            progress.advance()


def _rows(retrainings: Retrainings, missing: Sequence[Lesson]) -> Generator[dict[str, Any], None, None]:
    import ray.data
    from ray.data import ActorPoolStrategy

    resources = retrainings.judge.resources.score
    actors = actors_of(resources, len(missing))
    items = [{"lesson": pickle.dumps(lesson)} for lesson in missing]
    trained = ray.data.from_items(items, override_num_blocks=min(len(items), 32 * actors)).map_batches(
        Retrain,
        fn_constructor_kwargs={
            "judge": retrainings.judge,
            "run_uri": retrainings.run.uri(),
            "fingerprint": retrainings.fingerprint,
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

    def __init__(self, judge: Judge, run_uri: str, fingerprint: str, attempts: Any) -> None:
        import torch

        self._worker, self._max_failures = Worker(attempts), judge.resources.score.max_failures
        self._error: PipelineError | None = None
        try:
            resources = judge.resources.score
            torch.set_num_threads(max(1, int(resources.cpus)))
            run = open_run(run_uri)
            self._retrainings = Retrainings(judge, run, fingerprint)
            self._retrainer = Retrainer(run, judge.training, "cuda" if resources.gpus else "cpu")
        except PipelineError as error:  # raised here, Ray would bring home that an actor died
            self._error = error

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Train once for each row; one small row each."""
        return {"error": [self._do(pickle.loads(lesson)) for lesson in batch["lesson"]]}

    def _do(self, lesson: Lesson) -> bytes:
        try:
            if self._error is not None:
                raise self._error
            with self._worker.attempt(lesson.name) as number:
                if number > self._max_failures + 1:
                    raise ClusterError(
                        f"{number - 1} workers died on {lesson.name}", "is there enough memory for training?"
                    )
                self._retrainings.do(self._retrainer, lesson)
        except PipelineError as error:  # of an error that is raised Ray Data brings only the text home
            return pickle.dumps(error)
        return b""
