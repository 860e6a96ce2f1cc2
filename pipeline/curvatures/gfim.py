"""The generalised Fisher matrix of every parameter matrix, inverted by Schulz's iteration: HyperINF (2410.05090).

For a parameter matrix [d, r] with per-example gradients g, GFIM = E[g g'] / r [d, d] (their equation 8), and the curvature is
taken to be GFIM for each of the r columns. The inverse of A = GFIM + damping I comes of matrix products alone (Schulz, 1933):

    X <- X (2 I - A X).

The paper starts at X = 5e-5 I, which converges only for eigenvalues of A below 4e4, and takes log2(1 / (5e-5 a)) iterations
for an eigenvalue a to arrive: 25 for a = 1e-3, so that what 20 iterations give still depends on the start. Here X starts at I
divided by a bound of A's eigenvalues, which always converges, in about log2(condition) + 5 iterations, and ends when it has.

Shapes: Q vectors, P numbers of the chosen parameters, b rows of a piece of a batch, D sides of a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import NumericsError
from ..numerics import to_loss_dtype
from ..tasks.base import Batch, Task
from .base import Parameters, Sample, fit_cost, units
from .cost import Cost
from .diagonal import mean_squares
from .fisher import with_drawn_labels
from .per_example import PerExample

LARGEST_SIDE = 16384
"""Matrices with more rows than this (embeddings) are left to the diagonal: a GFIM of them fills gigabytes."""
MOST_ITERATIONS = 60
"""Enough for condition numbers of 1e15, at which float64 has no digits left."""
CONVERGED = 1e-9
"""Norm of I - A X at which the iteration has converged."""
CONVERGING = 0.1
"""Norm of it from which on every iteration must bring it down, to about its square, unless rounding does not let it."""


class GFIM:
    """G = E[g g'] / r for each parameter matrix by itself. See Curvature.

    Tensors of more than two dimensions are matrices [first, rest]. Vectors, numbers and matrices of more than LARGEST_SIDE rows
    get the diagonal of their Fisher matrix.
    """

    def __init__(self, by_share: bool = False) -> None:
        self._by_share = by_share
        self._units: dict[str, float] = {}
        self._parameters: Parameters | None = None
        self._tensors: dict[str, Tensor] = {}
        self._damping: float | None = None
        self._inverses: dict[str, Tensor] = {}

    def fit(
        self, model: nn.Module, task: Task, parameters: Parameters, sample: Sample, seed: int
    ) -> Mapping[str, Tensor]:
        """See Curvature: under each parameter's name its GFIM [d, d], or its diagonal [*shape]."""
        drawn = with_drawn_labels(model, task, sample, seed, parameters.device)
        per_example = PerExample(model, task, parameters, drawn)
        slots = {name: tensor.detach() for name, tensor in parameters.tensors.items() if _is_matrix(tensor)}
        like = {name: tensor.new_zeros(()).expand(len(tensor), len(tensor)) for name, tensor in slots.items()}

        def products(batch: Batch) -> dict[str, Tensor]:
            total = {name: torch.zeros_like(to_loss_dtype(each)) for name, each in like.items()}
            for name, gradient in per_example.gradients(batch, slots):
                wide = gradient.flatten(2).transpose(0, 1).flatten(1)  # [d, b r]
                total[name] += wide @ wide.mT
            return total

        sums = drawn.sums(products, like, "curvature: matrices, batch") if like else {}
        matrices = {
            name: (total / drawn.rows / slots[name][0].numel()).to(to_loss_dtype(slots[name]).dtype)
            for name, total in sums.items()
        }
        others = [name for name in parameters.names if name not in slots]
        return matrices | (mean_squares(per_example, parameters, drawn, others) if others else {})

    def cost(self, model: nn.Module, task: Task, parameters: Parameters, sample: Sample, seed: int) -> Cost:
        """See Curvature."""
        return fit_cost(self, model, task, parameters, sample, seed)

    def load(
        self, model: nn.Module, task: Task, parameters: Parameters, sample: Sample, tensors: Mapping[str, Tensor]
    ) -> None:
        """See Curvature."""
        self._parameters, self._tensors, self._damping = parameters, dict(tensors), None
        named = parameters.tensors
        values = {name: each.diagonal() if _is_matrix(named[name]) else each for name, each in tensors.items()}
        self._units = units(values, self._by_share)

    def solve(self, slope_QP: Tensor, dampings: Sequence[float]) -> list[Tensor]:
        """See Curvature.

        Raises:
            NumericsError: The iteration does not converge: a damping is too small.
        """
        assert self._parameters is not None, "load it first"
        slopes = self._parameters.split(slope_QP)
        found = []
        for damping in dampings:
            self._invert(damping)
            solved = []
            for name, slope in slopes.items():
                if name in self._inverses:
                    solved_QDR = self._inverses[name] @ slope.flatten(2).to(self._inverses[name].dtype)
                    solved.append(solved_QDR.view(slope.shape))
                else:
                    solved.append(slope / (self._tensors[name] + damping * self._units[name]))
            found.append(self._parameters.flat(solved).to(slope_QP.dtype))
        return found

    def _invert(self, damping: float) -> None:
        """Have the inverses for a damping; those of the last one are kept."""
        if damping == self._damping:
            return
        assert self._parameters is not None
        self._inverses, self._damping = {}, None
        for name, tensor in self._parameters.tensors.items():
            if _is_matrix(tensor):
                matrix = self._tensors[name].double()
                eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
                self._inverses[name] = schulz_inverse(matrix + damping * self._units[name] * eye, name).to(
                    self._tensors[name].dtype
                )
        self._damping = damping


def _is_matrix(tensor: Tensor) -> bool:
    return tensor.ndim >= 2 and len(tensor) <= LARGEST_SIDE


def schulz_inverse(matrix_DD: Tensor, name: str) -> Tensor:
    """Inverse of a symmetric positive definite matrix by Schulz's iteration.

    The start is I over the largest absolute row sum, which bounds the eigenvalues: those of I - A X are then in [0, 1), and are
    squared by every iteration, until rounding stops it.

    Args:
        matrix_DD: The matrix, float64.
        name: Of what, for messages.

    Raises:
        NumericsError: It has not converged within MOST_ITERATIONS.
    """
    eye_DD = torch.eye(len(matrix_DD), dtype=matrix_DD.dtype, device=matrix_DD.device)
    inverse_DD, before = eye_DD / matrix_DD.abs().sum(dim=1).max(), math.inf
    for _ in range(MOST_ITERATIONS):
        product_DD = matrix_DD @ inverse_DD
        left = float((eye_DD - product_DD).norm())
        if left <= CONVERGED or before / 2 < left <= CONVERGING:
            return inverse_DD  # made symmetric, or X (A X), it would not bear rounding
        inverse_DD, before = inverse_DD @ (2 * eye_DD - product_DD), left
    raise NumericsError(
        f"{name}: Schulz's iteration has not inverted its GFIM in {MOST_ITERATIONS} steps", "raise producer.damping"
    )
