"""A model, a task and a worker that cost nothing, so that what is measured is everything else."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch

from pipeline.artifacts import Run
from pipeline.attempts import Worker
from pipeline.freeze import freeze
from pipeline.records import Column, Shard
from pipeline.specfile import parse_spec
from pipeline.works import Manifest

BITS = 24
FIRST_FACTOR, NEXT_FACTOR = 0x9E3779B97F4A7C15 >> 1, 0x5851F42D


class Model(torch.nn.Module):
    """One number."""

    def __init__(self):
        super().__init__()
        self.register_buffer("factor", torch.tensor(FIRST_FACTOR | 1))


class Task:
    """A loss between 0 and 1 that looks random and takes no time: some bits of a product of integers."""

    def columns(self):
        return [Column("x", ("x",), "int64")]

    def loss_B(self, model, batch):
        return ((batch["x"] * model.factor >> 30) & (1 << BITS) - 1).float() / (1 << BITS)


class Nobody:
    """Stands where ScoreShard stands, and keeps account of its attempts as that does; its shards are of nothing."""

    def __init__(self, run_uri: str, query_ids: tuple[str, ...], attempts: Any) -> None:
        self._worker = Worker(attempts)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        rows = []
        for shard_id in batch["shard_id"].tolist():
            with self._worker.attempt(f"shard-{shard_id:06d}"):
                row = {"name": f"shard-{shard_id:06d}", "rows": 1, "rejects": 0, "quarantined": "", "seconds": 0.0}
                rows.append({**row, "notices": ""})
        return {name: [row[name] for row in rows] for name in rows[0]}


def write_corpus(folder: Path, files: int, rows_each: int) -> None:
    """Parquet files of one number a row."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(files):
        x = np.arange(i * rows_each, (i + 1) * rows_each)
        pq.write_table(pa.table({"x": x}), folder / f"part-{i:06d}.parquet")


def frozen(folder: Path, corpus_uri: str, queries: int = 1, **sections: Any) -> Run:
    """A run over numbers in a folder of its own, as `freeze` makes it."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.table({"query_id": [f"query-{q:03d}" for q in range(queries)], "x": list(range(queries))}),
        folder / "q.parquet",
    )
    tree = {
        "run": {"uri": str(folder / "run")},
        "model": {"factory": "tests.bench.nothing:Model"},
        "task": {"name": "tests.bench.nothing:Task"},
        "corpus": {"uri": corpus_uri, "payload": []},
        "queries": {"uri": str(folder / "q.parquet")},
        "resources": {"score": {"actors": os.cpu_count()}},
    }
    return freeze(parse_spec({**tree, **sections}))


def make_counterparts(run: Run) -> None:
    """What stage tune would leave: another number per query."""
    for q, query_id in enumerate(run.query_ids):
        factor = torch.tensor((FIRST_FACTOR | 1) + 2 * NEXT_FACTOR * (q + 1))
        run.commit_counterpart(query_id, safetensors.torch.save({"factor": factor}), {"direction": 1})


def with_shards(run: Run, shards: int) -> Run:
    """The run as if its corpus had so many shards; nothing of them is on disk."""
    one = run.shards[0]
    made = [Shard(i, one.path, i, 1, None, None, None, one.size_bytes, one.version) for i in range(shards)]
    first = dataclasses.replace(run.additions[0], stop_shard=shards)
    return dataclasses.replace(run, shards=Manifest.of(made), additions=(first,))
