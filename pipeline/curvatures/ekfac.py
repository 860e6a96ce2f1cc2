"""The Fisher matrix layer by layer in a Kronecker-factored eigenbasis with corrected eigenvalues: EK-FAC.

George et al. 2018 (1806.03884), as used for influence by Grosse et al. 2023 (2308.03296). For a layer with inputs a (a 1 among
them for the bias) and output gradients d, an example's gradient is the matrix g = sum over positions of d a'. The eigenvectors
of E[a a'] and E[d d'] together are a basis in which the Fisher matrix is nearly diagonal; its diagonal there, E[(Q_d' g Q_a)^2],
is measured in a second pass.

Shapes: Q vectors, P numbers of the chosen parameters, B rows of a batch, T positions, I inputs of a layer, O outputs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..blocks import repeated
from ..layers import Layer, layers_in
from ..numerics import to_loss_dtype
from ..tasks.base import Batch, Task
from .base import Parameters, Sample, say_first, units
from .cost import TIMED_SIDE, Cost, eigenvectors_s, multiply_s, timed
from .diagonal import sums_of_squares
from .eigenvectors import eigenvectors
from .fisher import with_drawn_labels
from .per_example import PerExample, Seen

LARGEST_SIDE = 16384
"""Layers with more inputs or outputs than this (vocabularies) are left to the diagonal: a covariance of them fills gigabytes."""
NAMES_SHOWN = 3
_INPUTS, _OUTPUTS, _VALUES, _DIAGONAL = "input_basis", "output_basis", "eigenvalues", "diagonal"


class EKFAC:
    """G = Q diag(eigenvalues) Q' for each layer by itself, its weight and bias together. See Curvature.

    Layers are nn.Linear, nn.Conv1d, nn.Conv2d (without groups) and the Conv1D of transformers, called once or several times.
    All else gets the diagonal of its Fisher matrix: norms, embeddings, grouped convolutions, weights that are tied or used by
    other means than their layer's call (in nn.MultiheadAttention), layers that are not called with rows along the first axis,
    those with a side beyond LARGEST_SIDE, and of a language model what is outside of its blocks, the output layer above all:
    there the diagonal ranks better (decision 18).

    Args:
        by_share: Whether dampings are shares of each layer's mean eigenvalue, and of the mean of each diagonal.
    """

    def __init__(self, by_share: bool = False) -> None:
        self._by_share = by_share
        self._parameters: Parameters | None = None
        self._layers: dict[str, Layer] = {}
        self._tensors: dict[str, Tensor] = {}
        self._units: dict[str, float] = {}

    def fit(
        self, model: nn.Module, task: Task, parameters: Parameters, sample: Sample, seed: int
    ) -> Mapping[str, Tensor]:
        """See Curvature.

        Returns:
            Of every layer, by the name of its weight: `WEIGHT/input_basis` [I, I] and `WEIGHT/output_basis` [O, O], eigenvectors
            in columns, and `WEIGHT/eigenvalues` [O, I]. Of every other parameter `PARAMETER/diagonal` [*shape].
        """
        drawn = with_drawn_labels(model, task, sample, seed, parameters.device)
        per_example = PerExample(model, task, parameters, drawn)
        sides, others = _shared_out(model, task, parameters, per_example)
        if others:
            say_first(_what_is_factored(parameters, others, len(sides)))
        tensors = _bases_and_diagonal(_sums(per_example, drawn, sides, others, parameters), drawn, parameters)
        return tensors | _eigenvalues(per_example, drawn, sides, parameters, tensors)

    def cost(self, model: nn.Module, task: Task, parameters: Parameters, sample: Sample, seed: int) -> Cost:
        """See Curvature. The second pass is taken to last as long as the first."""
        drawn, draw_s = timed(lambda: with_drawn_labels(model, task, sample, seed, parameters.device))
        per_example, check_s = timed(lambda: PerExample(model, task, parameters, drawn))
        sides, others = _shared_out(model, task, parameters, per_example)
        _, pass_s = timed(lambda: _sums(per_example, drawn, sides, others, parameters))
        device, dtype = parameters.device, to_loss_dtype(next(iter(parameters.tensors.values()))).dtype
        at_once = torch.get_num_threads() if device.type == "cpu" else 1
        every = [n for side in sides.values() for n in side]
        eigen_s = eigenvectors_s(device, dtype, min(max(every, default=1), TIMED_SIDE)) * sum(n**3 for n in every)
        solve = sum(2 * outputs * inputs * (outputs + inputs) for outputs, inputs in sides.values())
        return Cost(
            once_s=check_s + eigen_s / at_once,
            row_s=(draw_s + 2 * pass_s) / sample.rows,
            query_s=pass_s / sample.rows + multiply_s(device, dtype) * solve,
        )

    def load(
        self, model: nn.Module, task: Task, parameters: Parameters, sample: Sample, tensors: Mapping[str, Tensor]
    ) -> None:
        """See Curvature."""
        layers = layers_in(model, parameters.tensors)
        self._layers = {name: layer for name, layer in layers.items() if f"{name}/{_VALUES}" in tensors}
        self._parameters, self._tensors = parameters, dict(tensors)
        values = {name: each for name, each in tensors.items() if name.endswith((_VALUES, _DIAGONAL))}
        self._units = units(values, self._by_share)

    def solve(self, slope_QP: Tensor, dampings: Sequence[float]) -> list[Tensor]:
        """See Curvature."""
        assert self._parameters is not None, "load it first"
        slopes, tensors = self._parameters.split(slope_QP), self._tensors
        turned = {name: self._turned(name, layer.joined(slopes)) for name, layer in self._layers.items()}
        found = []
        for damping in dampings:
            solved: dict[str, Tensor] = {}
            for name, layer in self._layers.items():
                divided_QOI = turned[name] / self._damped(f"{name}/{_VALUES}", damping)
                back_QOI = tensors[f"{name}/{_OUTPUTS}"] @ divided_QOI @ tensors[f"{name}/{_INPUTS}"].mT
                solved |= layer.parted(back_QOI)
            for name, slope in slopes.items():
                if name not in solved:
                    solved[name] = slope / self._damped(f"{name}/{_DIAGONAL}", damping)
            found.append(self._parameters.flat([solved[name] for name in slopes]).to(slope_QP.dtype))
        return found

    def _damped(self, part: str, damping: float) -> Tensor:
        return self._tensors[part] + damping * self._units[part]

    def _turned(self, name: str, matrix_QOI: Tensor) -> Tensor:
        """A gradient in a layer's eigenbasis."""
        input_II, output_OO = self._tensors[f"{name}/{_INPUTS}"], self._tensors[f"{name}/{_OUTPUTS}"]
        return output_OO.mT @ matrix_QOI.to(input_II.dtype) @ input_II


def _what_is_factored(parameters: Parameters, others: Sequence[str], layers: int) -> str:
    """A line for a person."""
    numbers = sum(parameters.tensors[name].numel() for name in others)
    more = f" and {len(others) - NAMES_SHOWN} more" if len(others) > NAMES_SHOWN else ""
    return (
        f"curvature: {layers} layers factored, {1 - numbers / parameters.size:.0%} of {parameters.size:,} numbers; by their "
        f"diagonals: {', '.join(others[:NAMES_SHOWN])}{more}"
    )


def _sides(layer: Layer, parameters: Parameters) -> tuple[int, int]:
    """Outputs and inputs of a layer, one more for a bias."""
    tensors = {name: parameters.tensors[name].detach()[None] for name in layer.names}
    _, outputs, inputs = layer.joined(tensors).shape
    return outputs, inputs


def _shared_out(
    model: nn.Module, task: Task, parameters: Parameters, per_example: PerExample
) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """Sides of the layers that are factored, by the names of their weights; parameters that are not."""
    sides = {name: _sides(layer, parameters) for name, layer in per_example.layers.items()}
    inside = repeated(model) if hasattr(task, "token_ids_BT") else sides.keys()
    sides = {name: each for name, each in sides.items() if max(each) <= LARGEST_SIDE and name in inside}
    kept = {name for weight in sides for name in per_example.layers[weight].names}
    return sides, [name for name in parameters.names if name not in kept]


def _bases_and_diagonal(sums: Mapping[str, Tensor], sample: Sample, parameters: Parameters) -> dict[str, Tensor]:
    """Eigenvectors of the covariances of every layer's inputs and output gradients, and the diagonal of other parameters."""
    found, covariances = dict[str, Tensor](), dict[str, Tensor]()
    for name, each in sums.items():
        slot = parameters.tensors[name.rsplit("/", 1)[0]]
        if name.endswith(_DIAGONAL):
            found[name] = (each / sample.rows).to(to_loss_dtype(slot).dtype)
        else:
            covariances[name] = each.to(to_loss_dtype(slot).dtype)
    return found | eigenvectors(covariances, sample)


def _sums(
    per_example: PerExample,
    sample: Sample,
    sides: Mapping[str, tuple[int, int]],
    others: Collection[str],
    parameters: Parameters,
) -> dict[str, Tensor]:
    """Sums over the sample: of products of layers' inputs, of their output gradients, and of squares of others' gradients.

    Positions at which a loss does not depend on the output (padding, what a pooling passed over) are left out: they have no part
    in any gradient.
    """
    slots = {name: tensor.detach() for name, tensor in parameters.tensors.items()}
    like: dict[str, Tensor] = {}
    for name, (outputs, inputs) in sides.items():
        like[f"{name}/{_INPUTS}"] = slots[name].new_zeros(()).expand(inputs, inputs)
        like[f"{name}/{_OUTPUTS}"] = slots[name].new_zeros(()).expand(outputs, outputs)
    diagonal = {name: slots[name] for name in others}

    def covariances_and_squares(batch: Batch) -> dict[str, Tensor]:
        found = {}
        every_seen, gradients = per_example.both(batch, sides, others)
        for seen in every_seen:
            slope_NO, input_NI = seen.slope_BTO.flatten(0, 1), seen.input_BTI.flatten(0, 1)
            there_N = (slope_NO != 0).any(dim=1)
            found[f"{seen.layer.weight}/{_INPUTS}"] = input_NI[there_N].mT @ input_NI[there_N]
            found[f"{seen.layer.weight}/{_OUTPUTS}"] = slope_NO.mT @ slope_NO
        return found | {f"{name}/{_DIAGONAL}": each for name, each in sums_of_squares(gradients, diagonal).items()}

    like |= {f"{name}/{_DIAGONAL}": each for name, each in diagonal.items()}
    return sample.sums(covariances_and_squares, like, "curvature: bases (pass 1 of 2), batch")


def _eigenvalues(
    per_example: PerExample,
    sample: Sample,
    sides: Mapping[str, tuple[int, int]],
    parameters: Parameters,
    bases: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Mean squares of per-example gradients in the eigenbasis: [O, I] of every layer."""
    like = {name: parameters.tensors[name].new_zeros(()).expand(side) for name, side in sides.items()}

    def squares(batch: Batch) -> dict[str, Tensor]:
        found = {}
        for seen in per_example.seen(batch, sides) if sides else ():
            name = seen.layer.weight
            turned = Seen(
                seen.layer, seen.input_BTI @ bases[f"{name}/{_INPUTS}"], seen.slope_BTO @ bases[f"{name}/{_OUTPUTS}"]
            )
            found[name] = turned.sum_of_squares()
        return found

    sums = sample.sums(squares, like, "curvature: eigenvalues (pass 2 of 2), batch")
    return {
        f"{name}/{_VALUES}": (total / sample.rows).to(to_loss_dtype(like[name]).dtype) for name, total in sums.items()
    }
