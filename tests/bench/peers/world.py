"""What every peer is given: the model, the examples and their loss, as plain tensors; and what it gives back.

setup.json names the model by `factory`, package.module:function, whose weights are in model.safetensors, or by `folder`, in
Hugging Face format, with a `dtype`.

Shapes: N training examples, Q queries, B examples of a batch, T tokens, V classes or words.
"""

from __future__ import annotations

import copy
import importlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
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
        query_s: Those of score_s that went into the queries' gradients; 0 where the peer does not tell them apart.
        query_cpu_s: The same, of the CPU, of all threads.
    """

    score_QN: np.ndarray
    fit_s: float
    score_s: float
    settings: str
    query_s: float = 0.0
    query_cpu_s: float = 0.0


class QueryClock:
    """Seconds from the loss of a query to the next loss of an example, summed: what a peer does before it scores.

    Attributes:
        spent_s: By the clock, and of the CPU.
    """

    def __init__(self) -> None:
        self.spent_s = (0.0, 0.0)
        self._since_s: tuple[float, float] | None = None

    def query(self) -> None:
        """A query's loss is asked for."""
        self._since_s = self._since_s or (time.perf_counter(), time.process_time())

    def example(self) -> None:
        """An example's loss is asked for."""
        if self._since_s is not None:
            clock_s, cpu_s = self._since_s
            self.spent_s = (
                self.spent_s[0] + time.perf_counter() - clock_s,
                self.spent_s[1] + time.process_time() - cpu_s,
            )
            self._since_s = None


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
    """A folder of inputs: setup.json, the model, train.npz and queries.npz.

    Args:
        factory: Makes the model, in its dtype.
        weights: What is loaded into it; empty where the factory has loaded them.
        kind: What inputs and targets are.
        reduction: Loss of a text.
        train: Examples.
        queries: Queries.
        batch_rows: Examples of a batch that peers shall take; null for what suits each.
        temperature: What logits are divided by.
        query_rows: Queries that peers shall hold at a time, with a pass over the examples for each time; null for all.
    """

    factory: Callable[[], nn.Module]
    weights: dict[str, Tensor]
    kind: Kind
    reduction: Reduction
    train: Rows
    queries: Rows
    batch_rows: int | None = None
    temperature: float = 1.0
    query_rows: int | None = None

    @classmethod
    def read(cls, folder: Path) -> World:
        """The world of a folder."""
        setup = json.loads((folder / "setup.json").read_text())
        return cls(
            *(_pretrained(setup["folder"], setup["dtype"]) if "folder" in setup else _made(setup["factory"], folder)),
            setup["kind"],
            setup.get("reduction", REDUCTION),
            _rows(folder / "train.npz", setup["kind"]),
            _rows(folder / "queries.npz", setup["kind"]),
            temperature=setup.get("temperature", 1.0),
        )

    def model(self) -> Logits:
        """A fresh copy in eval mode, because peers wrap, hook and freeze what they are given."""
        model = self.factory()
        if self.weights:
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
        logits_MV = logits[:, :-1].flatten(0, 1).float()
        loss_M = F.cross_entropy(logits_MV, next_BT.flatten(), reduction="none", ignore_index=UNCOUNTED)
        loss_BT = loss_M.view(next_BT.shape)
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


def _made(factory: str, folder: Path) -> tuple[Callable[[], nn.Module], dict[str, Tensor]]:
    module, _, function = factory.partition(":")
    return getattr(importlib.import_module(module), function), safetensors.torch.load_file(folder / "model.safetensors")


def _pretrained(folder: str, dtype: str) -> tuple[Callable[[], nn.Module], dict[str, Tensor]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), local_files_only=True, trust_remote_code=False
    )
    return partial(copy.deepcopy, model), {}


def _rows(path: Path, kind: Kind) -> Rows:
    arrays = np.load(path)
    inputs, targets = (torch.from_numpy(arrays[column]) for column in COLUMNS[kind])
    return Rows(inputs, targets)
