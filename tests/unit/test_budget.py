"""How many rows a budget of seconds allows, by given costs: no clock has a part in it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.curvatures.cost import Cost
from pipeline.producers.budget import LEAST_ROWS, MOST_ROWS, choose_rows

COST = Cost(once_s=2, row_s=0.01, square_s=1e-5, cube_s=1e-9, query_s=0.1, query_row_s=1e-4)
SECONDS = st.floats(0, 1e3)


def chosen(cost, budget_s, most=MOST_ROWS, fields=()):
    return choose_rows("ekfac", cost, budget_s, 5, most, dict(fields))


@given(
    st.builds(Cost, SECONDS, SECONDS, SECONDS, SECONDS, SECONDS, SECONDS), st.floats(0, 1e6), st.integers(1, MOST_ROWS)
)
def test_one_row_more_would_take_longer(cost, budget_s, most):
    """The rows that are found are done in time, and are the most that are."""
    rows = cost.most_rows(budget_s, 3, most)
    assert rows == 0 or cost.of(rows, 3) <= budget_s
    assert rows == most or budget_s < cost.of(rows + 1, 3)


def test_more_budget_comes_to_all_rows():
    """With time enough there is nothing to say, and the fields are those of a spec without a budget."""
    rows = [chosen(COST, budget_s).fields["sample_rows"] for budget_s in (5, 10, 20, 40, 80, 1e4)]
    assert rows == sorted(rows)
    assert (MOST_ROWS, "") == (rows[-1], chosen(COST, 1e4).line)
    assert rows[0] < rows[1]


def test_a_person_is_told_what_more_time_would_change():
    """One line: rows, what they take, and what all would."""
    line = chosen(COST, 20.0).line
    assert "of 4,096 rows" in line
    assert "producer.budget_s: 20" in line
    assert "4,096 rows would take about 4 min" in line


def test_some_rows_are_used_whatever_they_take():
    """And what would be quicker is said."""
    found = chosen(COST, 1e-9)
    assert LEAST_ROWS == found.fields["sample_rows"]
    assert "producer.last_blocks: 1 is quicker" in found.line


@pytest.mark.parametrize(("most", "expected"), [(3, MOST_ROWS), (LEAST_ROWS + 1, LEAST_ROWS)])
def test_a_small_corpus_is_used_whole_if_there_is_no_choice(most, expected):
    """A corpus of a few rows leaves nothing to choose when there is time."""
    assert expected == chosen(COST, 1e4 if most == 3 else 1e-9, most).fields["sample_rows"]


def test_what_there_is_room_for_is_all():
    """Rows that cannot be inverted are not waited for."""
    assert MOST_ROWS == chosen(Cost(room=700), 1.0).fields["sample_rows"]


def test_other_fields_stay():
    """What was chosen before the rows is part of the choice."""
    assert {"sample_rows": MOST_ROWS, "curvature": "ekfac"} == chosen(COST, 1e4, fields={"curvature": "ekfac"}).fields
