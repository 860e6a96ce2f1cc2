"""How much a curvature is damped, chosen on rows of the corpus that it was not fitted to.

A small damping trusts every direction in which the sample bends, noise too; a large one sees no curvature at all. What a natural
step v is for is to take one example's loss down (or up) at the least cost to all others. For example t joining a corpus of n
that is to first order the minimum of

    1/2 v' (G + H_t / n) v - v' g_t,

G the curvature of all examples, H_t that of t itself. So rows of the corpus take the place of queries, v is solved for with the
curvature of one half of the sample, and G is that of the other half: the damping whose steps do best there is taken, read off
between those that are tried.

A curvature that is not the sample's own (a diagonal, say) misses so much of it that its steps are ten times too long. That says
nothing against their direction, and a damping large enough to shorten them would leave nothing of it. So each is first scaled to
the length that does best on the rows that it was fitted to, and every row counts alike, whatever its gradient's length.

Shapes: Q rows in the place of queries, P numbers of the chosen parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ..curvatures.base import Curvature, Parameters, Sample
from ..curvatures.gauss_newton import GaussNewton, product
from ..curvatures.kernel import Kernel, damped
from ..curvatures.linearised import Linearised
from ..tasks.base import Batch
from .base import Setting

SHARES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
"""Dampings that are tried, as shares of the curvature along gradients."""
FINE_SHARES = (*SHARES, 3e-4, 1e-4, 3e-5, 1e-5)
"""The same for a curvature that is not exact: what it leaves out bends nothing, so that less noise is trusted by mistake."""
ROWS, FEWEST_ROWS = 64, 8
"""Rows of the probe that take the place of queries, at most; fewer of a model so large that their vectors fill VECTOR_BYTES."""
VECTOR_BYTES = 16 << 30
"""Of vectors that are held for all rows together."""
VECTORS_HELD = 8
"""For each row."""


def choose_damping(setting: Setting, parameters: Parameters, curvature: Curvature) -> dict[str, float | str]:
    """The damping, and what speaks for it; the same at every worker.

    Returns:
        `curvature_scale`: curvature along gradients of rows, in nats. `damping`: that which does best.
        `damping_tried`: every damping with its criterion, lower is better: in nats (of a curvature
        that is not exact, for gradients of length 1). Empty details if the loss does not bend.
    """
    fitting = VECTOR_BYTES // (VECTORS_HELD * parameters.size * 4)
    rows = single_rows(setting.probe, min(ROWS, max(FEWEST_ROWS, fitting)))
    slope_QP = torch.stack([setting.slope(parameters, row) for row in rows])
    if isinstance(curvature, GaussNewton):
        curvature.load(setting.base, setting.task, parameters, setting.everything, {})
        if curvature.kernel is not None:
            return by_kernel(setting, curvature.kernel, slope_QP)
    scale = _mean_share(dot(slope_QP, _bent(setting, parameters, setting.rest, slope_QP)), dot(slope_QP, slope_QP))
    if not scale > 0:
        return {"curvature_scale": scale}
    tensors = curvature.fit(setting.base, setting.task, parameters, setting.rest, setting.seed)
    curvature.load(setting.base, setting.task, parameters, setting.rest, tensors)
    if not curvature.exact:
        slope_QP = slope_QP / slope_QP.norm(dim=1, keepdim=True).clamp(min=torch.finfo(slope_QP.dtype).tiny)
    costs: dict[float, float] = {}
    for damping, step_QP in _steps(curvature, slope_QP, scale):
        scaled_QP = step_QP if curvature.exact else _scaled(setting, parameters, slope_QP, step_QP)
        costs[damping] = _cost(setting, parameters, rows, slope_QP, scaled_QP)
    return {"curvature_scale": scale, "damping": cheapest(costs), "damping_tried": _said(costs)}


def by_kernel(setting: Setting, kernel: Kernel, slope_QP: Tensor) -> dict[str, float | str]:
    """The same with the curvature's kernel, where no product with vectors is needed any more.

    With v = (g - S_r' c) / d, S_r the rows of S of the half of the sample that v is solved with, S v is (S g - S S_r' c) / d
    for the rows of the other half, and for those of a row that takes the place of a query.

    Args:
        setting: The sample.
        kernel: Of all of it.
        slope_QP: Gradients of the first rows of the probe.
    """
    along_KQ, square_Q = kernel.along(slope_QP), dot(slope_QP, slope_QP)
    rest_K, held_out_K = kernel.of(setting.rest.all_numbers()), kernel.of(setting.held_out.all_numbers())
    own_KQ = _own(setting, kernel, len(slope_QP)).to(along_KQ.device)
    rest_rr, others_Kr = kernel.inner_KK[rest_K][:, rest_K] / setting.rest.rows, kernel.inner_KK[:, rest_K]
    scale = _mean_share((along_KQ[rest_K] ** 2).sum(dim=0) / setting.rest.rows, square_Q)
    if not scale > 0:
        return {"curvature_scale": scale}

    def cost(damping: float) -> float:
        weight_rQ = damped(rest_rr, damping)(along_KQ[rest_K]) / setting.rest.rows
        bent_KQ = (along_KQ - others_Kr @ weight_rQ) / damping
        lowered_Q = (square_Q - (weight_rQ * along_KQ[rest_K]).sum(dim=0)) / damping
        bent_Q = (bent_KQ[held_out_K] ** 2).sum(dim=0) / setting.held_out.rows
        own_Q = ((bent_KQ * own_KQ) ** 2).sum(dim=0) / setting.rows
        return float((0.5 * (bent_Q + own_Q) - lowered_Q).mean())

    costs = {share * scale: cost(share * scale) for share in SHARES}
    return {"curvature_scale": scale, "damping": cheapest(costs), "damping_tried": _said(costs)}


def _own(setting: Setting, kernel: Kernel, queries: int) -> Tensor:
    """Which rows of S are those of each of the first rows of the probe: [K, Q]."""
    starts, own_KQ = [0], torch.zeros(kernel.rows, queries, dtype=torch.bool)
    for batch in setting.probe:
        starts.append(starts[-1] + len(next(iter(batch.values()))))
    for part in kernel.parts:
        if part.number < len(setting.probe):
            for place, row in enumerate(part.rows, part.start):
                if starts[part.number] + row < queries:
                    own_KQ[place, starts[part.number] + row] = True
    return own_KQ


def _said(costs: Mapping[float, float]) -> str:
    return ", ".join(f"{damping:.3g}: {cost:.4g}" for damping, cost in costs.items())


def cheapest(costs: Mapping[float, float]) -> float:
    """The lowest point of a parabola through the cheapest and its neighbours, over logarithms; at an end, the one there."""
    dampings = sorted(costs)
    at = dampings.index(min(costs, key=costs.__getitem__))
    if at in (0, len(dampings) - 1):
        return dampings[at]
    near = dampings[at - 1 : at + 2]
    bend, slope, _ = np.polyfit([math.log(each / near[1]) for each in near], [costs[each] for each in near], 2)
    return near[1] * math.exp(-slope / (2 * bend)) if bend > 0 else near[1]


def _steps(curvature: Curvature, slope_QP: Tensor, scale: float) -> Iterator[tuple[float, Tensor]]:
    """Every damping, the largest first, and steps with it; those of a factored curvature are not all held at once."""
    dampings = [share * scale for share in (SHARES if curvature.exact else FINE_SHARES)]
    if curvature.exact:
        yield from zip(dampings, curvature.solve(slope_QP, dampings), strict=True)
    else:
        yield from ((damping, curvature.solve(slope_QP, [damping])[0]) for damping in dampings)


def _scaled(setting: Setting, parameters: Parameters, slope_QP: Tensor, step_QP: Tensor) -> Tensor:
    """Steps, those shortened that are longer than lowers 1/2 v' G v - v' g most on the rows that the curvature was fitted to."""
    bent_Q = dot(step_QP, _bent(setting, parameters, setting.rest, step_QP))
    best_Q = dot(step_QP, slope_QP) / bent_Q.clamp(min=torch.finfo(bent_Q.dtype).tiny)
    return step_QP * best_Q.clamp(max=1.0).to(step_QP.dtype)[:, None]


def _cost(setting: Setting, parameters: Parameters, rows: Sequence[Batch], slope_QP: Tensor, step_QP: Tensor) -> float:
    """The criterion: mean over rows of 1/2 v' (G + H_t / n) v - v' g_t, in nats."""
    bent_QP = _bent(setting, parameters, setting.held_out, step_QP)
    own_QP = torch.stack(
        [
            Linearised(setting.base, setting.task, parameters, row).gauss_newton(step_P[None])[0]
            for row, step_P in zip(rows, step_QP, strict=True)
        ]
    )
    return float((0.5 * (dot(step_QP, bent_QP) + dot(step_QP, own_QP) / setting.rows) - dot(step_QP, slope_QP)).mean())


def _bent(setting: Setting, parameters: Parameters, sample: Sample, vector_QP: Tensor) -> Tensor:
    return product(setting.base, setting.task, parameters, sample, vector_QP)


def single_rows(batches: Sequence[Batch], rows: int) -> Sequence[Batch]:
    """The first rows of batches, each a batch of its own."""
    found = [
        {name: value[i : i + 1] for name, value in batch.items()}
        for batch in batches
        for i in range(len(next(iter(batch.values()))))
    ]
    return found[:rows]


def dot(left_QP: Tensor, right_QP: Tensor) -> Tensor:
    """Dot products of rows, [Q], in float64."""
    return (left_QP.double() * right_QP.double()).sum(dim=1)


def _mean_share(part_Q: Tensor, whole_Q: Tensor) -> float:
    """Mean of quotients, of those that have something to divide by; 0 if none has."""
    there_Q = whole_Q > 0
    return float((part_Q[there_Q] / whole_Q[there_Q]).mean()) if there_Q.any() else 0.0
