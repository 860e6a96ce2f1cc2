"""The world of the truth tests: 1,000 digits, an MLP and a CNN fitted to them, and producers tried on many queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from jobs.digits import cnn, load_digits, mlp
from pipeline import changes
from pipeline.batches import Arrays
from pipeline.engine import LossEngine
from pipeline.errors import NumericsError
from pipeline.producers.base import Producer
from pipeline.records import Transform
from pipeline.tasks.classification import Classification
from pipeline.topk import transform_value
from pipeline.tuner import query_seed

TRAIN_ROWS = 1000
BATCH_ROWS = 256
TASK = Classification("pixels", "label", [1, 8, 8])

MODELS = {"mlp": mlp, "cnn": cnn}


@dataclass(frozen=True)
class Fitted:
    """A model and the 1,000 examples that it was fitted to."""

    model: nn.Module
    examples: dict[str, np.ndarray]
    base_loss_N: np.ndarray

    def query(self, rows: Any) -> dict[str, torch.Tensor]:
        """Training rows as a query."""
        return {name: torch.from_numpy(array[rows]) for name, array in self.examples.items()}


def fit(
    name: str, epochs: int = 30, weight_decay: float = 5e-3, labels: np.ndarray | None = None, seed: int = 0
) -> Fitted:
    """SGD lr .05, momentum .9, batch 64."""
    pixels, truth = load_digits()
    examples = {
        "features": pixels[:TRAIN_ROWS].reshape(-1, 1, 8, 8),
        "label": truth[:TRAIN_ROWS] if labels is None else labels,
    }
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MODELS[name]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=weight_decay)
    x, y = torch.from_numpy(examples["features"]), torch.from_numpy(examples["label"])
    for _ in range(epochs):
        for rows in torch.randperm(TRAIN_ROWS, generator=generator).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    model.eval()
    return Fitted(model, examples, LossEngine(model, TASK, []).losses(Arrays(examples).batches(BATCH_ROWS)).base_N)


def score(fitted: Fitted, producer: Producer, query: dict[str, torch.Tensor], seed: int = 0) -> np.ndarray:
    """Scores [N] of every training example for one query. Raises NumericsError if the producer does, or losses are not finite."""
    produced = producer.produce(fitted.model, TASK, query, seed)
    found = changes.between(fitted.model, produced.model, produced.added)
    changed = {name: change for name, (change, _) in found.items()}
    loss_N = (
        LossEngine(fitted.model, TASK, [changed]).losses(Arrays(fitted.examples).batches(BATCH_ROWS)).counterpart_QN[0]
    )
    if not np.isfinite(loss_N).all():
        raise NumericsError("losses under the counterpart are not finite")
    return producer.direction * (loss_N.astype(np.float64) - fitted.base_loss_N)


def duplicates(fitted: Fitted, producer: Producer, queries: int, transform: Transform) -> dict[str, float]:
    """Training examples used as queries: how often is the query's own copy ranked first, or among five; and how many failed."""
    rows = torch.randperm(TRAIN_ROWS, generator=torch.Generator().manual_seed(1))[:queries].tolist()
    ranks, failed = [], 0
    for row in rows:
        try:
            score_N = score(fitted, producer, fitted.query([row]), query_seed(0, str(row)))
        except NumericsError:
            failed += 1
            continue
        value_N = transform_value(score_N, fitted.base_loss_N, transform, 1e-3)
        ranks.append(int((value_N > value_N[row]).sum()))
    found = np.array(ranks)
    return {
        "top1": float((found < 1).sum()) / queries,
        "top5": float((found < 5).sum()) / queries,
        "failed": failed / queries,
    }
