"""What a run was given, and the work that this makes: corpus, queries, and each time that it grew.

Nothing here reads or writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from .folder import Folder
from .records import Column
from .spec import Resolved
from .works import Addition, Manifest, Receipt, Work


@dataclass(frozen=True)
class Given(Folder):
    """A run as it was frozen.

    Args:
        spec: The resolved spec.
        shards: The manifest, shards of all additions one after the other.
        columns: What the task reads.
        queries: Query rows of all additions, `query_id` first.
        additions: What the run was given: at first (number 0), and each time that it grew.
    """

    shards: Manifest
    columns: tuple[Column, ...]
    queries: pa.Table
    additions: tuple[Addition, ...]

    @property
    def resolved(self) -> Resolved:
        """What the run was frozen with."""
        assert self.spec.resolved is not None
        return self.spec.resolved

    @cached_property
    def query_ids(self) -> tuple[str, ...]:
        """All queries, in the order in which the run was given them."""
        return tuple(query_id for addition in self.additions for query_id in addition.query_ids)

    @cached_property
    def rows(self) -> int:
        """Rows of the corpus."""
        return self.shards.rows

    @property
    def per_token(self) -> bool:
        """Whether losses are means over the tokens of a text."""
        return getattr(self.spec.task, "reduction", None) == "mean"

    def works(self) -> Iterator[Work]:
        """All that is to be scored, in order of additions and shards."""
        for addition in self.additions:
            first = 0 if addition.query_ids else addition.first_shard
            for shard in self.shards[first : addition.stop_shard]:
                yield self._work(addition, shard)

    def work(self, addition: int, shard_id: int) -> Work:
        """One of them."""
        return self._work(self.additions[addition], self.shards[shard_id])

    def _work(self, addition: Addition, shard: Any) -> Work:
        new_shard = shard.shard_id >= addition.first_shard
        known = sum((before.query_ids for before in self.additions[: addition.number]), ()) if new_shard else ()
        return Work(addition.number, shard, known + addition.query_ids)

    @cached_property
    def number_of_works(self) -> int:
        """How many `works` gives."""
        return sum(each.stop_shard - (0 if each.query_ids else each.first_shard) for each in self.additions)

    @cached_property
    def rows_to_score(self) -> int:
        """Rows of all works: a grown run goes through its old rows again for new queries."""
        spans = ((0 if each.query_ids else each.first_shard, each.stop_shard) for each in self.additions)
        return sum(self.shards[first:stop].rows for first, stop in spans)

    def is_first(self, receipt: Receipt) -> bool:
        """Whether this commit of its shard is the first: those count every row of the corpus once."""
        return receipt.shard_id >= self.additions[receipt.addition].first_shard
