"""Measures of rankings against a truth, on rankings that can be counted by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pipeline.evaluate import detection, interval, own_copy, retrieval

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


def test_own_copies_and_the_depth_they_are_within():
    """Ranks 1, 2 and 3 counted by hand; a third is first, all are among three; Wilson's interval of 1 in 3."""
    found = own_copy(np.array([[9.0, 1, 2], [9, 8, 7], [2, 3, 1]]), np.array([0, 1, 2]), k=(1, 3))
    assert [1, 2, 3] == found.rank_Q.tolist()
    assert (pytest.approx(1 / 3), 1.0) == (found.within[1].value, found.within[3].value)
    assert (0.0615, 0.7923) == pytest.approx((found.within[1].low, found.within[1].high), abs=1e-3)


@given(
    arrays(np.int8, st.tuples(st.integers(1, 5), st.integers(1, 6))).map(lambda v: v.astype(float)),
    st.integers(0, 9),
)
def test_an_own_copy_is_found_as_retrieval_finds_it(value, seed):
    """One over the rank is the reciprocal rank of the only true example, but for ties, which stay in their range."""
    own = np.arange(len(value)) % value.shape[1]
    rank = own_copy(value, own, seed=seed).rank_Q
    truth = np.arange(value.shape[1]) == own[:, None]
    distinct = (value == value[truth][:, None]).sum(axis=1) == 1
    assert (1 / rank)[distinct].tolist() == retrieval(value, truth).reciprocal_rank_Q[distinct].tolist()
    above, level = ((compare(value, value[truth][:, None])).sum(axis=1) for compare in (np.greater, np.equal))
    assert ((above < rank) & (rank <= above + level)).all()


def test_an_own_copy_among_equals_gets_what_chance_gets():
    """Of 4 equal values the own copy is first in a quarter of the cases, and the same ones for the same seed."""
    found = own_copy(np.zeros((4000, 4)), np.zeros(4000, int))
    assert 1 / 4 == pytest.approx(found.within[1].value, abs=0.03)
    assert found.rank_Q.tolist() == own_copy(np.zeros((4000, 4)), np.zeros(4000, int)).rank_Q.tolist()


def test_the_bad_ones_are_counted_as_they_are_found():
    """Two bad of ten, ranked 1st and 4th: AUC 14 of 16 pairs; a half found among 20 %, all among 40 %."""
    bad = np.array([1, 0, 0, 1, 0, 0, 0, 0, 0, 0], bool)
    found = detection(np.arange(10.0)[::-1], bad, shares=(0.2, 0.4))
    assert 14 / 16 == found.auc
    assert {0.2: 0.5, 0.4: 1.0} == found.found
    assert [0, 0.5, 0.5, 0.5, 1, 1, 1, 1, 1, 1, 1] == found.found_P.tolist()
    assert (0.0, 1.0, 11, 2) == (found.inspected_P[0], found.inspected_P[-1], len(found.inspected_P), found.count)


@pytest.mark.slow
@given(st.lists(st.tuples(st.integers(-5, 5), st.booleans()), min_size=2).filter(lambda r: len({b for _, b in r}) == 2))
def test_less_suspicious_is_the_mirror_of_more(rows):
    """Negated values give one minus the AUC; every curve climbs from nothing to all."""
    value, bad = np.array([float(v) for v, _ in rows]), np.array([b for _, b in rows])
    found = detection(value, bad)
    assert 1 - found.auc == pytest.approx(detection(-value, bad).auc)
    assert (0.0, 1.0) == (found.found_P[0], found.found_P[-1])
    assert (np.diff(found.found_P) >= 0).all()


def test_values_that_say_nothing_find_what_chance_finds():
    """Equal values: AUC .5, and a tenth of the bad ones in a tenth of the examples."""
    bad = np.arange(20_000) < 4000
    found = detection(np.zeros(20_000), bad, shares=(0.1,))
    assert 0.5 == found.auc
    assert 0.1 == pytest.approx(found.found[0.1], abs=0.02)


@pytest.mark.parametrize(
    ("measure", "says"),
    [
        (lambda: own_copy(np.array([[np.inf, 1.0]]), np.array([0])), "value_QN: 1 of 2 values are not finite"),
        (lambda: own_copy(np.zeros((0, 3)), np.zeros(0, int)), "value_QN is empty"),
        (lambda: own_copy(np.zeros((1, 2)), np.array([2])), "columns from 0 to 1"),
        (lambda: own_copy(np.zeros((2, 2)), np.array([0])), "expected 2 columns"),
        (lambda: detection(np.array([np.nan, 1.0]), np.array([True, False])), "not finite"),
        (lambda: detection(np.zeros(2), np.zeros(3, bool)), r"shape \(3,\)"),
        (lambda: detection(np.zeros(2), np.ones(2, bool)), "2 of 2 examples are bad"),
    ],
)
def test_what_cannot_be_found_is_said(measure, says):
    """A value that is no number, a copy that is nowhere, examples of one kind only."""
    with pytest.raises(ValueError, match=says):
        measure()
