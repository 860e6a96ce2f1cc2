"""Which way scores are made: losses compared, or a backward pass for all queries at once. Measured, not guessed.

Comparing losses takes a pass forwards for every query, a derivative one pass forwards and one backwards for all of them, and so
much more for each query as its step has parameters. Both are timed on a batch of the corpus. A derivative is what a loss changes
by only where the step is short, so it is seen, too, what derivatives are at its other end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .batches import Batch

if TYPE_CHECKING:
    from .engine import LossEngine

Way = Literal["difference", "gradient", "jvp"]
MANY = 16
"""Queries from which on a calibration is worth its start of a worker: a backward pass costs about four passes forwards."""
FASTER, TIMES = 1.5, 3
"""How many times as fast a backward pass must be to be chosen, by the best of so many measurements: equal runs on equal machines
are to be scored in one way, whatever else the machines do."""
LOOKED_AT = 4
"""Counterparts whose steps are looked at."""
STRAIGHT = 0.1
"""Distance of exact loss differences from derivatives, relative to these, up to which a step counts as short."""
SHARE_OF_MEMORY = 0.5
"""Of what is free, that steps may take for the backward pass: they lie there once more, one beside the other."""


@dataclass(frozen=True)
class Calibration:
    """What was measured, and what came of it.

    Args:
        way: How scores are made.
        why: For people.
        queries: Counterparts that were scored together.
        rows: Rows of the batch.
        difference_s: Seconds for the batch, all queries, by comparing losses.
        gradient_s: By one backward pass; null if the model does not bear it, or memory.
        distance: Of exact loss differences from derivatives, relative to these: of the query where it is largest; null likewise.
    """

    way: Way
    why: str
    queries: int
    rows: int
    difference_s: float
    gradient_s: float | None = None
    distance: float | None = None

    def to_json(self) -> dict[str, Any]:
        """As calibration.json holds it."""
        return asdict(self)


def calibrate(engine: LossEngine, batch: Batch, queries: int) -> Calibration:
    """Measure both ways on a batch, and choose.

    Args:
        engine: With all counterparts.
        batch: Rows of the corpus.
        queries: How many there are.
    """
    rows, looked = len(batch.item_B), _spread(queries)
    engine.losses([batch], looked)  # the first time layouts are tried
    base_s = _seconds(lambda: engine.losses([batch], []))
    looked_s = _seconds(lambda: engine.losses([batch], looked))
    difference_s = base_s + max(0.0, looked_s - base_s) * queries / len(looked)

    def compared(why: str, gradient_s: float | None = None, distance: float | None = None) -> Calibration:
        return Calibration("difference", why, queries, rows, difference_s, gradient_s, distance)

    free_bytes = engine.free_bytes
    if engine.steps_bytes > SHARE_OF_MEMORY * free_bytes:
        needed = f"{engine.steps_bytes / 2**30:.1f} GiB for steps of all queries"
        return compared(f"a backward pass needs {needed}, {free_bytes / 2**30:.1f} are free")
    try:
        distance = max(engine.bend(batch, position) for position in looked)
        engine.derivatives([batch], None, "gradient")  # the first time layers are looked at
    except ValueError as error:
        return compared(str(error))
    gradient_s = _seconds(lambda: engine.derivatives([batch], None, "gradient"))
    times = difference_s / gradient_s
    if not distance <= STRAIGHT:
        why = f"steps are too long for derivatives: exact loss differences are {distance:.1%} off (allowed: {STRAIGHT:.0%})"
        return compared(why, gradient_s, distance)
    if times < FASTER:
        why = f"a backward pass for all {queries} queries is {times:.1f} times as fast, less than {FASTER:g}"
        return compared(why, gradient_s, distance)
    why = f"{times:.1f} times as fast as {queries} loss differences, from which it is {distance:.2%} off"
    return Calibration("gradient", why, queries, rows, difference_s, gradient_s, distance)


def _spread(queries: int) -> Sequence[int]:
    """Some of them, the first and the last included."""
    return sorted({round(each) for each in np.linspace(0, queries - 1, min(LOOKED_AT, queries))})


def _seconds(work: Callable[[], object]) -> float:
    """Of the quickest of TIMES times."""
    marks_s = []
    for _ in range(TIMES):
        started_s = time.perf_counter()
        work()
        marks_s.append(time.perf_counter() - started_s)
    return min(marks_s)
