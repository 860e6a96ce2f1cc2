"""What the judge trains anew: parts of the corpus, the corpus without some examples, the corpus and a query, one step more.

A lesson is named by what is in it: whoever asks for the same training again, for another method or judgement, finds it done.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def seed_of(seed: int, *parts: int | str) -> int:
    """Seed of one thing, from the spec's seed and its name alone."""
    text = "/".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Subset:
    """A random share of the corpus, drawn from the spec's seed and the part's number alone; `again`: which of its trainings."""

    share: float
    part: int
    again: int

    @property
    def name(self) -> str:
        """See Lesson."""
        return f"subset-{self.share:g}-{self.part:05d}-{self.again:02d}"

    def inside_N(self, seed: int, examples: int) -> np.ndarray:
        """See Lesson."""
        chance = np.random.default_rng(seed_of(seed, "subset", self.part))
        inside_N = np.zeros(examples, bool)
        inside_N[chance.permutation(examples)[: max(1, round(self.share * examples))]] = True
        return inside_N

    def seed(self, seed: int) -> int:
        """See Lesson: subsets are compared by their ranks, and each has chances of its own."""
        return seed_of(seed, "retraining", self.part, self.again)


@dataclass(frozen=True)
class Without:
    """The corpus without some rows."""

    rows: tuple[int, ...]
    again: int

    @property
    def name(self) -> str:
        """See Lesson."""
        return f"without-{_digest(','.join(map(str, self.rows)))}-{self.again:02d}"

    def inside_N(self, seed: int, examples: int) -> np.ndarray:
        """See Lesson."""
        inside_N = np.ones(examples, bool)
        inside_N[list(self.rows)] = False
        return inside_N

    def seed(self, seed: int) -> int:
        """See Lesson: differences to the whole are taken, so both have the same first weights."""
        return seed_of(seed, "retraining", self.again)


@dataclass(frozen=True)
class Whole:
    """The whole corpus, and a query's rows with it if one is named. Losses of the examples are taken, too."""

    query_id: str | None
    again: int

    @property
    def name(self) -> str:
        """See Lesson."""
        return f"whole{'' if self.query_id is None else '-' + _digest(self.query_id)}-{self.again:02d}"

    def inside_N(self, seed: int, examples: int) -> np.ndarray:
        """See Lesson."""
        return np.ones(examples, bool)

    def seed(self, seed: int) -> int:
        """See Without."""
        return seed_of(seed, "retraining", self.again)


@dataclass(frozen=True)
class Step:
    """The run's own model after one plain gradient step on a single row; `model` is a digest of that model."""

    row: int
    lr: float
    model: str

    @property
    def name(self) -> str:
        """See Lesson."""
        return f"step-{self.model}-{self.lr:g}-{self.row:09d}"


Lesson = Subset | Without | Whole | Step
"""One model to be trained: `name` is that of its object, the same for the same training. Of all but `Step`, `inside_N` says which
of N examples are trained on, and `seed` draws first weights and the order of examples."""


def without(rows: Sequence[int] | np.ndarray, again: int) -> Without:
    """The corpus without some rows, in whatever order they are named."""
    return Without(tuple(sorted(int(row) for row in rows)), again)
