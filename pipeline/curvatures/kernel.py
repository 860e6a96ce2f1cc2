"""The Gauss-Newton matrix of a sample by the inner products of its rows: inverted directly, for any damping.

Row i's part of the matrix is J_i' H_i J_i, J its outputs' derivatives and H the Hessian of its loss in the outputs. With mu and e
the eigenvalues and eigenvectors of H_i, that is the sum of s s' over s = sqrt(mu) J_i' e. With all these s as rows of a matrix S,
G = S'S / N, and by Woodbury's identity

    (G + d I)^-1 g = (g - S' (S S' / N + d I)^-1 S g / N) / d.

What is inverted is as large as S has rows, however many parameters there are, and S S' serves every damping and every part of the
sample.

Shapes: Q vectors, P numbers of the chosen parameters, N rows of the sample, B rows of a batch (b of a piece of it), D outputs of
a row, K rows of S.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import phases
from ..errors import NumericsError
from ..numerics import to_loss_dtype
from ..tasks.base import Batch, Task
from .base import Parameters, Sample
from .linearised import Linearised
from .output_slopes import OutputLoss, Pieces, flat, rows_of, with_slopes
from .per_example import PerExample
from .rows import as_rows

MOST_OUTPUTS = 128
"""Of a row; Hessians of more are not taken apart."""
MOST_KEPT, LEAST_KEPT = 0.95, 0.8
"""Of the trace of the sample's Hessians: as much as one row of S for each of the sample's has, between these (decision 19)."""
NOTHING = 1e-12
"""Of the largest eigenvalue: less is rounding."""
MOST_ROWS, MOST_BYTES, MOST_PRODUCTS = 6000, 2 << 30, 1e12
"""Of S, and multiplications for S S'. What is larger is not inverted directly."""
ENOUGH_ROWS = 512
"""Of the sample, where not all of it has room: by fewer, EK-FAC of all of it is better (decision 19)."""


@dataclass(frozen=True)
class _Bends:
    """How the losses of a batch's rows bend in the outputs.

    Args:
        number: The batch's, among all that were drawn.
        owner: The worker that holds it.
        first_B: Whether each row is the first of its example, so that examples are counted once.
        value_BD: Eigenvalues, the largest of each row first; null where rows have too many outputs.
    """

    number: int
    owner: int
    first_B: np.ndarray
    value_BD: np.ndarray | None


class TooLargeError(Exception):
    """S has no room, or rows have too many outputs."""


@dataclass(frozen=True)
class Part:
    """The rows of S that a batch has.

    Args:
        number: The batch's, among all that were drawn.
        owner: The worker that holds it.
        rows_D: Numbers of the batch's rows whose largest bend is kept, whose second largest is, ...: one for each row of S.
        start: Of its rows in S.
    """

    number: int
    owner: int
    rows_D: Sequence[np.ndarray]
    start: int

    @property
    def place(self) -> slice:
        """Of its rows in S."""
        return slice(self.start, self.start + sum(map(len, self.rows_D)))


class Kernel:
    """S and S S'. Every worker holds the rows of S that its batches have.

    Args:
        model: Base model in eval mode; not changed.
        task: Says what the loss is.
        parameters: Those that count as variables.
        sample: Rows. All workers must make it together.
        some: Whether the first rows of the sample will do, if they are enough.

    Raises:
        TooLargeError: It is not for this model and sample, at all workers alike.
    """

    def __init__(
        self, model: nn.Module, task: Task, parameters: Parameters, sample: Sample, some: bool = False
    ) -> None:
        self._parameters, self._sample = parameters, sample
        bends = _bends(model, task, parameters, sample)
        self.parts, rows = _with_room(bends, parameters.size, some)
        self.rows = self.parts[-1].place.stop
        """K."""
        first_N = np.concatenate([each.first_B for each in bends])
        self.of = sample.rows if rows == len(first_N) else max(1, int(first_N[:rows].sum()))
        """N."""
        parts = {part.number: part for part in self.parts}
        own = [
            (batch, parts[number])
            for number, batch in zip(sample.numbers, sample.batches, strict=True)
            if number in parts
        ]
        pieces = [
            _pieces(model, task, parameters, batch, part)
            for batch, part in phases.each("curvature: Hessians again, batch", "", own)
        ]
        first = [with_slopes(batch, *each[0]) for (batch, _), each in zip(own, pieces, strict=True)]
        looked_at = Sample(first, self.of, [part.number for _, part in own])
        per_example = PerExample(model, OutputLoss(task), parameters, looked_at)
        self._own = {
            part.number: rows_of(per_example, parameters, batch, each)
            for (batch, part), each in zip(phases.each("curvature: gradients, batch", "", own), pieces, strict=True)
        }
        self.inner_KK = self._inner()
        """S S', float64."""

    def along(self, vector_QP: Tensor) -> Tensor:
        """S times every vector: [K, Q], float64."""
        found_KQ = self.inner_KK.new_zeros(self.rows, len(vector_QP))
        for part in self.parts:
            if part.number in self._own:
                own = self._own[part.number]
                found_KQ[part.place] = (own @ vector_QP.to(own.dtype).mT).double()
        return self._summed(found_KQ)

    def back(self, weight_KQ: Tensor) -> Tensor:
        """S' times every column: [Q, P], float64."""
        found_QP = self.inner_KK.new_zeros(weight_KQ.shape[1], self._parameters.size)
        for part in self.parts:
            if part.number in self._own:
                own = self._own[part.number]
                found_QP += weight_KQ[part.place].mT.to(own.dtype) @ own
        return self._summed(found_QP)

    def solve(self, slope_QP: Tensor, damping: float) -> Tensor:
        """(G + damping I)^-1 times every vector: [Q, P]; each by itself, so that what is solved beside it does not show."""
        solve = damped(self.inner_KK / self.of, damping)
        found = []
        for slope_1P in phases.each("solving: query", "", slope_QP.split(1)):
            weight_K1 = solve(self.along(slope_1P)) / self.of
            found.append(((slope_1P.double() - self.back(weight_K1)) / damping).to(slope_QP.dtype))
        return torch.cat(found)

    def norms(self, slope_QP: Tensor) -> Callable[[float], tuple[Tensor, Tensor]]:
        """Of a damping d, with v the solve of a vector g: g' v = v' G v + d v' v, and v' G v, [Q] each, float64."""
        along_KQ, rows = self.along(slope_QP), self.of
        square_Q = (slope_QP.double() ** 2).sum(dim=1)

        def norms(damping: float) -> tuple[Tensor, Tensor]:
            weight_KQ = damped(self.inner_KK / rows, damping)(along_KQ) / rows
            whole_Q = (square_Q - (weight_KQ * along_KQ).sum(dim=0)) / damping
            return whole_Q, (weight_KQ**2).sum(dim=0) * rows  # S v = N w

        return norms

    def product(self, vector_QP: Tensor) -> Tensor:
        """G times every vector: [Q, P]."""
        return (self.back(self.along(vector_QP)) / self.of).to(vector_QP.dtype)

    def _inner(self) -> Tensor:
        """S S', a block for each pair of batches, so that the number of workers does not show."""
        like = self._parameters.tensors[self._parameters.names[0]].detach()
        inner_KK = like.new_zeros(self.rows, self.rows, dtype=torch.float64)
        for there in phases.each("curvature: inner products, batch", "", self.parts):
            block = self._own.get(there.number)
            if self._sample.is_split:
                if block is None:
                    block = to_loss_dtype(like.new_empty(0)).new_empty(
                        there.place.stop - there.start, self._parameters.size
                    )
                dist.broadcast(block, there.owner)
            for here in self.parts:
                if here.start <= there.start and here.number in self._own and block is not None:
                    inner_KK[here.place, there.place] = (self._own[here.number] @ block.mT).double()
        inner_KK = self._summed(inner_KK)
        return inner_KK.triu() + inner_KK.triu(1).mT

    def _summed(self, own: Tensor) -> Tensor:
        if self._sample.is_split:
            dist.all_reduce(own)
        return own


def damped(matrix_KK: Tensor, damping: float) -> Callable[[Tensor], Tensor]:
    """(matrix + damping I)^-1, as what multiplies columns by it.

    Raises:
        NumericsError: The damping is below what rounding leaves of the matrix.
    """
    factor_KK, failed = torch.linalg.cholesky_ex(matrix_KK + damping * torch.eye(len(matrix_KK)).to(matrix_KK))
    if failed:
        raise NumericsError(
            f"damping {damping:.2g} nats is too small: the Gauss-Newton matrix is known to its rounding only",
            "raise producer.damping, leave it out, or use a finer model.dtype",
        )
    return lambda column_KQ: torch.cholesky_solve(column_KQ, factor_KK)


def _bends(model: nn.Module, task: Task, parameters: Parameters, sample: Sample) -> list[_Bends]:
    """Of all workers' batches, in the order of their numbers. Raises NumericsError, TooLargeError."""
    rank = dist.get_rank() if sample.is_split else 0
    own = []
    for number, batch in zip(
        sample.numbers, phases.each("curvature: Hessians, batch", "", sample.batches), strict=True
    ):
        hessian_BDD = _hessians(model, task, parameters, batch)
        value_BD = None if hessian_BDD is None else torch.linalg.eigvalsh(hessian_BDD).flip(1).clamp(min=0)
        first_B = as_rows(batch).window_B == 0
        own.append(_Bends(number, rank, first_B, None if value_BD is None else value_BD.cpu().numpy()))
    gathered = [own]
    if sample.is_split:
        gathered = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, own)
    found = sorted((each for theirs in gathered for each in theirs), key=lambda each: each.number)
    if not found or any(each.value_BD is None for each in found):
        raise TooLargeError(f"outputs of more than {MOST_OUTPUTS} numbers for a row")
    return found


def _hessians(model: nn.Module, task: Task, parameters: Parameters, batch: Batch) -> Tensor | None:
    """Hessians of a batch's losses in its outputs, times the rows' weights: [B, D, D], float64.

    Returns:
        None where a row has too many outputs.

    Raises:
        NumericsError: One is not finite.
    """
    linearised = Linearised(model, task, parameters, batch)
    rows, outputs = len(linearised.loss_B), linearised.outputs
    if any(output.ndim < 1 or len(output) != rows for output in outputs):
        return None
    sizes = [output[0].numel() for output in outputs]
    if sum(sizes) > MOST_OUTPUTS:
        return None
    hessian = []
    for at in range(sum(sizes)):
        one_BD = outputs[0].new_zeros(rows, sum(sizes))
        one_BD[:, at] = 1
        change = [
            each.reshape(output.shape).to(output) for each, output in zip(one_BD.split(sizes, 1), outputs, strict=True)
        ]
        hessian.append(flat(linearised.bent(change)).detach())
    hessian_BDD = torch.stack(hessian, dim=1).double()
    if not hessian_BDD.isfinite().all():
        raise NumericsError(
            "the corpus's losses do not bend by finite numbers", "check the weights, and the corpus's rows"
        )
    return hessian_BDD


def most_rows(size: int) -> int:
    """Rows of S that there is room for, where each has so many numbers."""
    return min(MOST_ROWS, MOST_BYTES // (4 * size), int(math.sqrt(MOST_PRODUCTS / size)))


def _with_room(bends: Sequence[_Bends], size: int, some: bool) -> tuple[list[Part], int]:
    """What is kept of the whole sample, or of as many of its first rows as there is room for, and how many rows these are.

    Rows are counted, not batches, so that how they are cut into batches does not show. Raises TooLargeError.
    """
    most = most_rows(size)
    values = [each.value_BD for each in bends if each.value_BD is not None]
    starts = np.cumsum([0, *map(len, values)])

    def kept(rows: int) -> tuple[float, int]:
        """Least eigenvalue that is kept of so many rows, and how many are."""
        value_M = np.concatenate(
            [each[: max(0, rows - start)].ravel() for each, start in zip(values, starts, strict=False)]
        )
        least = _least(value_M, rows)
        return least, int((value_M >= least).sum())

    rows = fitting = int(starts[-1])
    if kept(rows)[1] > most:
        fitting = bisect.bisect_right(range(1, rows), most, key=lambda number: kept(number)[1])
    if not fitting or (fitting < rows and not (some and fitting >= ENOUGH_ROWS)):
        raise TooLargeError(f"{rows} rows of {size} numbers")
    least, parts = kept(fitting)[0], list[Part]()
    for each, value_BD, start in zip(bends, values, starts, strict=False):
        rows_D = [np.flatnonzero(value_b >= least) for value_b in value_BD[: max(0, fitting - start)].T]
        if sum(map(len, rows_D)):
            parts.append(Part(each.number, each.owner, rows_D, parts[-1].place.stop if parts else 0))
    return parts, fitting


def _least(value_M: np.ndarray, rows: int) -> float:
    """The least eigenvalue that is kept, of those of so many rows."""
    sorted_M = np.sort(value_M)[::-1]
    share_M = sorted_M.cumsum() / max(sorted_M.sum(), np.finfo(sorted_M.dtype).tiny)
    fewest, most = (1 + int((share_M < kept).sum()) for kept in (LEAST_KEPT, MOST_KEPT))
    return max(float(sorted_M[min(max(rows, fewest), most, len(sorted_M)) - 1]), NOTHING * float(sorted_M[0]))


def _pieces(model: nn.Module, task: Task, parameters: Parameters, batch: Batch, part: Part) -> Pieces:
    """Square roots of what is kept of a batch's Hessians: the largest of each row, the second largest, ...

    The Hessians are made again: to hold those of all batches would take more memory than S.
    """
    hessian_BDD = _hessians(model, task, parameters, batch)
    assert hessian_BDD is not None, "it was not too large before"
    value_BD, vector_BDD = torch.linalg.eigh(hessian_BDD)
    root_BDD = (vector_BDD * value_BD.clamp(min=0).sqrt()[:, None]).flip(2)  # the largest first
    like = parameters.tensors[parameters.names[0]]
    pieces = []
    for at, rows_b in enumerate(part.rows_D):
        if len(rows_b):
            row_b = torch.from_numpy(rows_b).to(root_BDD.device)
            pieces.append((row_b, to_loss_dtype(root_BDD[row_b, :, at].to(like.dtype))))
    return pieces
