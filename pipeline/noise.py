"""A run's own noise floor: how far rounding moves its scores, and how many of those that are listed stand above it.

A few examples are scored once more with the same weights in a finer precision; the root mean square of what scores differ by is
their noise. Another batch layout would show less: most roundings fall alike in any, see tests/bench/README.md.

Shapes: Q queries, N examples, M of them that are measured, S items (see batches.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .batches import Batch, Inputs
from .works import Noise, Receipt

if TYPE_CHECKING:
    from .artifacts import Run

CHANCE = 0.05
"""That of scores which are noise alone even one stands above what is called above the noise."""
LARGEST_SHARE, LEAST = 0.125, 8
"""Of a shard, that is measured; and how many examples are, whatever its size."""
MOST_QUERIES = 8
"""That are measured in a shard: the finer copy holds their counterparts."""
WARNINGS = 3
"""Queries named with their figures, before the rest are counted."""
HALF = ("bfloat16", "float16")
FINER = {**dict.fromkeys(HALF, "float32"), "float32": "float64"}


def is_measured(shard_id: int) -> bool:
    """Shards 0, 1, 4, 16, ...: few of many, and the same ones whoever asks."""
    return shard_id == 0 or (shard_id.bit_count() == 1 and shard_id.bit_length() % 2 == 1)


def measured_examples(examples: int, at_most: int) -> np.ndarray:
    """Positions [M] of those that are measured, ascending."""
    return spread(examples, min(at_most, max(LEAST, math.ceil(LARGEST_SHARE * examples))))


def limit(examples: int) -> float:
    """How many times its root mean square noise reaches among so many examples: 3.1 of 24, 5.5 of a million."""
    return -NormalDist().inv_cdf(CHANCE / (2 * max(1, examples)))


def spread(number: int, chosen: int) -> np.ndarray:
    """So many of 0, 1, ..., the first and the last included if they are more than one; all, if they are no more."""
    return np.unique(np.linspace(0, number - 1, min(chosen, number)).round().astype(np.int64))


def batches_of(inputs: Inputs, batches: Iterable[Batch], item_M: np.ndarray) -> Iterator[Batch]:
    """Some items in batches no larger than those they are scored in."""
    for batch in batches:
        items = batch.item_B[np.isin(batch.item_B, item_M)]
        if len(items):
            yield Batch(items, inputs.rows(items))


def noise_of(query_ids: Sequence[str], error_QM: np.ndarray) -> dict[str, Noise]:
    """What a receipt keeps of errors; those that are not finite are none of examples that are scored."""
    found: dict[str, Noise] = {}
    for query_id, error_M in zip(query_ids, error_QM, strict=True):
        finite = error_M[np.isfinite(error_M)]
        if len(finite):
            found[query_id] = {"examples": len(finite), "squares": float(np.square(finite).sum())}
    return found


def mean_of(noises: Sequence[Mapping[str, Noise]], share_M: Mapping[str, np.ndarray]) -> dict[str, Noise]:
    """Of the mean of members' scores, by the members' shares: their roundings are independent. Only where all were measured."""
    found: dict[str, Noise] = {}
    for query_id, shares in share_M.items():
        each = [noise[query_id] for noise in noises if query_id in noise]
        if len(each) == len(shares):
            examples = min(noise["examples"] for noise in each)
            means = [noise["squares"] / noise["examples"] for noise in each]
            found[query_id] = {"examples": examples, "squares": examples * float(np.square(shares) @ means)}
    return found


class Floor:
    """The noise of a run's scores, from its receipts in any order: sums are exact until they are rounded once."""

    def __init__(self) -> None:
        self._examples: dict[str, int] = {}
        self._squares: dict[str, list[float]] = {}

    def add(self, receipts: Iterable[Receipt]) -> None:
        """Take in some receipts."""
        for receipt in receipts:
            for query_id, noise in receipt.noise.items():
                self._examples[query_id] = self._examples.get(query_id, 0) + noise["examples"]
                self._squares.setdefault(query_id, []).append(noise["squares"])

    def of(self, query_id: str) -> float | None:
        """Of one query's scores, in nats; where it was not measured itself, of all queries that were; null if none was."""
        asked = [query_id] if query_id in self._examples else sorted(self._examples)
        examples = sum(self._examples[each] for each in asked)
        return math.sqrt(math.fsum(s for each in asked for s in self._squares[each]) / examples) if examples else None

    def judged(self, ranked: pa.Table, examples: int) -> dict[str, Any] | None:
        """What topk/meta.json says of a ranked table, the strongest of so many examples; null if nothing was measured.

        Per query its `noise` in nats, and per side how many of those listed have scores of more than `times` that.
        """
        if not self._examples:
            return None
        times = round(limit(examples), 1)
        queries: dict[str, Any] = {}
        for query_id in pc.unique(ranked["query_id"]).to_pylist():
            rows = ranked.filter(pc.equal(ranked["query_id"], query_id))
            score_N, side_N = np.abs(rows["score"].to_numpy()), np.array(rows["side"].to_pylist())
            noise = self.of(query_id)
            assert noise is not None
            queries[query_id] = {"noise": noise} | {
                side: {
                    "listed": int((side_N == side).sum()),
                    "above": int((score_N[side_N == side] > times * noise).sum()),
                }
                for side in ("proponent", "opponent")
                if side in side_N
            }
        return {"times": times, "measured": sum(self._examples.values()), "queries": queries}


def lines(run: Run, ranking: Mapping[str, Any], only: str | None = None) -> list[str]:
    """For people: the noise and how many of those listed stand above it; which queries' do not, the worst first, and what helps.

    Args:
        run: A ranked run.
        ranking: Its topk/meta.json; of a run in which nothing was measured there is nothing to say.
        only: A query; null for all.
    """
    found = ranking.get("noise")
    queries = {q: each for q, each in found["queries"].items() if only in (None, q)} if found else {}
    if not found or not queries:
        return []
    unit, dtype, times = "nats per token" if run.per_token else "nats", run.spec.model.dtype, found["times"]
    noise_Q = sorted(query["noise"] for query in queries.values())
    size = f"{noise_Q[0]:.2g}" + (f" to {noise_Q[-1]:.2g}" if noise_Q[0] < noise_Q[-1] else "")
    counts = " and ".join(_counted(queries.values(), side, "above") for side in _sides(queries.values()))
    said = [f"rounding in {dtype} moves scores by {size} {unit}: {counts} are above {times:g} times that"]
    within = {
        q: sum(each[side]["listed"] - each[side]["above"] for side in _sides([each])) for q, each in queries.items()
    }
    worst = sorted((q for q in queries if within[q]), key=lambda q: -within[q])
    for q in worst[:WARNINGS]:
        counts = " and ".join(_counted([queries[q]], side, "within") for side in _sides([queries[q]]))
        limit = f"{times:g} x {queries[q]['noise']:.2g} {unit}"
        said.append(f"warning: {counts} of query {q} are within the noise of {dtype} ({limit})")
    if len(worst) > WARNINGS:
        said.append(f"warning: so are some of {len(worst) - WARNINGS:,} more of {len(queries):,} queries")
    return [*said, f"what helps: {_remedies(run)}"] if worst else said


def _sides(queries: Iterable[Mapping[str, Any]]) -> list[str]:
    queries = list(queries)
    return [side for side in ("proponent", "opponent") if any(side in query for query in queries)]


def _counted(queries: Iterable[Mapping[str, Any]], side: str, what: str) -> str:
    there = [query[side] for query in queries if side in query]
    listed, above = (sum(each[name] for each in there) for name in ("listed", "above"))
    return f"{above if what == 'above' else listed - above:,} of {listed:,} {side}s"


def _remedies(run: Run) -> str:
    """What raises scores above their noise, what does most first (tests/bench/README.md).

    Whole weights in half precision hold no short step, so that its derivative is that of another: adapters do.
    """
    dtype = run.spec.model.dtype
    parts = [f"model.dtype: {FINER[dtype]}"] if dtype in FINER else []
    if run.way == "difference":
        holds = dtype not in HALF or getattr(run.spec.producer, "lora_rank", 0) > 0
        parts.append("score.way: gradient" if holds else "adapters (producer.lora_rank) with score.way: gradient")
    return ", or ".join([*parts, "a longer step of the producer"])
