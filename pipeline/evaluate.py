"""Is a ranking right? Measures of scores against a known truth, and how far they would move with other queries.

Shapes: Q queries, N examples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 9999


@dataclass(frozen=True)
class Retrieval:
    """How well Q rankings find what is true, per query, each from 0 to 1.

    Args:
        reciprocal_rank_Q: One over the rank of the first true example, from 1.
        recall_Q: Share of a query's true examples that are among its first k.
        precision_Q: Share of its first k that are true.
    """

    reciprocal_rank_Q: np.ndarray
    recall_Q: np.ndarray
    precision_Q: np.ndarray


def retrieval(
    score_QN: np.ndarray, truth_QN: np.ndarray, k: int = 10, pool_QN: np.ndarray | None = None, seed: int = 0
) -> Retrieval:
    """Measures of rankings by score, highest first; among equals chance decides, by seed.

    Args:
        score_QN: Scores; every one must be finite.
        truth_QN: Which examples are true of a query, at least one each.
        k: Depth of recall and precision.
        pool_QN: Which examples are ranked for a query, the true ones among them; null for all.
        seed: Orders equal scores.

    Raises:
        ValueError: A query has nothing true in its pool, or a score is not finite.
    """
    ranked_QN = np.ones_like(truth_QN) if pool_QN is None else pool_QN
    if not np.isfinite(score_QN[ranked_QN]).all():
        raise ValueError("a score is not finite")
    chance = np.random.default_rng(seed)
    rows = []
    for score_N, truth_N, ranked_N in zip(score_QN, truth_QN, ranked_QN, strict=True):
        true_M = truth_N[ranked_N]
        if not true_M.any():
            raise ValueError("a query has no true example")
        order_M = np.lexsort((chance.random(len(true_M)), -score_N[ranked_N]))
        place_T = np.flatnonzero(true_M[order_M])
        found = int((place_T < k).sum())
        rows.append((1 / (1 + place_T[0]), found / len(place_T), found / k))
    return Retrieval(*np.asarray(rows, np.float64).T)


def interval(value_Q: np.ndarray, confidence: float = CONFIDENCE, seed: int = 0) -> tuple[float, float]:
    """Bootstrap interval of the mean over queries: percentiles of resampled means."""
    from scipy.stats import bootstrap

    if np.ptp(value_Q) == 0:
        return float(value_Q[0]), float(value_Q[0])
    found = bootstrap(
        (value_Q,), np.mean, n_resamples=RESAMPLES, confidence_level=confidence, method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)
