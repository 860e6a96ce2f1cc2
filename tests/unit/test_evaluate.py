"""Measures of rankings against a truth, on rankings that can be counted by hand."""

import numpy as np
import pytest

from pipeline.evaluate import interval, retrieval

TRUTH = np.array([[True, False, True, False], [False, False, False, True]])


def test_measures_of_two_small_rankings():
    """First true at rank 1 and 3; two and one true, of which k = 2 finds one and none."""
    found = retrieval(np.array([[4.0, 3.0, 1.0, 2.0], [3.0, 4.0, 1.0, 2.0]]), TRUTH, k=2)
    assert [1.0, pytest.approx(1 / 3)] == found.reciprocal_rank_Q.tolist()
    assert [0.5, 0.0] == found.recall_Q.tolist()
    assert [0.5, 0.0] == found.precision_Q.tolist()


def test_only_the_pool_is_ranked():
    """What is outside of a query's pool stands above nothing, and may be anything."""
    pool = np.array([[True, True, True, True], [True, False, False, True]])
    found = retrieval(np.array([[4.0, 3.0, 1.0, 2.0], [1.0, np.nan, 9.0, 2.0]]), TRUTH, k=2, pool_QN=pool)
    assert [1.0, 1.0] == found.reciprocal_rank_Q.tolist()
    assert [0.5, 1.0] == found.recall_Q.tolist()


def test_equal_scores_are_ordered_by_chance():
    """A method that says nothing gets what chance gets: the mean of 1/rank over 4 places, .52."""
    truth = np.zeros((4000, 4), bool)
    truth[:, 0] = True
    found = retrieval(np.zeros((4000, 4)), truth)
    assert (1 + 1 / 2 + 1 / 3 + 1 / 4) / 4 == pytest.approx(found.reciprocal_rank_Q.mean(), abs=0.02)
    assert found.reciprocal_rank_Q.tolist() == retrieval(np.zeros((4000, 4)), truth).reciprocal_rank_Q.tolist()


@pytest.mark.parametrize(
    ("score", "truth", "says"),
    [([[1.0, 2.0]], [[False, False]], "no true example"), ([[np.nan, 2.0]], [[True, False]], "not finite")],
)
def test_what_cannot_be_measured_is_said(score, truth, says):
    """A query without a truth, a score that is no number."""
    with pytest.raises(ValueError, match=says):
        retrieval(np.array(score), np.array(truth))


def test_the_interval_covers_the_mean():
    """Of 200 fair coins: about 1.96 standard errors on either side. Equal values leave nothing open."""
    coins = np.random.default_rng(0).integers(0, 2, 200).astype(float)
    low, high = interval(coins)
    error = 1.96 * coins.std() / np.sqrt(len(coins))
    assert (coins.mean() - error, coins.mean() + error) == pytest.approx((low, high), abs=0.02)
    assert (0.5, 0.5) == interval(np.full(3, 0.5))
