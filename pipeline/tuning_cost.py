"""What tuning costs, counted without a model: in forward passes of one example. Pure: no I/O, no torch."""

from __future__ import annotations

from .choices import LanguageTask
from .producer_choices import Natural, Retain, Steps
from .spec import Spec

BOTH_WAYS = 3
"""Forward passes that a pass forwards and backwards is worth."""
SAMPLE_ROWS = 4096
"""Where the spec gives none: as many as the budget allows, and no more."""
DRAWS = 8
"""Labels drawn for each row that has one, for a curvature that is fitted; texts have many."""
DIRECT_PASSES = 2 * BOTH_WAYS - 1
"""For each row of a Gauss-Newton matrix that is inverted directly: its outputs twice, and its gradient."""
PROBE_ROWS, STEPS_TRIED = 64, 8
"""Where scores are loss differences, a step is looked for on so many rows, at about so many lengths."""


def tuning_passes(spec: Spec, rows: int, queries: int, query_rows: int) -> int | None:
    """Forward passes of one example that all counterparts of one model cost, about, a backward pass counted as two.

    Args:
        spec: The run's.
        rows: Of the corpus.
        queries: Counterparts to make.
        query_rows: Rows of all queries together.

    Returns:
        At most so many, where steps may end early or a budget may allow fewer rows. Null for producers that do not say.
    """
    producer = spec.producer
    if isinstance(producer, Natural):
        return _natural(producer, spec, min(producer.sample_rows or SAMPLE_ROWS, rows), queries, query_rows)
    if isinstance(producer, Retain):
        return (
            BOTH_WAYS * producer.steps * (query_rows + queries * min(spec.score.batch_rows, producer.sample_rows, rows))
        )
    if isinstance(producer, Steps):
        return BOTH_WAYS * producer.steps * query_rows * getattr(producer, "repeat", 1)
    return None


def _natural(producer: Natural, spec: Spec, sample: int, queries: int, query_rows: int) -> int:
    is_text = isinstance(spec.task, LanguageTask)
    fitted_passes = {"ekfac": 1 + 2 * BOTH_WAYS, "gfim": 1 + BOTH_WAYS, "diagonal": 1 + BOTH_WAYS}
    each = fitted_passes.get(producer.curvature or "", 0) * (1 if is_text else DRAWS) or DIRECT_PASSES
    steps = 0 if spec.score.way in ("gradient", "jvp") else queries * PROBE_ROWS * (BOTH_WAYS + STEPS_TRIED)
    walk = (producer.steps - 1) * BOTH_WAYS * query_rows
    search = 0 if producer.damping or producer.damping_share else BOTH_WAYS * PROBE_ROWS
    return each * sample + search + BOTH_WAYS * query_rows + steps + walk
