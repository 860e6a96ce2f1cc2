"""How far to go along a direction: far enough to stand above rounding, near enough that losses change in proportion.

Measured for every query on rows of the corpus. The derivative of a row's loss along the direction is known exactly; so a step's
loss differences, made as the engine makes them, can be compared with it. Short steps drown in rounding, long ones leave the
straight line, and the step at which the two errors together are smallest is taken.

Shapes: P numbers of the chosen parameters, N examples of the probe.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor, nn

from ..batches import own_copy
from ..curvatures.base import Parameters
from ..curvatures.linearised import Linearised
from ..curvatures.rows import as_rows, of_examples
from ..errors import NumericsError
from ..tasks.base import Batch, Task

RISES_NATS = (1.0, 0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)
"""Steps that are tried, by how much the query's loss would rise in proportion."""
FIRST_TRIED = 6
"""Of these: the search goes downhill from there, as rounding makes shorter steps worse and bending longer ones."""


@dataclass(frozen=True)
class Step:
    """A step along a direction, and how it was measured.

    Args:
        length: The direction is multiplied by it.
        rise_nats: What the query's loss rises by in proportion.
        linear_error: Its loss differences' distance from the derivative, relative to that, over the probe.
        half_step_difference: By how much twice the differences at half the step are off from them, relative to them.
    """

    length: float
    rise_nats: float
    linear_error: float
    half_step_difference: float

    @property
    def error(self) -> float:
        """The larger of the two: far out a loss may rise in proportion again, but not as its derivative says."""
        return max(self.linear_error, self.half_step_difference)


class Stepper:
    """Chooses steps, and takes them.

    Args:
        base: Base model in eval mode.
        task: Says what a loss is.
        parameters: Those that move.
        probe: Rows of the corpus, the same at all workers.
    """

    def __init__(self, base: nn.Module, task: Task, parameters: Parameters, probe: Sequence[Batch]) -> None:
        self._base, self._task, self._parameters = base, task, parameters
        self._probe = [as_rows(batch, number) for number, batch in enumerate(probe)]
        self._copy = copy.deepcopy(base)
        self._moved = Parameters(self._copy, parameters.names)

    def derivatives(self, direction_QP: Tensor) -> Tensor:
        """Exact derivatives of the probe's losses along directions: [Q, N], float64."""
        found = [
            Linearised(self._base, self._task, self._parameters, batch).loss_along(direction_QP)
            for batch in self._probe
        ]
        return of_examples(self._probe, torch.cat(found, dim=1).double())

    def choose(self, direction_P: Tensor, slope: float, expected_N: Tensor, rise_nats: float | None) -> Step:
        """The step along a direction.

        Args:
            direction_P: Direction.
            slope: Derivative of the query's loss along it, in nats.
            expected_N: The probe's losses' (`derivatives`).
            rise_nats: What the query's loss should rise by; null for what measures best.

        Raises:
            NumericsError: No step changes a loss of the probe.
        """
        rises_nats = RISES_NATS if rise_nats is None else (rise_nats,)
        lengths = [rise / slope for rise in rises_nats]

        @cache
        def differences_N(i: int) -> Tensor:
            return self._differences(direction_P, lengths[i])

        @cache
        def error(i: int) -> float:
            found = _relative(differences_N(i), lengths[i] * expected_N)
            return found if math.isfinite(found) else math.inf

        best = lowest(error, len(lengths), min(FIRST_TRIED, len(lengths) - 1))
        if not math.isfinite(error(best)):
            raise NumericsError(
                "no step along the query's direction changes a loss in proportion", "use a finer model.dtype"
            )
        twice_half_N = 2 * self._differences(direction_P, lengths[best] / 2)
        return Step(lengths[best], rises_nats[best], error(best), _relative(twice_half_N, differences_N(best)))

    def _differences(self, direction_P: Tensor, length: float) -> Tensor:
        """Change of the probe's losses [N] over a step, in float64 of losses as the engine has them."""
        return (self._losses(self.taken(length * direction_P)) - self._base_loss_N).double()

    @cached_property
    def _base_loss_N(self) -> Tensor:
        return self._losses(self._base)

    def _losses(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            losses_S = torch.cat([self._task.loss_B(model, own_copy(batch)) for batch in self._probe])
        return of_examples(self._probe, losses_S)

    def slope(self, change_P: Tensor, rows: Batch) -> Tensor:
        """Gradient [P] of the mean loss of some rows where a change has led."""
        model = self.taken(change_P)
        return self._moved.gradient(lambda: self._task.loss_B(model, own_copy(rows)).mean())

    def taken(self, change_P: Tensor) -> nn.Module:
        """The base with its parameters changed: one model, which the next call changes again."""
        with torch.no_grad():
            for name, change in self._parameters.split(change_P).items():
                torch.add(self._parameters.tensors[name], change, out=self._moved.tensors[name].data)
        return self._copy


def lowest(value: Callable[[int], float], values: int, start: int) -> int:
    """Where values are lowest, if they fall to there and rise beyond. Where all near the start are infinite, all are looked at.

    Args:
        value: Of each place.
        values: How many places.
        start: The place to begin at.
    """
    best = start
    while near := [i for i in (best - 1, best + 1) if 0 <= i < values and value(i) < value(best)]:
        best = min(near, key=value)
    return best if math.isfinite(value(best)) else min(range(values), key=value)


def _relative(found_N: Tensor, expected_N: Tensor) -> float:
    length = float(expected_N.norm())
    return float((found_N - expected_N).norm()) / length if length else math.inf
