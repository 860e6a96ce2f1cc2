"""How far a tuned copy's outputs on rows of the corpus are from the base model's, in nats.

The measure is the Bregman divergence of the task's loss: the loss under the copy, less what its straight line through the base's
outputs gives. For cross-entropy it is KL(base || copy), whatever the labels, for squared errors the squared distance of the
outputs. It is 0 at the base, and so is its gradient, where that of the loss itself is not: a copy that is held by it does not
drift. Its Hessian at the base is the Gauss-Newton matrix (Bae et al. 2022, 2209.05364).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..batches import own_copy
from ..errors import ContractError, NumericsError
from ..tasks.base import Batch, Task
from .base import Parameters
from .linearised import Linearised, StandIn, loss_of_outputs
from .rows import as_rows, weights

HELD_BYTES = 1 << 28
"""Of base outputs that are held; those beyond are computed at every use."""
POWER_ITERATIONS = 20
"""The curvature is the mean over the second half of them: within a few per cent on digits."""


@dataclass(frozen=True)
class _Line:
    """A batch's loss as a straight line in its outputs: what it is at the base's outputs, these, and its slopes there."""

    loss: Tensor
    outputs: list[Tensor]
    slopes: list[Tensor]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.outputs, *self.slopes))


class Divergence:
    """Divergences from one base model on a sample of the corpus.

    Args:
        base: A copy of the base model as it is tuned, but not tuned yet: what is to be tuned requires gradients.
        task: Says what the loss is.
        sample: Batches of rows; those without a finite loss are left out.

    Raises:
        ContractError: The task does not call the model, or no row has a loss.
    """

    def __init__(self, base: nn.Module, task: Task, sample: Sequence[Batch]) -> None:
        self._base, self._task = base, task
        with torch.no_grad():
            finite = [task.loss_B(base, own_copy(batch)).isfinite() for batch in sample]
        kept = zip(sample, finite, strict=True)
        self.batches = [as_rows(batch).some(is_B) for batch, is_B in kept if is_B.any()]
        if not self.batches:
            raise ContractError(
                "none of the rows drawn from the corpus has a finite loss", "is task right for this corpus?"
            )
        examples = sum(int((batch.window_B == 0).sum()) for batch in self.batches)
        self.examples_each = max(examples, 1) / len(self.batches)
        self._lines: dict[int, _Line] = {}

    def of(self, copy: nn.Module, number: int) -> Tensor:
        """Divergence of a copy on one of the batches: a scalar, in nats per example.

        A batch of fewer rows than others counts as much less: the mean over all batches is the mean over all examples.
        """
        line = self._line(number)
        stand_in = StandIn(copy, {})
        loss = self._mean(number, self._task.loss_B(stand_in, own_copy(self.batches[number])))  # type: ignore[arg-type]
        moved = zip(stand_in.outputs, line.outputs, line.slopes, strict=True)
        straight = sum((slope * (now - before)).sum() for now, before, slope in moved)
        return loss - line.loss - straight

    def _mean(self, number: int, loss_B: Tensor) -> Tensor:
        return (loss_B * weights(self.batches[number], loss_B)).sum() / self.examples_each

    def _line(self, number: int) -> _Line:
        """Computed as `of` computes, so that an untuned copy's divergence has no gradient, to the bit."""
        if number in self._lines:
            return self._lines[number]
        with torch.enable_grad():
            points, loss_B = loss_of_outputs(StandIn(self._base, {}), self._task, self.batches[number])
            loss = self._mean(number, loss_B)
            slopes = torch.autograd.grad(loss, points, allow_unused=True, materialize_grads=True)
        line = _Line(loss.detach(), [point.detach() for point in points], list(slopes))
        if line.nbytes + sum(held.nbytes for held in self._lines.values()) <= HELD_BYTES:
            self._lines[number] = line
        return line

    def largest_curvature(self, seed: int) -> float:
        """About the largest eigenvalue of the divergence's Hessian at the base, in nats: by power iteration, a batch each.

        Args:
            seed: Draws the first vector.

        Raises:
            ContractError: All that is tuned is complex.
            NumericsError: It is not a number above 0.
        """
        names = [name for name, each in self._base.named_parameters() if each.requires_grad and not each.is_complex()]
        if not names:
            raise ContractError(
                "all parameters that are chosen are complex", "the curvature is of real ones: choose some of these too"
            )
        parameters = Parameters(self._base, names)
        generator = torch.Generator().manual_seed(seed)
        vector_P = torch.randn(parameters.size, generator=generator, dtype=torch.float64).to(parameters.device)
        found = []
        like = next(iter(parameters.tensors.values()))
        for iteration in range(POWER_ITERATIONS):
            batch = self.batches[iteration % len(self.batches)]
            linearised = Linearised(self._base, self._task, parameters, batch)
            unit_P = vector_P / vector_P.norm()
            bent_P = linearised.gauss_newton(unit_P.to(like.dtype)[None])[0].double() / self.examples_each
            found.append(float(bent_P.norm()))
            vector_P = bent_P if found[-1] else vector_P  # of a batch that the model is certain of nothing is left
        curvature = math.fsum(last := found[POWER_ITERATIONS // 2 :]) / len(last)
        if not 0 < curvature < math.inf:
            raise NumericsError(
                f"the corpus's loss bends by {curvature} nats in the model's outputs: nothing holds them",
                "is the model certain of all rows, or is the loss a straight line in its outputs? Producer unlearn needs no hold",
            )
        return curvature
