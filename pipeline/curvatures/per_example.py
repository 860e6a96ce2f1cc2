"""Gradients of every example of a batch by itself, for all chosen parameters.

Those of linear layers and convolutions come of one pass backwards for the whole batch: an example's gradient is the sum over
positions of output gradient times input. All others take a pass for each example. Which layers may go the fast way is not
guessed: on one batch their gradients are compared with autograd's.

Shapes: B rows of a batch (b of a piece of it), T positions, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import ContractError
from ..tasks.base import Batch, Task
from .base import Parameters, Sample
from .fisher import weighted_loss
from .layers import Layer, layers_in, row_slices, watched
from .linearised import StandIn

PIECE_BYTES = 1 << 28
"""Gradients of single examples that are held at a time, of one layer."""
TOLERANCE = 1e-2
"""By how much a layer's gradient may be off from autograd's, relative to it; in half precision ten times as much."""


@dataclass(frozen=True)
class Seen:
    """Both sides of a layer on a batch.

    Args:
        layer: The layer.
        input_BTI: What it was called with, with a 1 for the bias.
        slope_BTO: Gradients of each row's loss in what it returned.
    """

    layer: Layer
    input_BTI: Tensor
    slope_BTO: Tensor

    def gradients(self) -> Iterator[Tensor]:
        """Of its parameters, [b, O, I], in pieces of the batch."""
        rows, numbers = len(self.input_BTI), self.input_BTI.shape[-1] * self.slope_BTO.shape[-1]
        for piece in row_slices(rows, numbers, PIECE_BYTES):
            yield self.slope_BTO[piece].mT @ self.input_BTI[piece]

    def sum_of_squares(self) -> Tensor:
        """Of the numbers of these gradients, over the rows: [O, I]."""
        if self.input_BTI.shape[1] == 1:  # the square of a product is the product of squares
            return (self.slope_BTO[:, 0] ** 2).mT @ self.input_BTI[:, 0] ** 2
        return torch.stack([(gradient_bOI**2).sum(dim=0) for gradient_bOI in self.gradients()]).sum(dim=0)


class PerExample:
    """Gradients of a model's losses, weighted as the Fisher matrix wants them.

    Args:
        model: Base model in eval mode; not changed.
        task: Says what the loss is.
        parameters: Those that count.
        sample: Rows, its labels drawn; the first batch of it is looked at. All workers must do this together.
    """

    def __init__(self, model: nn.Module, task: Task, parameters: Parameters, sample: Sample) -> None:
        self._model, self._task, self._parameters = model, task, parameters
        candidates = layers_in(model, parameters)
        like = torch.zeros(len(candidates), device=parameters.device)
        right = sample.first(parameters.device).sum(lambda batch: self._right(candidates, batch).to(like), like)
        self.layers = {name: layer for (name, layer), each in zip(candidates.items(), right, strict=True) if each > 0}
        covered = {name for layer in self.layers.values() for name in layer.names}
        self.others = [name for name in parameters.names if name not in covered]

    def seen(self, batch: Batch, weights: Collection[str]) -> Iterator[Seen]:
        """Both sides of layers, one layer after the other.

        Args:
            batch: Rows.
            weights: Names of the layers' weights.

        Raises:
            ContractError: A layer was called with something that has not one entry for each row.
        """
        layers = {name: self.layers[name] for name in weights}
        with torch.enable_grad(), self._parameters.differentiable(), watched(layers) as calls:
            loss_B = weighted_loss(StandIn(self._model, {}), self._task, batch)  # type: ignore[arg-type]
            outputs = [output for each in calls.values() for output in each.outputs]
            slopes = iter(_gradients(loss_B.sum(), outputs))
        for name, layer in layers.items():
            inputs = calls[name].inputs
            mine = [next(slopes) for _ in inputs]
            if any(len(each) != len(loss_B) for each in inputs):
                raise ContractError(
                    f"{name}: its layer was called with {[list(each.shape) for each in inputs]} for {len(loss_B)} rows",
                    "leave it out by producer.parameters, or set producer.curvature to gauss_newton",
                )
            if inputs:
                yield _both_sides(layer, inputs, mine)

    def gradients(self, batch: Batch, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Name and gradients [b, *shape] of parameters, in pieces of the batch, float32 or better.

        Raises:
            ContractError: As `seen`.
        """
        layers = [weight for weight, layer in self.layers.items() if set(layer.names) & set(names)]
        for seen in self.seen(batch, layers) if layers else ():
            for gradient_bOI in seen.gradients():
                for name, gradient in seen.layer.parted(gradient_bOI).items():
                    if name in names:
                        yield name, gradient
        others = [name for name in self.others if name in names]
        for row in range(len(next(iter(batch.values()))) if others else 0):
            own = {name: value[row : row + 1] for name, value in batch.items()}
            with torch.enable_grad(), self._parameters.differentiable():
                tensors = [self._parameters.tensors[name] for name in others]
                found = _gradients(weighted_loss(self._model, self._task, own).sum(), tensors)
            for name, gradient in zip(others, found, strict=True):
                yield name, (gradient if gradient.dtype.itemsize >= 4 else gradient.float())[None]

    def _right(self, layers: dict[str, Layer], batch: Batch) -> Tensor:
        """Whether what was seen of each layer makes its gradients on a batch: 1 or 0.

        Rows are weighted differently, so that a layer whose first axis is not that of rows shows; a weight that is used by
        other means too (tied, or not by a call of its layer) shows as well.
        """
        with torch.enable_grad(), self._parameters.differentiable(), watched(layers) as calls:
            loss_B = weighted_loss(StandIn(self._model, {}), self._task, batch)  # type: ignore[arg-type]
            outputs = [output for each in calls.values() for output in each.outputs]
            slopes = iter(_gradients(loss_B.sum(), outputs))
            weight_B = torch.arange(len(loss_B), device=loss_B.device).cos().to(loss_B.dtype)
            names = [name for layer in layers.values() for name in layer.names]
            tensors = [self._parameters.tensors[name] for name in names]
            wanted = dict(zip(names, _gradients((weight_B * loss_B).sum(), tensors), strict=True))
        found = []
        for name, layer in layers.items():
            inputs = calls[name].inputs
            mine = [next(slopes) for _ in inputs]
            if not inputs or any(len(each) != len(loss_B) for each in inputs):
                found.append(False)
                continue
            seen = _both_sides(layer, inputs, mine)
            weighted_BTO = weight_B.to(seen.slope_BTO.dtype)[:, None, None] * seen.slope_BTO
            ours_OI = weighted_BTO.flatten(0, 1).mT @ seen.input_BTI.flatten(0, 1)
            theirs_OI = layer.joined({each: wanted[each][None].to(ours_OI.dtype) for each in layer.names})[0]
            tolerance = TOLERANCE * (1 if wanted[name].dtype.itemsize >= 4 else 10)
            found.append(bool((ours_OI - theirs_OI).norm() <= tolerance * theirs_OI.norm()))
        return torch.tensor(found, dtype=torch.float64)


def _both_sides(layer: Layer, inputs: list[Tensor], slopes: list[Tensor]) -> Seen:
    """Of all calls of a layer: those after the first are further positions."""
    return Seen(
        layer,
        torch.cat([layer.inputs(each) for each in inputs], dim=1),
        torch.cat([layer.slopes(each) for each in slopes], dim=1),
    )


def _gradients(loss: Tensor, of: list[Tensor]) -> tuple[Tensor, ...]:
    if not (of and loss.requires_grad):
        return tuple(torch.zeros_like(each) for each in of)
    return torch.autograd.grad(loss, of, retain_graph=True, allow_unused=True, materialize_grads=True)
