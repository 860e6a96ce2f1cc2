"""The diagonal of the Fisher matrix, as in Attribution by Unlearning (Wang et al. 2024, 2406.09408).

Shapes: Q vectors, P numbers of the chosen parameters.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..numerics import to_loss_dtype
from ..tasks.base import Task
from .base import Parameters, Sample, fit_cost, units
from .cost import Cost
from .fisher import with_drawn_labels
from .per_example import PerExample


class Diagonal:
    """G = diagonal of the mean over the sample of g g', g an example's gradient. See Curvature."""

    def __init__(self, by_share: bool = False) -> None:
        self._by_share = by_share
        self._diagonal_P = self._unit_P = torch.empty(0)

    def fit(
        self, model: nn.Module, task: Task, parameters: Parameters, sample: Sample, seed: int
    ) -> Mapping[str, Tensor]:
        """See Curvature: a tensor of each parameter's shape, under its name."""
        drawn = with_drawn_labels(model, task, sample, seed, parameters.device)
        return mean_squares(PerExample(model, task, parameters, drawn), parameters, drawn, parameters.names)

    def cost(self, model: nn.Module, task: Task, parameters: Parameters, sample: Sample, seed: int) -> Cost:
        """See Curvature."""
        return fit_cost(self, model, task, parameters, sample, seed)

    def load(
        self, model: nn.Module, task: Task, parameters: Parameters, sample: Sample, tensors: Mapping[str, Tensor]
    ) -> None:
        """See Curvature."""
        self._diagonal_P = parameters.flat([tensors[name] for name in parameters.names])
        unit = units(tensors, self._by_share)
        self._unit_P = parameters.flat(
            [tensors[name].new_tensor(unit[name]).expand_as(tensors[name]) for name in parameters.names]
        )

    def solve(self, slope_QP: Tensor, dampings: Sequence[float]) -> list[Tensor]:
        """See Curvature."""
        assert len(self._diagonal_P), "load it first"
        return [(slope_QP / (self._diagonal_P + damping * self._unit_P)).to(slope_QP.dtype) for damping in dampings]


def mean_squares(
    per_example: PerExample, parameters: Parameters, sample: Sample, names: Collection[str]
) -> dict[str, Tensor]:
    """Mean over a sample of the squares of per-example gradients: name -> [*shape], float32 or better."""
    like = {name: parameters.tensors[name].detach() for name in parameters.names if name in names}

    sums = sample.sums(
        lambda batch: sums_of_squares(per_example.gradients(batch, names), like), like, "curvature: diagonals, batch"
    )
    return {name: (each / sample.rows).to(to_loss_dtype(like[name]).dtype) for name, each in sums.items()}


def sums_of_squares(gradients: Iterable[tuple[str, Tensor]], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sums over rows of the squares of gradients [b, *shape]: name -> [*shape], float32 or better."""
    total = {name: torch.zeros_like(to_loss_dtype(each)) for name, each in like.items()}
    for name, gradient in gradients:
        total[name] += (gradient**2).sum(dim=0)
    return total
