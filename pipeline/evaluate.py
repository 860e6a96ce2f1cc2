"""Is a ranking right? Measures of scores against a known truth, and how far they would move with other queries.

Shapes: Q queries, N examples. What retraining says of scores is measured in `pipeline.judgements`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .importing import extra

CONFIDENCE = 0.95
RESAMPLES = 9999


@dataclass(frozen=True)
class Estimate:
    """A measured number and the 95 % interval in which it stands, all in the number's own unit."""

    value: float
    low: float
    high: float


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
    with extra("evaluate", "an interval"):
        from scipy.stats import bootstrap

    if np.ptp(value_Q) == 0:
        return float(value_Q[0]), float(value_Q[0])
    found = bootstrap(
        (value_Q,), np.mean, n_resamples=RESAMPLES, confidence_level=confidence, method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)


def mean_over(value_Q: np.ndarray) -> Estimate:
    """The mean over queries with its bootstrap interval."""
    return Estimate(float(np.mean(value_Q)), *interval(value_Q))


def proportion(hit_Q: np.ndarray) -> Estimate:
    """The share that is true, with Wilson's interval (Wilson 1927), which holds near 0 and 1 and for few queries."""
    with extra("evaluate", "an interval"):
        from scipy.stats import binomtest

    found = binomtest(int(np.sum(hit_Q)), len(hit_Q)).proportion_ci(CONFIDENCE, method="wilson")
    return Estimate(float(np.mean(hit_Q)), float(found.low), float(found.high))


def must_be_finite(**values: np.ndarray) -> None:
    """What is measured must be numbers, and there must be some.

    Raises:
        ValueError: One of the arrays is empty, or holds something that is not finite; it is named.
    """
    for name, value in values.items():
        if value.size == 0:
            raise ValueError(f"{name} is empty")
        if not np.isfinite(value).all():
            raise ValueError(f"{name}: {np.count_nonzero(~np.isfinite(value))} of {value.size} values are not finite")


@dataclass(frozen=True)
class OwnCopy:
    """Where Q queries, each a copy of one training example, rank that example.

    Args:
        rank_Q: Rank of the own copy, from 1.
        within: Per depth k, the share of queries whose own copy is among the first k.
    """

    rank_Q: np.ndarray
    within: Mapping[int, Estimate]


def own_copy(value_QN: np.ndarray, own_Q: np.ndarray, k: Sequence[int] = (1, 5), seed: int = 0) -> OwnCopy:
    """Is the query's own copy ranked first? Ranking by value, highest first; among equals chance decides, by seed.

    The leakage measure of Ko et al. 2024 (2402.08922): the leaked image ranked 1st, or among the first 5.

    Args:
        value_QN: What is ranked: scores, or a transform of them.
        own_Q: Column of each query's own copy.
        k: Depths.
        seed: Orders equal values.

    Raises:
        ValueError: A value is not finite, there are not as many own copies as queries, or one is outside of the examples.
    """
    must_be_finite(value_QN=value_QN)
    queries, examples = value_QN.shape
    if own_Q.shape != (queries,) or own_Q.min() < 0 or own_Q.max() >= examples:
        raise ValueError(f"own_Q: expected {queries} columns from 0 to {examples - 1}, got {own_Q}")
    chance = np.random.default_rng(seed)
    own_Q1 = own_Q[:, None]
    value_Q1 = np.take_along_axis(value_QN, own_Q1, axis=1)
    equal_Q = (value_QN == value_Q1).sum(axis=1)
    rank_Q = 1 + (value_QN > value_Q1).sum(axis=1) + chance.integers(0, equal_Q)
    return OwnCopy(rank_Q, {depth: proportion(rank_Q <= depth) for depth in k})


@dataclass(frozen=True)
class Detection:
    """How well a value finds the bad examples, such as mislabelled ones, when one inspects the most suspicious first.

    Args:
        auc: Probability that a bad example is more suspicious than a good one; .5 is chance.
        found: Per share inspected (rounded to whole examples), the share of all bad ones among them.
        inspected_P: Share of the examples inspected, from 0 to 1 in N steps; P = N + 1 points.
        found_P: Share of the bad ones found by then.
        count: Number of bad examples.
    """

    auc: float
    found: Mapping[float, float]
    inspected_P: np.ndarray
    found_P: np.ndarray
    count: int


def detection(value_N: np.ndarray, bad_N: np.ndarray, shares: Sequence[float] = (0.1, 0.2), seed: int = 0) -> Detection:
    """Area under the ROC curve, and what inspecting the most suspicious finds.

    Args:
        value_N: How suspicious each example is: higher is more. The negative score, where the query is clean data.
        bad_N: Which ones are bad.
        shares: Shares of the examples to inspect.
        seed: Orders equal values for inspection; the AUC counts a tie as a half.

    Raises:
        ValueError: A value is not finite, the shapes disagree, or the examples are all bad or all good.
    """
    with extra("evaluate", "detection"):
        from sklearn.metrics import roc_auc_score

    must_be_finite(value_N=value_N)
    if bad_N.shape != value_N.shape:
        raise ValueError(f"bad_N has shape {bad_N.shape}, value_N {value_N.shape}")
    is_bad_N = bad_N.astype(bool)
    examples, count = len(is_bad_N), int(is_bad_N.sum())
    if count in (0, examples):
        raise ValueError(f"{count} of {examples} examples are bad: nothing to tell apart")
    order_N = np.lexsort((np.random.default_rng(seed).random(examples), -value_N))
    found_P = np.concatenate([[0.0], np.cumsum(is_bad_N[order_N]) / count])
    return Detection(
        auc=float(roc_auc_score(is_bad_N, value_N)),
        found={share: float(found_P[round(share * examples)]) for share in shares},
        inspected_P=np.linspace(0.0, 1.0, examples + 1),
        found_P=found_P,
        count=count,
    )
