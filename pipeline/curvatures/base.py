"""The protocol of a curvature, and what all of them work on: chosen parameters as rows of numbers, and a sample of the corpus.

Shapes: Q vectors, P numbers of the chosen parameters, B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import phases
from ..blocks import tunable
from ..errors import NumericsError
from ..observe import say
from ..tasks.base import Batch, Task
from .cost import Cost, timed

_Value = TypeVar("_Value")


class Parameters:
    """Chosen parameters of a model; tied ones once.

    Args:
        model: The model; it is not changed.
        names: Theirs, at least one, all of them real; null for all that are.
    """

    def __init__(self, model: nn.Module, names: Sequence[str] | None = None) -> None:
        named = tunable(model)
        chosen = [name for name in named if not named[name].is_complex()] if names is None else names
        self.tensors: dict[str, Tensor] = {name: named[name] for name in chosen}
        self._sizes = [parameter.numel() for parameter in self.tensors.values()]

    @property
    def names(self) -> list[str]:
        """Their names."""
        return list(self.tensors)

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return next(iter(self.tensors.values())).device

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
            name: part.view((*vector.shape[:-1], *shape))  # a tuple: a number has no dimensions
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
        batches: Those of this worker: task column -> [B, *shape]. `Rows` say which examples their rows are of; in a plain one
            every row is an example.
        rows: Examples in all workers' batches together.
        numbers: Of this worker's batches among all that were drawn; empty for one worker that has them all.
    """

    batches: Sequence[Batch]
    rows: int
    numbers: Sequence[int] = ()

    def __post_init__(self) -> None:
        """Numbers from 0, where none were given."""
        if not self.numbers:
            object.__setattr__(self, "numbers", range(len(self.batches)))

    def __add__(self, other: Sample) -> Sample:
        """Both together."""
        return Sample([*self.batches, *other.batches], self.rows + other.rows, [*self.numbers, *other.numbers])

    @property
    def is_split(self) -> bool:
        """Whether there are other workers."""
        return dist.is_initialized() and dist.get_world_size() > 1

    def of_first(self, value: _Value) -> _Value:
        """Something that workers found out each by themselves, as the first one has it."""
        if not self.is_split:
            return value
        found = [value]
        dist.broadcast_object_list(found)
        return found[0]

    def first(self, device: torch.device) -> Sample:
        """The batch of the smallest number alone, at the worker that has it.

        Args:
            device: Of the workers' group.
        """
        least = torch.tensor(min(self.numbers, default=torch.iinfo(torch.int64).max), device=device)
        if self.is_split:
            dist.all_reduce(least, dist.ReduceOp.MIN)
        found = [i for i, number in enumerate(self.numbers) if number == least][:1]
        return Sample([self.batches[i] for i in found], self.rows, [self.numbers[i] for i in found])

    def sum(self, of_batch: Callable[[Batch], Tensor], like: Tensor) -> Tensor:
        """Sum of something over the batches of all workers, in float64 so that their number does not show.

        Args:
            of_batch: Gives a tensor like `like` of every batch.
            like: Says shape and device, for workers that hold no batch.
        """
        return self.sums(lambda batch: {"": of_batch(batch)}, {"": like})[""]

    def sums(
        self, of_batch: Callable[[Batch], Mapping[str, Tensor]], like: Mapping[str, Tensor], phase: str = ""
    ) -> dict[str, Tensor]:
        """The same of several things at once.

        Args:
            of_batch: Gives tensors like `like` of every batch.
            like: Names, shapes and devices.
            phase: What this pass is for, as a person is told; empty for what is not worth telling.
        """
        totals = {name: torch.zeros_like(each, dtype=torch.float64) for name, each in like.items()}
        for batch in phases.each(phase, "batches", self.batches) if phase else self.batches:
            for name, each in of_batch(batch).items():
                totals[name] += each
        if self.is_split:
            for total in totals.values():
                dist.all_reduce(total)
        return totals


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

    def cost(self, model: nn.Module, task: Task, parameters: Parameters, sample: Sample, seed: int) -> Cost:
        """What fitting it and solving by it cost, by what they take for a few rows. All workers must call it together."""
        ...

    def solve(self, slope_QP: Tensor, dampings: Sequence[float]) -> list[Tensor]:
        """(G + damping I)^-1 times every gradient, [Q, P], for each damping. All workers must call it with the same.

        Args:
            slope_QP: Right-hand sides.
            dampings: Added to the diagonal, above 0: in nats, or as shares (`units`).
        """
        ...


def fit_cost(
    curvature: Curvature, model: nn.Module, task: Task, parameters: Parameters, sample: Sample, seed: int
) -> Cost:
    """The cost of a curvature that takes a few passes through the sample, and next to nothing for a query."""
    return Cost(row_s=timed(lambda: curvature.fit(model, task, parameters, sample, seed))[1] / sample.rows)


def say_first(text: str) -> None:
    """A notice for a person, by the first of several workers that all know it."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        say(text)


def units(values: Mapping[str, Tensor], by_share: bool) -> dict[str, float]:
    """What a damping is counted in, for every part of a curvature: in nats, or in the mean of the part's own eigenvalues.

    The parts of a model are bent so differently that no damping in nats suits them all; a share of each one's mean does, as
    Grosse et al. have it (2308.03296).

    Args:
        values: Part -> its eigenvalues, of any shape. A part without curvature has the mean over all others.
        by_share: Whether dampings are shares.

    Returns:
        Part -> what a damping is multiplied by before it is added to the part's eigenvalues.

    Raises:
        NumericsError: Shares are asked for, and all eigenvalues are 0.
    """
    if not by_share:
        return dict.fromkeys(values, 1.0)
    means = {name: float(each.double().mean()) for name, each in values.items()}
    bent = [mean for mean in means.values() if mean > 0]
    if not bent:
        raise NumericsError("the corpus's loss does not bend: no natural step", "is the model certain of all its rows?")
    return {name: mean if mean > 0 else sum(bent) / len(bent) for name, mean in means.items()}
