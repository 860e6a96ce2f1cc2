"""Gradients of what a model returns: per-example gradients of a loss that is the outputs times slopes that are given.

Shapes: P numbers of the chosen parameters, B rows of a batch (b of them), D outputs of a row, K slopes of a batch's rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..numerics import to_loss_dtype
from ..records import Column
from ..tasks.base import Batch, Task
from .base import Parameters
from .linearised import StandIn
from .per_example import PerExample

_SLOPES = "slopes of outputs"
Pieces = list[tuple[Tensor, Tensor]]
"""Of a batch: numbers of some of its rows [b], and a slope of the outputs of each [b, D]."""


class OutputLoss:
    """A task whose loss is what the model returns for a row, times what stands beside the row."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def columns(self) -> list[Column]:
        """See Task."""
        return self._task.columns()

    def loss_B(self, model: Any, batch: Batch) -> Tensor:
        """See Task."""
        stand_in = model if isinstance(model, StandIn) else StandIn(model, {})
        self._task.loss_B(stand_in, {name: value for name, value in batch.items() if name != _SLOPES})  # type: ignore[arg-type]
        return (to_loss_dtype(flat(stand_in.outputs)) * batch[_SLOPES]).sum(dim=1)


def flat(outputs: Sequence[Tensor]) -> Tensor:
    """Outputs [B, *shape] as one [B, D]."""
    return torch.cat([output.flatten(1) for output in outputs], dim=1)


def with_slopes(batch: Batch, row_b: Tensor, slope_bD: Tensor) -> Batch:
    """Some rows of a batch, for OutputLoss: every slope by itself, whatever the rows count in their examples."""
    return {**{name: value[row_b] for name, value in batch.items()}, _SLOPES: slope_bD}


def rows_of(per_example: PerExample, parameters: Parameters, batch: Batch, bend: Pieces) -> Tensor:
    """Gradients of a batch's outputs times their slopes: [K, P], float32 or better."""
    found = []
    for row_b, slope_bD in bend:
        parts: dict[str, list[Tensor]] = {name: [] for name in parameters.names}
        for name, gradient in per_example.gradients(with_slopes(batch, row_b, slope_bD), parameters.names):
            parts[name].append(gradient)
        found.append(parameters.flat([torch.cat(parts[name]) for name in parameters.names]))
    return torch.cat(found)
