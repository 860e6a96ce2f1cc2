"""What a plan says that tuning costs, against the rows that go through the model."""

import pytest

from pipeline.freeze import freeze, survey
from pipeline.tuner import Tuner
from pipeline.tuning_cost import BOTH_WAYS, tuning_passes

pytestmark = pytest.mark.slow  # every one tunes
EKFAC = "producer={name: natural, curvature: ekfac, sample_rows: 128}"


@pytest.fixture
def counted(make_spec):
    """`counted(override, ...)`: what is planned, and the rows that go forwards through the model while it is tuned."""

    def count(*overrides):
        run, plan = survey(make_spec(*overrides))
        planned = tuning_passes(run.spec, plan.rows, plan.queries, plan.query_rows)
        rows, tuner = [], Tuner(freeze(run.spec.model_copy(update={"resolved": None})), "cpu")
        tuner._base.register_forward_pre_hook(lambda module, given: rows.append(len(given[0])))  # copies keep it
        assert [] == tuner.tune_all(run.query_ids)
        return planned, sum(rows)

    return count


def test_steps_go_through_every_query_row(counted):
    """Exactly, where steps do not end early, but for looks at losses before and after."""
    planned, rows = counted("producer={name: unlearn, steps: 7, max_loss_change: 0}")
    assert 7 * BOTH_WAYS * 2 == planned
    assert 7 * 2 <= rows <= 7 * 2 + 4 * 2


@pytest.mark.parametrize(
    "override", [EKFAC, f"{EKFAC[:-1]}, damping: 0.1, step: 0.1}}", "producer={name: natural, sample_rows: 128}"]
)
def test_a_curvature_costs_about_what_is_planned(counted, override):
    """Passes forwards alone are between a third and all of what is planned with those backwards."""
    planned, rows = counted(override)
    assert planned / BOTH_WAYS <= 1.2 * rows
    assert rows <= planned


def test_a_producer_that_does_not_say_has_no_figure(make_spec):
    """Nor has one that tunes nothing."""
    run, plan = survey(make_spec("producer={name: 'tests.faults.waiting:WaitingProducer', options: {folder: x}}"))
    assert tuning_passes(run.spec, plan.rows, plan.queries, plan.query_rows) is None
