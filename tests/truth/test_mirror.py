"""The mirrored influence hypothesis itself, by the judge: what leaving examples out does, training with the query tells."""

import pytest

from tests.small import learn_here
from tests.truth.mirror import by_wrong_labels, convex

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """Models are trained in this process."""
    monkeypatch.setattr("pipeline.verdict.retrain", learn_here)


def mirrored(judgement):
    return next(row for row in judgement.rows if row["method"] == "trained with the query (P2)")


def test_of_a_convex_loss_training_with_a_query_tells_what_leaving_an_example_out_does(tmp_path):
    """Truth 4: 60 of 400 examples left out one by one; of all 400 Pearson is .996 and Spearman .988."""
    found = mirrored(convex(tmp_path, groups=60))
    assert found["pearson"] >= 0.99
    assert found["spearman"] >= 0.98


def test_of_a_cnn_groups_of_wrong_labels_mirror_the_clean_digits(tmp_path):
    """12 groups of 315, two models each; of 30 and five models Pearson and Spearman are .99."""
    found = mirrored(by_wrong_labels(tmp_path, groups=12, retrainings=2))
    assert found["pearson"] >= 0.95
    assert found["spearman"] >= 0.95
