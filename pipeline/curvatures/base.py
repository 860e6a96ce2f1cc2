"""The protocol of a curvature, and what all of them work on: chosen parameters as rows of numbers, and a sample of the corpus.

Shapes: Q vectors, P numbers of the chosen parameters, B rows of a batch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import MAX_NAMES_SHOWN, ContractError
from ..tasks.base import Batch, Task


class Parameters:
    """Parameters of a model whose names match a pattern, in their order; tied ones once.

    Args:
        model: The model; it is not changed.
        pattern: Regular expression searched in their names; empty for all.

    Raises:
        ContractError: None matches.
    """

    def __init__(self, model: nn.Module, pattern: str = "") -> None:
        named = {name: parameter for name, parameter in model.named_parameters() if parameter.is_floating_point()}
        chosen: dict[str, Tensor] = {name: each for name, each in named.items() if re.search(pattern, name)}
        if not chosen:
            raise ContractError(
                f"producer.parameters: {pattern!r} matches none of {len(named)} parameters: "
                + ", ".join(list(named)[:MAX_NAMES_SHOWN])
            )
        self.pattern, self.tensors = pattern, chosen
        self._sizes = [parameter.numel() for parameter in chosen.values()]

    @property
    def names(self) -> list[str]:
        """Their names."""
        return list(self.tensors)

    @property
    def size(self) -> int:
        """P: how many numbers they are together."""
        return sum(self._sizes)

    def flat(self, tensors: Sequence[Tensor]) -> Tensor:
        """One tensor per parameter, [*shape] or [Q, *shape] each, as [P] or [Q, P]."""
        leading = tensors[0].ndim - next(iter(self.tensors.values())).ndim
        return torch.cat([tensor.reshape(*tensor.shape[:leading], -1) for tensor in tensors], dim=-1)

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """[P] or [Q, P] as name -> a view of [*shape] or [Q, *shape]."""
        parts = vector.split(self._sizes, dim=-1)
        shapes = (parameter.shape for parameter in self.tensors.values())
        return {
            name: part.view(*vector.shape[:-1], *shape)
            for name, part, shape in zip(self.tensors, parts, shapes, strict=True)
        }

    @contextmanager
    def differentiable(self) -> Iterator[list[Tensor]]:
        """They alone require gradients in the block, whatever the model's maker said."""
        before = [parameter.requires_grad for parameter in self.tensors.values()]
        for parameter in self.tensors.values():
            parameter.requires_grad_(True)
        try:
            yield list(self.tensors.values())
        finally:
            for parameter, required in zip(self.tensors.values(), before, strict=True):
                parameter.requires_grad_(required)

    def gradient(self, loss: Callable[[], Tensor]) -> Tensor:
        """Gradient [P] of a scalar."""
        with torch.enable_grad(), self.differentiable() as tensors:
            return self.flat(torch.autograd.grad(loss(), tensors, materialize_grads=True, allow_unused=True))


@dataclass(frozen=True)
class Sample:
    """Rows of the corpus that a curvature is measured on; each worker holds some of the batches.

    Args:
        batches: Those of this worker: task column -> [B, *shape].
        rows: Rows of all workers' batches together.
    """

    batches: Sequence[Batch]
    rows: int

    def __add__(self, other: Sample) -> Sample:
        """Both together."""
        return Sample([*self.batches, *other.batches], self.rows + other.rows)

    def sum(self, of_batch: Callable[[Batch], Tensor], like: Tensor) -> Tensor:
        """Sum of something over the batches of all workers, in float64 so that their number does not show.

        Args:
            of_batch: Gives a tensor like `like` of every batch.
            like: Says shape and device, for workers that hold no batch.
        """
        total = torch.zeros_like(like, dtype=torch.float64)
        for batch in self.batches:
            total += of_batch(batch)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(total)
        return total


class Curvature(Protocol):
    """A matrix G [P, P] that says how the corpus's loss bends, in a form that can be inverted."""

    def fit(
        self, model: nn.Module, task: Task, parameters: Parameters, sample: Sample, seed: int
    ) -> Mapping[str, Tensor]:
        """What must be kept to invert it: named tensors, the same at all workers; empty where nothing is.

        Raises:
            ContractError: The model or task does not fit.
        """
        ...

    def load(
        self, model: nn.Module, task: Task, parameters: Parameters, sample: Sample, tensors: Mapping[str, Tensor]
    ) -> None:
        """Make ready to solve, with what `fit` gave."""
        ...

    def solve(self, slope_QP: Tensor, dampings: Sequence[float]) -> list[Tensor]:
        """(G + damping I)^-1 times every gradient, [Q, P], for each damping. All workers must call it with the same.

        Args:
            slope_QP: Right-hand sides.
            dampings: Added to the diagonal, above 0.
        """
        ...
