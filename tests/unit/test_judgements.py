"""What retraining says of scores, on truths that are known because they were made."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import spearmanr

from pipeline.judgements import agreement, contrast, linear_datamodelling

pytestmark = pytest.mark.slow

QUERIES, EXAMPLES, SUBSETS = 3, 8, 6
SCORES = arrays(np.int8, (QUERIES, EXAMPLES)).map(lambda score: score.astype(np.float64))
LOSSES = arrays(np.int8, (SUBSETS, 2, QUERIES)).map(lambda loss: loss.astype(np.float64))
HALVES = st.integers(0, 1000).map(
    lambda seed: np.random.default_rng(seed).permuted(np.tile(np.arange(EXAMPLES) < 4, (SUBSETS, 1)), axis=1)
)


def additive(score_QN, inside_SN, retrainings=1):
    """Losses that fall by the score of every example inside."""
    return np.repeat(-(score_QN @ inside_SN.T.astype(float)).T[:, None], retrainings, axis=1)


def noisy(queries=40, examples=60, subsets=80, retrainings=4, noise=3.0):
    """An additive truth under the noise of retraining."""
    chance = np.random.default_rng(0)
    score_QN = chance.normal(size=(queries, examples))
    inside_SN = chance.random((subsets, examples)) < 0.5
    loss_SRQ = additive(score_QN, inside_SN, retrainings)
    return score_QN, inside_SN, loss_SRQ + noise * chance.normal(size=loss_SRQ.shape)


@given(SCORES, HALVES)
def test_the_scores_of_an_additive_truth_foretell_it(score, inside):
    """Every query correlates fully, except one for which all subsets are the same."""
    truth = additive(score, inside, retrainings=2)
    same = np.ptp(truth, axis=(0, 1)) == 0
    judged = linear_datamodelling(score, inside, truth)
    assert np.where(same, 0.0, 1.0).tolist() == pytest.approx(judged.correlation_Q.tolist())
    assert np.where(same, 0.0, 1.0).mean() == pytest.approx(judged.reliability)


@given(SCORES, HALVES, LOSSES)
def test_negated_scores_foretell_the_opposite(score, inside, loss):
    """The correlation of every query changes its sign."""
    judged = linear_datamodelling(score, inside, loss)
    assert (-judged.correlation_Q).tolist() == pytest.approx(
        linear_datamodelling(-score, inside, loss).correlation_Q.tolist()
    )


@given(SCORES, HALVES, LOSSES, st.integers(-1000, 1000))
def test_a_constant_on_all_scores_changes_nothing_between_subsets_of_a_size(score, inside, loss, constant):
    """Each prediction moves by the same amount."""
    judged = linear_datamodelling(score + constant, inside, loss)
    assert linear_datamodelling(score, inside, loss).correlation_Q.tolist() == judged.correlation_Q.tolist()


@given(SCORES, HALVES, LOSSES, st.permutations(range(QUERIES)))
def test_queries_are_judged_one_by_one(score, inside, loss, order):
    """In another order they get the same correlations in that order."""
    judged = linear_datamodelling(score[order], inside, loss[:, :, order])
    assert linear_datamodelling(score, inside, loss).correlation_Q[order].tolist() == judged.correlation_Q.tolist()


@given(SCORES, HALVES, LOSSES)
def test_the_correlation_is_that_of_scipy(score, inside, loss):
    """Spearman with ties at their mean rank, wherever scipy can tell."""
    judged = linear_datamodelling(score, inside, loss)
    for correlation, told_S, gain_S in zip(
        judged.correlation_Q, score @ inside.T.astype(float), -loss.mean(axis=1).T, strict=True
    ):
        if np.ptp(told_S) and np.ptp(gain_S):
            assert spearmanr(told_S, gain_S).statistic == pytest.approx(correlation)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e9 + 0.1])
def test_scores_that_are_all_the_same_foretell_nothing(value):
    """0, not NaN, and no correlation of rounding errors either, whatever the value."""
    _, _, loss = noisy(examples=61)
    inside = np.random.default_rng(1).permuted(np.tile(np.arange(61) < 30, (80, 1)), axis=1)
    judged = linear_datamodelling(np.full((40, 61), value), inside, loss)
    assert [0.0] * 40 == judged.correlation_Q.tolist()
    assert (0.0, 0.0, 0.0) == (judged.mean.value, judged.mean.low, judged.mean.high)


def test_a_score_of_all_counts_the_size_of_a_subset():
    """Where subsets differ in size, scores that are all 1 foretell a loss that falls with the size."""
    inside = np.tril(np.ones((5, 5), bool))
    assert [1.0] == linear_datamodelling(np.ones((1, 5)), inside, -np.arange(5.0)[:, None, None]).correlation_Q.tolist()


def test_perfect_foresight_reaches_the_ceiling_that_the_noise_of_the_truth_leaves():
    """The scores a noisy truth was made from get sqrt(reliability), not more; the error bars hold it."""
    judged = linear_datamodelling(*noisy())
    assert judged.ceiling == pytest.approx(judged.mean.value, abs=0.02)
    assert judged.ceiling < 0.98
    assert judged.mean.low < judged.mean.value < judged.mean.high
    assert 2 * 1.96 * judged.standard_error == pytest.approx(judged.mean.high - judged.mean.low, rel=0.1)


@pytest.mark.parametrize("retrainings", [2, 3, 4, 5, 12])
def test_reliability_is_that_of_all_retrainings_together(retrainings):
    """Signal variance 15, noise 9 per retraining: by Spearman and Brown 15 / (15 + 9 / R), a little less in ranks."""
    judged = linear_datamodelling(*noisy(queries=150, retrainings=retrainings))
    assert 15 / (15 + 9 / retrainings) == pytest.approx(judged.reliability, abs=0.04)


def test_a_truth_of_mere_noise_has_no_reliability():
    """Halves that agree by chance only average to nothing, and leave nothing to foretell."""
    judged = linear_datamodelling(*noisy(queries=300, noise=1e6))
    assert 0.0 == pytest.approx(judged.reliability, abs=0.04)


def test_one_retraining_or_one_query_leaves_a_spread_unknown():
    """No reliability without a second retraining, no standard error without a second query."""
    score, inside, loss = noisy()
    judged = linear_datamodelling(score[:1], inside, loss[:, :1, :1])
    assert (None, None, None) == (judged.reliability, judged.ceiling, judged.standard_error)


def test_agreement_is_counted_with_its_intervals():
    """Of 2,000 pairs with correlation .6: both are near, inside of intervals of the width theory gives."""
    chance = np.random.default_rng(0)
    x = chance.normal(size=2000)
    found = agreement(x, 0.6 * x + 0.8 * chance.normal(size=2000))
    assert 0.6 == pytest.approx(found.pearson.value, abs=0.03)
    assert found.pearson.low < 0.6 < found.pearson.high
    assert 2 * 1.96 * (1 - 0.6**2) / np.sqrt(2000) == pytest.approx(found.pearson.high - found.pearson.low, rel=0.1)
    assert found.spearman.low < 6 / np.pi * np.arcsin(0.3) < found.spearman.high
    assert found.pearson.high - found.pearson.low == pytest.approx(found.spearman.high - found.spearman.low, rel=0.3)
    assert 2000 == found.count


@settings(max_examples=20)
@given(arrays(np.int16, 12).map(lambda x: x.astype(float)))
def test_ranks_do_not_see_a_curve(x):
    """A strictly rising function keeps Spearman at 1, a falling one at -1; a constant agrees with nothing."""
    sign = float(np.ptp(x) > 0)
    assert sign == pytest.approx(agreement(x, np.cbrt(x)).spearman.value)
    assert -sign == pytest.approx(agreement(x, -np.cbrt(x)).spearman.value)


def test_agreement_of_a_tiny_effect_on_a_large_number_is_seen():
    """An offset of a billion times the spread takes no digits, and raises no warning."""
    x = np.arange(50.0)
    assert 1.0 == pytest.approx(agreement(1e15 + x, x).pearson.value)


def test_removal_is_compared_with_removing_at_random():
    """Means 3 and 1, of which 2 remain; three queries of four win, the one that is level does not."""
    found = contrast(np.array([5.0, 4.0, 2.0, 1.0]), np.array([[0.0, 2.0], [2.0, 0.0], [1.0, 1.0], [1.0, 1.0]]))
    assert (3.0, 1.0, 2.0, 0.75) == (found.top, found.random, found.difference.value, found.wins.value)
    assert (0.5, 3.5) == (found.difference.low, found.difference.high)
    assert (0.3006, 0.9544) == pytest.approx((found.wins.low, found.wins.high), abs=1e-3)


@pytest.mark.parametrize(
    ("measure", "says"),
    [
        (lambda s, i, loss: linear_datamodelling(np.where(s > 2, np.nan, s), i, loss), "score_QN: .* not finite"),
        (lambda s, i, loss: linear_datamodelling(s, i, loss / 0.0), "loss_SRQ: .* not finite"),
        (lambda s, i, loss: linear_datamodelling(s, i.T, loss), "shapes disagree"),
        (lambda s, i, loss: linear_datamodelling(s[1:], i, loss), "shapes disagree"),
        (lambda s, i, loss: linear_datamodelling(s, i[:1], loss[:1]), "at least two"),
        (lambda s, i, loss: agreement(s[0], s[0, 1:]), "got shapes"),
        (lambda s, i, loss: agreement(s[0, :2], s[0, :2]), "at least 3"),
        (lambda s, i, loss: agreement(s[0], s[0] * np.nan), "y_N: .* not finite"),
        (lambda s, i, loss: contrast(s[:, 0], s.T), "shapes disagree"),
        (lambda s, i, loss: contrast(s[:, 0] * np.inf, s), "change_top_Q"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_cannot_be_judged_is_said(measure, says):
    """What is no number, shapes that disagree, too little to correlate."""
    with pytest.raises(ValueError, match=says):
        measure(*noisy())
