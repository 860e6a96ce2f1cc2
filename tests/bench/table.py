"""How every benchmark reports: one table for people, one JSON file for machines; a bar that does not hold is shown.

`python -m tests.bench.table TARGET` prints all that was measured of a target.
"""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

FOLDER = Path("build/bench")


@dataclass(frozen=True)
class Row:
    """One measured figure.

    Args:
        measure: What was measured, with its unit.
        value: The figure.
        bar: What it should reach, as `>= 0.8`; null where there is none.
        holds: Whether it does; null without a bar.
        conditions: Under what conditions it was measured.
    """

    measure: str
    value: float
    bar: str | None
    holds: bool | None
    conditions: str


def at_least(measure: str, value: float, bar: float, conditions: str) -> Row:
    """A figure that should not be under its bar."""
    return Row(measure, round(value, 4), f">= {bar:g}", value >= bar, conditions)


def at_most(measure: str, value: float, bar: float, conditions: str) -> Row:
    """A figure that should not be over its bar."""
    return Row(measure, round(value, 4), f"<= {bar:g}", value <= bar, conditions)


def figure(measure: str, value: float, conditions: str) -> Row:
    """A figure without a bar."""
    return Row(measure, round(value, 4), None, None, conditions)


def machine() -> str:
    """The hardware, for `conditions`."""
    cores = torch.get_num_threads()
    return f"{cores} cores, {platform.machine()}, torch {torch.__version__.split('+')[0]}, no GPU"


def publish(target: str, rows: list[Row]) -> None:
    """Print the table and write build/bench/<target>.json, in which figures of other parts of the target stay."""
    show(target, rows)
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{target}.json"
    kept = [row for row in published(target) if row.measure not in {one.measure for one in rows}]
    path.write_text(json.dumps([asdict(row) for row in kept + rows], indent=1) + "\n")


def published(target: str) -> list[Row]:
    """All figures of a target so far."""
    path = FOLDER / f"{target}.json"
    return [Row(**row) for row in json.loads(path.read_text())] if path.exists() else []


def show(target: str, rows: list[Row]) -> None:
    """Print the table."""
    table = Table(title=f"bench: {target}", title_justify="left", show_lines=True)
    for name in ("measure", "value", "bar", "holds", "conditions"):
        table.add_column(name)
    for row in rows:
        holds = "" if row.holds is None else ("yes" if row.holds else "NO")
        table.add_row(row.measure, f"{row.value:,.4g}", row.bar or "", holds, row.conditions)
    Console(width=150).print(table)


if __name__ == "__main__":
    show(sys.argv[1], published(sys.argv[1]))
