"""Models of several kinds, their tasks and random rows: what producer `retain` and its divergence are tried on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.curvatures.divergence import Divergence
from pipeline.extensions import load_task
from pipeline.records import Column
from pipeline.tasks.base import Batch, Task
from pipeline.tasks.classification import Classification
from tests import kinds
from tests.language import VOCABULARY, gpt
from tests.unit.test_spec import parse

FEATURES, CLASSES = kinds.FEATURES, kinds.CLASSES
TASK = Classification("features", "label", [FEATURES], temperature=2.0)
TEXTS = load_task(parse(task={"name": "causal_lm", "tokens": "ids"}).task)
SIZES = (20, 20, 7)
"""Rows of a sample's batches."""


class SquaredDistance:
    """A task of one's own, whose model is called as a model."""

    def columns(self) -> list[Column]:
        return [Column("features", ("features",), "float32", (FEATURES,))]

    def loss_B(self, model: nn.Module, batch: Batch) -> Tensor:
        distance_BC: Tensor = model(batch["features"]) - batch["wanted"]
        return 0.5 * distance_BC.square().sum(dim=1)


def perceptron() -> nn.Module:
    """Two layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES)).eval()


def normed() -> nn.Module:
    """A CNN whose batch norm has statistics of its own."""
    torch.manual_seed(0)
    before, behind = nn.Conv2d(1, 4, 2, padding=1), nn.Linear(36, CLASSES)
    model = nn.Sequential(nn.Unflatten(1, (1, 2, 2)), before, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), behind)
    model.train()(torch.randn(64, FEATURES))
    return model.eval()


def deep() -> nn.Module:
    """Layers enough for gradients to explode in, far from the base."""
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (nn.Linear(16, 16), nn.ReLU())]
    return nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU(), *layers, nn.Linear(16, CLASSES)).eval()


def rows(number: int, seed: int) -> dict[str, Tensor]:
    """Features, labels, and numbers that are wanted."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "features": torch.randn((number, FEATURES), generator=generator),
        "label": torch.randint(0, CLASSES, (number,), generator=generator),
        "wanted": torch.randn((number, CLASSES), generator=generator),
    }


def texts(number: int, seed: int) -> dict[str, Tensor]:
    """Token sequences of one length."""
    ids = torch.randint(0, VOCABULARY, (number, 10), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


Draw = Callable[[int, int], dict[str, Tensor]]
WORLDS: dict[str, tuple[Callable[[], nn.Module], Task, Draw]] = {
    "perceptron": (perceptron, TASK, rows),
    "CNN with batch norm": (normed, TASK, rows),
    "own task": (perceptron, SquaredDistance(), rows),
    "causal LM": (gpt, TEXTS, texts),
    "own task, deep": (deep, SquaredDistance(), rows),
    "learned temperature": (lambda: kinds.made(kinds.Scaled), TASK, rows),
    "complex": (lambda: kinds.made(kinds.ComplexParameter), TASK, rows),
    "in place": (lambda: kinds.made(kinds.InPlace), TASK, rows),
}
"""Kind -> how to make a model of it, its task, and what draws rows."""


def of_worlds(*names: str) -> Any:
    """Parametrise a test by worlds; by all of them if none is named. Language models are slow."""
    chosen = [
        pytest.param(*world, id=name, marks=[pytest.mark.slow] if world[1] is TEXTS else [])
        for name, world in WORLDS.items()
        if not names or name in names
    ]
    return pytest.mark.parametrize(("make", "task", "draw"), chosen)


def sample_of(draw: Draw, sizes: Sequence[int] = SIZES, seed: int = 1) -> list[dict[str, Tensor]]:
    """A sample of the corpus, in batches of these sizes."""
    parts = {name: value.split(list(sizes)) for name, value in draw(sum(sizes), seed).items()}
    return [{name: part[i] for name, part in parts.items()} for i in range(len(sizes))]


def untuned(base: nn.Module) -> nn.Module:
    """A copy that could be tuned."""
    return copy.deepcopy(base).requires_grad_(True)


def moved(base: nn.Module, length: float) -> nn.Module:
    """A copy whose parameters are a bit away from the base's."""
    torch.manual_seed(0)
    other = untuned(base)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += length * torch.randn_like(parameter)
    return other


def mean_divergence(held: Divergence, other: nn.Module) -> float:
    """Of a copy, over all batches, in nats per row."""
    return sum(held.of(untuned(other), i).item() for i in range(len(held.batches))) / len(held.batches)


def mean_loss(model: nn.Module, task: Task, batch: Batch) -> float:
    """Of some rows, in nats."""
    with torch.no_grad():
        return float(task.loss_B(model, {name: value.clone() for name, value in batch.items()}).mean())
