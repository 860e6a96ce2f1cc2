"""bergson (EleutherAI): gradient dot products by hooks on the linear layers below a language model's output, without biases.

`bergson build` and `bergson score` start processes and write gradients and scores to disk. Here the same collector, scorer and
loop over batches are called in this process with what the library has for memory (`InMemoryCollector`,
`InMemorySequenceScoreWriter`); all run on a CPU as they come. The model is prepared as the command prepares it, but for one
thing: there the input embeddings are what requires a gradient, which they never use; here their outputs do.
"""

from __future__ import annotations

import logging
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
from bergson.collector.collector import CollectorComputer
from bergson.collector.in_memory_collector import InMemoryCollector
from bergson.config import IndexConfig
from bergson.gradients import GradientProcessor
from bergson.score.score_writer import InMemorySequenceScoreWriter
from bergson.score.scorer import Scorer
from datasets import Dataset
from torch import Tensor

from tests.bench.peers.world import UNCOUNTED, QueryClock, Rows, Scored, UnsupportedError, World, timed

BATCH_ROWS = 32
PROJECTED = 16
"""Rows and columns that each layer's gradient is projected to: the default of the library's own projecting commands."""
CPU = torch.device("cpu")


def graddot(world: World) -> Scored:
    """Plain dot products."""
    return _scores(world, None)


def projected(world: World) -> Scored:
    """Gradients of each layer projected from both sides first."""
    return _scores(world, PROJECTED)


def _scores(world: World, dimensions: int | None) -> Scored:
    if world.kind != "causal_lm":
        raise UnsupportedError("its collector takes language models of transformers alone")
    logging.disable(logging.INFO)
    model, batch_rows = _prepared(world), world.batch_rows or BATCH_ROWS
    processor = GradientProcessor(projection_dim=dimensions)
    train, queries = _dataset(world.train), _dataset(world.queries)
    held = world.query_rows or len(queries)
    score_NQ = torch.zeros(len(train), len(queries))
    score_s, clock = 0.0, QueryClock()
    with TemporaryDirectory() as folder:
        config = IndexConfig(
            f"{folder}/run", projection_dim=dimensions or 0, loss_reduction=world.reduction, precision="auto"
        )
        config.partial_run_path.mkdir()
        collect = partial(_collected, model, config, processor, batch_rows)
        for start in range(0, len(queries), held):
            some = queries.select(range(start, min(start + held, len(queries))))
            clock.query()
            gradients, seconds = timed(partial(collect, some))
            clock.example()
            score_s += seconds
            scorer = Scorer(
                gradients.gradients,
                list(gradients.gradients),
                InMemorySequenceScoreWriter(len(train), len(some)),
                CPU,
                gradients.save_dtype,
            )
            found, seconds = timed(partial(collect, train, scorer))
            score_NQ[:, start : start + held] = found.scores
            score_s += seconds
    kept = "unprojected" if dimensions is None else f"projected to {dimensions} x {dimensions}"
    settings = f"{kept}, linear layers below the output, no biases, {gradients.save_dtype}"
    settings = f"{settings}; batches of {batch_rows}, queries of {held}"
    return Scored(score_NQ.T.numpy(), 0.0, score_s, settings, *clock.spent_s)


def _collected(
    model: Any,
    config: IndexConfig,
    processor: GradientProcessor,
    batch_rows: int,
    rows: Any,
    scorer: Scorer | None = None,
) -> InMemoryCollector:
    collector = InMemoryCollector(model=model.base_model, data=rows, cfg=config, processor=processor, scorer=scorer)
    every = range(len(rows))
    batches = [list(every[start : start + batch_rows]) for start in range(0, len(rows), batch_rows)]
    CollectorComputer(model, rows, collector=collector, batches=batches, cfg=config).run_with_collector_hooks()
    return collector


def _prepared(world: World) -> Any:
    model: Any = world.model().model
    model.requires_grad_(False)
    model.enable_input_require_grads()
    norm = next(part for part in reversed(list(model.base_model.modules())) if "Norm" in type(part).__name__)
    norm.weight.requires_grad_(True)  # the collector takes its dtype from what requires a gradient
    return model


def _dataset(rows: Rows) -> Any:
    """Texts as lists, without their padding."""
    ids, labels = rows.whole()
    lengths = _lengths(labels)
    columns = (("input_ids", ids), ("labels", labels))
    return Dataset.from_dict(
        {name: [row[:n] for row, n in zip(each.tolist(), lengths, strict=True)] for name, each in columns}
    )


def _lengths(label_NT: Tensor) -> list[int]:
    counted_NT = (label_NT != UNCOUNTED).long()
    found: list[int] = counted_NT.flip(1).cumsum(1).clamp(max=1).sum(1).tolist()
    return found
