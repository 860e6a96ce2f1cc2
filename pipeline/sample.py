"""A random sample of the corpus, for producers that look at more than their query."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .artifacts import Run
from .corpus import Corpus
from .errors import InputError
from .extensions import prepared

if TYPE_CHECKING:
    from .batches import Inputs
    from .tasks.base import Task

MAX_SHARDS = 32
"""Shards that rows are drawn from: of a corpus of any size only so many files are read."""


PROBE_ROWS = 64
"""Rows of the probe, at most; of a small sample half."""


@dataclass(frozen=True)
class Drawn:
    """Examples that were drawn.

    Args:
        inputs: As the task's model takes them.
        example_id_N: Their ids.
    """

    inputs: Inputs
    example_id_N: np.ndarray


def draw_sample(run: Run, task: Task, rows: int, most_shards: int = MAX_SHARDS) -> tuple[Drawn, Drawn]:
    """Rows drawn at random, in random order: the same at every worker and every start; a few of them, and the others.

    They are drawn from the corpus as it was first frozen; what cannot be scored is left out.

    Raises:
        InputError: No row that was drawn can be scored, or a file cannot be read.
    """
    shards = run.shards[: run.additions[0].stop_shard]
    rows_S = np.array([shard.rows for shard in shards])
    chance = np.random.default_rng(
        int.from_bytes(hashlib.sha256(f"{run.spec.seed}/sample".encode()).digest()[:7], "big")
    )
    picked = np.arange(len(shards))
    if rows < rows_S.sum() and len(shards) > most_shards:
        picked = np.sort(chance.choice(len(shards), most_shards, replace=False, p=rows_S / rows_S.sum()))
    corpus = Corpus(run.spec.corpus)
    drawn_M = np.sort(chance.permutation(rows_S[picked].sum())[:rows])
    starts = np.concatenate([[0], np.cumsum(rows_S[picked])])
    parts, ids = [], []
    for number, start, stop in zip(picked, starts, starts[1:], strict=False):
        shard = shards[int(number)]
        wanted = drawn_M[(drawn_M >= start) & (drawn_M < stop)] - start + shard.row_start
        if len(wanted):
            examples = corpus.read(shard, run.columns)
            kept_N = np.isin(examples.row_N, wanted)
            parts.append({name: array[kept_N] for name, array in examples.arrays.items()})
            ids.append(np.asarray(examples.example_id_N.to_pylist(), object)[kept_N])
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    id_M = np.concatenate(ids)
    order_M = chance.permutation(len(id_M))
    cuts = np.split(order_M, [min(PROBE_ROWS, (len(order_M) + 1) // 2)])
    probe, rest = (_drawn(task, {name: array[cut_M] for name, array in arrays.items()}, id_M[cut_M]) for cut_M in cuts)
    if not probe.inputs.items:
        raise InputError(
            f"{run.spec.corpus.uri}: of {len(drawn_M):,} rows drawn at random too few can be scored",
            "is task right for this corpus? Or raise producer.sample_rows",
        )
    return probe, rest


def _drawn(task: Task, arrays: Mapping[str, np.ndarray], id_M: np.ndarray) -> Drawn:
    inputs = prepared(task, arrays)
    return Drawn(inputs, np.delete(id_M, list(inputs.bad)))
