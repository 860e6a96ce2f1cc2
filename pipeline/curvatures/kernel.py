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

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import phases
from ..errors import NumericsError
from ..numerics import to_loss_dtype
from ..records import Column
from ..tasks.base import Batch, Task
from .base import Parameters, Sample
from .linearised import Linearised, StandIn
from .per_example import PerExample

MOST_OUTPUTS = 128
"""Of a row; Hessians of more are not taken apart."""
MOST_KEPT, LEAST_KEPT = 0.95, 0.8
"""Of the trace of a batch's Hessians: as much as one row of S for each of the batch's has, between these (decision 19)."""
NOTHING = 1e-12
"""Of the largest eigenvalue: less is rounding."""
MOST_ROWS, MOST_BYTES, MOST_PRODUCTS = 6000, 2 << 30, 1e12
"""Of S, and multiplications for S S'. What is larger is not inverted directly."""
ENOUGH_ROWS = 512
"""Of the sample, where not all of it has room: by fewer, EK-FAC of all of it is better (decision 19)."""
_SLOPES = "slopes of outputs"
_Pieces = list[tuple[Tensor, Tensor]]
"""Of a batch: numbers of some of its rows [b], and a sqrt(mu) e of each [b, D]."""


class TooLargeError(Exception):
    """S has no room, or rows have too many outputs."""


@dataclass(frozen=True)
class Part:
    """The rows of S that a batch has.

    Args:
        number: The batch's, among all that were drawn.
        owner: The worker that holds it.
        of: How many rows the batch has.
        rows: Numbers of the batch's rows that the rows of S belong to.
        start: Of its rows in S.
    """

    number: int
    owner: int
    of: int
    rows: tuple[int, ...]
    start: int

    @property
    def place(self) -> slice:
        """Of its rows in S."""
        return slice(self.start, self.start + len(self.rows))


class Kernel:
    """S and S S'. Every worker holds the rows of S that its batches have.

    Args:
        model: Base model in eval mode; not changed.
        task: Says what the loss is.
        parameters: Those that count as variables.
        sample: Rows. All workers must make it together.
        some: Whether the first batches of the sample will do, if they are enough.

    Raises:
        TooLargeError: It is not for this model and sample, at all workers alike.
    """

    def __init__(
        self, model: nn.Module, task: Task, parameters: Parameters, sample: Sample, some: bool = False
    ) -> None:
        self._parameters, self._sample = parameters, sample
        bends = [
            _bends(model, task, parameters, batch)
            for batch in phases.each("curvature: Hessians, batch", "", sample.batches)
        ]
        self.parts = _with_room(_parts(sample, bends), parameters.size, some)
        self.rows = self.parts[-1].place.stop
        """K."""
        self.of = sum(part.of for part in self.parts)
        """N."""
        numbers = {part.number for part in self.parts}
        bends = [bend if number in numbers else None for number, bend in zip(sample.numbers, bends, strict=True)]
        first = [_with_slopes(batch, *bend[0]) for batch, bend in zip(sample.batches, bends, strict=True) if bend]
        own = [number for number, bend in zip(sample.numbers, bends, strict=True) if bend]
        per_example = PerExample(model, _Outputs(task), parameters, Sample(first, self.of, own))
        self._own = {
            number: _rows(per_example, parameters, batch, bend)
            for number, batch, bend in zip(
                sample.numbers, phases.each("curvature: gradients, batch", "", sample.batches), bends, strict=True
            )
            if bend
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
                    block = to_loss_dtype(like.new_empty(0)).new_empty(len(there.rows), self._parameters.size)
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


class _Outputs:
    """A task whose loss is what the model returns for a row, times what stands beside the row."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def columns(self) -> list[Column]:
        """See Task."""
        return self._task.columns()

    def loss_B(self, model: Any, batch: Batch) -> Tensor:
        """See Task."""
        stand_in = model if isinstance(model, StandIn) else StandIn(model, {})
        self._task.loss_B(stand_in, {name: value for name, value in batch.items() if name != _SLOPES})  # type: ignore[arg-type]
        return (to_loss_dtype(_flat(stand_in.outputs)) * batch[_SLOPES]).sum(dim=1)


def _flat(outputs: Sequence[Tensor]) -> Tensor:
    return torch.cat([output.flatten(1) for output in outputs], dim=1)


def _with_slopes(batch: Batch, row_b: Tensor, slope_bD: Tensor) -> Batch:
    return {**{name: value[row_b] for name, value in batch.items()}, _SLOPES: slope_bD}


def _bends(model: nn.Module, task: Task, parameters: Parameters, batch: Batch) -> _Pieces | None:
    """Square roots of the Hessians of a batch's losses in its outputs: the largest of each row, the second largest, ...

    Returns:
        None where a row has too many outputs.

    Raises:
        NumericsError: A Hessian is not finite.
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
        hessian.append(_flat(linearised.bent(change)).detach())
    hessian_BDD = torch.stack(hessian, dim=1).double()
    if not hessian_BDD.isfinite().all():
        raise NumericsError(
            "the corpus's losses do not bend by finite numbers", "check the weights, and the corpus's rows"
        )
    value_BD, vector_BDD = torch.linalg.eigh(hessian_BDD)
    value_BD, vector_BDD = value_BD.flip(1).clamp(min=0), vector_BDD.flip(2)  # the largest first
    sorted_M = value_BD.flatten().sort(descending=True).values
    share_M = sorted_M.cumsum(0) / sorted_M.sum().clamp(min=torch.finfo(sorted_M.dtype).tiny)
    fewest, most = (1 + int((share_M < kept).sum()) for kept in (LEAST_KEPT, MOST_KEPT))
    least = float(sorted_M[min(max(rows, fewest), most, len(sorted_M)) - 1])
    root_BDD = vector_BDD * value_BD.sqrt()[:, None]
    pieces = []
    for at in range(sum(sizes)):
        row_b = (value_BD[:, at] >= max(least, NOTHING * sorted_M[0])).nonzero()[:, 0]
        if len(row_b):
            pieces.append((row_b, to_loss_dtype(root_BDD[row_b, :, at].to(outputs[0].dtype))))
    return pieces


def most_rows(size: int) -> int:
    """Rows of S that there is room for, where each has so many numbers."""
    return min(MOST_ROWS, MOST_BYTES // (4 * size), int(math.sqrt(MOST_PRODUCTS / size)))


def _with_room(parts: Sequence[Part], size: int, some: bool) -> list[Part]:
    """All parts, or the first of them that there is room for. Raises TooLargeError."""
    most = most_rows(size)
    fitting = [part for part in parts if part.place.stop <= most]
    if not fitting or (len(fitting) < len(parts) and not (some and sum(part.of for part in fitting) >= ENOUGH_ROWS)):
        raise TooLargeError(f"{parts[-1].place.stop if parts else 0} rows of {size} numbers")
    return fitting


def _parts(sample: Sample, bends: Sequence[_Pieces | None]) -> list[Part]:
    """The rows of S of all workers' batches, in the order of their numbers. Raises TooLargeError."""
    own = [
        (
            number,
            len(next(iter(batch.values()))),
            None if bend is None else tuple(row for b, _ in bend for row in b.tolist()),
        )
        for number, batch, bend in zip(sample.numbers, sample.batches, bends, strict=True)
    ]
    gathered = [own]
    if sample.is_split:
        gathered = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, own)
    parts: list[Part] = []
    found = [(number, owner, of, rows) for owner, theirs in enumerate(gathered) for number, of, rows in theirs]
    for number, owner, of, rows in sorted(found):
        if rows is None:
            raise TooLargeError(f"outputs of more than {MOST_OUTPUTS} numbers for a row")
        parts.append(Part(number, owner, of, rows, parts[-1].place.stop if parts else 0))
    return parts


def _rows(per_example: PerExample, parameters: Parameters, batch: Batch, bend: _Pieces) -> Tensor:
    """The rows of S that a batch has, [K, P], float32 or better."""
    found = []
    for row_b, slope_bD in bend:
        parts: dict[str, list[Tensor]] = {name: [] for name in parameters.names}
        for name, gradient in per_example.gradients(_with_slopes(batch, row_b, slope_bD), parameters.names):
            parts[name].append(gradient)
        found.append(parameters.flat([torch.cat(parts[name]) for name in parameters.names]))
    return torch.cat(found)
