"""How many rows of the corpus a curvature is measured on, so that stage tune ends within a budget of seconds.

What tuning costs is foreseen by what a few rows take (`curvatures/cost.py`). What is chosen is then frozen with the run: only the
first start looks at a clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..curvatures.cost import Cost
from ..observe import spoken
from .base import Chosen

BUDGET_S = 60.0
"""Where the spec gives none, and scoring takes no longer."""
MOST_ROWS, LEAST_ROWS = 4096, 16
"""Of a sample, where the spec does not say."""


def choose_rows(word: str, cost: Cost, budget_s: float, queries: int, most: int, fields: Mapping[str, Any]) -> Chosen:
    """How many rows.

    Args:
        word: The curvature.
        cost: What it costs.
        budget_s: Seconds for everything.
        queries: Counterparts to make.
        most: Rows that there are, and are used if time allows.
        fields: What else was chosen.
    """
    rows, whole = cost.most_rows(budget_s, queries, most), min(most, cost.room)
    if rows >= whole:
        return Chosen({"sample_rows": MOST_ROWS, **fields})
    used = min(max(rows, LEAST_ROWS), whole)
    line = (
        f"sample: {used:,} of {most:,} rows, with {word} about {spoken(cost.of(used, queries))} of tuning "
        f"(producer.budget_s: {budget_s:.0f}); {whole:,} rows would take about {spoken(cost.of(whole, queries))}"
    )
    if rows < LEAST_ROWS:
        line += ". Fewer rows would tell too little; producer.last_blocks: 1 is quicker"
    return Chosen({"sample_rows": used, **fields}, line)
