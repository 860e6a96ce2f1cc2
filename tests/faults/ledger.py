"""What became of every fault: rows of the run against those of the undisturbed one, and one table of it all."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from pipeline import storage
from pipeline.artifacts import Run

JSON_PATH = Path("build/faults/faults.json")
PROPERTY = "fault"
"""Of a test's report: an entry."""
_VALUES = ["example_id", "source", "base_loss", "counterpart_loss", "score"]
_Key = tuple[str, str, int]


@dataclass(frozen=True)
class Entry:
    """One fault and what became of it.

    Args:
        fault: In a few words.
        attempts: How often that was tried which the fault struck: the command, the shard, the query, or one request.
        rows: Score rows of the undisturbed run.
        rows_lost: Of these, in neither scores/ nor rejects/.
        rows_twice: Rows that are there more often than once, in scores/ and rejects/ together.
        rows_other: Rows with another value than in the undisturbed run.
        rows_rejected: Rows that are in rejects/ instead, once per query.
        recovered_after_s: From the fault until that was done which it had struck; null where nothing had to be done again.
    """

    fault: str
    attempts: int
    rows: int
    rows_lost: int
    rows_twice: int
    rows_other: int
    rows_rejected: int
    recovered_after_s: float | None


@dataclass
class Ledger:
    """Faults of a test, or of all."""

    entries: list[Entry] = field(default_factory=list)

    def enter(
        self,
        fault: str,
        attempts: int,
        recovered_after_s: float | None,
        run: Run,
        undisturbed: Run,
        rejected: int = 0,
    ) -> None:
        """Write down a fault, then require of the run: no row lost, twice or other, and so many rows of the corpus rejected."""
        expected, found, rejects = score_rows(undisturbed), score_rows(run), rejected_rows(run)
        there = Counter({key: len(values) for key, values in found.items()}) + rejects
        entry = Entry(
            fault=fault,
            attempts=attempts,
            rows=len(expected),
            rows_lost=sum(not there[key] for key in expected),
            rows_twice=sum(times - 1 for times in there.values() if times > 1),
            rows_other=sum(values[0] != expected.get(key, [None])[0] for key, values in found.items()),
            rows_rejected=sum(rejects.values()),
            recovered_after_s=None if recovered_after_s is None else round(recovered_after_s, 1),
        )
        self.entries.append(entry)
        assert len(expected) == sum(len(values) for values in expected.values())
        assert (0, 0, 0) == (entry.rows_lost, entry.rows_twice, entry.rows_other), entry
        assert rejected * len(run.query_ids) == entry.rows_rejected, entry
        assert storage.exists(run.uri("_SUCCESS")), "not sealed"

    def write(self, path: Path) -> None:
        """As JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([asdict(entry) for entry in self.entries], indent=1) + "\n")

    def show(self, console: Console) -> None:
        """As a table."""
        table = Table(title="What was done to it, and what became of it", title_justify="left")
        table.add_column("fault")
        for name in ("attempts", "rows lost", "rows twice", "rows in rejects", "seconds to recover"):
            table.add_column(name, justify="right")
        for entry in self.entries:
            seconds = "-" if entry.recovered_after_s is None else f"{entry.recovered_after_s:.1f}"
            counts = (entry.attempts, entry.rows_lost, entry.rows_twice, entry.rows_rejected)
            table.add_row(entry.fault, *map(str, counts), seconds)
        console.print(table)


def score_rows(run: Run) -> dict[_Key, list[tuple[Any, ...]]]:
    """(query, corpus file, row) -> what scores/ says of it, as often as it is there; committed or not, as a lake would see it."""
    filesystem, path = storage.data_filesystem(run.uri("scores"))
    table = pq.read_table(path, filesystem=filesystem, partitioning=None)
    found: dict[_Key, list[tuple[Any, ...]]] = {}
    for row in table.to_pylist():
        key = (row["query_id"], Path(run.shards[row["shard_id"]].path).name, row["row"])
        found.setdefault(key, []).append(tuple(row[name] for name in _VALUES))
    return found


def rejected_rows(run: Run) -> Counter[_Key]:
    """(query, corpus file, row) -> how often it is in the rejects of a commit, for every query."""
    found: Counter[_Key] = Counter()
    for receipt in run.receipts():
        if receipt.rejects:
            rows = run.read_shard(receipt, receipt.rejects_path).to_pylist()
            found.update((query_id, Path(row["path"]).name, row["row"]) for row in rows for query_id in run.query_ids)
    return found
