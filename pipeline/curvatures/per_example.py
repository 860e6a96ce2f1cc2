"""Gradients of every example of a batch by itself, for all chosen parameters.

Those of common layers come of one pass backwards for the whole batch, from both sides of the layer; of all other parameters, of
a pass for each example. Which may go the fast way is not guessed: on one batch their gradients are compared with autograd's.

Shapes: B rows of a batch (b of a piece of it), T positions, I inputs, O outputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import ContractError
from ..layers import Layer, Use, row_slices, uses_in, watched
from ..numerics import to_loss_dtype
from ..tasks.base import Batch, Task
from .base import Parameters, Sample
from .fisher import weighted_loss
from .linearised import StandIn
from .rows import as_rows

PIECE_BYTES = 1 << 28
"""Gradients of single examples that are held at a time, of one layer."""
LOOKED_AT = 4
"""Rows on which it is seen whether both sides of a layer make its gradients."""
TOLERANCE = 1e-2
"""By how much a gradient may be off from autograd's, relative to it; in half precision ten times as much."""


@dataclass(frozen=True)
class Seen:
    """Both sides of a layer with a matrix of weights, on a batch.

    Args:
        layer: The layer.
        input_BTI: What it was called with, with a 1 for the bias.
        slope_BTO: Gradients of each row's loss in what it returned.
    """

    layer: Layer
    input_BTI: Tensor
    slope_BTO: Tensor

    def sum_of_squares(self) -> Tensor:
        """Of the numbers of each row's gradient, over the rows: [O, I]."""
        if self.input_BTI.shape[1] == 1:  # the square of a product is the product of squares
            return (self.slope_BTO[:, 0] ** 2).mT @ self.input_BTI[:, 0] ** 2
        rows, numbers = len(self.input_BTI), self.input_BTI.shape[-1] * self.slope_BTO.shape[-1]
        pieces = row_slices(rows, numbers, PIECE_BYTES)
        squares = [((self.slope_BTO[piece].mT @ self.input_BTI[piece]) ** 2).sum(dim=0) for piece in pieces]
        return torch.stack(squares).sum(dim=0)


_Sides = list[tuple[Tensor, Tensor]]
"""Of every call of a layer: what it was given, and gradients of what it returned."""


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
        self._uses = uses_in(model, parameters.tensors)
        like = torch.zeros(len(parameters.names), device=parameters.device)
        few = slice(0, LOOKED_AT)
        first = sample.first(parameters.device)
        right = first.sum(lambda batch: self._right(as_rows(batch).some(few)).to(like), like).tolist()
        self.others = [name for name, each in zip(parameters.names, right, strict=True) if not each]
        """Parameters that take a pass for each example."""
        self._uses = [use for use in self._uses if not set(use.names) & set(self.others)]
        times = Counter(name for use in self._uses for name in use.names)
        self.layers = {
            use.weight: use
            for use in self._uses
            if isinstance(use, Layer) and all(times[name] == 1 for name in use.names)
        }
        """By the name of their weight, layers with a matrix of weights that nothing else uses."""

    def seen(self, batch: Batch, weights: Collection[str]) -> Iterator[Seen]:
        """The first of `both`."""
        return self.both(batch, weights, ())[0]

    def gradients(self, batch: Batch, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """The second of `both`."""
        return self.both(batch, (), names)[1]

    def both(
        self, batch: Batch, weights: Collection[str], names: Collection[str]
    ) -> tuple[Iterator[Seen], Iterator[tuple[str, Tensor]]]:
        """What layers see, and gradients of other parameters, by one pass.

        Args:
            batch: Rows.
            weights: Names of weights of `layers`.
            names: Of parameters.

        Returns:
            Both sides of the layers, one layer after the other; the calls of a layer after the first are further positions.
            Name and gradients [b, *shape] of the parameters, in pieces of the batch, float32 or better.

        Raises:
            ContractError: A layer was called with something that has not one entry for each row.
        """
        layers = [self.layers[name] for name in weights]
        uses = [use for use in self._uses if set(use.names) & set(names)]
        sides = self._sides(batch, [*layers, *uses]) if layers or uses else []
        return _seen(layers, sides[: len(layers)]), self._gradients(batch, names, uses, sides[len(layers) :])

    def _gradients(
        self, batch: Batch, names: Collection[str], uses: Sequence[Use], sides: Sequence[_Sides]
    ) -> Iterator[tuple[str, Tensor]]:
        """Of parameters: those whose layers were seen, and others by a pass for each row."""
        for group in _groups(uses):
            found = self._summed([uses[i] for i in group], [sides[i] for i in group])
            yield from ((name, each) for name, each in found if name in names)
        others = [name for name in self.others if name in names]
        for row in range(len(next(iter(batch.values()))) if others else 0):
            own = as_rows(batch).some(slice(row, row + 1))
            with torch.enable_grad(), self._parameters.differentiable():
                tensors = [self._parameters.tensors[name] for name in others]
                slopes = _gradients(weighted_loss(self._model, self._task, own).sum(), tensors)
            yield from ((name, to_loss_dtype(each)[None]) for name, each in zip(others, slopes, strict=True))

    def _summed(self, uses: Sequence[Use], sides: Sequence[_Sides]) -> Iterator[tuple[str, Tensor]]:
        """Name and gradients [b, *shape] of parameters that layers share, in pieces."""
        numbers = sum(self._parameters.tensors[name].numel() for name in {name for use in uses for name in use.names})
        rows = next((len(given) for calls in sides for given, _ in calls), 0)
        for piece in row_slices(rows, numbers, PIECE_BYTES):
            total: dict[str, Tensor] = {}
            for use, calls in zip(uses, sides, strict=True):
                for given, slope in calls:
                    for name, gradient in use.gradients(given[piece], slope[piece]).items():
                        total[name] = total[name] + gradient if name in total else gradient
            yield from total.items()

    def _sides(self, batch: Batch, uses: Sequence[Use]) -> list[_Sides]:
        """Of every layer both sides of its calls. Raises ContractError: they have not one entry for each row."""
        with torch.enable_grad(), self._parameters.differentiable(), watched(uses) as calls:
            loss_B = weighted_loss(StandIn(self._model, {}), self._task, batch)  # type: ignore[arg-type]
            slopes = iter(_gradients(loss_B.sum(), [output for each in calls for output in each.outputs]))
        for use, each in zip(uses, calls, strict=True):
            if any(len(given) != len(loss_B) for given in each.inputs):
                raise ContractError(
                    f"{use.names[0]}: its layer was called with {[list(given.shape) for given in each.inputs]} for "
                    f"{len(loss_B)} rows",
                    "leave it out by producer.parameters, or set producer.curvature to gauss_newton",
                )
        return [[(given, next(slopes)) for given in each.inputs] for each in calls]

    def _right(self, batch: Batch) -> Tensor:
        """Of every parameter whether what was seen of its layers makes its gradients on a batch: 1 or 0.

        Rows are weighted differently, so that a layer whose first axis is not that of rows shows; a weight that is used by
        other means too, not by a call of its layer, shows as well.
        """
        with torch.enable_grad(), self._parameters.differentiable() as tensors, watched(self._uses) as calls:
            loss_B = weighted_loss(StandIn(self._model, {}), self._task, batch)  # type: ignore[arg-type]
            slopes = iter(_gradients(loss_B.sum(), [output for each in calls for output in each.outputs]))
            weight_B = torch.arange(len(loss_B), device=loss_B.device).cos().to(loss_B.dtype)
            wanted = dict(zip(self._parameters.names, _gradients((weight_B * loss_B).sum(), tensors), strict=True))
        sides = [[(given, next(slopes)) for given in each.inputs] for each in calls]
        right: set[str] = set()
        for group in _groups(self._uses):
            try:
                weighted = [[(given, slope * _beside(weight_B, slope)) for given, slope in sides[i]] for i in group]
                found: dict[str, Tensor] = {}
                for name, gradient in self._summed([self._uses[i] for i in group], weighted):
                    found[name] = found.get(name, 0) + gradient.sum(dim=0)
                names = {name for i in group for name in self._uses[i].names}
                right |= names if _equal(found, {name: wanted[name] for name in names}) else set()
            except (RuntimeError, TypeError, ValueError, LookupError, AttributeError):
                continue  # one of them is not what it was taken for
        return torch.tensor([name in right for name in wanted])


def _seen(layers: Sequence[Layer], sides: Sequence[_Sides]) -> Iterator[Seen]:
    for layer, calls in zip(layers, sides, strict=True):
        if calls:
            yield Seen(
                layer,
                torch.cat([layer.inputs(given) for given, _ in calls], dim=1),
                torch.cat([layer.slopes(to_loss_dtype(slope)) for _, slope in calls], dim=1),
            )


def _beside(weight_B: Tensor, slope: Tensor) -> Tensor:
    """[B] as [B, 1, ...]. Raises ValueError: there are not so many rows."""
    if len(slope) != len(weight_B):
        raise ValueError(f"{len(slope)} rows of {len(weight_B)}")
    return weight_B.to(slope.dtype).view(-1, *[1] * (slope.ndim - 1))


def _equal(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    """Whether gradients of a layer agree, each relative to itself; one that is nothing but rounding, relative to the others."""
    whole = torch.stack([each.norm() for each in wanted.values()]).norm()
    for name, each in wanted.items():
        tolerance = TOLERANCE * (1 if each.dtype.itemsize >= 4 else 10)
        if name not in found or found[name].shape != each.shape:
            return False
        if not (found[name] - each).norm() <= tolerance * (each.norm() + tolerance * whole):
            return False
    return True


def _groups(uses: Sequence[Use]) -> list[list[int]]:
    """Numbers of uses, those together that share a parameter."""
    groups: list[tuple[set[str], list[int]]] = []
    for i, use in enumerate(uses):
        names, members = set(use.names), [i]
        for group in [group for group in groups if group[0] & names]:
            groups.remove(group)
            names, members = names | group[0], group[1] + members
        groups.append((names, members))
    return [members for _, members in groups]


def _gradients(loss: Tensor, of: Sequence[Tensor]) -> tuple[Tensor, ...]:
    if not (of and loss.requires_grad):
        return tuple(torch.zeros_like(each) for each in of)
    return torch.autograd.grad(loss, list(of), retain_graph=True, allow_unused=True, materialize_grads=True)
