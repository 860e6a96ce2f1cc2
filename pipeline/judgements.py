"""Are scores right? What retraining without some examples says of them.

Shapes: Q queries, N examples, S subsets of them, R retrainings on each subset, M random draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from .evaluate import CONFIDENCE, Estimate, mean_over, must_be_finite, proportion
from .importing import extra

RANK_RESAMPLES = 1999  # each sorts both columns anew
BATCH_VALUES = 1_000_000  # of resampled numbers held at once
ALL_HALVINGS_UP_TO = 8  # retrainings: at most 70 ways to halve them
HALVINGS = 64  # drawn at random from there on


@dataclass(frozen=True)
class LDS:
    """Linear datamodelling score: how well sums of scores foretell the loss of models retrained on subsets.

    Args:
        correlation_Q: Spearman correlation over the subsets, per query.
        mean: Over queries, with its bootstrap interval; subsets and retrainings are taken as given.
        standard_error: Of the mean over queries; null for one query.
        reliability: How well the truth agrees with itself, from its retrainings; null when each subset has but one.
    """

    correlation_Q: np.ndarray
    mean: Estimate
    standard_error: float | None
    reliability: float | None

    @property
    def ceiling(self) -> float | None:
        """The mean that scores of perfect foresight would get: sqrt(reliability) (Spearman 1904); 0 where there is none."""
        return None if self.reliability is None else math.sqrt(max(0.0, self.reliability))


def linear_datamodelling(score_QN: np.ndarray, inside_SN: np.ndarray, loss_SRQ: np.ndarray) -> LDS:
    """The linear datamodelling score (Park et al. 2023, TRAK, 2303.14186).

    Per query, the Spearman correlation over subsets between the sum of the scores of the examples inside and minus
    the query's loss, averaged over retrainings. Scores that foretell the same for every subset get 0.

    Args:
        score_QN: Scores, higher = more helpful to the query.
        inside_SN: Which examples each subset holds, bool.
        loss_SRQ: Loss of each query under each retraining on each subset, nats.

    Raises:
        ValueError: A score or a loss is not finite, the shapes disagree, or there are fewer than two subsets.
    """
    must_be_finite(score_QN=score_QN, loss_SRQ=loss_SRQ)
    (queries, examples), (subsets, retrainings, _) = score_QN.shape, loss_SRQ.shape
    if inside_SN.shape != (subsets, examples) or loss_SRQ.shape[2] != queries:
        raise ValueError(
            f"shapes disagree: score_QN {score_QN.shape}, inside_SN {inside_SN.shape}, loss_SRQ {loss_SRQ.shape}"
        )
    if subsets < 2:
        raise ValueError("one subset cannot be correlated: at least two are needed")
    gain_RQS = -loss_SRQ.astype(np.float64).transpose(1, 2, 0)
    correlation_Q = _spearman(_foretold(score_QN.astype(np.float64), inside_SN), gain_RQS.mean(axis=0))
    error = float(correlation_Q.std(ddof=1)) / math.sqrt(queries) if queries > 1 else None
    reliability = None if retrainings < 2 else float(_reliability(gain_RQS).mean())
    return LDS(correlation_Q, mean_over(correlation_Q), error, reliability)


def _foretold(score_QN: np.ndarray, inside_SN: np.ndarray) -> np.ndarray:
    """Sum of the scores inside of each subset, less a constant per query.

    Scores are taken from their median first: else a common offset would leave rounding errors, which rank.
    """
    middle_Q1 = np.median(score_QN, axis=1, keepdims=True)
    size_S = inside_SN.sum(axis=1)
    return (score_QN - middle_Q1) @ inside_SN.T.astype(np.float64) + middle_Q1 * (size_S - size_S[0])


def _reliability(gain_RQS: np.ndarray) -> np.ndarray:
    """Per query, the Spearman correlation of halves of the retrainings, stepped up to the length of all of them.

    Spearman-Brown: `k r / (1 + (k - 1) r)` for k times the length. On a negative r it is mirrored: chance halves
    then average to 0 instead of running to minus infinity.
    """
    retrainings = len(gain_RQS)
    halves = [
        _spearman(gain_RQS[list(first)].mean(axis=0), gain_RQS[list(second)].mean(axis=0))
        for first, second in _halvings(retrainings)
    ]
    r_Q = np.mean(halves, axis=0)
    longer = retrainings / (retrainings // 2)
    return longer * r_Q / (1 + (longer - 1) * np.abs(r_Q))


def _halvings(count: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Ways to cut so many retrainings into two of the same size; of an odd number one is left out."""
    half = count // 2
    if count > ALL_HALVINGS_UP_TO:
        chance = np.random.default_rng(0)
        for _ in range(HALVINGS):
            order = tuple(chance.permutation(count).tolist())
            yield order[:half], order[half : 2 * half]
        return
    for kept in combinations(range(count), 2 * half):
        for others in combinations(kept[1:], half - 1):
            first = (kept[0], *others)
            yield first, tuple(i for i in kept if i not in first)


def _spearman(x_QN: np.ndarray, y_QN: np.ndarray) -> np.ndarray:
    """Rank correlations along the last axis, ties at their mean rank; 0 where one side is constant."""
    with extra("evaluate", "a rank correlation"):
        from scipy.stats import rankdata

    middle = (x_QN.shape[-1] + 1) / 2
    x_QN, y_QN = rankdata(x_QN, axis=-1) - middle, rankdata(y_QN, axis=-1) - middle
    scale_Q = np.sqrt((x_QN**2).sum(axis=-1) * (y_QN**2).sum(axis=-1))
    return np.clip((x_QN * y_QN).sum(axis=-1) / np.where(scale_Q > 0, scale_Q, 1.0), -1.0, 1.0)


@dataclass(frozen=True)
class Agreement:
    """How two numbers of the same examples go together.

    Args:
        pearson: Linear correlation, with Fisher's interval; of several queries the mean, with a bootstrap interval over them.
        spearman: Rank correlation, with a bootstrap interval over examples, or over queries.
        count: Number of pairs.
    """

    pearson: Estimate
    spearman: Estimate
    count: int


def agreement(x_N: np.ndarray, y_N: np.ndarray, seed: int = 0) -> Agreement:
    """Pearson and Spearman correlation, such as of P1 and P2 (Ko et al. 2024); 0 when one side is constant.

    Args:
        x_N: One number per example, any unit.
        y_N: The other.
        seed: Draws the resamples.

    Raises:
        ValueError: A number is not finite, the shapes disagree, or there are fewer than three examples.
    """
    with extra("evaluate", "a correlation"):
        from scipy.stats import bootstrap, pearsonr

    must_be_finite(x_N=x_N, y_N=y_N)
    if x_N.shape != y_N.shape or x_N.ndim != 1 or len(x_N) < 3:
        raise ValueError(f"expected two columns of at least 3 numbers, got shapes {x_N.shape} and {y_N.shape}")
    x_N, y_N = x_N.astype(np.float64), y_N.astype(np.float64)
    if np.ptp(x_N) == 0 or np.ptp(y_N) == 0:
        return Agreement(Estimate(0.0, 0.0, 0.0), Estimate(0.0, 0.0, 0.0), len(x_N))
    # correlations do not see an offset; without it no digits are lost to it
    x_N, y_N = x_N - np.median(x_N), y_N - np.median(y_N)
    linear = pearsonr(x_N, y_N)
    inside = linear.confidence_interval(CONFIDENCE)
    ranks = bootstrap(
        (x_N, y_N), lambda x, y, axis: _spearman(x, y), paired=True, vectorized=True, n_resamples=RANK_RESAMPLES,
        batch=max(1, BATCH_VALUES // len(x_N)), confidence_level=CONFIDENCE, method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return Agreement(
        Estimate(float(linear.statistic), float(inside.low), float(inside.high)),
        Estimate(float(_spearman(x_N, y_N)), float(ranks.low), float(ranks.high)),
        len(x_N),
    )


def mean_agreement(x_QN: np.ndarray, y_QN: np.ndarray) -> Agreement:
    """The mean of several queries' correlations. Of one query, its `agreement`. Raises ValueError as that does."""
    each = [agreement(x_N, y_N) for x_N, y_N in zip(x_QN, y_QN, strict=True)]
    if len(each) == 1:
        return each[0]
    pearson, spearman = (np.array([getattr(one, name).value for one in each]) for name in ("pearson", "spearman"))
    return Agreement(mean_over(pearson), mean_over(spearman), x_QN.size)


@dataclass(frozen=True)
class Contrast:
    """What a query's strongest proponents do, against random examples.

    Args:
        top: Mean change over queries, nats.
        random: The same for random examples, over queries and draws.
        difference: Top minus random, mean over queries with its bootstrap interval; above 0 the ranking is worth something.
        wins: Share of queries for which top moved the loss further than random did on average.
    """

    top: float
    random: float
    difference: Estimate
    wins: Estimate


def contrast(change_top_Q: np.ndarray, change_random_QM: np.ndarray) -> Contrast:
    """The strongest proponents against a control, where it is changes of the query's loss that tell.

    Leave-top-k-out is the brittleness measure of datamodels (Ilyas et al. 2022, 2202.00622); tail patch is that of TrackStar
    (Chang et al. 2024, 2410.17413).

    Args:
        change_top_Q: Change of each query's loss by its own top k, nats, positive in the direction that proponents promise:
            its rise when they are left out, its fall after a step on them.
        change_random_QM: The same by random examples, per draw.

    Raises:
        ValueError: A change is not finite, or the shapes disagree.
    """
    must_be_finite(change_top_Q=change_top_Q, change_random_QM=change_random_QM)
    if change_random_QM.ndim != 2 or change_top_Q.shape != change_random_QM.shape[:1]:
        raise ValueError(
            f"shapes disagree: change_top_Q {change_top_Q.shape}, change_random_QM {change_random_QM.shape}"
        )
    random_Q = change_random_QM.mean(axis=1)
    return Contrast(
        top=float(change_top_Q.mean()),
        random=float(random_Q.mean()),
        difference=mean_over(change_top_Q - random_Q),
        wins=proportion(change_top_Q > random_Q),
    )
