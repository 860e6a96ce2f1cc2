"""How much a curvature is damped: so much that the corpus's rows support nearly half of what is left of a gradient.

With v = (G + d I)^-1 g, the influence norm of a gradient g is sqrt(g' v), and g' v = v' G v + d v' v: a part that the sample's
rows bend, and a part that only the damping d holds. A small damping trusts every direction in which the sample happens not to
bend, a large one sees no curvature at all. Where the first part is SUPPORT of the whole, over the norms of some rows of the
corpus, retraining was foretold best on seven worlds (decision 19).

Shapes: Q examples in the place of queries, P numbers of the chosen parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import phases
from ..curvatures.base import Curvature, Parameters
from ..curvatures.gauss_newton import GaussNewton
from ..curvatures.rows import Rows, as_rows
from ..observe import say
from ..tasks.base import Batch
from .base import Setting

SUPPORT, FACTORED_SUPPORT = 0.45, 0.57
"""Share of influence norms that the sample's rows are to support: by the Gauss-Newton matrix, and by a factored one, which leaves
out what bends between layers and numbers."""
START, FACTOR = 0.01, 10.0
"""First damping tried, in nats; it is multiplied or divided until the right one lies between two."""
FARTHEST = 1e4
"""Times, or a part of, the curvature along gradients: dampings beyond are not tried."""
MOST_TRIED = 12
"""Dampings, about, that a search takes where it is long."""
CLOSE = 0.6
"""Logarithms of dampings between which support is a straight line."""
INVERTED_ROWS, OTHER_ROWS = 64, 16
"""Rows of the probe that take the place of queries: with a curvature that is inverted, and with one whose every solve goes
through the sample."""
VECTOR_BYTES = 4 << 30
"""Of vectors that are held for all rows together; fewer rows of a model so large that they do not fit."""
VECTORS_HELD, FEWEST_ROWS = 8, 4
DOT_COLUMNS = 1 << 16
"""Numbers of each row that a dot product takes at a time."""
_Norms = Callable[[float], tuple[Tensor, Tensor]]
"""Of a damping, the squares of rows' influence norms and what of them the sample supports, [Q] each."""


def choose_damping(setting: Setting, parameters: Parameters, curvature: Curvature) -> dict[str, float | str]:
    """The damping, and what speaks for it; the same at every worker.

    Args:
        setting: The sample.
        parameters: Those that move.
        curvature: Of the whole sample, loaded.

    Returns:
        `damping`, in nats; `damping_support`: every damping that was tried, with the share of influence norms that the sample
        supported. Empty if the loss does not bend.
    """
    fitting = VECTOR_BYTES // (VECTORS_HELD * parameters.size * 4)
    most = INVERTED_ROWS if _is_inverted(curvature) else OTHER_ROWS
    examples = single_examples(setting.probe, min(most, max(FEWEST_ROWS, fitting)))
    norms = _norms(curvature, torch.stack([_slope(setting, parameters, rows) for rows in examples]))
    tried: dict[float, float] = {}

    def support(damping: float) -> float:
        phases.at("damping", len(tried), MOST_TRIED, "tried")
        square_Q, part_Q = norms(damping)
        norm_Q = square_Q.clamp(min=0).sqrt()
        share_Q = torch.where(norm_Q > 0, part_Q / norm_Q.clamp(min=torch.finfo(norm_Q.dtype).tiny), 0.0)
        tried[damping] = float(share_Q.sum() / norm_Q.sum()) if norm_Q.sum() > 0 else 0.0
        return tried[damping]

    damping = supporting(support, SUPPORT if isinstance(curvature, GaussNewton) else FACTORED_SUPPORT)
    if damping is None:
        return {}
    return {
        "damping": damping,
        "damping_support": ", ".join(f"{each:.3g}: {tried[each]:.2f}" for each in sorted(tried)),
    }


def _is_inverted(curvature: Curvature) -> bool:
    return not isinstance(curvature, GaussNewton) or curvature.kernel is not None


def _norms(curvature: Curvature, slope_QP: Tensor) -> _Norms:
    if isinstance(curvature, GaussNewton) and curvature.kernel is not None:
        return curvature.kernel.norms(slope_QP)

    def norms(damping: float) -> tuple[Tensor, Tensor]:
        step_QP = curvature.solve(slope_QP, [damping])[0]
        square_Q = dot(slope_QP, step_QP)
        return square_Q, square_Q - damping * dot(step_QP, step_QP)

    return norms


def supporting(support: Callable[[float], float], wanted: float) -> float | None:
    """The damping with the support that is wanted, read off between two that are near; an end of the search, if it lies beyond.

    Args:
        support: Of a damping; falls where the damping grows.
        wanted: Between 0 and 1.

    Returns:
        None: nothing bends.
    """
    here, there = START, support(START)
    if not 0 < there < 1:
        return None
    bending = START * there / (1 - there)  # if all of it were of one curvature
    least, most = bending / FARTHEST, bending * FARTHEST
    found, before = {here: there}, here
    while (found[here] > wanted) == (there > wanted):
        if here < least if there <= wanted else here > most:
            say(
                f"warning: dampings from {min(found):.2g} to {max(found):.2g} were tried, and none is right: {here:.2g} is "
                "taken. Give producer.damping, and judge it by mirrorscope evaluate"
            )
            return here
        before, here = here, here * (FACTOR if there > wanted else 1 / FACTOR)
        found[here] = support(here)
    low, high = min(here, before), max(here, before)
    while math.log(high / low) > CLOSE:
        middle = math.sqrt(low * high)
        found[middle] = support(middle)
        low, high = (middle, high) if found[middle] > wanted else (low, middle)
    above = (found[low] - wanted) / max(found[low] - found[high], 1e-12)
    return low * (high / low) ** min(max(above, 0.0), 1.0)


def single_examples(batches: Sequence[Batch], number: int) -> list[list[Rows]]:
    """The first examples of batches, each as its rows, one by one."""
    found: dict[str, list[Rows]] = {}
    for batch_number, batch in enumerate(batches):
        rows = as_rows(batch, batch_number)
        for i, example in enumerate(rows.example_B):
            found.setdefault(example, []).append(rows.some(slice(i, i + 1)))
    return list(found.values())[:number]


def _slope(setting: Setting, parameters: Parameters, rows: Sequence[Rows]) -> Tensor:
    """Gradient [P] of an example's loss."""
    return torch.stack([float(row.weight_B[0]) * setting.slope(parameters, row) for row in rows]).sum(dim=0)


def dot(left_QP: Tensor, right_QP: Tensor) -> Tensor:
    """Dot products of rows, [Q], in float64; by pieces that stay in a processor's cache."""
    pieces = zip(left_QP.split(DOT_COLUMNS, dim=1), right_QP.split(DOT_COLUMNS, dim=1), strict=True)
    return torch.stack([torch.linalg.vecdot(left.double(), right.double()) for left, right in pieces]).sum(dim=0)
