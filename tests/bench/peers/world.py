"""What every peer is given: the model, the examples and their loss, as plain tensors; and what it gives back.

Shapes: N training examples, Q queries, B examples of a batch, T tokens, V classes or words.
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

Kind = Literal["classification", "causal_lm"]
Reduction = Literal["mean", "sum"]
Result = TypeVar("Result")

COLUMNS: dict[Kind, tuple[str, str]] = {"classification": ("features", "label"), "causal_lm": ("input_ids", "labels")}
REDUCTION: Reduction = "sum"
"""Loss of a text where setup.json does not say: the sum over its counted tokens."""
UNCOUNTED = -100
"""Label of a token whose loss does not count."""


class UnsupportedError(Exception):
    """The peer cannot do this model; the message says why."""


@dataclass(frozen=True)
class Scored:
    """What a peer found.

    Args:
        score_QN: Higher = training on the example lowers the query's loss more.
        fit_s: Seconds of what is done once for any queries.
        score_s: Seconds of what is done for these queries, the examples' own gradients included if they are not kept.
        settings: How the peer was run, in short words.
    """

    score_QN: np.ndarray
    fit_s: float
    score_s: float
    settings: str


class Rows(Dataset[tuple[Tensor, Tensor]]):
    """Inputs and targets that a loader takes by the batch: collating rows one by one costs more than a small model."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return self.inputs[row], self.targets[row]

    def __getitems__(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        index = torch.tensor(rows)
        return self.inputs[index], self.targets[index]

    def whole(self) -> tuple[Tensor, Tensor]:
        """All rows as one batch."""
        return self.inputs, self.targets

    def taken(self, rows: Tensor | slice) -> Rows:
        """Some of the rows, or some more than once."""
        return Rows(self.inputs[rows], self.targets[rows])

    def loader(self, batch_rows: int, collate: Callable[[Any], Any] | None = None) -> DataLoader[Any]:
        """Batches in order."""
        return DataLoader(self, min(batch_rows, len(self)), collate_fn=collate or as_it_is)


def as_it_is(batch: Any) -> Any:
    """The collate function for `Rows`, whose batches are ready."""
    return batch


class Logits(nn.Module):
    """A model that returns its logits as a tensor, whether it calls them so or not, divided by a temperature."""

    def __init__(self, model: nn.Module, temperature: float = 1.0) -> None:
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits [B, V] or [B, T, V]."""
        output = self.model(inputs)
        logits: Tensor = output if isinstance(output, Tensor) else output.logits
        return logits if self.temperature == 1.0 else logits / self.temperature


@dataclass(frozen=True)
class World:
    """A folder of inputs: setup.json, model.safetensors, train.npz and queries.npz; and batches that peers shall take, if any."""

    factory: Callable[[], nn.Module]
    weights: dict[str, Tensor]
    kind: Kind
    reduction: Reduction
    train: Rows
    queries: Rows
    batch_rows: int | None = None
    temperature: float = 1.0

    @classmethod
    def read(cls, folder: Path) -> World:
        """The world of a folder; `factory` in setup.json is package.module:function."""
        setup = json.loads((folder / "setup.json").read_text())
        module, _, function = setup["factory"].partition(":")
        return cls(
            getattr(importlib.import_module(module), function),
            safetensors.torch.load_file(folder / "model.safetensors"),
            setup["kind"],
            setup.get("reduction", REDUCTION),
            _rows(folder / "train.npz", setup["kind"]),
            _rows(folder / "queries.npz", setup["kind"]),
            temperature=setup.get("temperature", 1.0),
        )

    def model(self) -> Logits:
        """A fresh copy in eval mode, because peers wrap, hook and freeze what they are given."""
        model = self.factory()
        model.load_state_dict(self.weights)
        config: Any = getattr(model, "config", None)
        if config is not None:
            config.use_cache = False
        return Logits(model, self.temperature).eval()

    def loss_B(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss of each example, in nats."""
        if self.kind == "classification":
            return F.cross_entropy(logits, targets, reduction="none")
        next_BT = targets[:, 1:]
        loss_BT = F.cross_entropy(logits[:, :-1].transpose(1, 2), next_BT, reduction="none", ignore_index=UNCOUNTED)
        if self.reduction == "sum":
            return loss_BT.sum(dim=1)
        return loss_BT.sum(dim=1) / (next_BT != UNCOUNTED).sum(dim=1).clamp(min=1)

    def repeated(self, rows: int, queries: int = 1) -> World:
        """The first query or queries, and the training examples over and over, up to so many rows."""
        return replace(
            self,
            train=self.train.taken(torch.arange(rows) % len(self.train)),
            queries=self.queries.taken(slice(queries)),
        )

    def first(self, rows: int) -> World:
        """The first query and so many first training examples."""
        return replace(self, train=self.train.taken(slice(rows)), queries=self.queries.taken(slice(1)))


def timed(work: Callable[[], Result]) -> tuple[Result, float]:
    """What the work returns, and its seconds."""
    started_s = time.perf_counter()
    result = work()
    return result, time.perf_counter() - started_s


def _rows(path: Path, kind: Kind) -> Rows:
    arrays = np.load(path)
    inputs, targets = (torch.from_numpy(arrays[column]) for column in COLUMNS[kind])
    return Rows(inputs, targets)
