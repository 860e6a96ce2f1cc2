"""The Gauss-Newton matrix itself: inverted directly where that is possible, else by conjugate gradients on its products.

Shapes: Q vectors, P numbers of the chosen parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .. import phases
from ..numerics import to_loss_dtype
from ..tasks.base import Task
from .base import Parameters, Sample
from .cost import Cost, multiply_s, timed
from .kernel import Kernel, TooLargeError, most_rows
from .linearised import Linearised

DAMPINGS = 6
"""About so many are tried to find one."""


class GaussNewton:
    """G = mean over the sample of J' H J. See Curvature. Nothing is saved of it.

    Samples of small models are inverted directly (`kernel.py`). With others every solve goes through the sample again and again.

    Args:
        iterations: Of conjugate gradients, at most.
        tolerance: A solve ends when no residual is longer than this share of its right-hand side.
        some: Whether some of the sample will do, if that can be inverted directly.
    """

    def __init__(self, iterations: int, tolerance: float, some: bool = False) -> None:
        self._iterations, self._tolerance, self._some = iterations, tolerance, some
        self._product: Callable[[Tensor], Tensor] | None = None
        self._sample: Sample | None = None
        self.kernel: Kernel | None = None
        """What inverts it directly, if anything does; there from `load` on."""

    def fit(
        self, model: nn.Module, task: Task, parameters: Parameters, sample: Sample, seed: int
    ) -> Mapping[str, Tensor]:
        """See Curvature."""
        return {}

    def load(
        self, model: nn.Module, task: Task, parameters: Parameters, sample: Sample, tensors: Mapping[str, Tensor]
    ) -> None:
        """See Curvature. The same sample again costs nothing."""
        if sample is self._sample:
            return
        self._sample, self._product = sample, partial(product, model, task, parameters, sample)
        try:
            self.kernel = Kernel(model, task, parameters, sample, self._some)
        except TooLargeError:
            self.kernel = None

    def cost(self, model: nn.Module, task: Task, parameters: Parameters, sample: Sample, seed: int) -> Cost:
        """See Curvature: of inverting it directly, where a few rows can be; else, without `some`, of conjugate gradients."""
        device, dtype = parameters.device, to_loss_dtype(next(iter(parameters.tensors.values()))).dtype
        try:
            kernel, kernel_s = timed(lambda: Kernel(model, task, parameters, sample))
        except TooLargeError:
            if self._some:
                return Cost(room=0)
            vector_1P = torch.ones(1, parameters.size, device=device, dtype=dtype)
            _, product_s = timed(lambda: product(model, task, parameters, sample, vector_1P))
            solve_s = self._iterations * product_s / sample.rows
            return Cost(row_s=DAMPINGS * solve_s, query_row_s=solve_s)
        each = kernel.rows / kernel.of
        factoring_s = (1 + DAMPINGS) * multiply_s(device, torch.float64) / 3
        return Cost(
            row_s=kernel_s / sample.rows,
            square_s=each**2 * parameters.size * multiply_s(device, dtype) / 2,
            cube_s=each**3 * factoring_s,
            query_row_s=2 * each * parameters.size * multiply_s(device, dtype),
            room=int(most_rows(parameters.size) / each),
        )

    def solve(self, slope_QP: Tensor, dampings: Sequence[float]) -> list[Tensor]:
        """See Curvature."""
        assert self._product is not None, "load it first"
        if self.kernel is not None:
            return [self.kernel.solve(slope_QP, damping) for damping in dampings]
        return conjugate_gradients(self._product, slope_QP, dampings, self._iterations, self._tolerance)


def product(model: nn.Module, task: Task, parameters: Parameters, sample: Sample, vector_QP: Tensor) -> Tensor:
    """The Gauss-Newton matrix of a sample times every vector: [Q, P]."""
    total_QP = sample.sum(
        lambda batch: Linearised(model, task, parameters, batch).gauss_newton(vector_QP), like=vector_QP
    )
    return (total_QP / sample.rows).to(vector_QP.dtype)


def conjugate_gradients(
    product: Callable[[Tensor], Tensor],
    b_QP: Tensor,
    dampings: Sequence[float],
    iterations: int,
    tolerance: float = 0.0,
) -> list[Tensor]:
    """Solve (A + damping I) x = b by conjugate gradients (Hestenes and Stiefel, 1952), each right-hand side by itself.

    Several dampings cost the products of one: all these systems have the same Krylov spaces, and the residual of each is a
    multiple of that of the least damped (Jegerlehner, hep-lat/9612014).

    Args:
        product: A times every row of [Q, P]; A symmetric, without negative eigenvalues.
        b_QP: Right-hand sides.
        dampings: Above 0.
        iterations: At most.
        tolerance: A right-hand side is done when the residual of the least damped is at most this share of it.

    Returns:
        x [Q, P] for each damping.
    """
    least = min(dampings)
    found = [torch.zeros_like(b_QP) for _ in dampings]
    directions = [b_QP.clone() for _ in dampings]
    residual_QP, direction_QP = b_QP.clone(), b_QP.clone()
    first_Q = length_Q = _dot(b_QP, b_QP)
    one_Q = torch.ones_like(length_Q)
    before = now = [one_Q for _ in dampings]
    step_before_Q, turn_Q = one_Q, torch.zeros_like(one_Q)
    for iteration in range(iterations):
        phases.at("conjugate gradients: iteration", iteration, iterations, "")
        active_Q = length_Q > tolerance**2 * first_Q  # one that is done stays as it is, whatever is solved beside it
        if not active_Q.any():
            break
        bent_QP = torch.zeros_like(b_QP)
        bent_QP[active_Q] = product(direction_QP[active_Q]) + least * direction_QP[active_Q]
        step_Q = -_share(length_Q * active_Q, _dot(direction_QP, bent_QP))
        after = [
            _share(
                here * was * step_before_Q,
                step_Q * turn_Q * (was - here) + was * step_before_Q * (1 - (damping - least) * step_Q),
            )
            for damping, was, here in zip(dampings, before, now, strict=True)
        ]
        residual_QP += step_Q.to(b_QP.dtype)[:, None] * bent_QP
        length_before_Q, length_Q = length_Q, _dot(residual_QP, residual_QP)
        turn_Q = _share(length_Q, length_before_Q)
        for i, (here, there) in enumerate(zip(now, after, strict=True)):
            own_step_Q = step_Q * _share(there, here)
            found[i] -= own_step_Q.to(b_QP.dtype)[:, None] * directions[i]
            own_turn_Q = turn_Q * _share(there * own_step_Q, here * step_Q)
            directions[i] = (
                there.to(b_QP.dtype)[:, None] * residual_QP + own_turn_Q.to(b_QP.dtype)[:, None] * directions[i]
            )
        direction_QP = residual_QP + turn_Q.to(b_QP.dtype)[:, None] * direction_QP
        before, now, step_before_Q = now, after, step_Q
    return found


def _dot(left_QP: Tensor, right_QP: Tensor) -> Tensor:
    return (left_QP.double() * right_QP.double()).sum(dim=1)


def _share(part_Q: Tensor, whole_Q: Tensor) -> Tensor:
    """Quotients; 0 where there is nothing to divide by."""
    return torch.where(whole_Q != 0, part_Q / torch.where(whole_Q != 0, whole_Q, 1.0), 0.0)
