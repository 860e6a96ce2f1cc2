"""What the judge has before it: every method's scores, the run that says what they are about, and tables of known truths.

Shapes: Q queries, N examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from . import matrices, storage
from .artifacts import Run
from .digests import as_frozen
from .errors import ArtifactError, InputError
from .evaluate import Estimate
from .extensions import load_task
from .judge import Judge
from .matrices import Matrix
from .plan import make_shards
from .queries import WHOLE_FILE_ROWS
from .reader import Reader, check_columns
from .retraining import Examples, untempered
from .values import as_text

Row = dict[str, str | float | int | None]


@dataclass(frozen=True)
class Judgement:
    """One question put to all methods.

    Args:
        name: Of its files.
        title: What was asked.
        rows: One per method, best first.
        figure: PNG.
    """

    name: str
    title: str
    rows: Sequence[Row]
    figure: bytes


@dataclass(frozen=True)
class Case:
    """What is judged: the first run's examples and queries, and every method's scores."""

    judge: Judge
    run: Run
    examples: Examples
    methods: Sequence[Matrix]

    @property
    def id_N(self) -> np.ndarray:
        """Ids of the examples."""
        return self.examples.id_N

    @property
    def query_ids(self) -> tuple[str, ...]:
        """Queries, as the first run has them."""
        return self.run.query_ids

    @property
    def queries(self) -> str:
        """How many, for people."""
        return "one query" if len(self.query_ids) == 1 else f"{len(self.query_ids):,} queries"

    @cached_property
    def wrong_N(self) -> np.ndarray:
        """Which examples carry a wrong label: [N] bool. Raises InputError if none of the corpus does."""
        assert self.judge.mislabelled is not None
        table = read_table(self.judge.mislabelled.uri, ["example_id"])
        wrong_N = np.isin(self.id_N, np.asarray(table["example_id"].to_pylist(), dtype=str))
        if not wrong_N.any():
            raise InputError(f"mislabelled.uri: {self.judge.mislabelled.uri} names no example of the corpus")
        return wrong_N


def open_case(judge: Judge, runs: Mapping[str, Run]) -> Case:
    """Read all scores.

    Raises:
        ArtifactError: A run is not finished, or damaged.
        InputError: Runs disagree on corpus or queries, or scores are missing.
    """
    name, first = next(iter(runs.items()))
    for other, run in runs.items():
        if not run.is_sealed():
            raise ArtifactError(f"runs.{other}: {run.uri()} is not finished", "run its spec to the end first")
        if run.resolved.digests["corpus"] != first.resolved.digests["corpus"] or run.query_ids != first.query_ids:
            raise InputError(
                f"runs.{other}: {run.uri()} has another corpus or other queries than {name}, {first.uri()}",
                "methods are judged side by side on the same examples and queries",
            )
    with as_frozen(first):
        task = load_task(untempered(first.spec.task))
    examples = Examples.read(first, task)
    found = [matrices.of_run(each, run, first.query_ids, examples.id_N) for each, run in runs.items()]
    found += [
        matrices.of_file(each, storage.absolute(uri), first.query_ids, examples.id_N)
        for each, uri in judge.scores.items()
    ]
    return Case(judge, first, examples, found)


def labelled(method: Matrix) -> str:
    """A method by its name, and by how it ranks if that is not by the score."""
    return method.name if method.transform == "signed" else f"{method.name} ({method.transform})"


def spread(name: str, estimate: Estimate) -> Row:
    """An estimate as columns of a table."""
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def best_first(rows: Sequence[Row], by: str) -> list[Row]:
    """Rows in falling order of a column."""
    return sorted(rows, key=lambda row: -float(row[by] or 0))


def read_table(uri: str, names: Sequence[str]) -> pa.Table:
    """Columns of a table in any format that a corpus may have, as text. Raises InputError."""
    reader, parts = Reader(uri), []
    for measured in reader.with_columns([reader.measure(file) for file in reader.survey()], names):
        check_columns(measured, [], {"table": names})
        parts += [reader.read(shard, list(names)).table for shard in make_shards([measured], WHOLE_FILE_ROWS)]
    if not parts:
        raise InputError(f"{uri} has no rows")
    return pa.table({name: pa.concat_arrays([as_text(part, name) for part in parts]) for name in names})
