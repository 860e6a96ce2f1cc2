"""How much a curvature is damped, chosen on rows of the corpus that it was not fitted to.

A small damping trusts every direction in which the sample bends, noise too; a large one sees no curvature at all. What a natural
step v is for is to take one example's loss down (or up) at the least cost to all others. For example t joining a corpus of n
that is to first order the minimum of

    1/2 v' (G + H_t / n) v - v' g_t,

G the curvature of all examples, H_t that of t itself. So rows of the corpus take the place of queries, v is solved for with the
curvature of the rest of the sample, and G is that of rows held out from both: the damping whose steps do best there is taken.

Shapes: Q rows in the place of queries, P numbers of the chosen parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..curvatures.base import Curvature, Parameters, Sample
from ..curvatures.gauss_newton import product
from ..curvatures.linearised import Linearised
from ..tasks.base import Batch
from .base import Setting

SHARES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
"""Dampings that are tried, as shares of the curvature along gradients."""
ROWS = 64
"""Rows of the probe that take the place of queries."""


def choose_damping(setting: Setting, parameters: Parameters, curvature: Curvature) -> dict[str, float | str]:
    """The damping, and what speaks for it; the same at every worker.

    Returns:
        `curvature_scale`: curvature along gradients of rows, in nats. `damping`: that which does best.
        `damping_tried`: every damping with its criterion, in nats; lower is better. Empty details if the loss does not bend.
    """
    rows = single_rows(setting.probe, ROWS)
    slope_QP = torch.stack([setting.slope(parameters, row) for row in rows])
    scale = _mean_share(dot(slope_QP, _bent(setting, parameters, setting.rest, slope_QP)), dot(slope_QP, slope_QP))
    if not scale > 0:
        return {"curvature_scale": scale}
    dampings = [share * scale for share in SHARES]
    tensors = curvature.fit(setting.base, setting.task, parameters, setting.rest, setting.seed)
    curvature.load(setting.base, setting.task, parameters, setting.rest, tensors)
    costs = [_cost(setting, parameters, rows, slope_QP, step_QP) for step_QP in curvature.solve(slope_QP, dampings)]
    best = min(range(len(costs)), key=costs.__getitem__)
    tried = ", ".join(f"{damping:.3g}: {cost:.4g}" for damping, cost in zip(dampings, costs, strict=True))
    return {"curvature_scale": scale, "damping": dampings[best], "damping_tried": tried}


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
